"""An adapter's files, in PEFT's format, so that every tool of the ecosystem reads them.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's; `lorafit.json` beside them holds what PEFT has no place
for: the base's fingerprint, the chat template and stop tokens it was trained with, and the method's settings.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lorafit.adapter import Adapter
from lorafit.errors import AdapterError
from lorafit.files import load_json
from lorafit.methods import Method, find
from lorafit.methods.lora import LoRA
from lorafit.model.sites import Site

PREFIX = "base_model.model."
WEIGHTS, CONFIG, OWN = "adapter_model.safetensors", "adapter_config.json", "lorafit.json"


def save(adapter: Adapter, folder: Path, sites: Mapping[str, Site], base_folder: str, modules: Sequence[str]) -> None:
    """Write the adapter's files into `folder`, which must exist. `modules`: all module paths of the base.

    The folder isn't swapped in whole here; a run does that (see run.py).
    """
    adapter = _felt(adapter)
    tensors, config = {}, _config(adapter, sites, base_folder, modules)
    for path, layer in adapter.items():
        for name, tensor in _to_peft(layer, sites[path]).items():
            tensors[f"{PREFIX}{_peft_path(sites[path], adapter)}.{name}"] = tensor
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    own = {"method": adapter.method, "options": adapter.options, **adapter.notes}
    if adapter.method != "lora" and (plain := _as_lora(adapter)) is not None:
        own |= {"method": "lora", "options": plain}
        own.setdefault("trained_as", {"method": adapter.method, "options": adapter.options})
    (folder / OWN).write_text(json.dumps(own, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load(folder: Path, sites: Mapping[str, Site], fingerprint: str = "") -> Adapter:
    """Read an adapter, strictly: every key must have a place of its shape, and the base must be the one it was made for.

    AdapterError lists all that is wrong. An adapter without `lorafit.json` (made by PEFT) has no fingerprint to check.
    """
    config, own = read_config(folder), read_notes(folder)
    made_for = own.get("fingerprint", "")
    if fingerprint and made_for and fingerprint != made_for:
        raise AdapterError(
            f"{folder} was made for another base ({own.get('base', '?')}, fingerprint {made_for[:8]}, not"
            f" {fingerprint[:8]}); load it on that one"
        )
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder / WEIGHTS} can't be read: {error}") from None
    if config.get("peft_type") == "ADALORA":
        config, tensors = _from_adalora(config, tensors, sites, folder)
    method, options = _method_of(config, own, folder)
    if any(site.tied for site in sites.values()):
        tensors = _untied(config, tensors, sites, folder)
    grouped, bad = _by_site(tensors, sites, config.get("target_parameters") or [])
    layers: dict[str, Method] = {}
    for path, parts in grouped.items():
        site = sites[path]
        made, wrong = _from_peft(parts, site, method, _options_for(path, config, options))
        bad += [f"{path}: {reason}" for reason in wrong]
        if made is not None:
            layers[path] = made
    missing = [path for path in _promised(config, sites) if path not in grouped]
    bad += [f"{path}: named in {CONFIG}, but its tensors are missing" for path in missing]
    if bad or not layers:
        listed = "\n  ".join(bad[:20]) + (f"\n  … and {len(bad) - 20} more" if len(bad) > 20 else "")
        raise AdapterError(f"{folder} doesn't fit this base:\n  {listed or 'it holds no tensors'}")
    adapter = Adapter(method, options, layers)
    adapter.notes = {key: value for key, value in own.items() if key not in ("method", "options")}
    return adapter


def read_config(folder: Path) -> dict[str, Any]:
    """What adapter_config.json holds. AdapterError if it isn't there."""
    values = load_json(folder / CONFIG, AdapterError)
    if values is None:
        raise AdapterError(f"{folder / CONFIG} is missing; {folder} is not an adapter")
    return values


def read_notes(folder: Path) -> dict[str, Any]:
    """What lorafit.json holds; {} for an adapter made elsewhere."""
    return load_json(folder / OWN, AdapterError) or {}


# --- PEFT's names and shapes -------------------------------------------------------------------------------------------


def _peft_path(site: Site, adapter: Adapter) -> str:
    """PEFT wraps a module once for each of its adapted parameters; the last wrapped is the outermost."""
    if site.kind != "experts":
        return site.path
    module = site.path.rsplit(".", 1)[0]
    wrapped = [path for path, _ in adapter.items() if path.rsplit(".", 1)[0] == module]
    return module + ".base_layer" * (len(wrapped) - 1 - sorted(wrapped, key=_wrap_order).index(site.path))


def _wrap_order(path: str) -> int:
    return 1 if path.endswith("down_proj") else 0


def _felt(adapter: Adapter) -> Adapter:
    """Without the layers of rank 0."""
    layers = {p: layer for p, layer in adapter.items() if (f := layer.stored()) is None or f[0].shape[-2]}
    if len(layers) == len(adapter.layers):
        return adapter
    kept = Adapter(adapter.method, adapter.options, layers)
    kept.notes = adapter.notes
    return kept


def _as_lora(adapter: Adapter) -> dict[str, Any] | None:
    """The settings of LoRA under which an adapter is stored, where all its layers add products of low rank: its own, or r and
    alpha as most of its sites have them."""
    found = [layer.stored() for _, layer in adapter.items()]
    if adapter.method == "lora" or not found or None in found:
        return adapter.options if adapter.method == "lora" else None
    pairs = Counter((f[0].shape[-2], round(f[2] * f[0].shape[-2], 9)) for f in found if f is not None)
    r, alpha = pairs.most_common(1)[0][0]
    return {"r": r, "alpha": alpha, "dropout": 0.0, "rslora": False}


def _to_peft(layer: Method, site: Site) -> dict[str, Tensor]:
    factors = layer.stored()
    if factors is None:
        return {f"lorafit_{name}": t.detach().cpu().float().contiguous() for name, t in layer.state_dict().items()}
    a, b = (part.detach().cpu().float() for part in factors[:2])
    if site.kind == "experts":  # A (experts·r, in), expert first; B (out, r·experts), expert last
        a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    if site.lookup:
        return {"lora_embedding_A": a.contiguous(), "lora_embedding_B": b.contiguous()}
    return {"lora_A.weight": a.contiguous(), "lora_B.weight": b.contiguous()}


def _from_peft(
    parts: Mapping[str, Tensor], site: Site, method: str, options: Mapping[str, Any]
) -> tuple[Method | None, list[str]]:
    kind = find(method)
    if site.kind not in kind.kinds:
        return None, [f"method '{method}' can't adapt a site of kind '{site.kind}'"]
    if not issubclass(kind, LoRA):
        layer = kind(site, None, **options)
        state = {name.removeprefix("lorafit_"): tensor for name, tensor in parts.items()}
    else:
        a_name, b_name = ("lora_embedding_A", "lora_embedding_B") if site.lookup else ("lora_A.weight", "lora_B.weight")
        if set(parts) != {a_name, b_name}:
            return None, [f"has {', '.join(sorted(parts))}; expected {a_name} and {b_name}"]
        a, b = parts[a_name].float(), parts[b_name].float()
        *lead, out, width = site.shape
        if a.ndim != 2 or b.ndim != 2:
            return None, [f"{a_name} {tuple(a.shape)} and {b_name} {tuple(b.shape)} must have two dimensions"]
        if site.kind == "experts":
            (experts,) = lead
            if a.shape[0] % experts or b.shape[1] % experts:
                return None, [f"A {tuple(a.shape)} and B {tuple(b.shape)} can't be split over {experts} experts"]
            a = a.view(experts, -1, a.shape[1])
            b = b.view(b.shape[0], -1, experts).permute(2, 0, 1)
        layer = kind(site, None, **options)
        state = {"a": a, "b": b}
    want = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    wrong = [f"{n} is missing" for n in want if n not in state] + [
        f"unknown tensor {n}" for n in state if n not in want
    ]
    wrong += [
        f"{n} is {tuple(state[n].shape)}, expected {shape}"
        for n, shape in want.items()
        if n in state and tuple(state[n].shape) != shape
    ]
    if wrong:
        return None, wrong
    layer.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return layer, []


def _by_site(
    tensors: Mapping[str, Tensor], sites: Mapping[str, Site], parameters: Sequence[str]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The tensors of each site by short name, and a line for each key without a site."""
    nested: dict[str, list[int]] = {}  # experts' module -> how deep its keys are wrapped
    parsed, bad = [], []
    for key, tensor in tensors.items():
        match = re.fullmatch(
            re.escape(PREFIX) + r"(.+?)((?:\.base_layer)*)\.(lora_[AB]\.weight|lora_embedding_[AB]|lorafit_\w+)", key
        )
        if match is None:
            copied = key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
            own = {p: site for site in sites.values() for p in (site.path, *(name for name, _ in site.tied))}
            if copied in own and torch.equal(own[copied].stored.cpu().to(tensor.dtype), tensor):
                continue  # PEFT adds the base's own embedding or head when they are adapted
            bad.append(f"{key}: not a key of a LoRA adapter" if copied not in own else f"{key}: differs from this base")
            continue
        path, depth, name = match[1], match[2].count(".base_layer"), match[3]
        nested.setdefault(path, []).append(depth)
        parsed.append((key, path, depth, name, tensor))
    found: dict[str, dict[str, Tensor]] = {}
    for key, path, depth, name, tensor in parsed:
        site = _site_of(path, max(nested[path]) - depth, sites, parameters)
        if site is None:
            bad.append(f"{key}: this base has no such weight")
        else:
            found.setdefault(site, {})[name] = tensor
    return found, bad


def _site_of(path: str, order: int, sites: Mapping[str, Site], parameters: Sequence[str]) -> str | None:
    """The site of a key. Experts' keys name their module alone; which of its parameters is meant follows from how deep
    the key is wrapped, among those that target_parameters names."""
    if path in sites:
        return path
    named = [
        p
        for p, site in sites.items()
        if site.kind == "experts"
        and p.rsplit(".", 1)[0] == path
        and any(p == n or p.endswith("." + n) for n in parameters)
    ]
    named.sort(key=_wrap_order)
    return named[order] if order < len(named) else None


def _config(adapter: Adapter, sites: Mapping[str, Site], base_folder: str, modules: Sequence[str]) -> dict[str, Any]:
    paths = [path for path, _ in adapter.items()]
    plain = [p for p in paths if sites[p].kind != "experts"]
    experts = [p for p in paths if sites[p].kind == "experts"]
    options = _as_lora(adapter)
    config: dict[str, Any] = {
        "peft_type": f"LORAFIT_{adapter.method.upper()}" if options is None else "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_folder,
        "inference_mode": True,
        "target_modules": _short(plain, modules),
        "target_parameters": experts or None,
        "modules_to_save": None,
    }
    if options is None:
        return config
    found = {p: factors for p, layer in adapter.items() if (factors := layer.stored()) is not None}
    ranks = {p: a.shape[-2] for p, (a, _, _) in found.items()}
    alphas = {p: s * (ranks[p] ** 0.5 if options["rslora"] else ranks[p]) for p, (_, _, s) in found.items()}
    return config | {
        "r": options["r"],
        "lora_alpha": options["alpha"],
        "lora_dropout": 0.0 if experts else options["dropout"],  # PEFT refuses dropout on parameters
        "use_rslora": options["rslora"],
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": bool(plain) and all(sites[p].kind == "conv1d" for p in plain),
        "init_lora_weights": True,
        "rank_pattern": {re.escape(p): r for p, r in ranks.items() if r != options["r"]},
        "alpha_pattern": {
            re.escape(p): round(alpha, 9) for p, alpha in alphas.items() if abs(alpha - options["alpha"]) > 1e-6
        },
        "ensure_weight_tying": any(sites[p].tied for p in paths),
    }


def _short(paths: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Leaf names (`q_proj`) when they mean exactly these modules, as other tools expect; whole paths otherwise."""
    leaves = sorted({path.rsplit(".", 1)[-1] for path in paths})
    meant = {m for m in modules if m.rsplit(".", 1)[-1] in leaves}
    return leaves if meant == set(paths) else list(paths)


def _promised(config: Mapping[str, Any], sites: Mapping[str, Site]) -> list[str]:
    """The sites that a list of target_modules means; a file that lacks one of them is incomplete."""
    targets = config.get("target_modules")
    narrowed = ("layers_to_transform", "layers_pattern", "exclude_modules")
    if not isinstance(targets, list) or any(config.get(key) for key in narrowed):
        return []
    return [p for p in sites if any(p == t or p.endswith("." + t) for t in targets)]


# --- reading adapter_config.json ---------------------------------------------------------------------------------------

# PEFT features that change what the tensors mean; an adapter that uses one would compute something else here.
_UNSUPPORTED = [
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "modules_to_save",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "velora_config",
    "kasa_config",
    "arrow_config",
    "monteclora_config",
    "corda_config",
]


_HARMLESS_STARTS = ("gaussian", "orthogonal", "eva")


def _method_of(config: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> tuple[str, dict[str, Any]]:
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind.startswith("LORAFIT_"):
        return str(own.get("method", "")), dict(own.get("options", {}))
    if kind != "LORA":
        raise AdapterError(f"{folder} is a '{kind}' adapter; only LORA and ADALORA can be loaded")
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append(f"bias={config['bias']}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _HARMLESS_STARTS:  # PEFT edits the base for these when it loads them
        used.append(f"init_lora_weights={start}")
    if used:
        raise AdapterError(f"{folder} uses {', '.join(used)}, which can't be loaded yet")
    try:
        options = {
            "r": int(config["r"]),
            "alpha": float(config["lora_alpha"]),
            "dropout": float(config.get("lora_dropout") or 0.0),
            "rslora": bool(config.get("use_rslora", False)),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG}: {type(error).__name__} at {error}") from None
    return "lora", options


def _from_adalora(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], sites: Mapping[str, Site], folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's AdaLoRA as a LoRA: its A, with E's numbers on the rows, its B, and the rank that each weight has left. All have the
    scale of the first rank, to which PEFT adds 1e-5."""
    try:
        r, alpha = int(config["init_r"]), float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG}: {type(error).__name__} at {error}") from None
    scale = (alpha if alpha > 0 else r) / (r + 1e-5)
    parts: dict[str, dict[str, Tensor]] = {}
    made: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if match := re.fullmatch(r"(.+)\.lora_([ABE])", key):
            parts.setdefault(match[1], {})[match[2]] = tensor
        else:
            made[key] = tensor
    ranks: dict[str, int] = {}
    for name, own in parts.items():
        shapes = {part: tuple(tensor.shape) for part, tensor in own.items()}
        rank = own["E"].numel() if "E" in own else -1
        if set(own) != set("ABE") or (shapes["A"][0], *shapes["B"][1:], *shapes["E"]) != (rank, rank, rank, 1):
            there = ", ".join(f"lora_{part} {shape}" for part, shape in sorted(shapes.items()))
            raise AdapterError(
                f"{folder}: {name} has {there}; expected lora_A (r, in), lora_B (out, r) and lora_E (r, 1)"
            )
        ranks[name.removeprefix(PREFIX)] = rank
        if rank:  # PEFT keeps what has lost all its ranks
            made |= {f"{name}.lora_A.weight": own["A"] * own["E"], f"{name}.lora_B.weight": own["B"]}
    promised = [path for path in _promised(config, sites) if ranks.get(path) != 0]
    patterns = {re.escape(path): rank for path, rank in ranks.items()}
    return {
        **config,
        "peft_type": "LORA",
        "use_rslora": False,
        "r": r,
        "target_modules": promised if len(promised) else config.get("target_modules"),
        "rank_pattern": patterns,
        "alpha_pattern": {path: scale * rank for path, rank in patterns.items()},
    }, made


def _options_for(path: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    own = dict(options)
    if "r" not in own:
        return own
    for key, option in (("rank_pattern", "r"), ("alpha_pattern", "alpha")):
        for pattern, value in (config.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                own[option] = value
                break
    return own


def _untied(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], sites: Mapping[str, Site], folder: Path
) -> dict[str, Tensor]:
    """Without what PEFT repeats for an output head that shares the embedding's adapter: its A is the other's B, turned."""
    kept = dict(tensors)
    for site in (s for s in sites.values() if s.tied):
        names = [site.path, *(path for path, _ in site.tied)]
        touched = [n for n in names if any(key.startswith(f"{PREFIX}{n}.lora_") for key in tensors)]
        if touched and not config.get("ensure_weight_tying"):
            raise AdapterError(
                f"{folder} changes {' and '.join(touched)} alone, but this base uses one weight for"
                f" {' and '.join(names)}; make it with ensure_weight_tying"
            )
        for name in names[1:]:
            for ours, theirs in (("lora_embedding_B", "lora_A.weight"), ("lora_embedding_A", "lora_B.weight")):
                source, repeated = tensors.get(f"{PREFIX}{site.path}.{ours}"), tensors.get(f"{PREFIX}{name}.{theirs}")
                if source is not None and repeated is not None and torch.equal(source.t(), repeated):
                    del kept[f"{PREFIX}{name}.{theirs}"]
    return kept

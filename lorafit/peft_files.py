"""An adapter's files, in PEFT's format, so that every tool of the ecosystem reads them.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's; `lorafit.json` beside them holds what PEFT has no place
for: the base's fingerprint, the chat template and stop tokens it was trained with, and the method's settings.
"""

from __future__ import annotations

import json
import math
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
from lorafit.files import load_json, sha256
from lorafit.methods import Method, find, settings
from lorafit.methods.dora import DoRA
from lorafit.methods.ia3 import IA3
from lorafit.methods.lora import LoRA
from lorafit.model.shards import DAMAGED, TYPES, read_header
from lorafit.model.sites import Site

PREFIX = "base_model.model."
WEIGHTS, CONFIG, OWN = "adapter_model.safetensors", "adapter_config.json", "lorafit.json"
INT8, SCALE = "LORAFIT_INT8", ".scale"  # a LoRA whose tensors are int8, each with its rows' scales beside it
PICKLED = "adapter_model.bin"  # what PEFT once wrote


def save(
    adapter: Adapter,
    folder: Path,
    sites: Mapping[str, Site],
    base_folder: str,
    modules: Sequence[str],
    int8: bool = False,
) -> None:
    """Write the adapter's files into `folder`, which must exist. `modules`: all module paths of the base. `int8`: a LoRA's
    tensors in 8 bits with a scale for each row, which PEFT doesn't read.

    The folder isn't swapped in whole here; a run does that (see run.py).
    """
    adapter = _felt(adapter)
    tensors, config = {}, _config(adapter, sites, base_folder, modules)
    for path, layer in adapter.items():
        for name, tensor in _to_peft(layer, sites[path]).items():
            tensors[f"{PREFIX}{_peft_path(sites[path], adapter)}.{name}"] = tensor
    if int8:
        if config["peft_type"] != "LORA":
            raise AdapterError(f"method '{adapter.method}' can't be stored in int8; compress it to a rank as well")
        config["peft_type"], tensors = INT8, _coded(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    own = {"method": adapter.method, "options": adapter.options, **adapter.notes}
    if (stored := _as_lora(adapter)) is not None and adapter.method not in _LORAS:
        own |= {"method": "lora", "options": stored}
        own.setdefault("trained_as", {"method": adapter.method, "options": adapter.options})
    (folder / OWN).write_text(json.dumps(own, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load(folder: Path, sites: Mapping[str, Site], fingerprint: str = "", shapes: bool = False) -> Adapter:
    """Read an adapter, strictly: every key must have a place of its shape, and the base must be the one it was made for.
    `shapes`: without its numbers, on the meta device; of the file only the header is read.

    AdapterError names the first of what is wrong. An adapter without `lorafit.json` (made by PEFT) has no fingerprint to check.
    """
    config, own = read_config(folder), read_notes(folder)
    _check_values(config, folder)
    if not (folder / WEIGHTS).is_file() and (folder / PICKLED).is_file():
        raise AdapterError(
            f"{folder / PICKLED} is a pickle, which lorafit doesn't read; load the adapter in PEFT and save it anew as {WEIGHTS}"
        )
    made_for = own.get("fingerprint", "")
    if fingerprint and made_for and fingerprint != made_for:
        raise AdapterError(
            f"{folder} was made for another base ({own.get('base', '?')}, fingerprint {made_for[:8]}, not"
            f" {fingerprint[:8]}); load it on that one"
        )
    try:
        tensors = _shapes(folder / WEIGHTS) if shapes else safetensors.torch.load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder / WEIGHTS} can't be read: {error}") from None
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise AdapterError(f"{folder}: {key} holds numbers that aren't finite; the adapter is damaged")
    if config.get("peft_type") == "ADALORA":
        config, tensors = _from_adalora(config, tensors, sites, folder)
    method, options = _method_of(config, own, folder)
    if config.get("peft_type") == INT8:
        tensors = _numbers(tensors, folder)
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
        listed = "; ".join(bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise AdapterError(f"{folder} doesn't fit this base: {listed or 'it holds no tensors'}")
    adapter = Adapter(method, options, layers)
    adapter.notes = {key: value for key, value in own.items() if key not in ("method", "options")}
    return adapter


def method_of(folder: Path) -> str:
    """The method of a saved adapter, told without its tensors."""
    config = read_config(folder)
    return "lora" if config.get("peft_type") == "ADALORA" else _method_of(config, read_notes(folder), folder)[0]


def _shapes(file: Path) -> dict[str, Tensor]:
    """The tensors of a file without their numbers."""
    try:
        start, entries = read_header(file)
        if start + max((entry["data_offsets"][1] for entry in entries.values()), default=0) > file.stat().st_size:
            raise ValueError("it is cut off")
        return {
            name: torch.empty(entry["shape"], dtype=TYPES.get(entry["dtype"], torch.float32), device="meta")
            for name, entry in entries.items()
        }
    except DAMAGED as error:
        raise AdapterError(f"{file} can't be read: {error}") from None


def _same(a: Tensor, b: Tensor) -> bool:
    """Of one shape and, as far as their numbers are there, the same."""
    return a.shape == b.shape and (a.is_meta or b.is_meta or torch.equal(a.cpu().to(b.dtype), b))


def peft_type(kind: type[Method]) -> str | None:
    """PEFT's type that a method's adapters are stored as; None where PEFT has none, and the files are lorafit's alone."""
    if kind is IA3:
        return "IA3"
    return "LORA" if kind in _LORAS.values() or kind.factors is not Method.factors else None


def read_config(folder: Path) -> dict[str, Any]:
    """What adapter_config.json holds. AdapterError if it isn't there."""
    values = load_json(folder / CONFIG, AdapterError)
    if values is None:
        raise AdapterError(f"{folder / CONFIG} is missing; {folder} is not an adapter")
    if "lora_parameters" in values and "peft_type" not in values:
        raise AdapterError(f"{folder} is an adapter of mlx-lm; first: lorafit adapter convert {folder} OUT")
    return values


def settings_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """An adapter's method and its settings, with targets and patterns as adapter_config.json has them."""
    config = read_config(folder)
    _check_values(config, folder)
    named = {"targets": "target_modules", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"}
    found = {ours: config[theirs] for ours, theirs in named.items() if config.get(theirs)}
    if config.get("peft_type") == "ADALORA":  # loaded as a LoRA with a rank for each weight
        return "lora", found
    method, options = _method_of(config, read_notes(folder), folder)
    return method, {**found, **options}


def read_notes(folder: Path) -> dict[str, Any]:
    """What lorafit.json holds; {} for an adapter made elsewhere."""
    found = load_json(folder / OWN, AdapterError) or {}
    for key, kind in _NOTES.items():
        if found.get(key) is not None and not isinstance(found[key], kind):
            raise AdapterError(f"{folder / OWN}: {key}={found[key]!r} can't be meant; the file is damaged")
    return found


_NOTES = {
    "method": str,
    "options": dict,
    "base": str,
    "fingerprint": str,
    "chat": dict,
    "lineage": dict,
    "trained_as": dict,
}


def ancestor(given: str, folder: Path) -> dict[str, Any]:
    """What is remembered of an adapter that another one was made of: where it was, its tensors' hash, and its own lineage."""
    before, weights = read_notes(folder).get("lineage"), folder / WEIGHTS
    found = {"adapter": given, "sha256": sha256(weights) if weights.is_file() else ""}
    return found | ({"lineage": before} if before else {})


# --- 8 bits ------------------------------------------------------------------------------------------------------------


def _coded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """int8 codes, and the fp32 scale of each row (rows, 1): its largest number is 127. A vector stays as it is."""
    found: dict[str, Tensor] = {name: tensor for name, tensor in tensors.items() if tensor.dim() < 2}
    for name, tensor in tensors.items():
        if name in found:
            continue
        scale = tensor.abs().amax(1, keepdim=True) / 127
        scale[scale == 0] = 1
        found |= {name: (tensor / scale).round().to(torch.int8), name + SCALE: scale}
    return found


def _numbers(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """What the codes stand for. AdapterError for a tensor that isn't codes with a scale for each row."""
    found = {}
    for name, codes in tensors.items():
        if name.endswith(SCALE):
            continue
        if codes.dim() < 2 and codes.is_floating_point():
            found[name] = codes
            continue
        scale = tensors.get(name + SCALE)
        if codes.dtype is not torch.int8 or scale is None or scale.shape != (*codes.shape[:1], 1):
            raise AdapterError(f"{folder / WEIGHTS}: {name} isn't int8 with a scale for each row")
        found[name] = codes.float() * scale.float()
    return found


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


_OURS = {"ia3_l": "scale"}
_LORAS: dict[str, type[LoRA | DoRA]] = {"lora": LoRA, "dora": DoRA}  # the methods that PEFT's LORA stands for


def _pair(layer: Method) -> tuple[Tensor, Tensor, float] | None:
    """(a, b, scale) of a layer that is stored as LoRA."""
    return (layer.a, layer.b, layer.scale) if isinstance(layer, DoRA) else layer.stored()


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
    if adapter.method in _LORAS:
        return adapter.options
    found = [layer.stored() for _, layer in adapter.items()]
    if not found or None in found:
        return None
    root = adapter.method == "rslora"
    pairs = Counter((f[0].shape[-2], _alpha(f[0].shape[-2], f[2], root)) for f in found if f is not None)
    r, alpha = pairs.most_common(1)[0][0]
    return {"r": r, "alpha": alpha, "dropout": adapter.options.get("dropout", 0.0), "rslora": root}


def _alpha(r: int, scale: float, rslora: bool) -> float:
    return round(scale * (r**0.5 if rslora else r), 9)


def _plain(tensor: Tensor) -> Tensor:
    """As it is stored: in fp32, or whole numbers as they are."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.float() if tensor.is_floating_point() else tensor


def _to_peft(layer: Method, site: Site) -> dict[str, Tensor]:
    if isinstance(layer, IA3):
        return {"ia3_l": layer.scale.detach().cpu().unsqueeze(0 if layer.inputs else 1)}
    factors = _pair(layer)
    if factors is None:
        return {f"lorafit_{name}": _plain(t) for name, t in layer.state_dict().items()}
    a, b = (part.detach().cpu().float() for part in factors[:2])
    if site.kind == "experts":  # A (experts·r, in), expert first; B (out, r·experts), expert last
        a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    names = _names(site, type(layer))
    return {names[name]: t.contiguous() for name, t in {"a": a, "b": b, **_magnitude(layer)}.items()}


def _magnitude(layer: Method) -> dict[str, Tensor]:
    return {"m": layer.m.detach().cpu()} if isinstance(layer, DoRA) else {}


def _names(site: Site, kind: type[Method]) -> dict[str, str]:
    """PEFT's names of a layer's parameters."""
    a, b = ("lora_embedding_A", "lora_embedding_B") if site.lookup else ("lora_A.weight", "lora_B.weight")
    return {"a": a, "b": b, **({"m": "lora_magnitude_vector"} if issubclass(kind, DoRA) else {})}


def _from_peft(
    parts: Mapping[str, Tensor], site: Site, method: str, options: Mapping[str, Any]
) -> tuple[Method | None, list[str]]:
    kind = find(method)
    if site.kind not in kind.kinds:
        return None, [f"method '{method}' can't adapt a site of kind '{site.kind}'"]
    if kind is IA3:
        layer: Method = kind(site, None, **options)
        state = {_OURS.get(name, name): tensor.flatten() for name, tensor in parts.items()}
    elif kind not in _LORAS.values():
        layer = kind(site, None, **options)
        state = {name.removeprefix("lorafit_"): tensor for name, tensor in parts.items()}
    else:
        names = _names(site, kind)
        if set(parts) != set(names.values()):
            return None, [f"has {', '.join(sorted(parts))}; expected {' and '.join(names.values())}"]
        state = {name: parts[theirs].float() for name, theirs in names.items()}
        a, b, a_name, b_name = state["a"], state["b"], names["a"], names["b"]
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
        state |= {"a": a, "b": b}
    want = {name: tuple(t.shape) for name, t in layer.state_dict().items()}
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
    layer.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})
    return layer, []


def _by_site(
    tensors: Mapping[str, Tensor], sites: Mapping[str, Site], parameters: Sequence[str]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The tensors of each site by short name, and a line for each key without a site."""
    nested: dict[str, list[int]] = {}  # experts' module -> how deep its keys are wrapped
    parsed, bad = [], []
    for key, tensor in tensors.items():
        match = re.fullmatch(
            re.escape(PREFIX)
            + r"(.+?)((?:\.base_layer)*)\.(lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|lorafit_\w+)",
            key,
        )
        if match is None:
            copied = key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
            own = {p: site for site in sites.values() for p in (site.path, *(name for name, _ in site.tied))}
            if copied in own and _same(own[copied].stored, tensor):
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
    conv1d = bool(plain) and all(sites[p].kind == "conv1d" for p in plain)
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
    if adapter.method == "ia3":
        inputs = {p for p, layer in adapter.items() if isinstance(layer, IA3) and layer.inputs}
        return (
            config
            | _feedforward(config["target_modules"], plain, inputs)
            | {"peft_type": "IA3", "fan_in_fan_out": conv1d}
        )
    if options is None:
        return config
    found = {p: factors for p, layer in adapter.items() if (factors := _pair(layer)) is not None}
    ranks = {p: a.shape[-2] for p, (a, _, _) in found.items()}
    alphas = {p: _alpha(ranks[p], s, options["rslora"]) for p, (_, _, s) in found.items()}
    return config | {
        "r": options["r"],
        "lora_alpha": options["alpha"],
        "lora_dropout": 0.0 if experts else options["dropout"],  # PEFT refuses dropout on parameters
        "use_rslora": options["rslora"],
        "use_dora": adapter.method == "dora",
        "bias": "none",
        "fan_in_fan_out": conv1d,
        "init_lora_weights": True,
        "rank_pattern": {re.escape(p): r for p, r in ranks.items() if r != options["r"]},
        "alpha_pattern": {re.escape(p): alpha for p, alpha in alphas.items() if abs(alpha - options["alpha"]) > 1e-6},
        "ensure_weight_tying": any(sites[p].tied for p in paths),
    }


def _feedforward(targets: list[str], paths: Sequence[str], inputs: set[str]) -> dict[str, list[str]]:
    """IA3's modules, and which of them scale their inputs: short names if each means modules of one sort."""
    meant = {name: {p for p in paths if p == name or p.endswith("." + name)} for name in targets}
    if any(found & inputs and found - inputs for found in meant.values()):
        return {"target_modules": list(paths), "feedforward_modules": sorted(inputs)}
    return {"target_modules": targets, "feedforward_modules": [name for name in targets if meant[name] & inputs]}


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


_MOST_RANK = 1 << 16  # more than any weight has: not even asked for


def _check_values(config: Mapping[str, Any], folder: Path) -> None:
    """AdapterError where a value that is used isn't of its kind; a file may have been written by anybody."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    bad = [key for key in ("lora_alpha", "lora_dropout") if config.get(key) is not None and not number(config[key])]
    if (r := config.get("r")) is not None and not (number(r) and r <= _MOST_RANK):
        bad.append("r")
    for key, most in (("rank_pattern", _MOST_RANK), ("alpha_pattern", math.inf)):
        found = config.get(key) or {}
        if key == "rank_pattern" and config.get("peft_type") == "ADALORA":
            found = {}  # there it says which triplets are left, see _from_adalora
        if not isinstance(found, dict) or not all(
            number(v) and 0 < v <= most and _compiles(pattern) for pattern, v in found.items()
        ):
            bad.append(key)
    for key in ("target_modules", "target_parameters"):
        found = config.get(key) or []
        if not isinstance(found, str) and not (isinstance(found, list) and all(isinstance(v, str) for v in found)):
            bad.append(key)
    if bad:
        raise AdapterError(f"{folder / CONFIG}: {bad[0]}={config[bad[0]]!r} can't be meant; the file is damaged")


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _method_of(config: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> tuple[str, dict[str, Any]]:
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind.startswith("LORAFIT_") and kind != INT8:
        name, options = str(own.get("method", "")), dict(own.get("options", {}))
        if unknown := [key for key in options if key not in settings(find(name))]:
            raise AdapterError(f"{folder / OWN}: method '{name}' has no setting '{unknown[0]}'")
        return name, options
    if kind == "IA3":
        return "ia3", {"feedforward": _feedforward_of(config, folder)}
    if kind not in ("LORA", INT8):
        raise AdapterError(f"{folder} is a '{kind}' adapter; only LORA, IA3 and ADALORA can be loaded")
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
    return "dora" if config.get("use_dora") else "lora", options


def _feedforward_of(config: Mapping[str, Any], folder: Path) -> list[str]:
    named = config.get("feedforward_modules") or []
    if not isinstance(named, list) or config.get("modules_to_save"):
        wrong = "modules_to_save" if config.get("modules_to_save") else f"feedforward_modules={named}"
        raise AdapterError(f"{folder} uses {wrong}, which can't be loaded yet")
    return [str(name) for name in named]


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
                if source is not None and repeated is not None and _same(source.t(), repeated):
                    del kept[f"{PREFIX}{name}.{theirs}"]
    return kept

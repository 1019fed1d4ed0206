"""An adapter's tensors under PEFT's names and in its shapes, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.adapter import Adapter
from lorafit.errors import AdapterError
from lorafit.methods import Method, find
from lorafit.methods.dora import DoRA
from lorafit.methods.ia3 import IA3
from lorafit.methods.lora import LoRA
from lorafit.model.shards import DAMAGED, TYPES, read_header
from lorafit.model.sites import Site
from lorafit.peft_files.beside import ROWS
from lorafit.peft_files.settings import CONFIG, PREFIX, SCALE, WEIGHTS, promised

_OURS = {"ia3_l": "scale"}
LORAS: dict[str, type[LoRA | DoRA]] = {"lora": LoRA, "dora": DoRA}  # the methods that PEFT's LORA stands for


def pair(layer: Method) -> tuple[Tensor, Tensor, float] | None:
    """(a, b, scale) of a layer that is stored as LoRA."""
    return (layer.a, layer.b, layer.scale) if isinstance(layer, DoRA) else layer.stored()


def to_peft(layer: Method, site: Site) -> dict[str, Tensor]:
    """A layer's tensors by PEFT's short names; by lorafit's own where PEFT has none."""
    if isinstance(layer, IA3):
        return {"ia3_l": layer.scale.detach().cpu().unsqueeze(0 if layer.inputs else 1)}
    factors = pair(layer)
    if factors is None:
        return {f"lorafit_{name}": _plain(t) for name, t in layer.state_dict().items()}
    a, b = (part.detach().cpu().float() for part in factors[:2])
    if site.kind == "experts":  # A (experts·r, in), expert first; B (out, r·experts), expert last
        a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    names = _names(site, type(layer))
    return {names[name]: t.contiguous() for name, t in {"a": a, "b": b, **_magnitude(layer)}.items()}


def _plain(tensor: Tensor) -> Tensor:
    """As it is stored: in fp32, or whole numbers as they are."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.float() if tensor.is_floating_point() else tensor


def _magnitude(layer: Method) -> dict[str, Tensor]:
    return {"m": layer.m.detach().cpu()} if isinstance(layer, DoRA) else {}


def _names(site: Site, kind: type[Method]) -> dict[str, str]:
    """PEFT's names of a layer's parameters."""
    a, b = ("lora_embedding_A", "lora_embedding_B") if site.lookup else ("lora_A.weight", "lora_B.weight")
    return {"a": a, "b": b, **({"m": "lora_magnitude_vector"} if issubclass(kind, DoRA) else {})}


def peft_path(site: Site, adapter: Adapter) -> str:
    """PEFT wraps a module once for each of its adapted parameters; the last wrapped is the outermost."""
    if site.kind != "experts":
        return site.path
    module = site.path.rsplit(".", 1)[0]
    wrapped = [path for path, _ in adapter.items() if path.rsplit(".", 1)[0] == module]
    return module + ".base_layer" * (len(wrapped) - 1 - sorted(wrapped, key=_wrap_order).index(site.path))


def _wrap_order(path: str) -> int:
    return 1 if path.endswith("down_proj") else 0


def shapes_of(file: Path) -> dict[str, Tensor]:
    """The tensors of a file without their numbers, on the meta device. AdapterError where its header can't be read."""
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


# --- reading -----------------------------------------------------------------------------------------------------------


def from_peft(
    parts: Mapping[str, Tensor], site: Site, method: str, options: Mapping[str, Any]
) -> tuple[Method | None, list[str]]:
    """A layer of these tensors, or what is wrong with them."""
    kind = find(method)
    if site.kind not in kind.kinds:
        return None, [f"method '{method}' can't adapt a site of kind '{site.kind}'"]
    if kind is IA3:
        layer: Method = kind(site, None, **options)
        state = {_OURS.get(name, name): tensor.flatten() for name, tensor in parts.items()}
    elif kind not in LORAS.values():
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


_NAME = r"lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|lorafit_\w+|" + re.escape(ROWS)
_KEY = re.compile(re.escape(PREFIX) + rf"(.+?)((?:\.base_layer)*)\.({_NAME})")


def by_site(
    tensors: Mapping[str, Tensor], sites: Mapping[str, Site], parameters: Sequence[str], whole: Sequence[str] = ()
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The tensors of each site by short name, and a line for each key without a site."""
    nested: dict[str, list[int]] = {}  # experts' module -> how deep its keys are wrapped
    parsed, bad = [], []
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, name = key.removeprefix(PREFIX).rpartition(".")
        if path in whole and name in ("weight", "bias"):
            found.setdefault(path, {})[name] = tensor
            continue
        match = _KEY.fullmatch(key)
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


def untied(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], sites: Mapping[str, Site], folder: Path
) -> dict[str, Tensor]:
    """Without what PEFT repeats for an output head that shares the embedding's adapter: its A is the other's B, turned."""
    kept = dict(tensors)
    for site in (s for s in sites.values() if s.tied):
        names = [site.path, *(path for path, _ in site.tied)]
        touched = [n for n in names if any(key.startswith(f"{PREFIX}{n}.lora_") for key in tensors)]
        whole = [tensors.get(f"{PREFIX}{name}.weight") for name in names] if config.get("modules_to_save") else []
        there = [name for name, tensor in zip(names, whole, strict=False) if tensor is not None]
        if (touched and not config.get("ensure_weight_tying")) or (there and not _equal(whole)):
            raise AdapterError(
                f"{folder} changes {' and '.join(touched or there)} alone, but this base uses one weight for"
                f" {' and '.join(names)}; make it with ensure_weight_tying"
            )
        for name in names[1:]:
            if there:
                del kept[f"{PREFIX}{name}.weight"]
            for ours, theirs in (("lora_embedding_B", "lora_A.weight"), ("lora_embedding_A", "lora_B.weight")):
                source, repeated = tensors.get(f"{PREFIX}{site.path}.{ours}"), tensors.get(f"{PREFIX}{name}.{theirs}")
                if source is not None and repeated is not None and _same(source.t(), repeated):
                    del kept[f"{PREFIX}{name}.{theirs}"]
    return kept


def _same(a: Tensor, b: Tensor) -> bool:
    """Of one shape and, as far as their numbers are there, the same."""
    return a.shape == b.shape and (a.is_meta or b.is_meta or torch.equal(a.cpu().to(b.dtype), b))


def _equal(tensors: Sequence[Tensor | None]) -> bool:
    first = tensors[0]
    return first is not None and all(tensor is not None and _same(first, tensor) for tensor in tensors)


def from_adalora(
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
    still = [path for path in promised(config, sites) if ranks.get(path) != 0]
    patterns = {re.escape(path): rank for path, rank in ranks.items()}
    return {
        **config,
        "peft_type": "LORA",
        "use_rslora": False,
        "r": r,
        "target_modules": still if len(still) else config.get("target_modules"),
        "rank_pattern": patterns,
        "alpha_pattern": {path: scale * rank for path, rank in patterns.items()},
    }, made


# --- 8 bits ------------------------------------------------------------------------------------------------------------


def coded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """int8 codes, and the fp32 scale of each row (rows, 1): its largest number is 127. A vector stays as it is."""
    found: dict[str, Tensor] = {name: tensor for name, tensor in tensors.items() if tensor.dim() < 2}
    for name, tensor in tensors.items():
        if name in found:
            continue
        scale = tensor.abs().amax(1, keepdim=True) / 127
        scale[scale == 0] = 1
        found |= {name: (tensor / scale).round().to(torch.int8), name + SCALE: scale}
    return found


def numbers(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
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

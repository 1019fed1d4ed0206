"""Adapters of other programs to PEFT's format and back, each compared with the formula of its own format.

| format | y − x·Wᵀ | tensors |
|---|---|---|
| PEFT | s·(x·Aᵀ)·Bᵀ | lora_A (r, in), lora_B (out, r); s = alpha/r |
| mlx-lm | s·(x·a)·b | lora_a (in, r), lora_b (r, out); s = lora_parameters.scale |
| MiniMind | (x·Aᵀ)·Bᵀ | lora.A.weight (r, in), lora.B.weight (out, r) |
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lorafit import files
from lorafit.adapter import Adapter
from lorafit.adapters.deltas import Delta
from lorafit.adapters.opened import Opened, Shape, here, identity, low_rank, sites_of
from lorafit.errors import AdapterError, LorafitError
from lorafit.files import load_json
from lorafit.model.load import blank
from lorafit.model.sites import Site, find_sites
from lorafit.peft_files import CONFIG

MLX_WEIGHTS = "adapters.safetensors"
ALLOWED = 1e-5  # largest difference from the source's formula, beside the largest number of its result
ROWS = 4  # inputs that are tried


@dataclass(frozen=True)
class Foreign:
    """An adapter of another program: what it adds to each site as Delta, the same by the formula of its format, as a function
    of inputs (n, in), and what it says of its base."""

    format: str
    deltas: dict[str, Delta]
    formulas: dict[str, Callable[[Tensor], Tensor]]
    shapes: dict[str, Shape]
    base: str


def foreign(path: Path) -> Foreign | None:
    """What is at a path, if another program than PEFT and lorafit wrote it. AdapterError where it can't be read."""
    if path.is_file():
        return _minimind(path)
    if (path / MLX_WEIGHTS).is_file():
        return _mlx(path)
    return None


def _mlx(folder: Path) -> Foreign:
    config = load_json(folder / CONFIG, AdapterError) or {}
    kind, given = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind != "lora":
        raise AdapterError(f"{folder} is of mlx-lm's kind '{kind}'; only lora can be converted")
    if not isinstance(given, dict) or not isinstance(given.get("scale"), int | float):
        raise AdapterError(f"{folder / CONFIG} has no lora_parameters with a scale; it isn't mlx-lm's")
    if isinstance(given["scale"], bool) or not math.isfinite(given["scale"]):
        raise AdapterError(f"{folder / CONFIG}: scale={given['scale']} can't be meant; the file is damaged")
    if not isinstance(config.get("model") or "", str):
        raise AdapterError(f"{folder / CONFIG}: model={config['model']!r} can't be meant; the file is damaged")
    try:
        tensors = safetensors.torch.load_file(folder / MLX_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder / MLX_WEIGHTS} can't be read: {error}") from None
    scale = float(given["scale"])
    pairs = _paired(tensors, r"(.+)\.lora_(a|b)", folder / MLX_WEIGHTS)
    found = Foreign("mlx-lm", {}, {}, {}, str(config.get("model") or ""))
    for path, (a, b) in pairs.items():
        if a.shape[1] != b.shape[0]:
            raise AdapterError(
                f"{folder / MLX_WEIGHTS}: {path}: lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)} don't fit"
            )
        found.deltas[path] = Delta(b.T.double() * scale, a.T.double())
        found.formulas[path] = partial(_mlx_formula, a, b, scale)
        found.shapes[path] = Shape(b.shape[1], a.shape[0], "embedding" if path.endswith("embed_tokens") else "linear")
    return found


def _mlx_formula(a: Tensor, b: Tensor, scale: float, x: Tensor) -> Tensor:
    return scale * ((x @ a) @ b)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth` file, without MiniMind's wrappers' prefix; nothing but tensors is ever unpickled."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; torch's own text is of many lines and tells to trust the file
        if not _is_torch(path):
            line = "it isn't a file of torch's"
        elif isinstance(error, pickle.UnpicklingError) and "Unsupported operand" not in str(error):
            line = "it holds more than tensors"
        else:
            line = "it can't be read, it is cut off or damaged"
        raise AdapterError(f"{path} is refused: {line} ({type(error).__name__})") from None
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise AdapterError(f"{path} is refused: it must hold tensors by name and nothing else")
    for key, tensor in held.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
            raise AdapterError(f"{path} is refused: {key} isn't a plain tensor of numbers")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise AdapterError(f"{path} is refused: {key} says {tuple(tensor.shape)}, and the file holds fewer numbers")
    return {str(key).removeprefix("module.").removeprefix("_orig_mod."): tensor for key, tensor in held.items()}


def _is_torch(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def _minimind(path: Path) -> Foreign:
    tensors = read_tensors(path)
    pairs = _paired(tensors, r"(.+)\.lora\.(A|B)\.weight", path)
    found = Foreign("MiniMind", {}, {}, {}, "")
    for name, (a, b) in pairs.items():
        if a.shape[0] != b.shape[1]:
            raise AdapterError(f"{path}: {name}: lora.A {tuple(a.shape)} and lora.B {tuple(b.shape)} don't fit")
        found.deltas[name] = Delta(b.double(), a.double())
        found.formulas[name] = partial(_minimind_formula, a, b)
        found.shapes[name] = Shape(b.shape[0], a.shape[1])
    return found


def _minimind_formula(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return (x @ a.T) @ b.T


def _paired(tensors: Mapping[str, Tensor], pattern: str, file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The two matrices of each site, fp32. AdapterError with all keys that are not of one."""
    halves: dict[str, dict[str, Tensor]] = {}
    bad = []
    for key, tensor in tensors.items():
        match = re.fullmatch(pattern, key)
        if match is None or tensor.ndim != 2 or 0 in tensor.shape:
            bad.append(key)
            continue
        number = tensor.float()
        if not bool(number.isfinite().all()):
            raise AdapterError(f"{file}: {key} holds numbers that aren't finite in fp32; the adapter is damaged")
        halves.setdefault(match[1], {})[match[2].lower()] = number
    bad += [path for path, parts in halves.items() if set(parts) != {"a", "b"}]
    if bad or not halves:
        listed = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise AdapterError(f"{file} isn't a LoRA of a known format: {listed or 'it holds no tensors'}")
    return {path: (parts["a"], parts["b"]) for path, parts in halves.items()}


@dataclass(frozen=True)
class Converted:
    """An adapter for PEFT's format and what is needed to write it. `base`: its folder, None where it isn't here."""

    adapter: Adapter
    sites: Mapping[str, Site]
    modules: Sequence[str]
    name: str
    base: Path | None


def taken(source: Foreign, given: str, model: str | None) -> Converted:
    """Another program's adapter over its base's sites; over those that its own tensors tell of where the base isn't here.

    AdapterError where it doesn't fit the base, or names none.
    """
    name = model or source.base
    if not name:
        raise AdapterError(f"{given} doesn't say which base it is for; name it with --model")
    place = here(name)
    if place is None and model is not None:
        raise AdapterError(f"there is no model at '{model}'")
    if place is None:
        sites, modules = sites_of(source.shapes), []
    else:
        skeleton = blank(place)
        sites, modules = find_sites(skeleton), [path for path, _ in skeleton.named_modules()]
    bad = []
    for path, shape in source.shapes.items():
        site = sites.get(path)
        if site is None:
            bad.append(f"{path}: this base has no such weight")
        elif tuple(site.shape) != (shape.out, shape.width):
            bad.append(f"{path} is for {shape.out}×{shape.width}, this base has {'×'.join(map(str, site.shape))}")
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise AdapterError(f"{given} doesn't fit {name}: {bad[0]}{more}")
    adapter = low_rank(sites, {path: source.deltas[path] for path in sites if path in source.deltas})
    adapter.notes = {"base": name, "lineage": {"made": "convert", "format": source.format, "of": [{"adapter": given}]}}
    if place is not None and (made_for := identity(place)):
        adapter.notes["fingerprint"] = made_for
    return Converted(adapter, sites, modules, name, place)


@torch.no_grad()
def off(formulas: Mapping[str, Callable[[Tensor], Tensor]], adapter: Adapter) -> float:
    """The largest difference between what an adapter adds to random inputs and what these formulas say, beside the largest
    number that they give."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for path, layer in adapter.items():
        factors = layer.factors()
        assert factors is not None
        a, b, scale = factors
        x = torch.randn(ROWS, a.shape[-1], generator=generator)
        want, got = formulas[path](x), (x @ a.T) @ b.T * scale
        worst = max(worst, float((want - got).abs().max()) / max(float(want.abs().max()), 1e-30))
    return worst


def proved(worst: float) -> float:
    """`worst`, if it is allowed. LorafitError otherwise, before anything counts."""
    if not worst <= ALLOWED:
        raise LorafitError(
            f"converted, it adds something else: off by {worst:.2g}, allowed {ALLOWED:g}; nothing was written"
        )
    return worst


# --- to mlx-lm ---------------------------------------------------------------------------------------------------------


def write_mlx(opened: Opened, out: Path) -> float:
    """An adapter's folder as mlx-lm reads it; returns how far the file, read back, is from it.

    mlx-lm makes all its layers of one rank and one scale: smaller ranks are filled up with zeros, scales go into lora_b.
    """
    kinds = {opened.sites[path].kind for path in opened.paths} - {"linear", "embedding"}
    if kinds or not all(opened.low(path) for path in opened.paths):
        what = f"sites of kind '{min(kinds)}'" if kinds else f"method '{opened.adapter.method}'"
        raise AdapterError(
            f"{opened.given}: {what} can't be written for mlx-lm; linear layers and embeddings of a LoRA can"
        )
    found = {path: opened.delta(path) for path in opened.paths}
    rank = max(delta.rank for delta in found.values())
    tensors: dict[str, Tensor] = {}
    for path, delta in found.items():
        a, b = torch.zeros(delta.a.shape[1], rank), torch.zeros(rank, delta.b.shape[0])
        a[:, : delta.rank], b[: delta.rank] = delta.a.T, delta.b.T
        tensors |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
    blocks = [re.match(r"(?:model|transformer)\.(?:layers|h)\.(\d+)\.(.+)", path) for path in found]
    keys = {match[2] if match else path for match, path in zip(blocks, found, strict=True)}
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "model": opened.base_name,
        "num_layers": _layers(opened),
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    worst = 0.0

    def fill(place: Path) -> None:
        nonlocal worst
        safetensors.torch.save_file(tensors, place / MLX_WEIGHTS, metadata={"format": "mlx"})
        (place / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        worst = proved(off(_mlx(place).formulas, opened.adapter))

    files.write_folder(out, fill, again="try again")
    return worst


def _layers(opened: Opened) -> int:
    """How many of the last decoder layers mlx-lm must look at: all, as far as is known."""
    numbers = [
        int(m[1]) for path in opened.sites if (m := re.match(r"(?:model|transformer)\.(?:layers|h)\.(\d+)\.", path))
    ]
    return max(numbers, default=-1) + 1

"""Adapters read from their folders, and new ones written. The base's config is enough for it, and where not even that is here,
the shapes in the adapter's own file; only a method whose ΔW depends on the weights has them read, one after the other.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafit
from lorafit import files, peft_files
from lorafit.adapter import Adapter
from lorafit.adapters.deltas import Delta
from lorafit.errors import AdapterError, ModelError
from lorafit.methods.lora import given
from lorafit.model.fingerprint import fingerprint
from lorafit.model.load import blank, locate
from lorafit.model.shards import DAMAGED, read_header
from lorafit.model.sites import Site, find_sites
from lorafit.session import adapter_folder, base_of, open_session

Working = Callable[[str], object]


@dataclass
class Opened:
    """An adapter, the sites of its base, and where that lies (None: not here). `modules`: the base's module paths, [] where
    they aren't known. `given`: the path as the user wrote it."""

    given: str
    folder: Path
    adapter: Adapter
    sites: Mapping[str, Site]
    base: Path | None
    modules: Sequence[str] = field(default=(), repr=False)

    @property
    def notes(self) -> dict[str, Any]:
        """What lorafit.json says beside method and options."""
        return self.adapter.notes

    @property
    def base_name(self) -> str:
        """The base as the adapter names it; empty where it doesn't."""
        try:
            return base_of(self.folder)
        except AdapterError:
            return ""

    @property
    def bytes(self) -> int:
        """Of its tensors' file."""
        return (self.folder / peft_files.WEIGHTS).stat().st_size

    def delta(self, path: str) -> Delta:
        """ΔW of a site; of a method that has no factors by decomposing it."""
        factors = self.adapter[path].factors()
        if factors is not None:
            a, b, scale = factors
            return Delta(b.detach().double() * scale, a.detach().double())
        u, s, vt = self.svd(path)
        return Delta(u * s[..., None, :], vt)

    def svd(self, path: str) -> tuple[Tensor, Tensor, Tensor]:
        """u, s and vᵀ of a site's ΔW, as Delta.svd."""
        if self.low(path):
            return self.delta(path).svd()
        u, s, vt = torch.linalg.svd(self.matrix(path).double(), full_matrices=False)
        return u, s, vt

    @torch.no_grad()
    def matrix(self, path: str) -> Tensor:
        """ΔW (*lead, out, in), fp32."""
        return self.adapter[path].delta_weight(self.sites[path].weight()).detach().float()

    def low(self, path: str) -> bool:
        """ΔW is kept as a product of low rank."""
        return self.adapter[path].factors() is not None

    def rank(self, path: str) -> int | None:
        """Of a site's factors; where ΔW isn't their product the r that it was trained with, and None where there was none."""
        factors = self.adapter[path].factors()
        if factors is not None:
            return factors[0].shape[-2]
        return None if path in self.adapter.beside else self.adapter.options.get("r")

    @property
    def paths(self) -> list[str]:
        """The adapted sites, in the base's order."""
        there = {path for path, _ in self.adapter.items()}
        return [path for path in self.sites if path in there]


def open_adapter(given: str, model: str | None = None, working: Working = lambda text: None) -> Opened:
    """Read one; strict, see peft_files.load. `model`: the base, instead of the one that it names.

    AdapterError where it doesn't fit, holds numbers that aren't finite, or needs weights that aren't here; RunError where
    there is no adapter.
    """
    folder = adapter_folder(given)
    working(f"reading {given}")
    try:
        name = model or base_of(folder)
    except AdapterError:
        name = None
    place = here(name, working) if name else None
    if model is not None and place is None:
        raise ModelError(f"there is no model at '{model}'")
    if place is None:
        sites, modules = sites_of(_shapes(folder)), []
    else:
        new = peft_files.read_notes(folder).get("new_tokens") or {}
        skeleton = blank(place, rows=1 + max(new.values(), default=-1))
        sites, modules = find_sites(skeleton), [path for path, _ in skeleton.named_modules()]
    adapter = _without_weights(folder, sites, identity(place) if place is not None else "")
    if adapter is None:
        if place is None:
            raise AdapterError(
                f"what {given} adds depends on its base's weights, which aren't here; name it with --model"
            )
        host = open_session([given], model=model, streamed=True, precision="fp32", device="cpu", working=working).host
        (adapter,), sites = host.adapters.values(), host.sites
    return Opened(given, folder, adapter, sites, place, modules)


def no_biases(opened: Opened) -> None:
    """AdapterError where an adapter changes biases too, which factors of ΔW have no place for."""
    for path, layer in opened.adapter.items():
        bias = opened.sites[path].bias
        if bias is not None and layer.delta_bias(bias) is not None:
            raise AdapterError(
                f"{opened.given} ({opened.adapter.method}) changes the bias of {path} too, which a LoRA has no place for;"
                " merge it instead"
            )


def _without_weights(folder: Path, sites: Mapping[str, Site], made_for: str) -> Adapter | None:
    """None where the method must see its weights, which these sites haven't."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch: numbers are copied to where there is no place for them
            adapter = peft_files.load(folder, sites, made_for)
    except (NotImplementedError, RuntimeError):  # of torch: a tensor without numbers was asked for them
        return None
    return adapter if all(layer.factors() is not None for _, layer in adapter.items()) else None


def here(name: str, working: Working = lambda text: None) -> Path | None:
    """The folder of a base that is on this machine; nothing is downloaded. None where it isn't."""
    if name.count("/") == 1 and not Path(name).expanduser().exists() and not name.startswith((".", "/", "~")):
        from huggingface_hub import try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            return None
    try:
        return locate(name, working, weights=False)
    except ModelError:
        return None


def identity(place: Path) -> str:
    """The base's fingerprint; empty where its weights aren't here."""
    try:
        return fingerprint(place)
    except ModelError:
        return ""


# --- sites without a base ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Of a site, as an adapter's file tells it."""

    out: int
    width: int
    kind: str = "linear"


def sites_of(shapes: Mapping[str, Shape]) -> dict[str, Site]:
    """Sites of these shapes, over modules without weights."""
    found = {}
    with torch.device("meta"):
        for path, shape in shapes.items():
            module: nn.Module
            if shape.kind == "embedding":
                module = nn.Embedding(shape.width, shape.out)
            elif shape.kind == "conv1d":
                module = Conv1D(shape.out, shape.width)
            else:
                module = nn.Linear(shape.width, shape.out, bias=False)
            found[path] = Site(path, shape.kind, module)
    return found


def _shapes(folder: Path) -> dict[str, Shape]:
    """From the header of an adapter's tensors. AdapterError where it takes the base to understand them."""
    config = peft_files.read_config(folder)
    own = config.get("peft_type") not in ("LORA", peft_files.INT8)
    if own or config.get("target_parameters") or config.get("ensure_weight_tying"):
        raise AdapterError(f"{folder} can't be understood without its base, which isn't here; name it with --model")
    try:
        _, entries = read_header(folder / peft_files.WEIGHTS)
    except DAMAGED as error:
        raise AdapterError(f"{folder / peft_files.WEIGHTS} can't be read: {error}") from None
    sizes = {
        match.groups(): tuple(entry["shape"])
        for key, entry in entries.items()
        if (match := re.fullmatch(re.escape(peft_files.PREFIX) + r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?", key))
    }
    found = {}
    for (path, look_up, letter), a in sizes.items():
        b = sizes.get((path, look_up, "B"))
        if letter == "A" and b is not None and len(a) == len(b) == 2:
            kind = "embedding" if look_up else "conv1d" if config.get("fan_in_fan_out") else "linear"
            found[path] = Shape(b[0], a[1], kind)
    return found


# --- writing -----------------------------------------------------------------------------------------------------------


def low_rank(sites: Mapping[str, Site], deltas: Mapping[str, Delta]) -> Adapter:
    """A LoRA of scale 1 that adds these, by site path."""
    layers = {path: given(sites[path], delta.a.float(), delta.b.float()) for path, delta in deltas.items()}
    usual = max((d.rank for d in deltas.values()), key=[d.rank for d in deltas.values()].count)
    return Adapter("lora", {"r": usual, "alpha": float(usual), "dropout": 0.0, "rslora": False}, layers)


def carried(sources: Sequence[Opened], **lineage: Any) -> dict[str, Any]:
    """The notes of an adapter made of these: base and chat of the first, all of a single one, and where it comes from."""
    kept = ("fingerprint", "base", "quant", "double_quant", "quant_start", "chat", "learn")
    notes = {key: value for key, value in sources[0].notes.items() if key in kept or len(sources) == 1}
    if any(_stored(source) != _stored(sources[0]) for source in sources):
        notes = {key: value for key, value in notes.items() if "quant" not in key} | {"quant": "none"}
    of = [peft_files.ancestor(source.given, source.folder) for source in sources]
    return {**notes, "lorafit": lorafit.__version__, "lineage": {**lineage, "of": of}}


def _stored(opened: Opened) -> list[Any]:
    """How the base was stored that it was trained on."""
    return [opened.notes.get(key) for key in ("quant_start", "double_quant")] + [opened.notes.get("quant", "none")]


def differences(sources: Sequence[Opened]) -> list[str]:
    """What the first's notes say and others' don't; worth telling before they are made one."""
    first, found = sources[0], []
    for other in sources[1:]:
        if other.notes.get("chat") != first.notes.get("chat"):
            found.append(f"{other.given} was trained with another chat; the result carries that of {first.given}")
        if _stored(other) != _stored(first):
            found.append(
                f"{other.given} and {first.given} were trained on bases stored otherwise; the result is for 16 bits"
            )
    return found


def base_folder(opened: Opened) -> str:
    """What PEFT's config calls the base."""
    return str(peft_files.read_config(opened.folder).get("base_model_name_or_path") or opened.base_name)


def write(
    adapter: Adapter, out: Path, sites: Mapping[str, Site], base: str, modules: Iterable[str], int8: bool = False
) -> None:
    """The adapter's folder, whole or not at all."""
    for path, layer in adapter.items():
        if not all(bool(p.isfinite().all()) for p in layer.parameters()):
            raise AdapterError(f"{path}: the result isn't finite; nothing was written")
    listed = list(modules)
    files.write_folder(out, lambda place: peft_files.save(adapter, place, sites, base, listed, int8), again="try again")

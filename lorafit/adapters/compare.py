"""What an adapter is, and how two differ, site by site."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from lorafit import peft_files
from lorafit.adapters.deltas import enough, inner, total
from lorafit.adapters.opened import Opened, identity
from lorafit.errors import AdapterError

MOST = 0.99  # of the energy ‖ΔW‖²


@dataclass(frozen=True)
class Part:
    """A site of an adapter: `scale` and `rank` are those of its factors, `needed` is the rank that holds 99 % of ‖ΔW‖² (None:
    it has no factors), `norm` is ‖ΔW‖."""

    path: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    scale: float | None
    norm: float
    needed: int | None


def parts(opened: Opened) -> list[Part]:
    """All of an adapter's sites."""
    found = []
    for path in opened.paths:
        site, factors = opened.sites[path], opened.adapter[path].factors()
        shape = tuple(site.shape)
        if factors is None:
            found.append(Part(path, site.kind, shape, None, None, float(opened.matrix(path).norm()), None))
            continue
        s, rank = opened.delta(path).values(), factors[0].shape[-2]
        found.append(Part(path, site.kind, shape, rank, float(factors[2]), float(s.norm()), enough(s, MOST)))
    return found


def by_layer(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Norms of sites as norms of the decoder's layers, by number; what is outside of them by its own name."""
    sums: dict[str, float] = {}
    for path, norm in values:
        number = re.search(r"\.(\d+)\.", path)
        name = f"layer {number[1]}" if number else path.rsplit(".", 1)[-1]
        sums[name] = sums.get(name, 0.0) + norm**2
    return {name: math.sqrt(value) for name, value in sums.items()}


def trained_as(opened: Opened) -> tuple[str, dict[str, Any]]:
    """The method that made an adapter, with its settings: not the LoRA that it may be stored as."""
    if trained := opened.notes.get("trained_as"):
        return str(trained.get("method", "?")), dict(trained.get("options") or {})
    method, options = opened.adapter.method, dict(opened.adapter.options)
    if method == "lora" and options.pop("rslora", False):  # as PEFT writes it
        method = "rslora"
    return method, options


def info(opened: Opened) -> dict[str, Any]:
    """All that `lorafit adapter info` tells, in JSON types."""
    found, notes = parts(opened), opened.notes
    method, options = trained_as(opened)
    return {
        "adapter": opened.given,
        "method": method,
        "options": options,
        "stored_as": {"method": opened.adapter.method, "options": opened.adapter.options}
        if notes.get("trained_as")
        else None,
        "base": opened.base_name,
        "base_is_here": opened.base is not None,
        "fingerprint": notes.get("fingerprint", ""),
        "quant": notes.get("quant", "none"),
        "int8": peft_files.read_config(opened.folder).get("peft_type") == peft_files.INT8,
        "parameters": opened.adapter.numbers(),
        "bytes": opened.bytes,
        "step": notes.get("step"),
        "norm": math.hypot(*(part.norm for part in found)),
        "layers": by_layer((part.path, part.norm) for part in found),
        "sites": [asdict(part) for part in found],
        "lineage": notes.get("lineage"),
    }


# --- two -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gap:
    """Two adapters at a site. `distance` is ‖ΔA − ΔB‖ beside the larger of ‖ΔA‖ and ‖ΔB‖: 0 the same, 1 one of them alone, 2
    opposite; `cosine` is that of the angle between them, NaN where one of them is zero."""

    path: str
    norms: tuple[float, float]
    distance: float
    cosine: float


def gap(path: str, one: Opened, other: Opened) -> Gap:
    """At a site where both are; by their factors, or by their matrices where one has none."""
    if one.low(path) and other.low(path):
        a, b = one.delta(path), other.delta(path)
        norms, apart, product = (a.norm(), b.norm()), total([a, b * -1.0]).norm(), inner(a, b)
    else:
        w, v = one.matrix(path).double(), other.matrix(path).double()
        norms, apart, product = (float(w.norm()), float(v.norm())), float((w - v).norm()), float((w * v).sum())
    larger, both = max(norms), norms[0] * norms[1]
    return Gap(path, norms, apart / larger if larger else 0.0, product / both if both else math.nan)


def same_base(one: Opened, other: Opened) -> bool | None:
    """Whether both are for the same weights; None where neither files nor names tell."""
    prints = [
        opened.notes.get("fingerprint") or (identity(opened.base) if opened.base else "") for opened in (one, other)
    ]
    if all(prints):
        return prints[0] == prints[1]
    names = one.base_name, other.base_name
    return names[0] == names[1] if all(names) else None


def diff(one: Opened, other: Opened) -> dict[str, Any]:
    """All that `lorafit adapter diff` tells, in JSON types. AdapterError where no site of both has the same shape."""
    both = [p for p in one.paths if p in other.adapter and one.sites[p].shape == other.sites[p].shape]
    if not both:
        raise AdapterError(f"{one.given} and {other.given} have no site of the same name and shape")
    gaps = [gap(path, one, other) for path in both]
    product = sum(g.cosine * g.norms[0] * g.norms[1] for g in gaps if all(g.norms))
    apart = sum((g.distance * max(g.norms)) ** 2 for g in gaps)
    only = [[p for p in x.paths if p not in both] for x, y in ((one, other), (other, one))]
    lone = [
        math.hypot(*(part.norm for part in parts(x) if part.path in paths))
        for x, paths in zip((one, other), only, strict=True)
    ]
    norms = [math.hypot(lone[i], *(gap.norms[i] for gap in gaps)) for i in (0, 1)]
    larger = max(norms)
    return {
        "adapters": [one.given, other.given],
        "same_base": same_base(one, other),
        "bases": [one.base_name, other.base_name],
        "different": different(one, other),
        "norms": norms,
        "distance": math.sqrt(apart + lone[0] ** 2 + lone[1] ** 2) / larger if larger else 0.0,
        "cosine": product / (norms[0] * norms[1]) if all(norms) else math.nan,
        "only_in": only,
        "sites": [asdict(gap) for gap in gaps],
    }


def different(one: Opened, other: Opened) -> dict[str, list[Any]]:
    """Settings and notes that differ, by name."""
    pair = [_settings(one), _settings(other)]
    return {
        key: [values.get(key) for values in pair]
        for key in dict.fromkeys([*pair[0], *pair[1]])
        if pair[0].get(key) != pair[1].get(key)
    }


def _settings(opened: Opened) -> dict[str, Any]:
    notes = opened.notes
    method, options = trained_as(opened)
    chat = notes.get("chat") or {}
    ranks = sorted({f[0].shape[-2] for _, layer in opened.adapter.items() if (f := layer.factors()) is not None})
    return {
        "method": method,
        **options,
        "ranks": ", ".join(map(str, ranks)),
        "sites": len(opened.paths),
        "quant": notes.get("quant", "none"),
        "fingerprint": notes.get("fingerprint", ""),
        "step": notes.get("step"),
        "learn": notes.get("learn"),
        **{f"chat {key}": value for key, value in chat.items()},
    }


def unlike(one: Opened, other: Opened) -> float:
    """The largest `distance` of a site, for adapters that ought to be the same."""
    return max(gap(path, one, other).distance for path in one.paths)

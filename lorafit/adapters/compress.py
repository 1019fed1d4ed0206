"""A smaller adapter: fewer of the singular directions of its ΔW, by layer or by a budget of bytes for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorafit.adapters import deltas
from lorafit.adapters.combine import Combined, Kept
from lorafit.adapters.compare import gap
from lorafit.adapters.opened import Opened, carried, low_rank, no_biases
from lorafit.errors import AdapterError, ConfigError
from lorafit.log import size as bytes_

NAMES = 98  # most bytes of a tensor in the file's header, beside its path and the two places where it lies


def compress(
    opened: Opened,
    *,
    rank: int | None = None,
    energy: float | None = None,
    size: int | None = None,
    int8: bool = False,
    progress: Callable[[int, int], object] = lambda done, whole: None,
) -> Combined:
    """At most this rank, this share of ‖ΔW‖² at each site, or this many bytes in all; at most one of them, and none keeps the
    factors as they are. `int8`: what a byte budget reckons with. ConfigError for a budget that rank 1 exceeds."""
    no_biases(opened)
    if rank is None and energy is None and size is None:
        if not all(opened.low(path) for path in opened.paths):
            raise AdapterError(f"what {opened.given} adds isn't of low rank; give --rank, --energy or --size as well")
        found = {path: opened.delta(path) for path in opened.paths}
        kept = {path: Kept(delta.rank, 0.0, delta.norm() ** 2) for path, delta in found.items()}
        adapter = opened.adapter
        adapter.notes = _lineage(opened, int8=int8)
        return Combined(adapter, kept)
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank {rank}: must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"--energy {energy}: must be more than 0 and at most 1")
    ranks = _affordable(opened, size, int8) if size is not None else {}
    found, kept = {}, {}
    for done, path in enumerate(opened.paths):
        progress(done, len(opened.paths))
        u, s, vt = opened.svd(path)
        most = ranks.get(path) or (deltas.enough(s, energy) if energy is not None else rank)
        found[path], lost = deltas.cut(u, s, vt, min(most or 1, deltas.actual(s)))
        whole = float(s.square().sum())
        kept[path] = Kept(found[path].rank, lost / whole if whole else 0.0, whole)
    adapter = low_rank(opened.sites, found)
    adapter.notes = _lineage(opened, rank=rank, energy=energy, size=size, int8=int8 or None)
    return Combined(adapter, kept)


def _lineage(opened: Opened, **settings: Any) -> dict[str, Any]:
    return carried([opened], made="compress", **{key: value for key, value in settings.items() if value is not None})


def _affordable(opened: Opened, size: int, int8: bool) -> dict[str, int]:
    """The rank of each site: of all singular directions those with the most energy a byte."""
    values = {path: opened.svd(path)[1] for path in opened.paths}
    price, left = {}, size - 64
    for path in values:
        *lead, out, width = opened.sites[path].shape
        experts = lead[0] if lead else 1
        price[path] = experts * ((out + width) + 4 if int8 else 4 * (out + width))
        left -= price[path] + (4 * out if int8 else 0) + (NAMES + len(path) + 2 * len(str(size))) * (4 if int8 else 2)
    if left < 0:
        raise ConfigError(f"--size {bytes_(size)}: rank 1 at every site takes {bytes_(size - left)} already")
    offers = []
    for path, s in values.items():
        energy = s.square().reshape(-1, s.shape[-1]).sum(0)[1 : deltas.actual(s)]
        offers += [(float(e) / price[path], path) for e in energy]
    ranks, closed = dict.fromkeys(values, 1), set[str]()
    for _, path in sorted(offers, reverse=True):
        if path in closed:
            continue
        if price[path] > left:
            closed.add(path)  # the next ones of this site are worth less: none of them instead of it
            continue
        ranks[path] += 1
        left -= price[path]
    return ranks


def rounded(opened: Opened, back: Opened) -> float:
    """‖ΔW − what came back‖² / ‖ΔW‖² over all sites: what rounding took away too."""
    gaps = [gap(path, opened, back) for path in opened.paths]
    whole = sum(one.norms[0] ** 2 for one in gaps)
    return sum((one.distance * max(one.norms)) ** 2 for one in gaps) / whole if whole else 0.0

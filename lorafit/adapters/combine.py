"""Several adapters as one: Σ wᵢ·ΔWᵢ and its relatives, always of the ΔW themselves.

What an adapter adds is ΔW = s·B·A; adding the As and the Bs apart would add Bᵢ·Aⱼ of different adapters, which nobody trained.
Scales, patterns and methods are in ΔW already, so that adapters of different ranks and alphas combine as any others.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lorafit.adapter import Adapter
from lorafit.adapters import deltas
from lorafit.adapters.compare import same_base
from lorafit.adapters.deltas import Delta
from lorafit.adapters.opened import Opened, carried, low_rank, no_biases
from lorafit.errors import AdapterError, ConfigError

HOWS = {
    "cat": "the exact sum, factors side by side: the ranks add up",
    "linear": "the exact sum, at the smallest rank that holds it",
    "svd": "the sum's best approximation of a rank",
    "ties": "the largest numbers of each, where they agree in sign (arXiv 2306.01708)",
    "dare": "numbers of each dropped at random, the rest scaled up (arXiv 2311.03099)",
}
DENSITY = {"ties": 0.2, "dare": 0.5}  # TIES: the paper's; DARE loses nothing on average at any


@dataclass(frozen=True)
class Kept:
    """A site of the result: its rank, and the share of the energy ‖ΔW‖² that this rank couldn't hold."""

    rank: int
    lost: float
    energy: float


@dataclass(frozen=True)
class Combined:
    """The result, and what became of each site."""

    adapter: Adapter
    sites: dict[str, Kept]

    @property
    def lost(self) -> float:
        """Of the whole energy."""
        whole = sum(kept.energy for kept in self.sites.values())
        return sum(kept.lost * kept.energy for kept in self.sites.values()) / whole if whole else 0.0


def combine(
    sources: Sequence[Opened],
    weights: Sequence[float],
    how: str,
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], object] = lambda done, whole: None,
) -> Combined:
    """One adapter of these, each times its weight; a site that an adapter hasn't counts as zero there.

    `rank`: of the result, for svd by default the largest of the adapters' ranks at the site, for ties and dare their sum;
    where what an adapter adds isn't of low rank, the r that it was trained with counts.
    `density`: the share of numbers that ties and dare keep; 1 for a single adapter, which nothing disagrees with.
    AdapterError for other bases, or a method without factors where the sum must be exact.
    """
    if len(sources) == 1 and weights[0] == 1 and rank is density is None and not _all_low(sources[0]):
        sources[0].adapter.notes = carried(sources, made="combine", how=how, weights=list(weights))
        return Combined(sources[0].adapter, {})  # whatever its method, alone it is itself
    exact = how in ("cat", "linear")
    _check(sources, how, rank, density, exact)
    if density is None:
        density = DENSITY.get(how, 1.0) if len(sources) > 1 else 1.0
    paths = [path for path in sources[0].sites if any(path in source.adapter for source in sources)]
    paths += [p for source in sources[1:] for p in source.paths if p not in sources[0].sites and p not in paths]
    sites = {path: site for source in reversed(sources) for path, site in source.sites.items()}
    made, kept = {}, {}
    for done, path in enumerate(paths):
        progress(done, len(paths))
        there = [(source, weight) for source, weight in zip(sources, weights, strict=True) if path in source.adapter]
        if how in ("cat", "linear", "svd"):
            found, lost, energy = _summed(path, there, how, rank)
        else:
            found, lost, energy = _formed(path, there, sites[path].shape, how, rank, density, seed)
        made[path] = found
        kept[path] = Kept(found.rank, lost / energy if energy else 0.0, energy)
    adapter = low_rank(sites, made)
    settings = {"rank": rank, "density": density if how in DENSITY else None, "seed": seed if how == "dare" else None}
    adapter.notes = carried(
        sources, made="combine", how=how, weights=list(weights), **{k: v for k, v in settings.items() if v is not None}
    )
    return Combined(adapter, kept)


def _check(sources: Sequence[Opened], how: str, rank: int | None, density: float | None, exact: bool) -> None:
    first = sources[0]
    if given := next((source.given for source in sources if source.notes.get("new_tokens")), None):
        raise AdapterError(f"{given} has new tokens, whose rows no sum has a place for; merge it, or use it by itself")
    for other in sources[1:]:
        if same_base(first, other) is False:
            raise AdapterError(
                f"{first.given} and {other.given} are for different bases ({first.base_name or '?'}, {other.base_name or '?'});"
                " what is added to one means nothing for the other"
            )
        for path in other.paths:
            if path in first.sites and first.sites[path].shape != other.sites[path].shape:
                raise AdapterError(
                    f"{path} is {_size(first, path)} in {first.given}, {_size(other, path)} in {other.given}"
                )
    if rank is not None and exact:
        raise ConfigError(f"--rank goes with svd, ties and dare; {how} is exact at the rank that it takes")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank {rank}: must be at least 1")
    if density is not None and how not in DENSITY:
        raise ConfigError(f"--density goes with ties and dare; {how} keeps every number")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"--density {density}: must be more than 0 and at most 1")
    for source in sources:
        no_biases(source)
        if _all_low(source):
            continue
        what = f"what {source.given} ({source.adapter.method}) adds isn't of low rank"
        unknown = any(source.rank(path) is None for path in source.paths)
        if exact:
            raise AdapterError(f"{what}, so no exact sum is; --how svd{' --rank N' if unknown else ''}")
        if rank is None and unknown:
            raise ConfigError(f"{what}, and there is no rank to go by; give --rank")


def _all_low(opened: Opened) -> bool:
    return all(opened.low(path) for path in opened.paths)


def _size(opened: Opened, path: str) -> str:
    return "×".join(map(str, opened.sites[path].shape))


def _summed(path: str, there: Sequence[tuple[Opened, float]], how: str, rank: int | None) -> tuple[Delta, float, float]:
    """The sum by its factors, with the energy it lacks and had."""
    each = [source.delta(path) for source, _ in there]
    parts = [delta * weight for delta, (_, weight) in zip(each, there, strict=True)]
    whole = deltas.total(parts)
    if how == "cat":
        return whole, 0.0, whole.norm() ** 2
    s = whole.values()
    if float(s.norm()) <= deltas.NOTHING * max(part.norm() for part in parts):  # they cancel out, but for rounding
        return whole.truncated(1)[0] * 0.0, 0.0, 0.0
    most = deltas.actual(s) if how == "linear" else rank or max(source.rank(path) or 0 for source, _ in there)
    found, lost = whole.truncated(min(most, deltas.actual(s)))
    return found, 0.0 if how == "linear" else lost, float(s.square().sum())


def _formed(
    path: str,
    there: Sequence[tuple[Opened, float]],
    shape: Sequence[int],
    how: str,
    rank: int | None,
    density: float,
    seed: int,
) -> tuple[Delta, float, float]:
    """TIES or DARE of each matrix of a site, brought back to a rank, with the energy it lacks and had."""
    *lead, out, width = shape
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{path}".encode()))
    weights = [weight for _, weight in there]
    held = [source.delta(path) if source.low(path) else source.matrix(path) for source, _ in there]
    most = rank or sum(source.rank(path) or 0 for source, _ in there)
    found, lacks, energy = [], 0.0, 0.0
    for index in range(lead[0]) if lead else [None]:
        rows = [_rows(one, index) for one in held]
        if how == "ties":
            w = deltas.ties(rows, (out, width), weights, density)
        else:
            w = deltas.dare(rows, (out, width), weights, density, generator)
        one, lost = deltas.best(w, most, generator)
        found.append(one)
        lacks += lost
        energy += float(w.double().square().sum())
    if not lead:
        return found[0], lacks, energy
    return Delta(torch.stack([one.b for one in found]), torch.stack([one.a for one in found])), lacks, energy


def _rows(held: Delta | Tensor, index: int | None) -> deltas.Rows:
    """How some rows of ΔW, or of an expert's, are made."""
    if isinstance(held, Tensor):
        whole = held if index is None else held[index]
        return lambda begin, end: whole[begin:end]
    one = held if index is None else Delta(held.b[index], held.a[index])
    return partial(Delta.rows, one)

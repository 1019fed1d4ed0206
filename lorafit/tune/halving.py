"""Successive halving (arXiv 1502.07943, 1810.05834): who goes on is decided from held-out losses at rungs.

Candidates are compared after an eighth and three eighths of their steps (later where these are few), each by its own count, so
batches of any size meet at the same share of the data. A third of them goes on, and at least two do from the first rung.
From the first rung these don't all have one learning rate, where there are others: early losses rank rates wrongly, and those of
a rate's ranks are alike, so a good rate could be out with all of them.
Nobody waits longer than the result needs: who can't be overtaken any more goes on at once, who can't make it is cut at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorafit.evaluate import spacing

ETA = 3
EIGHTHS = (1, 3)  # of its steps, after which a candidate is compared
FEWEST = 8  # steps before anybody is cut


def rungs(steps: int) -> tuple[int, int]:
    """The steps after which a candidate with so many is compared: those of `train`'s own evaluations, eight a run, but none
    before FEWEST steps, when the largest rate that doesn't diverge looks worst, nor the second one soon after the first."""
    each = spacing(steps)
    first = max(EIGHTHS[0], math.ceil(FEWEST / each)) * each
    return min(steps, first), min(steps, max(EIGHTHS[1] * each, 2 * first))


def shares(steps: int) -> tuple[float, float, float]:
    """The same, and the end, as shares of its training."""
    first, second = rungs(steps)
    return first / steps, second / steps, 1.0


def keeps(size: int, finalists: int = 1) -> tuple[int, int]:
    """How many of `size` candidates go on from each rung: rounded up from the first, where losses say little yet, and down from
    the second, after which one costs as much as five have before the first."""
    first = max(math.ceil(size / ETA), min(size, 2))
    return first, max(first // ETA, min(first, finalists))


def cost(size: int, steps: int, finalists: int = 1) -> float:
    """What a search over `size` candidates of so many steps takes, in whole trainings."""
    first, last = keeps(size, finalists)
    begin, later, end = shares(steps)
    return begin * size + (later - begin) * first + (end - later) * last


@dataclass(frozen=True)
class Cut:
    """Why a candidate is out: its place among `of` at a rung, of which `keep` go on."""

    rung: int
    place: int
    of: int
    keep: int


@dataclass(frozen=True)
class Verdicts:
    """Who goes on from which rung, and who is out."""

    passed: Mapping[int, frozenset[int]]  # rung -> candidates
    cut: Mapping[int, Cut]


@dataclass
class Heat:
    """Candidates that are compared with each other. `size`: how many there will be; None: not known yet, nobody is judged.

    `losses` by rung and candidate; infinite for one that has failed. Equal losses: the earlier candidate is the better. `spared`
    go on whatever their losses are, beside as many others as go on without them. `rates`: learning rates of the candidates that
    have been given one.
    """

    size: int | None
    finalists: int = 1
    spared: frozenset[int] = frozenset()
    rates: dict[int, float] = field(default_factory=dict)
    losses: tuple[dict[int, float], ...] = field(default_factory=lambda: tuple({} for _ in EIGHTHS))

    def verdicts(self) -> Verdicts:
        """What can be said by now, whatever the losses that are still to come."""
        passed: dict[int, frozenset[int]] = {}
        cut: dict[int, Cut] = {}
        if self.size is None:
            return Verdicts(passed, cut)
        entering = self.size
        for rung, keep in enumerate(keeps(self.size, self.finalists)):
            there = {n: loss for n, loss in self.losses[rung].items() if rung == 0 or n in passed[rung - 1]}
            missing = entering - len(there)
            rates = self.rates if rung == 0 and keep > 1 else {}
            hopeful = best(there, keep, self.spared, rates) | self.spared  # by now: nobody else ever will be
            certain = {
                n for n, ahead in ranked(there) if not missing or ahead + missing < keep - bool(rates)
            } | self.spared
            passed[rung] = frozenset(n for n in hopeful & certain & there.keys() if _finite(there[n]))
            cut |= {
                n: Cut(rung, ahead + 1, entering, keep)
                for n, ahead in ranked(there)
                if n not in hopeful or not _finite(there[n])
            }
            entering = keep + len(self.spared) if missing else len(passed[rung])
        return Verdicts(passed, cut)

    def complete(self) -> bool:
        """Everybody who goes on from the rung before has reached the last one, or failed."""
        if self.size is None or len(self.losses[0]) < self.size:
            return False
        return self.verdicts().passed[0] <= set(self.losses[-1])


def ranked(losses: Mapping[int, float]) -> list[tuple[int, int]]:
    """Candidates by loss, each with how many are better."""
    order: Sequence[int] = sorted(losses, key=lambda n: (losses[n] if _finite(losses[n]) else math.inf, n))
    return [(n, ahead) for ahead, n in enumerate(order)]


def best(losses: Mapping[int, float], keep: int, spared: frozenset[int], rates: Mapping[int, float]) -> frozenset[int]:
    """The `keep` best that haven't failed. Where these have one rate, but for who is spared, the best of another rate takes the
    place of the last."""
    order = [n for n, _ in ranked(losses) if _finite(losses[n])]
    judged = [n for n in order if n not in spared]
    other = next((n for n in judged if rates.get(n) != rates.get(judged[0])), None)
    if other is None or other in order[:keep]:
        return frozenset(order[:keep])
    return frozenset({*order[: keep - 1], judged[0], other})


def _finite(loss: float) -> bool:
    return math.isfinite(loss)

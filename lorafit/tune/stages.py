"""Searching one setting at a time: the settings as they are, then the learning rate, the rank, the sites.

Each stage tries other values of one setting of the best candidate so far and compares them with it, after the same share of
training. The best of all is trained to its end, and so are the settings as they are: what is found is never worse. Ranks and
sites are compared at a good learning rate, which decides more than they do (arXiv 2602.04998).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from lorafit.tune.halving import EIGHTHS, Cut, Heat, Verdicts, keeps, ranked, shares
from lorafit.tune.space import Range, Space, Values, digits, nearly
from lorafit.tune.strategy import FIRST

AS_THEY_ARE = frozenset({1})  # the first candidate
APART = 3.0  # between neighbouring learning rates
FEW = 7  # rates that a stage tries at most


def around(centre: float, tried: Sequence[float], within: Range | None = None) -> Iterator[float]:
    """Learning rates from the centre outwards, a factor of APART apart, then those between; none that was tried."""
    known = list(tried)
    for power in (0, 1, -1, 2, -2, 0.5, -0.5, 1.5, -1.5):
        rate = digits(centre * APART**power)
        inside = within is None or within.low <= rate <= within.high
        if inside and not any(nearly(rate, other) for other in known):
            known.append(rate)
            yield rate


class Staged:
    """A Strategy. `searched`: a stage for each setting, in this order. `start`: what those settings are without a search."""

    def __init__(self, searched: Space, start: Values, size: int | None, finalists: int) -> None:
        self.searched, self.start, self.size, self.finalists = searched, start, size, finalists
        self.timed = size is None  # how many there is time for is asked again before each stage
        self.rate: float | None = None
        self.stages = list(searched)
        self.values: dict[int, Values] = {}
        self.ahead: list[Values] = []  # candidates of this stage that weren't asked for yet
        self.heats: list[Heat] = []
        self.last: dict[int, float] = {}  # losses at the last rung, of all stages
        self.over = False

    @property
    def wants_rate(self) -> bool:
        """If the learning rate is searched, and there is more than one candidate."""
        return "lr" in self.searched and self.rate is None and not self.heats and self.size != 1

    def centre(self, rate: float) -> None:
        """Learning rates are tried around this one."""
        self.rate = rate

    def resize(self, size: int) -> None:
        """The stages to come share what is left."""
        self.size = max(size, len(self.values))

    def ask(self) -> Values | None:
        """The next of this stage; of the next stage where this one is decided."""
        if not self.heats:
            self._begin([{}])
        while not self.ahead and not self.over and self.heats[-1].complete():
            if self.size is None:
                return None
            self._next()
        if not self.ahead:
            return None
        values = self.ahead.pop(0)
        self.values[len(self.values) + 1] = values
        return values

    def _next(self) -> None:
        best = self.best()
        if not self.stages or best is None:
            self.over = True
            return
        self._begin([], best)
        if self.timed and self.stages:
            self.size = None

    def _begin(self, first: list[Values], best: int | None = None) -> None:
        """Make the next stage's candidates: beside `first`, others than the best so far."""
        like = {} if best is None else self.values[best]
        while self.stages and not self.ahead:
            key = self.stages.pop(0)
            others = list(self._others(key, like.get(key, self.start.get(key))))
            self.ahead = [{**like, key: value} for value in others[: self._share(len(first))]]
        self.ahead = first + self.ahead
        if not self.ahead:
            self.over = best is not None
            return
        self.heats.append(Heat(len(self.ahead) + (best is not None), spared=frozenset() if self.heats else AS_THEY_ARE))
        if best is not None:
            for rung, losses in enumerate(self.heats[-1].losses):
                losses[best] = self._loss(best, rung)

    def _share(self, first: int) -> int:
        """How many candidates a stage has: half of those left, all in the last."""
        if self.size is None:
            return FIRST - 1
        left = self.size - len(self.values) - first
        return max(0, math.ceil(left / 2) if self.stages else left)

    def _others(self, key: str, now: Any) -> Iterator[Any]:
        """Other values of a setting, those that are tried first at the front."""
        one = self.searched[key]
        if key == "lr" and isinstance(one, Range):
            yield from list(around(self.rate or now or math.sqrt(one.low * one.high), [now] if now else [], one))[:FEW]
            return
        for value in one.grid():
            near = isinstance(one, Range) and now and isinstance(value, float) and nearly(value, now)
            if value != now and not near:
                yield value

    def _loss(self, number: int, rung: int) -> float:
        return next(heat.losses[rung][number] for heat in self.heats if number in heat.losses[rung])

    def best(self) -> int | None:
        """The best by now at the last rung; None if none has got there."""
        order = [number for number, _ in ranked(self.last) if math.isfinite(self.last[number])]
        return order[0] if order else None

    def report(self, number: int, rung: int, loss: float) -> None:
        """For the stage's heat; the last rung compares all stages."""
        self.heats[-1].losses[rung][number] = loss
        if rung == len(EIGHTHS) - 1:
            self.last[number] = loss

    def verdicts(self) -> Verdicts:
        """From the first rung as the stages' heats say; from the last the best of all, when all stages are over."""
        judged = [heat.verdicts() for heat in self.heats]
        passed = {0: frozenset[int]().union(*(found.passed.get(0, ()) for found in judged))}
        cut = {n: out for found in judged for n, out in found.cut.items() if out.rung == 0 and n not in self.last}
        cut = {n: out for n, out in cut.items() if n not in passed[0]}
        good = [n for n, _ in ranked(self.last) if math.isfinite(self.last[n])][: self.finalists]
        spared = [n for n in AS_THEY_ARE if math.isfinite(self.last.get(n, math.inf))]
        good += [n for n in spared if n not in good]
        for number, before in ranked(self.last):
            if number not in good:
                cut[number] = Cut(len(EIGHTHS) - 1, before + 1, len(self.last), self.finalists)
        passed[1] = frozenset(good if self.over else spared)
        return Verdicts(passed, cut)

    def cost(self, size: int, steps: int) -> float:
        """Of a stage with half of the candidates, and of others that share the rest; two are trained to their end."""
        first, second, end = shares(steps)
        total, left, stages = min(size, 2) * (end - second), size - 1, max(1, len(self.searched))
        for stage in range(stages):
            own = (math.ceil(left / 2) if stage < stages - 1 else left) + (stage == 0)
            left -= own - (stage == 0)
            total += first * own + (second - first) * min(own, keeps(own + (stage > 0))[0])
        return total

"""Searching one setting at a time: the settings as they are, then the learning rate, the rank, the sites.

Each stage tries other values of one setting of the best candidate so far and compares them with it, after the same share of
training. The best of all is trained to its end, and so are the settings as they are: what is found is never worse. Ranks and
sites are compared at a good learning rate, which decides more than they do (arXiv 2602.04998).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lorafit.tune.halving import EIGHTHS, Cut, Heat, Verdicts, keeps, ranked, shares
from lorafit.tune.space import Range, Space, Values, alike, digits, nearly
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


def split(left: int, most: Sequence[int]) -> list[int]:
    """So many candidates over stages of which each has at most so many: half of those left, all in the last; more where the
    stages after it can't take them."""
    found: list[int] = []
    for stage, its in enumerate(most):
        half = math.ceil(left / 2) if stage < len(most) - 1 else left
        found.append(min(its, max(half, left - sum(most[stage + 1 :]))))
        left -= found[-1]
    return found


class Staged:
    """A Strategy. `searched`: a stage for each setting, in this order. `start`: what those settings are without a search.

    Without a size the first stage begins with FIRST candidates and goes on when it is told for how many there is time; it is
    asked again before each stage.
    """

    def __init__(self, searched: Space, start: Values, size: int | None, finalists: int) -> None:
        self.searched, self.start, self.size, self.finalists = searched, start, size, finalists
        self.timed = size is None
        self.rate: float | None = None
        self.stages = list(searched)
        self.values: dict[int, Values] = {}
        self.ahead: list[Values] = []  # candidates of this stage that weren't asked for yet
        self.heats: list[Heat] = []
        self.last: dict[int, float] = {}  # losses at the last rung, of all stages
        self.over = False
        self.left_out = False  # a stage had more values than candidates

    @property
    def wants_rate(self) -> bool:
        """If the learning rate is searched, and there is more than one candidate."""
        return "lr" in self.searched and self.rate is None and not self.heats and self.size != 1

    def centre(self, rate: float) -> None:
        """Learning rates are tried around this one."""
        self.rate = rate

    @property
    def whole(self) -> bool:
        """Whether each stage has tried all its values."""
        return self.over and not self.stages and not self.left_out

    def resize(self, size: int) -> int:
        """The first stage has its share, if it is waiting for that; the stages to come share what is left."""
        asked, heat = len(self.values), self.heats[-1]
        self.size = size = max(min(size, 1 + sum(self._most(self.searched))), asked)
        if heat.size is None:
            share = split(size - 1, [asked + len(self.ahead) - 1, *self._most(self.stages)])[0]
            self._shorten(max(0, share - (asked - 1)))
            heat.size = asked + len(self.ahead)
            self._forget_size()
        return size

    def _forget_size(self) -> None:
        """It is to be asked for again before the next stage."""
        if self.timed and self.stages and not self.ahead:
            self.size = None

    def ask(self) -> Values | None:
        """The next of this stage; of the next stage where this one is decided."""
        if not self.heats:
            self._begin([{}])
        while not self.ahead and not self.over and self.heats[-1].complete():
            if self.size is None:
                return None
            self._next()
        if not self.ahead or (self.heats[-1].size is None and len(self.values) >= FIRST):
            return None
        values = self.ahead.pop(0)
        self.values[len(self.values) + 1] = values
        if self.size is not None:
            self._forget_size()
        return values

    def _next(self) -> None:
        best = self.best()
        if not self.stages or best is None:
            self.over = True
            return
        self._begin([], best)

    def _begin(self, first: list[Values], best: int | None = None) -> None:
        """Make the next stage's candidates: beside `first`, others than the best so far."""
        like = {} if best is None else self.values[best]
        while self.stages and not self.ahead:
            most = self._most(self.stages)
            key = self.stages.pop(0)
            known = [alike(values, self.start) for values in self.values.values()]
            for value in self._others(key):
                found = alike(values := {**like, key: value}, self.start)
                if found not in known:  # it would be where the method doesn't have the setting
                    self.ahead.append({key: value for key, value in values.items() if key in found})
            if self.size is not None:
                self._shorten(split(self.size - len(self.values) - len(first), most)[0])
        self.ahead = first + self.ahead
        if not self.ahead:
            self.over = best is not None
            return
        size = None if self.size is None else len(self.ahead) + (best is not None)
        self.heats.append(Heat(size, spared=frozenset() if self.heats else AS_THEY_ARE))
        if best is not None:
            for rung, losses in enumerate(self.heats[-1].losses):
                losses[best] = self._loss(best, rung)

    def _shorten(self, share: int) -> None:
        """Leave the stage that begins so many candidates."""
        self.left_out |= share < len(self.ahead)
        del self.ahead[share:]

    def _most(self, keys: Iterable[str]) -> list[int]:
        """How many candidates the stages of these settings can have."""
        return [len(list(self._others(key))) for key in keys]

    def _others(self, key: str) -> Iterator[Any]:
        """Other values of a setting than it has, those that are tried first at the front."""
        one, now = self.searched[key], self.start.get(key)
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
        """Of its stages; two candidates are trained to their end."""
        first, second, end = shares(steps)
        total = min(size, 2) * (end - second)
        for stage, others in enumerate(split(size - 1, self._most(self.searched))):
            own = others + (stage == 0)
            total += first * own + (second - first) * min(own, keeps(own + (stage > 0))[0])
        return total

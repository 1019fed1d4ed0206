"""What a search asks of whoever proposes candidates; and the plain kind, whose candidates are all compared with each other."""

from __future__ import annotations

from typing import Protocol

from lorafit.tune.halving import Heat, Verdicts, cost, shares
from lorafit.tune.space import Values

FIRST = 4  # candidates that are tried while it isn't known yet for how many there is time


class Strategy(Protocol):
    """Proposes candidates, numbered from 1 in the order in which they are asked for, and judges them.

    The same calls in the same order have the same answers, so a search is resumed by repeating them.
    """

    size: int | None  # how many candidates there will be at most; None: not known yet

    @property
    def wants_rate(self) -> bool:
        """Whether `centre` is to be called before the first candidate is asked for."""

    def centre(self, rate: float) -> None:
        """Take in the learning rate that a range test found."""

    @property
    def whole(self) -> bool:
        """Whether all candidates that there are have been asked for."""

    def resize(self, size: int) -> int:
        """Take in how many candidates there is time for; how many there will be at most."""

    def ask(self) -> Values | None:
        """The next candidate's settings, beside those that all have; None: not now."""

    def report(self, number: int, rung: int, loss: float) -> None:
        """Take in a candidate's held-out loss at a rung, infinite if it failed."""

    def verdicts(self) -> Verdicts:
        """Who goes on and who is out, by now."""

    def cost(self, size: int, steps: int) -> float:
        """What a search over so many candidates of so many steps takes, in whole trainings."""


class Sampler(Protocol):
    """Draws candidates."""

    most: int | None  # how many different ones there are; None: any number

    def draw(self, number: int, size: int | None) -> Values:
        """Candidate `number` (from 1) of `size`."""

    def told(self, number: int, loss: float) -> None:
        """Take in a candidate's held-out loss at the first rung."""


class AllTogether:
    """Candidates of a sampler in one heat."""

    wants_rate = False

    def __init__(self, sampler: Sampler, size: int | None, finalists: int) -> None:
        self.sampler = sampler
        self.size: int | None = None
        self.asked = 0
        self.heat = Heat(None, finalists)
        if size is not None:
            self.resize(size)

    def centre(self, rate: float) -> None:
        """Not wanted."""

    @property
    def whole(self) -> bool:
        """Of those of the sampler, where they can be counted."""
        return self.asked == self.sampler.most

    def resize(self, size: int) -> int:
        """At least what was asked for, at most what there is."""
        most = self.sampler.most
        self.size = self.heat.size = max(self.asked, size if most is None else min(size, most))
        return self.size

    def ask(self) -> Values | None:
        """The sampler's next."""
        limit = self.size if self.size is not None else min(FIRST, self.sampler.most or FIRST)
        if self.asked >= limit:
            return None
        self.asked += 1
        values = self.sampler.draw(self.asked, self.size)
        if not values:  # the settings as they are: what is found is never worse
            self.heat.spared = frozenset({self.asked})
        if "lr" in values:
            self.heat.rates[self.asked] = values["lr"]
        return values

    def report(self, number: int, rung: int, loss: float) -> None:
        """For the heat, and at the first rung for the sampler."""
        self.heat.losses[rung][number] = loss
        if rung == 0:
            self.sampler.told(number, loss)

    def verdicts(self) -> Verdicts:
        """The heat's."""
        return self.heat.verdicts()

    def cost(self, size: int, steps: int) -> float:
        """Of one heat, and of what is spared in it."""
        return cost(size, steps, self.heat.finalists) + len(self.heat.spared) * (1 - shares(steps)[0])

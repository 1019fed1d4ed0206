"""What each candidate's metrics hold: its own share of the steps that it shared with others."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from lorafit.batches import Plan
from lorafit.fit import Training
from lorafit.run import Run
from lorafit.train.loop import Step
from lorafit.tune.search import Search, name_of


class Books:
    """`of` is a candidate's run folder."""

    def __init__(self, of: Callable[[int], Run]) -> None:
        self.of = of
        self._trainings: dict[int, Training] = {}
        self._sizes: dict[int, Iterator[int]] = {}
        self._last = time.monotonic()

    def add(self, number: int, training: Training) -> None:
        """A candidate from now on."""
        self._trainings[number] = training

    def forget(self, number: int) -> None:
        """One that is out."""
        self._trainings.pop(number, None)
        self._sizes.pop(number, None)

    def pause(self) -> None:
        """What was done since the last step doesn't belong to the next one."""
        self._last = time.monotonic()

    def record(self, search: Search, step: Step) -> None:
        """A line for everybody who took part in a step, but those who failed in it."""
        seconds = time.monotonic() - self._last
        for number, candidate in search.candidates.items():
            if name_of(number) not in step.jobs or candidate.state == "failed":
                continue
            training = self._trainings[number]
            if number not in self._sizes:
                self._sizes[number] = sizes(training.job.plan, candidate.taken - 1)
            tokens = next(self._sizes[number])
            training.spent["steps"] += seconds
            training.tokens += tokens
            training.record(self.of(number), replace(step, number=candidate.taken, tokens=tokens), seconds)
        self._last = time.monotonic()


def sizes(plan: Plan, since: int) -> Iterator[int]:
    """The tokens of step `since`, since + 1, … (from 0) of a job."""

    def every() -> Iterator[int]:
        for number in itertools.count():
            epoch = plan.epoch(number)
            for run in epoch.runs:
                yield int(plan.lengths[epoch.order[run.start : run.stop]].sum())

    return itertools.islice(every(), since, None)

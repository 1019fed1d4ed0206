"""The engine: candidates trained together over one base, compared at rungs, cut, replaced. A generator of `Round`, one for each
step; it does no input or output. Whoever drives it records, saves and shows.

Candidates share the forward of a step and nothing else (train/loop.py), so one that wins is what it would be alone: its own
evaluations, early stop and schedule are those of `lorafit train` with its settings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lorafit.evaluate import spacing
from lorafit.fit import Training
from lorafit.train.loop import Step, train
from lorafit.tune import together
from lorafit.tune.halving import EIGHTHS, Cut, rungs
from lorafit.tune.space import Values
from lorafit.tune.strategy import Strategy

State = Literal["training", "waiting", "cut", "failed", "done"]
RANGE_STEPS = 32  # of a range test, or a quarter of a training's where that is less
FEWEST = 8  # with fewer a range test tells nothing
SPAN = 30.0  # it goes from the baseline's rate divided by this to that rate times this
BELOW = 4.0  # the rate with the lowest loss there is this much above the best one for a whole training
FARTHEST = 10.0  # from the baseline's rate, that a range test may move the centre


def name_of(number: int) -> str:
    """A candidate's adapter in the host, and its folder."""
    return f"{number:03d}"


@dataclass
class Candidate:
    """One set of settings, and how far it has come. `training` is None when it is out, and only its figures are left, or while
    it waits on disk."""

    number: int
    values: Values
    training: Training | None
    steps: int
    state: State = "training"
    why: str = ""
    losses: list[float] = field(default_factory=list)  # at the rungs
    taken: int = 0  # steps
    best_loss: float = math.inf
    best_step: int = 0

    @property
    def rungs(self) -> tuple[int, ...]:
        """The steps after which it is compared."""
        return rungs(self.steps)


@dataclass(frozen=True)
class Event:
    """What happened to a candidate (0: to the search)."""

    kind: Literal["range", "budget", "lost", "joined", "evaluated", "rung", "cut", "failed", "done"]
    candidate: int
    figures: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """In JSON types, but for infinite figures."""
        return {"event": self.kind, "candidate": self.candidate or None, **self.figures}


@dataclass(frozen=True)
class Round:
    """A step of all that were training, and what came of it. `step` is None where candidates were only put in or judged."""

    step: Step | None
    events: tuple[Event, ...]
    testing: bool = False  # of the range test: nothing that a search could be taken up from


Make = Callable[[int, Values], Training]
Wake = Callable[[Candidate], Training]


class Search:
    """`make` makes a candidate's adapter and job, `wake` those of one that waited on disk; `places` is how many train at once,
    `room` the bytes that all adapters may take with their gradients and optimisers. `time_for` says, from the trainings done so
    far (whole and parts), how many candidates there is time for; it is asked where the strategy has no size.

    Everything that a search is taken up from lies in `candidates`, `calls` (those of the strategy, in order), `halvings` and
    `before`.
    """

    def __init__(
        self,
        strategy: Strategy,
        make: Make,
        *,
        places: int,
        wake: Wake | None = None,
        room: int | None = None,
        time_for: Callable[[float], int] = lambda done: 8,
    ) -> None:
        self.strategy, self.make, self.wake = strategy, make, wake
        self.places, self.room, self.time_for = places, room, time_for
        self.candidates: dict[int, Candidate] = {}
        self.calls: list[list[Any]] = []
        self.halvings = 0
        self.before = math.nan  # held-out loss before training: a fresh adapter changes nothing, so it is everybody's
        self.scored, self.scoring = 0, 0.0  # evaluations, and their seconds
        self._jobs: list[Any] = []
        self._events: list[Event] = []
        self._idle = False  # the strategy had nothing when it was asked, and was told nothing since

    # --- what the strategy was asked and told ----------------------------------------------------------------------------

    def call(self, what: str, *arguments: Any) -> Any:
        """Call the strategy, and remember that."""
        self.calls.append([what, *arguments])
        answer = getattr(self.strategy, what)(*arguments)
        self._idle = what == "ask" and answer is None
        return answer

    # --- the rounds ------------------------------------------------------------------------------------------------------

    def rounds(self) -> Iterator[Round]:
        """Until nobody is left to train. May be dropped after any round that isn't `testing`, and taken up from there."""
        if self.strategy.wants_rate:
            yield from self.range_test()
        while True:
            self._fill()
            if self._events:
                yield self.round(None)
            if not self._jobs:
                return
            host = next(c.training.host for c in self.candidates.values() if c.training)
            for step in train(host, self._jobs, self.halvings):
                self.halvings = step.halvings
                for candidate in self._training():
                    self._after(candidate, step)
                self.judge()
                self._fill()
                yield self.round(step)

    def round(self, step: Step | None) -> Round:
        """What happened since the last one."""
        events, self._events = tuple(self._events), []
        return Round(step, events)

    def _training(self) -> list[Candidate]:
        return [c for c in self.candidates.values() if c.state == "training"]

    def say(self, kind: Any, candidate: int, **figures: Any) -> None:
        """Something happened to a candidate, or (0) to the search."""
        self._events.append(Event(kind, candidate, figures))

    # --- one step later --------------------------------------------------------------------------------------------------

    def _after(self, candidate: Candidate, step: Step) -> None:
        """What a step has made of a candidate: it fails, is evaluated, stops early, reaches a rung, or its end."""
        training = candidate.training
        assert training is not None and training.config.eval_every is not None
        training.halvings = self.halvings
        job, figures = training.job, step.jobs[candidate_name(candidate)]
        candidate.taken = job.done
        job.failed = job.failed or training.watch.loss(figures.loss)
        if job.failed:
            self._fail(candidate, job.failed)
            return
        at = job.done
        due = at % training.config.eval_every == 0 or at == job.steps
        reached = len(candidate.losses) < len(EIGHTHS) and at >= candidate.rungs[len(candidate.losses)]
        if not due and not reached:
            return
        loss, enough = self._score(training), ""
        if due:  # between `train`'s own evaluations early stop isn't told of a rung either
            best, enough = training.watch.evaluation(at, loss)
            candidate.best_loss, candidate.best_step = training.watch.best_loss, training.watch.best_step
            self.say("evaluated", candidate.number, step=at, held_out_loss=loss, best=best)
        if not math.isfinite(loss):
            job.failed = enough or f"the held-out loss is {loss}"
            self._fail(candidate, job.failed)
            return
        if reached:
            candidate.state = "waiting"
            self._reach(candidate, loss)
        if enough or at == job.steps:
            candidate.state, candidate.why = "done", enough if at < job.steps else ""
            while len(candidate.losses) < len(EIGHTHS):
                self._reach(candidate, candidate.best_loss)
            self.say("done", candidate.number, step=at, held_out_loss=candidate.best_loss, why=candidate.why)
        self._leave(candidate)

    def _score(self, training: Training) -> float:
        began = time.monotonic()
        loss = training.held_out_loss()
        self.scored, self.scoring = self.scored + 1, self.scoring + time.monotonic() - began
        return loss

    def _reach(self, candidate: Candidate, loss: float) -> None:
        rung = len(candidate.losses)
        candidate.losses.append(loss)
        self.call("report", candidate.number, rung, loss)
        self.say("rung", candidate.number, rung=rung, step=candidate.taken, held_out_loss=loss)

    def _fail(self, candidate: Candidate, why: str) -> None:
        candidate.state, candidate.why = "failed", why
        for rung in range(len(candidate.losses), len(EIGHTHS)):
            self.call("report", candidate.number, rung, math.inf)
        self.say("failed", candidate.number, step=candidate.taken, why=why)
        self._leave(candidate)
        self._forget(candidate)

    def _leave(self, candidate: Candidate) -> None:
        """Take no further part, unless it is still training."""
        if candidate.state != "training" and candidate.training is not None:
            job = candidate.training.job
            self._jobs[:] = [other for other in self._jobs if other is not job]

    def _forget(self, candidate: Candidate) -> None:
        """Its adapter, its gradients and its optimiser are free for others."""
        if candidate.training is not None:
            candidate.training.host.remove(candidate_name(candidate))
            candidate.training = None

    def judge(self) -> None:
        """Cut whoever is out by now."""
        for number, out in self.strategy.verdicts().cut.items():
            candidate = self.candidates[number]
            if candidate.state in ("waiting", "done"):
                candidate.state, candidate.why = "cut", reason(candidate, out)
                self.say("cut", number, step=candidate.taken, rung=out.rung, why=candidate.why)
                self._forget(candidate)

    # --- who trains ------------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Give free places to those who go on, the farthest first, then to new candidates."""
        while len(self._jobs) < self.places:
            if (candidate := self.following()) is None:
                return
            assert candidate.training is not None
            candidate.state = "training"
            self._jobs.append(candidate.training.job)
            self._jobs.sort(key=lambda job: job.name)

    def following(self) -> Candidate | None:
        """Who takes a free place, made if it is new."""
        if not self._has_room():
            return None
        if (ready := self._ready()) is not None:
            return ready
        if not self._idle:
            values = self.call("ask")
            return self._join(values) if values is not None else self._ready()  # the last stage may just have ended
        if self._idle and self.strategy.size is None and not self._training():
            enough = self.time_for(self.done())
            size = self.call("resize", enough)
            self.say("budget", 0, candidates=size, all=enough > size)
            self.judge()
            return self.following()
        return None

    def _ready(self) -> Candidate | None:
        """Of those who may go on, the farthest, and the best of these; in memory again."""
        passed = self.strategy.verdicts().passed
        ready = [
            c
            for c in self.candidates.values()
            if c.state == "waiting" and c.number in passed.get(len(c.losses) - 1, frozenset())
        ]
        best = max(ready, key=lambda c: (len(c.losses), -c.losses[-1], -c.number), default=None)
        if best is not None and best.training is None:
            assert self.wake is not None
            best.training = self.wake(best)
        return best

    def _join(self, values: Values) -> Candidate:
        number = len(self.candidates) + 1
        training = self.make(number, values)
        if math.isnan(self.before):
            self.before = self._score(training)
        self.begin(training)
        made = Candidate(number, values, training, training.job.steps, best_loss=self.before)
        self.candidates[number] = made
        self.say("joined", number, settings=values, steps=made.steps, lr=training.job.lr)
        return made

    def begin(self, training: Training) -> None:
        """What `train` does before the first step."""
        training.watch.before = self.before
        training.watch.evaluation(0, self.before)

    def _has_room(self) -> bool:
        """Whether another adapter like the largest fits into memory beside those that don't wait: those that do may lie on disk,
        so it doesn't matter here where they are. Where nobody is training one may always come."""
        held = self._held(("training", "done"))
        return self.room is None or not self._training() or sum(held) + max(held) <= self.room

    def _held(self, states: Sequence[State]) -> list[int]:
        return [bytes_of(c.training) for c in self.candidates.values() if c.training is not None and c.state in states]

    def rest(self) -> list[int]:
        """Free the memory of as many of those who wait as there is no room for, once all that they are is on disk. Who they
        are."""
        gone = []
        for candidate in [c for c in self.candidates.values() if c.state == "waiting" and c.training is not None]:
            if self.room is not None and sum(self._held(("training", "done", "waiting"))) > self.room:
                self._forget(candidate)
                gone.append(candidate.number)
        return gone

    def done(self) -> float:
        """Trainings done so far, whole and parts."""
        return sum(c.taken / c.steps for c in self.candidates.values())

    def left(self, steps: int) -> float:
        """Trainings of so many steps that are still to come, as far as can be told: no more than those who aren't out and those
        who haven't come yet would take, no less than whoever trains has before it, and else what the strategy expects."""
        size = self.strategy.size or len(self.candidates)
        within = [c for c in self.candidates.values() if c.state in ("training", "waiting")]
        most = sum(1 - c.taken / c.steps for c in within) + max(0, size - len(self.candidates))
        ends = [(c, next((at for at in c.rungs if at > c.taken), c.steps)) for c in self._training()]
        least = sum((end - c.taken) / c.steps for c, end in ends)
        return min(most, max(least, self.strategy.cost(size, steps) - self.done()))

    def absorb(self, number: int, events: Sequence[Event], state: State, why: str, taken: int) -> None:
        """What happened to a candidate at a worker (workers.py), whose own search has no strategy."""
        candidate = self.candidates[number]
        candidate.taken = taken
        if state == "failed":
            self._fail(candidate, why)
            return
        candidate.state, candidate.why = state, why
        for event in events:
            self._events.append(event)
            if event.kind == "rung":
                candidate.losses.append(event.figures["held_out_loss"])
                self.call("report", number, event.figures["rung"], candidate.losses[-1])

    def drop(self, candidate: Candidate) -> None:
        """It goes on elsewhere, or not at all."""
        self._forget(candidate)
        del self.candidates[candidate.number]

    def put_back(self, candidate: Candidate) -> None:
        """A candidate of a search that is taken up again, restored."""
        self.candidates[candidate.number] = candidate
        if candidate.state == "training":
            assert candidate.training is not None
            self._jobs.append(candidate.training.job)
            self._jobs.sort(key=lambda job: job.name)

    # --- the range test --------------------------------------------------------------------------------------------------

    def range_test(self) -> Iterator[Round]:
        """Train the baseline for a few steps while its rate rises from far too low to far too high (arXiv 1506.01186), and tell
        the strategy where the loss was lowest before it rose."""
        training = self.make(0, {})
        job = training.job
        usual, count = job.lr, range_steps(job.steps)
        rate, curve = usual, []
        if count >= FEWEST:
            job.schedule, job.warmup, job.steps = "constant", 0.0, count
            job.lr = usual / SPAN
            for step in train(training.host, [job], self.halvings):
                self.halvings = step.halvings
                figures = step.jobs[job.name]
                if math.isfinite(figures.loss):
                    curve.append((figures.lr, figures.loss))
                yield Round(step, (), testing=True)
                job.lr = usual / SPAN * SPAN ** (2 * job.done / (count - 1))
            rate = centre_of(curve, usual)
        training.host.remove(job.name)
        self.call("centre", rate)
        self.say("range", 0, lr=rate, usual=usual, curve=curve)


def candidate_name(candidate: Candidate) -> str:
    """Of its adapter."""
    return name_of(candidate.number)


def bytes_of(training: Training) -> int:
    """What an adapter takes while it is trained."""
    return together.bytes_of(training.config.optimizer, training.host.adapters[training.name].numbers())


def reason(candidate: Candidate, out: Cut) -> str:
    """Why a candidate was cut, in words; `candidate` is as it was before."""
    if candidate.state == "done":
        return f"{candidate.why or 'trained to its end'}; place {out.place} of {out.of}"
    return (
        f"held-out loss {candidate.losses[out.rung]:.4f} after step {candidate.rungs[out.rung]} of {candidate.steps}:"
        f" place {out.place} of {out.of}, {out.keep} {'goes' if out.keep == 1 else 'go'} on"
        + (", not all with one learning rate" if out.place <= out.keep else "")
    )


def too_short(steps: int, ranged: bool) -> str:
    """What isn't to be trusted in a search whose trainings have so many steps, of which a range test (`ranged`) takes a quarter;
    empty where they are long enough."""
    found, count = [], range_steps(steps)
    if ranged and FEWEST <= count < RANGE_STEPS:
        found.append(f"a range test of {count} steps may be off (it is trusted from {4 * RANGE_STEPS} on)")
    first, second = rungs(steps)
    if first == second:
        found.append("nobody can be compared before the end, so nothing is saved")
    elif first > spacing(steps):
        found.append(f"comparisons come late, after {first} and {second} steps, and save less")
    return f"{steps} steps a training are few: {'; '.join(found)}" if found else ""


def evaluations(steps: int, every: int) -> int:
    """How many a candidate with so many steps has, one every so many, and at the rungs."""
    return len({*range(every, steps, every), *rungs(steps), steps})


def range_steps(steps: int) -> int:
    """Of a range test before trainings of so many steps; too few to tell anything below FEWEST."""
    return min(RANGE_STEPS, steps // 4)


def centre_of(curve: list[tuple[float, float]], usual: float) -> float:
    """The rate to search around: BELOW under the one where the smoothed loss of a range test was lowest, no farther than
    FARTHEST from the usual one."""
    mean, lowest, at = math.nan, math.inf, usual
    for lr, loss in curve:
        mean = loss if math.isnan(mean) else mean + (loss - mean) / 3
        if mean < lowest:
            lowest, at = mean, lr
    return min(usual * FARTHEST, max(usual / FARTHEST, at / BELOW))

"""Where candidates come from: a grid, chance, or a tree-structured Parzen estimator (`pip install 'lorafit[tune]'`).

All are functions of the space, the seed and what they were told, so that a search can be taken up again.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
from typing import Any, Literal

from lorafit.errors import MissingExtra
from lorafit.tune.space import Choice, Range, Space, Values, alike, distinct, own
from lorafit.tune.strategy import Sampler

Kind = Literal["grid", "random", "tpe"]
TRIES = 50  # to draw a candidate that wasn't drawn before
WORST = 1e6  # a loss for Optuna in place of an infinite one


def sampler(kind: Kind, searched: Space, seed: int, start: Values) -> Sampler:
    """`start`: what the searched settings are without a search. MissingExtra where `tpe` is asked for and Optuna isn't there."""
    if kind == "grid":
        return Grid(searched, seed)
    start = {key: start[key] for key in (*searched, "method") if key in start}
    return Tpe(searched, seed) if kind == "tpe" else Random(searched, seed, start)


class Grid:
    """Every combination, without settings that its method doesn't have, once; where there are more than candidates, as many of
    them by chance."""

    def __init__(self, searched: Space, seed: int) -> None:
        each = [[(key, value) for value in one.grid()] for key, one in searched.items()]
        self.whole = distinct(own(dict(point)) for point in itertools.product(*each))
        self.order = list(range(len(self.whole)))
        random.Random(f"{seed}:grid").shuffle(self.order)
        self.most: int | None = len(self.whole)

    def draw(self, number: int, size: int | None) -> Values:
        """In the grid's own order where all are taken."""
        return self.whole[number - 1 if size == self.most else self.order[number - 1]]

    def told(self, number: int, loss: float) -> None:
        """Changes nothing."""


class Random:
    """Each setting by chance. The first candidate is the settings as they are."""

    def __init__(self, searched: Space, seed: int, start: Values | None = None) -> None:
        self.searched, self.seed, self.start = searched, seed, start or {}
        self.most: int | None = None
        if all(isinstance(one, Choice) for one in searched.values()):
            self.most = len(distinct(alike(values, self.start) for values in ({}, *Grid(searched, seed).whole)))
        self.drawn: list[Values] = []

    def draw(self, number: int, size: int | None) -> Values:
        """One that wasn't there before, if it is to be had in some tries."""
        values: Values = {}
        for attempt in range(TRIES if number > 1 else 0):
            chance = random.Random(f"{self.seed}:{number}:{attempt}")
            values = own({key: _drawn(one, chance) for key, one in self.searched.items()})
            if alike(values, self.start) not in self.drawn:
                break
        self.drawn.append(alike(values, self.start))
        return values

    def told(self, number: int, loss: float) -> None:
        """Changes nothing."""


def _drawn(one: Range | Choice, chance: random.Random) -> Any:
    return one.at(chance.random()) if isinstance(one, Range) else chance.choice(one.values)


class Tpe:
    """Optuna's TPE (Bergstra et al., NeurIPS 2011). The first candidate is the settings as they are, of which it learns nothing.

    It learns from the losses at the first rung, which every candidate reaches and which compare like with like.
    """

    most: int | None = None

    def __init__(self, searched: Space, seed: int) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise MissingExtra("--search tpe needs Optuna; pip install 'lorafit[tune]'")
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.searched = searched
        self.study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=4))
        self.trials: dict[int, Any] = {}
        self.pruned = optuna.trial.TrialState.PRUNED

    def draw(self, number: int, size: int | None) -> Values:
        """Where TPE expects most."""
        if number == 1:
            return {}
        trial = self.trials[number] = self.study.ask()
        return own({key: self._suggested(trial, key, one) for key, one in self.searched.items()})

    @staticmethod
    def _suggested(trial: Any, key: str, one: Range | Choice) -> Any:
        if isinstance(one, Choice):
            return one.values[trial.suggest_categorical(key, list(range(len(one.values))))]
        if one.whole:
            return trial.suggest_int(key, round(one.low), round(one.high), log=one.log)
        return float(f"{trial.suggest_float(key, one.low, one.high, log=one.log):.3g}")

    def told(self, number: int, loss: float) -> None:
        """As the value of a trial that ended there."""
        if number in self.trials:
            self.trials[number].report(loss if math.isfinite(loss) else WORST, 0)
            self.study.tell(self.trials[number], state=self.pruned)

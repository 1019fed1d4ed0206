"""From what is asked of a search to its space, its strategy, and the settings of each candidate."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from lorafit import config as settings
from lorafit import fit, plan
from lorafit.config import Config
from lorafit.errors import ConfigError, ModelError
from lorafit.fit import Training
from lorafit.methods import find
from lorafit.methods import settings as method_settings
from lorafit.tune.options import Options
from lorafit.tune.samplers import sampler
from lorafit.tune.space import Choice, Range, Space, Values, edges, settled, space
from lorafit.tune.stages import Staged
from lorafit.tune.strategy import AllTogether, Strategy

FINALISTS = 3  # that are trained to their end where not the loss decides
RANKS = (32, 8, 64)
SHAPING = {"method", "targets", "rank_pattern", "alpha_pattern"}  # settings that an adapter may not be possible with


class Proposals:
    """`asked` are the settings that all candidates share, `base` is prepared with them. ConfigError where nothing is left to
    search."""

    def __init__(self, asked: Mapping[str, Any], options: Options, base: Training) -> None:
        self.asked, self.options, self.base = asked, options, base
        self.start: Values = {**settings.flat(base.config), "lr": base.job.lr}
        self.space = self._space()

    def _space(self) -> Space:
        if self.options.space is not None:
            return space(self.options.space, self.asked)
        config, rate = self.base.config, self.base.job.lr
        kind, staged = find(config.method), self.options.search == "staged"
        wide = 30.0 if staged else 10.0
        found: dict[str, Range | Choice] = {"lr": Range(rate / wide, rate * wide, log=True)}
        if "r" in config.options:
            found["r"] = Choice(RANKS if staged else tuple(sorted({*RANKS, config.options["r"]})))
        if self.options.search != "grid":
            sites: list[list[str]] = [["attention"]] if kind.targets == ("all-linear",) else [["all-linear"]]
            found["targets"] = Choice(tuple(sites if staged else [[], *sites]))
        found = {key: one for key, one in found.items() if key not in self.asked}
        if not found:
            raise ConfigError(
                "lr, r and targets are all set, so nothing is left to search; leave one out or give --space"
            )
        return found

    def try_edges(self) -> None:
        """An adapter that can't be made is an error before anything is trained."""
        own = SHAPING | set(method_settings(find(self.base.config.method)))
        for key, value in edges(self.space):
            config = self.config_of({key: value})
            if key in own or key in config.options:
                with contextlib.suppress(ModelError):
                    plan.empty(config, self.base.host.base.path, self.base.host.base.device.type != "cpu")

    def strategy(self, size: int | None) -> Strategy:
        """For so many candidates; None: as many as there is time for."""
        finalists = 1 if self.options.objective == "loss" else FINALISTS
        if self.options.search == "staged":
            return Staged(self.space, self.start, size, finalists)
        kind: Any = self.options.search
        made = sampler(kind, self.space, self.base.config.seed, self.start)
        if size is not None and kind == "grid" and self.options.budget is None:
            size = made.most
        return AllTogether(made, size, finalists)

    def config_of(self, values: Values) -> Config:
        """A candidate's settings: all that were chosen for the baseline stay, but for what follows from `values`."""
        flat = settled(values, {key: value for key, value in self.start.items() if value is not None})
        for key in ("eval_every", "out"):
            flat.pop(key, None)
        kind = find(str(flat["method"]))
        if "method" in values and "lr" not in values and "lr" not in self.asked:
            flat["lr"] = self.start["lr"] * kind.lr_factor / find(self.base.config.method).lr_factor
        known = {*settings.defaults(), *method_settings(kind)}
        config = fit.build({key: value for key, value in flat.items() if key in known})
        config.eval_every = self.base.config.eval_every if "eval_every" in self.asked else None
        if kind.codes and config.quant != "none":
            raise ConfigError(f"method={config.method} makes codes of its own of a quantised base; it can't share one")
        return config

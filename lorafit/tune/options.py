"""What is asked of a search."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorafit.errors import ConfigError
from lorafit.tune import workers as crews

OBJECTIVES = ("loss", "token_f1", "exact_match")
SEARCHES = ("staged", "grid", "random", "tpe")


@dataclass(frozen=True)
class Options:
    """What is asked of a search, beside the settings that all candidates share."""

    search: str = "staged"
    budget: str | None = None  # 8: candidates; 30m: time
    objective: str = "loss"
    together: int | None = None
    space: Mapping[str, Any] | None = None
    workers: str = "none"  # local:N, ray://…

    def check(self) -> None:
        """ConfigError for a word that isn't known."""
        for key, value, known in (("search", self.search, SEARCHES), ("objective", self.objective, OBJECTIVES)):
            if value not in known:
                raise ConfigError(f"--{key} {value}: must be one of {', '.join(known)}")
        if self.together is not None and self.together < 1:
            raise ConfigError(f"--together {self.together}: must be at least 1")
        if self.budget is not None:
            budget_of(self.budget)
        crews.check(self.workers)


def budget_of(text: str) -> int | float:
    """A number of candidates (int), or seconds (float)."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(s|m|h|min)?\s*", text.lower())
    amount = float(found[1]) if found else 0.0
    if not found or amount <= 0 or (not found[2] and not amount.is_integer()):
        raise ConfigError(f"--budget {text}: must be a number of candidates, such as 8, or a time: 90s, 30m, 2h")
    return int(amount) if not found[2] else amount * {"s": 1, "m": 60, "min": 60, "h": 3600}[found[2]]

"""Watching a job's losses: which step is best, when to stop early, when it has run away."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Watch:
    """Held-out losses seen so far. `patience`: evaluations without improvement that are borne (0: any number)."""

    patience: int = 3
    before: float = math.nan  # held-out loss before training
    best_loss: float = math.inf
    best_step: int = 0
    worse: int = 0
    start: float = math.nan  # the training loss of the first step, before anything has changed
    first: float = math.nan  # running means of the training loss: over the first steps, and now, of ten and of three
    mean: float = math.nan
    recent: float = math.nan
    seen: int = 0

    def loss(self, loss: float) -> str:
        """Take in a step's training loss; a reason to stop, or ''.

        What it is compared with is what the first steps lost; but where that is far more than before training, they have
        run away already.
        """
        self.seen += 1
        if self.seen == 1:
            self.start = self.mean = self.recent = loss
        self.mean += (loss - self.mean) / min(self.seen, 10)
        self.recent += (loss - self.recent) / min(self.seen, 3)
        if self.seen <= 5:
            self.first = self.mean
        # Rows of one step may be easy by chance; those that are held out are many.
        sure = math.isfinite(self.before)
        untrained = max(self.start, self.before) if sure else self.start
        first = min(self.first, 1.25 * untrained + 0.25 if sure else 2 * untrained + 2)
        if self.seen > 10 and self.mean > 1.2 * first + 0.5:
            to = f"{self.mean:.3g} (mean of about ten steps) at step {self.seen}"
            return f"the training loss ran away, from {self.start:.3g} at step 1 to {to}"
        if self.seen >= 3 and self.recent > 2 * untrained + (2 if sure else 4):
            to = f"{self.recent:.3g} (mean of about three steps) at step {self.seen}"
            return f"the training loss ran away at once, from {self.start:.3g} at step 1 to {to}"
        return ""

    def evaluation(self, step: int, loss: float) -> tuple[bool, str]:
        """Take in a held-out loss; whether it is the best so far, and a reason to stop or ''."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.worse = loss, step, 0
            return True, ""
        self.worse += 1
        if not math.isfinite(loss):
            return False, f"the held-out loss is {loss}"
        if self.patience and self.worse >= self.patience:
            return False, f"no better held-out loss in {self.worse} evaluations"
        return False, ""

    def to_json(self) -> dict[str, Any]:
        """In JSON types (NaN and infinity as null)."""
        return {k: v if math.isfinite(v) else None for k, v in asdict(self).items()}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Watch:
        """The reverse of `to_json`."""
        empty = Watch()
        return Watch(**{k: getattr(empty, k) if v is None else v for k, v in values.items()})

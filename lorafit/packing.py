"""How documents lie in a row: end to end, what several of them begin with only once.

A causal model gives the same for the same beginning. So a system prompt that a hundred documents open with goes through
the model once a row, and each of them goes on from there: its queries meet the keys of the beginning, then its own.
Gradients are the same as if the beginning had been there each time, because they add up where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SHORTEST = 16  # tokens of a beginning that is worth sharing


@dataclass(frozen=True)
class Packing:
    """Stretches of tokens end to end. A stretch goes on from the stretch before[i], which stands earlier in the row and
    goes on from none; where that is None it begins a document of its own."""

    lengths: tuple[int, ...]
    before: tuple[int | None, ...]

    @staticmethod
    def apart(lengths: Sequence[int]) -> Packing:
        """Whole documents, nothing shared."""
        return Packing(tuple(lengths), (None,) * len(lengths))

    @cached_property
    def shared(self) -> bool:
        """Some stretch goes on from another."""
        return any(other is not None for other in self.before)

    @cached_property
    def positions(self) -> Tensor:
        """The place (tokens,) of each token in its document."""
        starts = [0 if other is None else self.lengths[other] for other in self.before]
        return torch.cat([torch.arange(at, at + n) for at, n in zip(starts, self.lengths, strict=True)])

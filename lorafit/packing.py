"""How documents lie in a row: end to end, what several of them begin with only once.

A causal model gives the same for the same beginning. So a system prompt that a hundred documents open with goes through
the model once a row, and each of them goes on from there: its queries meet the keys of the beginning, then its own.
Gradients are the same as if the beginning had been there each time, because they add up where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

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
    def keys(self) -> tuple[int, ...]:
        """The tokens that each stretch's last token sees: those it goes on from, and its own."""
        return tuple(
            n if other is None else self.lengths[other] + n for n, other in zip(self.lengths, self.before, strict=True)
        )

    @cached_property
    def positions(self) -> Tensor:
        """The place (tokens,) of each token in its document."""
        return torch.cat([torch.arange(m - n, m) for m, n in zip(self.keys, self.lengths, strict=True)])

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(self.lengths)]

    @cached_property
    def _rows(self) -> Tensor:
        """The token (keys,) of the row that each key is."""
        parts = []
        for i, other in enumerate(self.before):
            for j in (i,) if other is None else (other, i):
                parts.append(torch.arange(self._starts[j], self._starts[j + 1]))
        return torch.cat(parts)

    @cached_property
    def _own(self) -> Tensor:
        """Of each token (tokens,) of the row, the key that it is in its own stretch."""
        ends = accumulate(self.keys)
        return torch.cat([torch.arange(end - n, end) for end, n in zip(ends, self.lengths, strict=True)])

    @cached_property
    def _copies(self) -> list[tuple[int, Tensor]]:
        """Of each stretch that others go on from: its number, and the keys (others, its tokens) that are copies of it."""
        starts = [0, *accumulate(self.keys)]
        found: dict[int, list[int]] = {}
        for i, other in enumerate(self.before):
            if other is not None:
                found.setdefault(other, []).append(starts[i])
        return [(i, torch.tensor(at)[:, None] + torch.arange(self.lengths[i])) for i, at in found.items()]

    def spread(self, x: Tensor) -> Tensor:
        """Rows of tokens (tokens, ...) -> rows of keys (keys, ...), in the order of `keys`."""
        if not self.shared:
            return x
        spread: Tensor = _Spread.apply(x, self)  # type: ignore[no-untyped-call]
        return spread


class _Spread(torch.autograd.Function):
    """A row for each key; a beginning's gradient is the sum of its copies', in fp32, rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return x.index_select(0, packing._rows)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        packing = ctx.packing
        dx = dy.index_select(0, packing._own)
        for i, keys in packing._copies:
            at, end = packing._starts[i], packing._starts[i + 1]
            copies = dy.index_select(0, keys.flatten()).view(*keys.shape, *dy.shape[1:])
            kind = torch.promote_types(dy.dtype, torch.float32)
            dx[at:end] = dx[at:end].to(kind) + copies.to(kind).sum(0)
        return dx, None

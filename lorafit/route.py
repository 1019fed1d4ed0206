"""A route says which tokens go through which adapters.

It is a list of runs of tokens, each with a stack: a tuple of adapter names whose deltas are added; `()` is the plain base.
A batch row is a run in the simple case, a document inside a packed row in general. It is worked out once a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Stack = tuple[str, ...]
StackLike = str | Sequence[str] | None


def stack(spec: StackLike) -> Stack:
    """`None` is `()`, a name is a stack of one."""
    if spec is None:
        return ()
    return (spec,) if isinstance(spec, str) else tuple(spec)


@dataclass(frozen=True)
class Route:
    """Runs of (tokens, stack); the single run of a route for any number of tokens has None for its length."""

    runs: tuple[tuple[int | None, Stack], ...]

    @staticmethod
    def all(spec: StackLike) -> Route:
        """Every token through one stack, however many there are."""
        return Route(((None, stack(spec)),))

    @staticmethod
    def of(segments: Iterable[tuple[int, StackLike]]) -> Route:
        """Segments in token order; neighbours with the same stack become one run."""
        runs: list[tuple[int, Stack]] = []
        for length, spec in segments:
            names = stack(spec)
            if runs and runs[-1][1] == names:
                runs[-1] = (runs[-1][0] + length, names)
            elif length:
                runs.append((length, names))
        return Route(tuple(runs))

    @property
    def uniform(self) -> Stack | None:
        """The stack of a route that has only one."""
        return self.runs[0][1] if len(self.runs) == 1 else None

    @property
    def names(self) -> set[str]:
        """Every adapter in it."""
        return {name for _, names in self.runs for name in names}

    @property
    def tokens(self) -> int | None:
        """How many tokens it covers; None for any number."""
        lengths = [n for n, _ in self.runs]
        return None if None in lengths else sum(n for n in lengths if n is not None)

    def lengths(self) -> list[int]:
        """Tokens of each run."""
        return [n for n, _ in self.runs if n is not None]

    def take(self, positions: Tensor) -> Route:
        """The route of the tokens at `positions` (ascending), for a product on some tokens only (the output head)."""
        if self.tokens is None:
            return self
        ends = torch.tensor(self.lengths()).cumsum(0)
        counts = torch.bincount(
            torch.searchsorted(ends, positions.cpu(), right=True), minlength=len(self.runs)
        ).tolist()
        return Route.of((n, names) for n, (_, names) in zip(counts, self.runs, strict=True))

    def within(self, start: int, length: int) -> Route:
        """The route of `length` tokens from `start`."""
        if self.tokens is None:
            return self
        pieces, at = [], 0
        for n, names in self.runs:
            assert n is not None
            pieces.append((max(0, min(at + n, start + length) - max(at, start)), names))
            at += n
        return Route.of(pieces)

    def groups(self, token: Tensor) -> list[tuple[Stack, Tensor]]:
        """For rows in any order, each of token `token[row]`: the row indices of each stack."""
        run = torch.searchsorted(torch.tensor(self.lengths(), device=token.device).cumsum(0), token, right=True)
        stacks = sorted({names for _, names in self.runs})
        number = torch.tensor([stacks.index(names) for _, names in self.runs], device=token.device)[run]
        return [(names, (number == i).nonzero().squeeze(1)) for i, names in enumerate(stacks)]

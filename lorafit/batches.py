"""From rows to optimiser steps: which documents a step learns from, cut into micro-batches, packed end to end.

Everything here is a pure function of the rows, the settings and the seed, so a run can be resumed from a step number alone
and nothing random has to be saved.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from lorafit.data.store import lengths_of
from lorafit.data.tokens import Tokens


@dataclass(frozen=True)
class Micro:
    """Documents end to end: ids (tokens,), their lengths, and what is learned.

    `positions` (targets,) are the tokens whose successor is learned, ascending, never across two documents; `labels`
    (targets,) are those successors; `owners` says for each target which segment (job) it belongs to.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    positions: Tensor
    labels: Tensor
    segments: tuple[tuple[int, int], ...]  # (owner, tokens), in token order
    owners: Tensor  # (targets,) index of the job

    @property
    def tokens(self) -> int:
        """How many tokens it holds."""
        return len(self.ids)


def pack(documents: Sequence[Tokens], owner: int = 0) -> Micro:
    """One micro-batch of these documents, all of one owner."""
    return join([(owner, documents)])


def join(parts: Sequence[tuple[int, Sequence[Tokens]]]) -> Micro:
    """One micro-batch of several owners' documents, each owner's side by side."""
    ids, lengths, positions, labels, owners, segments = [], [], [], [], [], []
    at = 0
    for owner, documents in parts:
        start = at
        for row in documents:
            found = np.flatnonzero(row.learn[1:])  # the first token of a document has no predecessor to learn from
            positions.append(found + at)
            labels.append(row.ids[1:][found])
            ids.append(row.ids)
            lengths.append(len(row.ids))
            at += len(row.ids)
        owners.append(np.full(sum(len(p) for p in positions[len(positions) - len(documents) :]), owner))
        segments.append((owner, at - start))
    return Micro(
        torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        tuple(lengths),
        torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        tuple(segments),
        torch.from_numpy(np.concatenate(owners).astype(np.int64)),
    )


def targets(rows: Sequence[Tokens]) -> int:
    """How many learned tokens these rows have."""
    return sum(int(row.learn[1:].sum()) for row in rows)


def fill(lengths: Sequence[int], tokens: int) -> list[range]:
    """Cut a sequence of documents into runs of at most `tokens` tokens, at least one document each, in order."""
    runs, start, held = [], 0, 0
    for i, length in enumerate(lengths):
        if i > start and held + length > tokens:
            runs.append(range(start, i))
            start, held = i, 0
        held += length
    if start < len(lengths):
        runs.append(range(start, len(lengths)))
    return runs


class Epoch(Sequence[list[Tokens]]):
    """The steps of an epoch; a step's rows are read when it is asked for, so that only its tokens are in memory."""

    def __init__(self, rows: Sequence[Tokens], order: np.ndarray, runs: Sequence[range]) -> None:
        self._rows, self._order, self._runs = rows, order, runs

    def __len__(self) -> int:
        return len(self._runs)

    @overload
    def __getitem__(self, key: int) -> list[Tokens]: ...
    @overload
    def __getitem__(self, key: slice) -> Epoch: ...
    def __getitem__(self, key: Any) -> Any:
        """A step's documents, or some steps."""
        if isinstance(key, slice):
            return Epoch(self._rows, self._order, self._runs[key])
        return [self._rows[self._order[i]] for i in self._runs[key]]


@dataclass(frozen=True)
class Plan:
    """The steps of a job: `rows` in a new order each epoch, about `tokens` tokens a step, in `accumulate` micro-batches."""

    rows: Sequence[Tokens]
    tokens: int
    accumulate: int = 1
    seed: int = 0

    @cached_property
    def lengths(self) -> np.ndarray:
        """The tokens of each row."""
        return lengths_of(self.rows)

    def epoch(self, number: int) -> Epoch:
        """The documents of each step of an epoch."""
        shuffled = list(range(len(self.rows)))
        random.Random(f"{self.seed}:{number}").shuffle(shuffled)
        order = np.array(shuffled, np.int64)
        return Epoch(self.rows, order, fill(self.lengths[order].tolist(), self.tokens))

    def micros(self, documents: Sequence[Tokens]) -> list[list[Tokens]]:
        """A step's documents in micro-batches. Their gradients are summed, so the cut changes memory alone."""
        total = sum(len(row.ids) for row in documents)
        runs = fill([len(row.ids) for row in documents], max(1, -(-total // self.accumulate)))
        return [[documents[i] for i in run] for run in runs]

    def steps(self, epochs: float) -> int:
        """How many steps that many epochs have; a part of an epoch counts by its share of the steps."""
        whole = int(epochs)
        count = sum(len(self.epoch(number)) for number in range(whole))
        part = epochs - whole
        return max(1, count + (round(part * len(self.epoch(whole))) if part > 1e-9 else 0))

    def since(self, step: int) -> Iterator[list[Tokens]]:
        """The documents of step, step + 1, … (counted from 0), for ever."""
        number = 0
        while True:
            steps = self.epoch(number)
            for at in range(max(0, step), len(steps)):
                yield steps[at]
            step -= len(steps)
            number += 1


def default_tokens(rows: Sequence[Tokens]) -> int:
    """Tokens a step when the user names none: small data needs many small steps to learn at all, large data full ones."""
    total = int(lengths_of(rows).sum())
    return max(256, min(2048, total // 32))

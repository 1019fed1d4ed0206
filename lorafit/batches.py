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
from lorafit.packing import SHORTEST, Packing

SAMPLE = 32  # rows that are looked at for what they share
LEAST_TOKENS = 256  # of a step
TOGETHER = 4  # rows of a step that share most of their tokens, at least


@dataclass(frozen=True)
class Micro:
    """Documents in a row: ids (tokens,), how they lie there, and what is learned.

    `positions` (pairs,) are tokens whose successor is learned, ascending, never across two documents, and `labels` (pairs,)
    those successors. Where documents share their beginning, so do some learned tokens: `copies` (targets,) says which pair
    each learned token of each document is; None where they are the pairs themselves. `owners` (targets,) says which job it
    belongs to.
    """

    ids: Tensor
    packing: Packing
    positions: Tensor
    labels: Tensor
    segments: tuple[tuple[int, int], ...]  # (owner, tokens), in token order
    owners: Tensor
    copies: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens the row holds."""
        return len(self.ids)


def pack(documents: Sequence[Tokens], owner: int = 0, share: bool = False) -> Micro:
    """One micro-batch of these documents, all of one owner."""
    return join([(owner, documents)], share)


def join(parts: Sequence[tuple[int, Sequence[Tokens]]], share: bool = False) -> Micro:
    """One micro-batch of several owners' documents, each owner's side by side. With `share`, what documents of one owner
    begin with is there once."""
    stretches: list[np.ndarray] = []
    before: list[int | None] = []
    found: list[np.ndarray] = []  # of each document: where in the row its learned tokens' predecessors are
    labels, owners, segments = [], [], []
    at = 0
    for owner, documents in parts:
        start = at
        rows = [row.ids for row in documents]
        shared: dict[int, tuple[int, int]] = {}  # document -> the stretch it goes on from, and where that is
        for length, members in alike(rows, range(len(rows))) if share else ():
            shared |= dict.fromkeys(members, (len(stretches), at))
            stretches.append(rows[members[0]][:length])
            before.append(None)
            at += length
        for i, row in enumerate(documents):
            other, begins = shared.get(i, (None, 0))
            length = 0 if other is None else len(stretches[other])
            learned = np.flatnonzero(row.learn[1:])  # the first token of a document has no predecessor to learn from
            found.append(np.where(learned < length, begins + learned, at - length + learned))
            labels.append(row.ids[1:][learned])
            owners.append(np.full(len(learned), owner))
            stretches.append(row.ids[length:])
            before.append(other)
            at += len(row.ids) - length
        segments.append((owner, at - start))
    packing = Packing(tuple(map(len, stretches)), tuple(before))
    positions, successors, copies = np.concatenate(found), np.concatenate(labels), None
    if packing.shared:
        words = int(successors.max(initial=0)) + 1
        pairs, copies = np.unique(positions.astype(np.int64) * words + successors, return_inverse=True)
        positions, successors = pairs // words, pairs % words
    return Micro(
        torch.from_numpy(np.concatenate(stretches).astype(np.int64)),
        packing,
        torch.from_numpy(positions.astype(np.int64)),
        torch.from_numpy(successors.astype(np.int64)),
        tuple(segments),
        torch.from_numpy(np.concatenate(owners).astype(np.int64)),
        None if copies is None else torch.from_numpy(copies.astype(np.int64).ravel()),
    )


def alike(rows: Sequence[np.ndarray], members: Sequence[int], depth: int = 50) -> list[tuple[int, list[int]]]:
    """Groups of these rows that begin alike: how many tokens they share, and which rows. Every row keeps a token of its own.

    All of them or finer groups with longer beginnings, whichever saves more tokens; groups within groups are looked for
    `depth` deep.
    """
    if len(members) < 2:
        return []
    first = rows[members[0]]
    length = max(0, min(len(rows[i]) for i in members) - 1)
    for i in members:
        differs = rows[i][:length] != first[:length]
        length = int(differs.argmax()) if differs.any() else length
    together = [(length, list(members))] if length >= SHORTEST else []
    branches: dict[int, list[int]] = {}
    for i in members:
        if len(rows[i]) > length + 1:
            branches.setdefault(int(rows[i][length]), []).append(i)
    finer = [group for branch in branches.values() for group in alike(rows, branch, depth - 1)] if depth else []
    return max(together, finer, key=_saved)


def _saved(groups: Sequence[tuple[int, list[int]]]) -> int:
    return sum(length * (len(members) - 1) for length, members in groups)


def spared(documents: Sequence[Tokens]) -> int:
    """How many tokens needn't be in a row again, because documents before them begin alike."""
    return _saved(alike([row.ids for row in documents], range(len(documents))))


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
        self._rows, self.order, self.runs = rows, order, runs

    def __len__(self) -> int:
        return len(self.runs)

    @overload
    def __getitem__(self, key: int) -> list[Tokens]: ...
    @overload
    def __getitem__(self, key: slice) -> Epoch: ...
    def __getitem__(self, key: Any) -> Any:
        """A step's documents, or some steps."""
        if isinstance(key, slice):
            return Epoch(self._rows, self.order, self.runs[key])
        return [self._rows[self.order[i]] for i in self.runs[key]]


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

    def largest(self, epoch: Epoch) -> list[Tokens]:
        """The documents of an epoch's largest micro-batch; no others are read."""
        most, where = 0, (0, range(0))
        for number, run in enumerate(epoch.runs):
            lengths = self.lengths[epoch.order[run.start : run.stop]].tolist()
            for cut in fill(lengths, max(1, -(-sum(lengths) // self.accumulate))):
                if (tokens := sum(lengths[cut.start : cut.stop])) > most:
                    most, where = tokens, (number, cut)
        number, cut = where
        return epoch[number][cut.start : cut.stop] if most else []

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


def default_tokens(rows: Sequence[Tokens], share: bool = True) -> int:
    """Tokens a step when the user names none: small data needs many small steps to learn at all, large data full ones.

    Where rows share most of their tokens, a step has several of them at least: the first is nearly all there is to compute.
    """
    total = int(lengths_of(rows).sum())
    tokens = max(LEAST_TOKENS, min(2048, total // 32))
    some = [rows[i] for i in range(0, len(rows), max(1, -(-len(rows) // SAMPLE)))] if share else []
    held = sum(len(row.ids) for row in some)
    if 2 * spared(some) > held:
        tokens = max(tokens, TOGETHER * -(-held // len(some)))
    return tokens

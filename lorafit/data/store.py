"""Tokenised rows as flat arrays, in files or in memory, and read one row at a time: memory holds what is looked at.

A token takes four bytes: its id, or the complement of its id (a negative number) where it is learned. An example is a line
of JSON. A table tells where both begin, and what else is known of a row. Files are read by position and never mapped, so
the pages of rows that were looked at once don't stay in the process.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from lorafit.data.example import Example
from lorafit.data.tokens import CUTS, Tokens

DIGEST = 16  # bytes of a row's keys

# What is known of each row. `tokens` and `text`: how many, and bytes of, the two flat arrays; `full`: tokens before
# truncation; `system`: digest of the system message, 0 for none; `key`, `prompt`: digests of the row, and of the row
# without its last answer.
TABLE = np.dtype(
    [
        ("line", "<i8"),
        ("tokens", "<i8"),
        ("text", "<i8"),
        ("full", "<i8"),
        ("learned", "<i8"),
        ("system", "<u8"),
        ("flags", "<u2"),
        ("cut", "u1"),
        ("key", f"V{DIGEST}"),
        ("prompt", f"V{DIGEST}"),
    ]
)


def coded(ids: np.ndarray, learn: np.ndarray) -> np.ndarray:
    """Ids and mask in one array of int32."""
    return np.where(learn, ~ids, ids).astype("<i4")


def decoded(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids and the mask that `coded` took."""
    return codes ^ (codes >> 31), codes < 0


class Blob:
    """Bytes to be read by position: of a file, or in memory. A file stays readable when it is deleted meanwhile."""

    def __init__(self, source: Path | bytes | bytearray) -> None:
        self._data = memoryview(b"")
        self._file = -1
        if isinstance(source, Path):
            self._file = os.open(source, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            self.size = os.fstat(self._file).st_size
        else:
            self._data, self.size = memoryview(source), len(source)

    def read(self, start: int, end: int) -> bytes | memoryview:
        """The bytes from `start` to `end`."""
        return self._data[start:end] if self._file < 0 else os.pread(self._file, end - start, start)

    def parts(self, size: int = 1 << 20) -> Iterator[bytes | memoryview]:
        """All of it, a part at a time."""
        for start in range(0, self.size, size):
            yield self.read(start, min(start + size, self.size))


class Stored(Tokens):
    """A row of a store. Its example is parsed when somebody asks for it."""

    def __init__(self, store: Store, number: int) -> None:
        ids, learn = decoded(store.codes(number, number + 1))
        values = {"ids": ids, "learn": learn, "line": int(store.lines[number]), "full": int(store.full[number])}
        self.__dict__.update(values, cut=CUTS[store.cut[number]], _store=store, _number=number)

    @cached_property
    def example(self) -> Example:  # type: ignore[override]
        """The row as it stood in the file."""
        return self.__dict__["_store"].example(self.__dict__["_number"])  # type: ignore[no-any-return]


class Store:
    """Every usable row of a file."""

    def __init__(self, table: np.ndarray, codes: Blob, texts: Blob) -> None:
        self._codes, self._texts = codes, texts
        self.lines, self.full, self.cut = (table[name].copy() for name in ("line", "full", "cut"))
        self.lengths = table["tokens"].copy()
        self._starts = np.concatenate(([0], np.cumsum(table["tokens"])))
        self._places = np.concatenate(([0], np.cumsum(table["text"])))
        if self._starts[-1] * 4 != codes.size or self._places[-1] != texts.size:
            raise ValueError("the table isn't that of these rows")

    def codes(self, first: int, past: int) -> np.ndarray:
        """The coded tokens of the rows from `first` up to `past`, end to end."""
        start, end = int(self._starts[first]) * 4, int(self._starts[past]) * 4
        return np.frombuffer(self._codes.read(start, end), "<i4")

    def runs(self, first: int, past: int, most: int) -> Iterator[range]:
        """The rows from `first` up to `past` in runs of at most `most` tokens, at least one row each."""
        while first < past:
            end = int(np.searchsorted(self._starts, self._starts[first] + most, "right")) - 1
            end = max(first + 1, min(end, past))
            yield range(first, end)
            first = end

    def example(self, number: int) -> Example:
        """The row as it stood in the file."""
        data = self._texts.read(int(self._places[number]), int(self._places[number + 1]))
        return Example.from_json(bytes(data))


class Rows(Sequence[Tokens]):
    """Some rows of a store, in order; each is read when it is asked for. `numbers`: their numbers in the store."""

    def __init__(self, store: Store, numbers: np.ndarray) -> None:
        self.store, self.numbers = store, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, key: int) -> Tokens: ...
    @overload
    def __getitem__(self, key: slice) -> Rows: ...
    def __getitem__(self, key: Any) -> Any:
        """A row, or some of them."""
        if isinstance(key, slice):
            return Rows(self.store, self.numbers[key])
        return Stored(self.store, int(self.numbers[key]))

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each row."""
        lengths: np.ndarray = self.store.lengths[self.numbers]
        return lengths

    def runs(self, most: int = 1 << 18) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The coded tokens of all rows, in pieces of about `most` tokens, each with the lengths of its rows."""
        for neighbours in np.split(self.numbers, np.flatnonzero(np.diff(self.numbers) != 1) + 1):
            for run in self.store.runs(int(neighbours[0]), int(neighbours[-1]) + 1, most) if len(neighbours) else ():
                yield self.store.codes(run.start, run.stop), self.store.lengths[run.start : run.stop]


def lengths_of(rows: Iterable[Tokens]) -> np.ndarray:
    """The tokens of each row, without reading rows that are stored."""
    return rows.lengths if isinstance(rows, Rows) else np.fromiter((len(row.ids) for row in rows), np.int64)

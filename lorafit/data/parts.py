"""A batch of rows to arrays, by itself: what a worker does, and what the arrays of a whole file are put together from."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorafit.data.chat import Chat
from lorafit.data.example import Example, Fault
from lorafit.data.read import Row, examples
from lorafit.data.report import Traits, system_of
from lorafit.data.store import DIGEST, TABLE, coded
from lorafit.data.tokens import CUTS, Learn, Long, Tokens, encode_all


@dataclass
class Part:
    """What a batch of rows holds.

    `table`, `codes` and `texts` are those of `store`. `rows`: all rows, the unusable ones too; `examples`: those that were
    tokenised; `formats`: theirs. `long`: tokens of rows that are too long; `skipped`: how many of them are no fault.
    """

    table: np.ndarray
    codes: bytes
    texts: bytes
    rows: int = 0
    examples: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    notes: list[Fault] = field(default_factory=list)
    long: list[int] = field(default_factory=list)
    skipped: int = 0


@dataclass
class Work:
    """The settings that decide what becomes of a row."""

    chat: Chat
    mapping: Mapping[str, str] | None
    learn: Learn
    max_tokens: int
    long: Long

    def __post_init__(self) -> None:
        self._traits = Traits(self.chat)

    def __call__(self, batch: Sequence[Row]) -> Part:
        """A batch of rows as arrays."""
        part = Part(np.empty(0, TABLE), b"", b"")
        read: list[Example] = []
        faults = part.faults
        for row in batch:
            for item in examples(row, self.mapping):
                if isinstance(item, Example):
                    part.rows += 1
                    part.formats[item.format] += 1
                    read.append(item)
                else:
                    part.rows += not item.note
                    (part.notes if item.note else faults).append(item)
        part.examples = len(read)
        found: list[Tokens] = []
        encoded = encode_all(read, self.chat, learn=self.learn, max_tokens=self.max_tokens, long=self.long)
        for example, result in zip(read, encoded, strict=True):
            if isinstance(result, Tokens):
                found.append(result)
                continue
            if result.length:
                part.long.append(result.length)
            if result.length and self.long == "skip":
                part.skipped += 1
            else:
                faults.append(Fault(example.line, result.reason))
        faults.sort(key=lambda fault: fault.line)
        self._pack(part, found)
        return part

    def _pack(self, part: Part, rows: Sequence[Tokens]) -> None:
        if not rows:
            return
        texts = [row.example.to_json() for row in rows]
        part.texts = b"".join(texts)
        ids = np.concatenate([row.ids for row in rows])
        learn = np.concatenate([row.learn for row in rows])
        part.codes = coded(ids, learn).tobytes()
        entries = []
        for row, text in zip(rows, texts, strict=True):
            key, prompt = keys(row.example)
            size = (row.line, len(row.ids), len(text), row.full, int(np.count_nonzero(row.learn)))
            traits = (_system(row.example), self._traits.of(row.example), CUTS.index(row.cut))
            entries.append((*size, *traits, key, prompt))
        part.table = np.array(entries, TABLE)


def keys(example: Example) -> tuple[bytes, bytes]:
    """Digests of a row that are the same for equal rows, and for rows that are equal up to the last answer."""
    turns = [[m.role, m.content, m.reasoning, m.tool_calls, m.name] for m in example.messages]
    last = max((n for n, turn in enumerate(turns) if turn[0] == "assistant"), default=0)
    digest = hashlib.blake2b(_text([turns[:last], example.text, example.tools]), digest_size=DIGEST)
    prompt = digest.digest()
    digest.update(_text(turns[last:]))
    return digest.digest(), prompt


def _text(value: Any) -> bytes:
    return _ENCODER.encode(value).encode("utf-8")


_ENCODER = json.JSONEncoder(sort_keys=True, default=str)


def _system(example: Example) -> int:
    text = system_of(example)
    if text is None:
        return 0
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") | 1

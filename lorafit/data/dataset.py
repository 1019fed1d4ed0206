"""A data file to training rows and held-out rows, and a report on everything that was found on the way."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorafit.data.chat import Chat
from lorafit.data.example import Example, Fault, RowFault
from lorafit.data.read import read
from lorafit.data.report import Report, histogram, pieces, shared_system, template_notes
from lorafit.data.tokens import Learn, Long, Tokens, encode_all
from lorafit.errors import DataError

LEAST, MOST = 8, 500  # held-out rows of a split
SMALLEST = 16  # usable rows below which nothing is held out


@dataclass
class Dataset:
    """Rows to train on and to evaluate on, in the order of the file."""

    train: list[Tokens]
    held_out: list[Tokens]
    report: Report


@dataclass
class _File:
    """What one file holds."""

    tokens: list[Tokens] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    notes: list[Fault] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    rows: int = 0
    skipped: int = 0


def prepare(
    path: str | Path,
    chat: Chat,
    *,
    held_out: str | Path | None = None,
    held_out_share: float = 0.05,
    mapping: Mapping[str, str] | None = None,
    learn: Learn = "assistant",
    max_tokens: int = 4096,
    long: Long = "error",
    seed: int = 0,
    skip_bad_rows: bool = False,
    strict: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Dataset:
    """Reads, checks, tokenises and splits a data file.

    Raises DataError for a file that can't be read; with `strict` also for rows that can't be used (unless
    `skip_bad_rows`) and for a file without a usable row. `progress` is called with the number of rows done so far.
    A row that has duplicates always stays in training.
    """

    def load(file: str | Path, mapping: Mapping[str, str] | None) -> _File:
        return _load(file, chat, mapping, learn, max_tokens, long, progress)

    main = load(path, mapping)
    other = None
    if held_out is not None:
        try:
            other = load(held_out, mapping)
        except DataError:
            if not mapping:
                raise
            other = load(held_out, None)  # the held-out file may have a format of its own, which the map isn't for
    if strict:
        for file, name in ((main, path), (other, held_out)):
            if file is not None:
                _refuse(file, str(name), skip_bad_rows)
    report = Report(str(path), rows=main.rows, by_format=dict(main.formats.most_common()))
    report.faults, report.notes = main.faults, main.notes + template_notes([row.example for row in main.tokens], chat)
    repeated = _find_duplicates(main.tokens, report)
    if other is None:
        train, held = _split(main.tokens, repeated, report, held_out_share, seed)
    else:
        train, held = main.tokens, other.tokens
        report.faults = report.faults + [_named(fault, str(held_out)) for fault in other.faults]
        report.notes = report.notes + [_named(note, str(held_out)) for note in other.notes]
    held = _without_leaks(train, held, report)
    _count(report, train, held, main, other, max_tokens, chat)
    return Dataset(train, held, report)


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 (hex) over every token id and mask in order; equal for equal data, template and settings."""
    digest = hashlib.sha256()
    for rows in (dataset.train, dataset.held_out):
        digest.update(len(rows).to_bytes(8, "little"))
        for row in rows:
            digest.update(len(row.ids).to_bytes(8, "little"))
            digest.update(row.ids.astype("<i4").tobytes())
            digest.update(row.learn.tobytes())
    return digest.hexdigest()


def _load(
    path: str | Path,
    chat: Chat,
    mapping: Mapping[str, str] | None,
    learn: Learn,
    max_tokens: int,
    long: Long,
    progress: Callable[[int], None] | None,
) -> _File:
    file = _File()
    waiting: deque[Example] = deque()  # read, not yet back from the tokenizer

    def examples() -> Iterator[Example]:
        for item in read(path, mapping):
            if isinstance(item, Fault):
                file.rows += not item.note
                (file.notes if item.note else file.faults).append(item)
                continue
            file.rows += 1
            file.formats[item.format] += 1
            waiting.append(item)
            yield item

    for done, result in enumerate(encode_all(examples(), chat, learn=learn, max_tokens=max_tokens, long=long), 1):
        example = waiting.popleft()
        if isinstance(result, Tokens):
            file.tokens.append(result)
            file.lengths.append(result.full)
        else:
            _bad(file, example.line, result, long)
        if progress:
            progress(done)
    file.faults.sort(key=lambda fault: fault.line)
    return file


def _bad(file: _File, line: int, fault: RowFault, long: Long) -> None:
    if fault.length:
        file.lengths.append(fault.length)
    if fault.length and long == "skip":
        file.skipped += 1
    else:
        file.faults.append(Fault(line, fault.reason))


def _refuse(file: _File, path: str, skip_bad_rows: bool) -> None:
    shown = "; ".join(f"line {fault.line}: {fault.reason}" for fault in file.faults[:3])
    if file.faults and not skip_bad_rows:
        raise DataError(
            f"{path}: {len(file.faults)} of {file.rows} rows can't be used: {shown}; "
            f"`lorafit check {path}` shows them all, --skip-bad-rows leaves them out"
        )
    if not file.tokens:
        skipped = f"{file.skipped} are over max_tokens" if file.skipped else shown
        raise DataError(f"{path}: none of the {file.rows} rows can be used: {skipped}; see `lorafit check {path}`")


def _key(example: Example, prompt: bool = False) -> bytes:
    """The same for equal rows; with `prompt`, for rows that are equal up to the last answer."""
    messages = list(example.messages)
    if prompt:
        last = max((n for n, message in enumerate(messages) if message.role == "assistant"), default=0)
        messages = messages[:last]
    turns = [[m.role, m.content, m.reasoning, m.tool_calls, m.name] for m in messages]
    whole = json.dumps([turns, example.text, example.tools], sort_keys=True, default=str)
    return hashlib.sha256(whole.encode("utf-8")).digest()


def _find_duplicates(rows: list[Tokens], report: Report) -> set[int]:
    """The indices of all rows that are there more than once; notes and pairs of lines go to the report."""
    first: dict[bytes, int] = {}
    repeated = set()
    for number, row in enumerate(rows):
        index = first.setdefault(_key(row.example), number)
        if index != number:
            line = rows[index].line
            repeated |= {index, number}
            report.duplicates.append((row.line, line))
            report.notes.append(Fault(row.line, f"the same as line {line}", note=True))
    return repeated


def _split(
    rows: list[Tokens], repeated: set[int], report: Report, share: float, seed: int
) -> tuple[list[Tokens], list[Tokens]]:
    if share <= 0 or not rows:
        return rows, []
    if len(rows) < SMALLEST:
        reason = (
            f"only {len(rows)} usable rows: nothing is held out, so there is no evaluation (from {SMALLEST} rows on)"
        )
        report.notes.append(Fault(1, reason, note=True))
        return rows, []
    single = [number for number in range(len(rows)) if number not in repeated]
    count = min(max(LEAST, min(MOST, round(len(rows) * share))), len(rows) // 2, len(single))
    if count < LEAST:
        reason = f"only {count} rows can be held out, because the others are duplicates"
        report.notes.append(Fault(1, reason, note=True))
    chosen = set(random.Random(seed).sample(single, count))
    return [r for n, r in enumerate(rows) if n not in chosen], [r for n, r in enumerate(rows) if n in chosen]


def _without_leaks(train: list[Tokens], held: list[Tokens], report: Report) -> list[Tokens]:
    whole = {_key(row.example): row.line for row in reversed(train)}
    prompts = {_key(row.example, prompt=True): row.line for row in reversed(train) if row.example.messages}
    kept = []
    for row in held:
        line = whole.get(_key(row.example))
        if line is not None:
            report.leaks.append((row.line, line))
            continue
        kept.append(row)
        line = prompts.get(_key(row.example, prompt=True)) if row.example.messages else None
        if line is not None:
            report.same_prompt.append((row.line, line))
    return kept


def _count(
    report: Report,
    train: list[Tokens],
    held: list[Tokens],
    main: _File,
    other: _File | None,
    max_tokens: int,
    chat: Chat,
) -> None:
    rows = [*train, *held]
    report.train_rows, report.held_out_rows = len(train), len(held)
    report.tokens = sum(len(row.ids) for row in rows)
    report.target_tokens = sum(int(row.learn.sum()) for row in rows)
    report.share = report.target_tokens / report.tokens if report.tokens else 0.0
    lengths = main.lengths + (other.lengths if other else [])
    report.lengths = histogram(lengths)
    report.over_length = sum(length > max_tokens for length in lengths)
    report.skipped = main.skipped + (other.skipped if other else 0)
    report.truncated = sum(row.cut != "" for row in rows)
    report.truncated_end = sum(row.cut == "answer" for row in rows)
    report.text_example = pieces(train[0], chat) if train else []
    report.system = shared_system(row.example for row in train)


def _named(fault: Fault, path: str) -> Fault:
    return replace(fault, reason=f"{path}: {fault.reason}")

"""A data file to training rows and held-out rows, and a report on everything that was found on the way."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lorafit.data.cache import File, Writer, find, name_of
from lorafit.data.chat import Chat
from lorafit.data.example import Fault
from lorafit.data.parts import Work
from lorafit.data.read import check, read_rows
from lorafit.data.report import CONVERSATION, Report, histogram, pieces, shared_system, template_notes
from lorafit.data.store import Rows, decoded
from lorafit.data.tokens import CUTS, Learn, Long, Tokens
from lorafit.data.workers import spread
from lorafit.errors import DataError

SMALL = 1_000_000  # bytes of a file that is prepared faster than a cache is worth
LEAST, MOST = 8, 500  # held-out rows of a split
SMALLEST = 16  # usable rows below which nothing is held out


@dataclass
class Dataset:
    """Rows to train on and to evaluate on, in the order of the file. A row is read when it is asked for."""

    train: Sequence[Tokens]
    held_out: Sequence[Tokens]
    report: Report


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
    cache: bool = True,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], object] | None = None,
) -> Dataset:
    """Reads, checks, tokenises and splits a data file.

    Raises DataError for a file that can't be read; with `strict` also for rows that can't be used (unless
    `skip_bad_rows`) and for a file without a usable row. `progress` is called with the number of rows done so far.
    A row that has duplicates always stays in training. With `cache`, a large file's tokens are kept in the user's cache
    folder and read from there the next time; `say` is told when that isn't possible.
    """

    told: list[str] = []

    def load(file: str | Path, mapping: Mapping[str, str] | None) -> File:
        found, trouble = _load(Path(file), Work(chat, mapping, learn, max_tokens, long), cache, progress)
        if trouble and say and not told:
            told.append(trouble)
            say(f"no cache for {Path(file).name}: {trouble}; cache=false doesn't try")
        return found

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
    report.faults = main.faults
    report.notes = main.notes + template_notes(main.table["flags"], main.table["line"], chat)
    repeated = _find_duplicates(main.table, report)
    if other is None:
        train, held = _split(main, repeated, report, held_out_share, seed)
    else:
        train, held = _Some(main, np.arange(len(main.table))), _Some(other, np.arange(len(other.table)))
        report.faults = report.faults + [_named(fault, str(held_out)) for fault in other.faults]
        report.notes = report.notes + [_named(note, str(held_out)) for note in other.notes]
    held = _without_leaks(train, held, report)
    made = Dataset(Rows(train.file.store, train.index), Rows(held.file.store, held.index), report)
    _count(made, train, held, [main] if other is None else [main, other], max_tokens, chat)
    return made


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 (hex) over every token id and mask in order; equal for equal data, template and settings."""
    digest = hashlib.sha256()
    for rows in (dataset.train, dataset.held_out):
        digest.update(len(rows).to_bytes(8, "little"))
        for ids, learn, lengths in _runs(rows):
            ids_bytes, learn_bytes = memoryview(ids.astype("<i4").tobytes()), memoryview(learn.tobytes())
            at = 0
            for length in lengths.tolist():
                digest.update(length.to_bytes(8, "little"))
                digest.update(ids_bytes[at * 4 : (at + length) * 4])
                digest.update(learn_bytes[at : at + length])
                at += length
    return digest.hexdigest()


def _runs(rows: Sequence[Tokens]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ids, mask and lengths of many rows at a time."""
    if isinstance(rows, Rows):
        for codes, lengths in rows.runs():
            yield *decoded(codes), lengths
    else:
        for row in rows:
            yield row.ids, row.learn, np.array([len(row.ids)])


@dataclass(frozen=True)
class _Some:
    """Some rows of a file, by number."""

    file: File
    index: np.ndarray

    def __getitem__(self, name: str) -> np.ndarray:
        return self.file.table[name][self.index]  # type: ignore[no-any-return]


def _load(path: Path, work: Work, kept: bool, progress: Callable[[int], None] | None) -> tuple[File, str]:
    """What a file holds, from the cache if it is there; and why it couldn't be kept, if so."""
    check(path, work.mapping)
    before = path.stat()
    name = name_of(path, work) if kept and before.st_size >= SMALL else None
    found = find(name) if name else None
    if found is not None:
        return found, ""
    done = 0
    with Writer(name) as writer, contextlib.closing(spread(work, read_rows(path, work.mapping))) as parts:
        for part in parts:
            writer.add(part)
            done += part.examples
            if progress:
                progress(done)
        after = path.stat()
        same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
        return writer.finish(keep=same), writer.trouble


def _refuse(file: File, path: str, skip_bad_rows: bool) -> None:
    shown = "; ".join(f"line {fault.line}: {fault.reason}" for fault in file.faults[:3])
    if file.faults and not skip_bad_rows:
        raise DataError(
            f"{path}: {len(file.faults)} of {file.rows} rows can't be used: {shown}; "
            f"`lorafit check {path}` shows them all, --skip-bad-rows leaves them out"
        )
    if not len(file.table):
        skipped = f"{file.skipped} are over max_tokens" if file.skipped else shown
        raise DataError(f"{path}: none of the {file.rows} rows can be used: {skipped}; see `lorafit check {path}`")


def _find_duplicates(table: np.ndarray, report: Report) -> set[int]:
    """The numbers of all rows that are there more than once; notes and pairs of lines go to the report."""
    first: dict[bytes, int] = {}
    repeated = set()
    for number, key in enumerate(table["key"].tolist()):
        index = first.setdefault(key, number)
        if index != number:
            line, earlier = int(table["line"][number]), int(table["line"][index])
            repeated |= {index, number}
            report.duplicates.append((line, earlier))
            report.notes.append(Fault(line, f"the same as line {earlier}", note=True))
    return repeated


def _split(file: File, repeated: set[int], report: Report, share: float, seed: int) -> tuple[_Some, _Some]:
    size = len(file.table)
    everything, nothing = _Some(file, np.arange(size)), _Some(file, np.arange(0))
    if share <= 0 or not size:
        return everything, nothing
    if size < SMALLEST:
        reason = f"only {size} usable rows: nothing is held out, so there is no evaluation (from {SMALLEST} rows on)"
        report.notes.append(Fault(1, reason, note=True))
        return everything, nothing
    single = [number for number in range(size) if number not in repeated]
    count = min(max(LEAST, min(MOST, round(size * share))), size // 2, len(single))
    if count < LEAST:
        reason = f"only {count} rows can be held out, because the others are duplicates"
        report.notes.append(Fault(1, reason, note=True))
    chosen = np.zeros(size, dtype=bool)
    chosen[random.Random(seed).sample(single, count)] = True
    return _Some(file, np.flatnonzero(~chosen)), _Some(file, np.flatnonzero(chosen))


def _without_leaks(train: _Some, held: _Some, report: Report) -> _Some:
    """The held-out rows that aren't among the training rows."""
    talks = (train["flags"] & CONVERSATION) != 0
    whole = _first_lines(train["key"], train["line"], held["key"])
    prompts = _first_lines(train["prompt"][talks], train["line"][talks], held["prompt"])
    kept = np.ones(len(held.index), dtype=bool)
    found = zip(
        held["key"].tolist(), held["prompt"].tolist(), held["line"].tolist(), held["flags"].tolist(), strict=True
    )
    for number, (key, prompt, line, flags) in enumerate(found):
        if key in whole:
            report.leaks.append((line, whole[key]))
            kept[number] = False
        elif flags & CONVERSATION and prompt in prompts:
            report.same_prompt.append((line, prompts[prompt]))
    return _Some(held.file, held.index[kept])


def _first_lines(keys: np.ndarray, lines: np.ndarray, wanted: np.ndarray) -> dict[bytes, int]:
    """The first line of each wanted key that is there."""
    asked = set(wanted.tolist())
    found: dict[bytes, int] = {}
    for number, key in enumerate(keys.tolist()):
        if key in asked:
            found.setdefault(key, int(lines[number]))
    return found


def _count(made: Dataset, train: _Some, held: _Some, files: list[File], max_tokens: int, chat: Chat) -> None:
    report, parts = made.report, (train, held)
    report.train_rows, report.held_out_rows = len(train.index), len(held.index)
    report.tokens = sum(int(part["tokens"].sum()) for part in parts)
    report.target_tokens = sum(int(part["learned"].sum()) for part in parts)
    report.share = report.target_tokens / report.tokens if report.tokens else 0.0
    lengths = [length for file in files for length in (*file.table["full"].tolist(), *file.long)]
    report.lengths = histogram(lengths)
    report.over_length = sum(length > max_tokens for length in lengths)
    report.skipped = sum(file.skipped for file in files)
    report.truncated = sum(int((part["cut"] != 0).sum()) for part in parts)
    report.truncated_end = sum(int((part["cut"] == CUTS.index("answer")).sum()) for part in parts)
    report.text_example = pieces(made.train[0], chat) if made.train else []
    report.system = shared_system(made.train, train["system"])


def _named(fault: Fault, path: str) -> Fault:
    return replace(fault, reason=f"{path}: {fault.reason}")

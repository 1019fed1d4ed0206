"""Data files to examples, one row at a time, with the line of every fault."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lorafit.data.example import Example, Fault, RowFault
from lorafit.data.formats import MAPPED, parse
from lorafit.data.rows import READERS
from lorafit.data.turns import columns, kind
from lorafit.errors import DataError


class Row(NamedTuple):
    """A row as its file holds it: any value, or the Fault that spoils it. `where` tells rows on one line apart."""

    line: int
    value: Any
    where: str = ""


def read(path: str | Path, mapping: Mapping[str, str] | None = None) -> Iterator[Example | Fault]:
    """Every row of a .jsonl, .json, .csv, .parquet or .txt file, in order, as an Example or the Fault that spoils it.

    A note (`Fault.note`) comes before the row it belongs to. `mapping` names columns, see `formats.parse`. Raises
    DataError for a file that can't be read at all, holds no rows, or lacks a mapped column in every row.
    """
    for row in read_rows(path, mapping):
        yield from examples(row, mapping)


def read_rows(path: str | Path, mapping: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Every row of a file in order, not yet looked into. Raises DataError as `read` does."""
    path = Path(path)
    check(path, mapping)
    missing = dict.fromkeys((mapping or {}).values())
    seen, before, names = 0, 0, ""
    for line, value in READERS[path.suffix.lower()](path):
        if isinstance(value, Fault):
            seen += not value.note
            yield Row(line, value)
            continue
        seen += 1
        where = f"row {seen}: " if line == before else ""  # several rows on one line, as in minified JSON
        before = line
        if isinstance(value, Mapping):
            names = names or columns(value)
            if missing:
                missing = {column: None for column in missing if column not in value}
        yield Row(line, value, where)
    if not seen:
        raise DataError(f"{path}: line 1: the file has no rows; a row is one example, such as {_SAMPLE}")
    if missing and names:
        raise DataError(f"{path}: no row has the column '{next(iter(missing))}'; there are {names}; mend --map")


_SAMPLE = '{"prompt": "…", "completion": "…"}'


def examples(row: Row, mapping: Mapping[str, str] | None = None) -> Iterator[Example | Fault]:
    """What a row holds: an example, with a note before it if there is something to tell, or the row's fault."""
    line, value, where = row
    if isinstance(value, Fault):
        yield value
        return
    if not isinstance(value, Mapping):
        yield Fault(line, f"{where}the row is {kind(value)}, not an object with columns")
        return
    try:
        example = parse(value, line, mapping)
    except RowFault as fault:
        yield Fault(line, where + fault.reason)
        return
    if example.messages and example.messages[-1].role == "user":
        yield Fault(line, f"{where}ends with a user turn: nothing is learned from that turn", note=True)
    yield example


def check(path: Path, mapping: Mapping[str, str] | None = None) -> None:
    """Raises DataError for a file that can't be read at all, or a mapping that can't be meant."""
    _check_file(path)
    _check_mapping(mapping or {})


def _check_file(path: Path) -> None:
    if not path.exists():
        raise DataError(f"no such file: {path}; give a data file ({', '.join(READERS)})")
    if path.is_dir():
        inside = sorted(item.name for item in path.iterdir() if item.suffix.lower() in READERS)[:3]
        raise DataError(
            f"{path} is a folder; give one file in it" + (f", such as {', '.join(inside)}" if inside else "")
        )
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: unknown kind of file '{path.suffix}'; there are {', '.join(READERS)}")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror}") from None
    if not start:
        raise DataError(f"{path}: line 1: the file is empty; a row is one example, such as {_SAMPLE}")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16; save it as UTF-8")


def _check_mapping(mapping: Mapping[str, str]) -> None:
    unknown = [part for part in mapping if part not in MAPPED]
    if unknown:
        raise DataError(f"--map {unknown[0]}=…: unknown part; there are {', '.join(MAPPED)}")
    if mapping and not ({"text", "messages"} & set(mapping) or {"user", "assistant"} <= set(mapping)):
        raise DataError(
            "--map needs user and assistant, or messages, or text, e.g. --map user=question,assistant=answer"
        )

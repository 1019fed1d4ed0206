"""Files to rows: (line, value) in order, where value is the parsed row or a Fault. Lines count from 1."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lorafit.data.example import Fault
from lorafit.data.formats import recognised
from lorafit.errors import DataError

Rows = Iterator[tuple[int, Any]]

BOM = b"\xef\xbb\xbf"
PART = 1 << 20  # bytes of a file read at a time
_BAD_BYTES = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of bytes that aren't UTF-8
_SPACE = re.compile(r"[ \t\r\n]*")
_NOT_UTF8 = "not valid UTF-8; save the file as UTF-8"
_NOT_JSON = "not valid JSON: {} (column {})"


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Each line with its number and without a byte-order mark; bytes that aren't UTF-8 become surrogates."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(BOM):
                line = line[len(BOM) :]
            yield number, line.decode("utf-8", "surrogateescape")


def _bom(path: Path) -> Rows:
    with path.open("rb") as file:
        if file.read(3) == BOM:
            yield 1, Fault(1, "the file starts with a byte-order mark; it is ignored", note=True)


def read_json(path: Path) -> Rows:
    """JSON Lines, one JSON array, or one object that holds one array, told apart by what the file holds."""
    yield from _bom(path)
    if not _alone(path) and _is_json(next((text for _, text in lines_of(path) if text.strip()), "")):
        yield from _json_lines(path)
        return
    with path.open("rb") as file:
        window = _Window(file)
        start = window.skip(0)
        if window.text[start : start + 1] == "[":
            yield from _elements(window, start)
            return
    del window
    text = path.read_bytes().removeprefix(BOM).decode("utf-8", "surrogateescape")
    start = _skip(text, 0)
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        yield from _json_lines(path)  # so that one broken line costs one row
        return
    if _skip(text, end) < len(text):
        yield from _objects(text, start)
    else:
        yield from _single(text, start, value)


_DECODER = json.JSONDecoder()


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _alone(path: Path) -> bool:
    """Whether the file holds a single line that isn't blank. Reads parts, for that line may be as long as the file."""
    count, filled = 0, False
    with path.open("rb") as file:
        decoder = _decoder()
        while data := file.read(PART):
            first, *lines = decoder.decode(data).split("\n")
            filled = filled or bool(first.strip())
            for line in lines:
                count += filled
                filled = bool(line.strip())
            if count + filled > 1:
                return False
    return True


class _Window:
    """A part of a file's text, so that a file larger than memory can be read.

    `text` begins in `line`, after `column` of its characters. Bytes that aren't UTF-8 become surrogates.
    """

    def __init__(self, file: BinaryIO | None = None, text: str = "") -> None:
        self.text, self.line, self.column = text, 1, 0
        self._file, self._decoder = file, _decoder()
        self.more()

    def more(self) -> bool:
        """Reads on, as much again as there is; False at the end of the file."""
        data = self._file.read(max(PART, len(self.text))) if self._file else b""
        self.text += self._decoder.decode(data, final=not data)
        return bool(data)

    def drop(self, end: int) -> None:
        """Forgets the text before `end`."""
        lines = self.text.count("\n", 0, end)
        self.column = end - 1 - self.text.rfind("\n", 0, end) if lines else self.column + end
        self.line += lines
        self.text = self.text[end:]

    def skip(self, at: int) -> int:
        """Past the whitespace at `at`."""
        at = _skip(self.text, at)
        while at == len(self.text) and self.more():
            at = _skip(self.text, at)
        return at

    def fault(self, line: int, error: json.JSONDecodeError) -> tuple[int, Fault]:
        """A broken row that begins in `line`, and all that comes after it."""
        column = error.colno + (self.column if error.lineno == 1 else 0)
        reason = _NOT_JSON.format(error.msg, column)
        return line, Fault(
            self.line + error.lineno - 1, f"{reason}; the rest of the file can't be read, mend this first"
        )


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _json_lines(path: Path) -> Rows:
    for number, text in lines_of(path):
        if not text.strip():
            continue
        if _BAD_BYTES.search(text):
            yield number, Fault(number, _NOT_UTF8)
            continue
        try:
            yield number, json.loads(text.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            yield number, Fault(number, _NOT_JSON.format(error.msg, error.colno))
        except RecursionError:
            yield number, Fault(number, "not valid JSON: nested too deeply")


def _elements(window: _Window, at: int) -> Rows:
    """The elements of the array that opens at `at`."""
    at = window.skip(at + 1)
    line = window.line + window.text.count("\n", 0, at)
    while window.text[at : at + 1] != "]":
        try:
            value, end = _DECODER.raw_decode(window.text, at)
            stop = window.skip(end)
            if window.text[stop : stop + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", window.text, stop)
        except json.JSONDecodeError as error:
            if window.more():
                continue  # the row was cut off where the window ends
            yield window.fault(line, error)
            return
        bad = _BAD_BYTES.search(window.text, at, end)
        yield line, Fault(line + window.text.count("\n", at, bad.start()), _NOT_UTF8) if bad else value
        after = window.skip(stop + 1) if window.text[stop] == "," else stop
        line += window.text.count("\n", at, after)
        at = after
        if at > PART:
            window.drop(at)
            at = 0


def _objects(text: str, at: int) -> Rows:
    """Objects one after another, each over several lines."""
    line = 1 + text.count("\n", 0, at)
    while at < len(text):
        try:
            value, end = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            reason = _NOT_JSON.format(error.msg, error.colno)
            yield line, Fault(error.lineno, f"{reason}; the rest of the file can't be read, mend this first")
            return
        yield line, Fault(line, _NOT_UTF8) if _BAD_BYTES.search(text, at, end) else value
        after = _skip(text, end)
        line += text.count("\n", at, after)
        at = after


def _single(text: str, start: int, value: Any) -> Rows:
    """The only value in the file: the one row, or an object around the list of rows."""
    line = 1 + text.count("\n", 0, start)
    lists = [key for key, item in value.items() if _is_rows(item)] if isinstance(value, Mapping) else []
    if not lists or recognised(value):
        yield line, Fault(line, _NOT_UTF8) if _BAD_BYTES.search(text) else value
    elif len(lists) > 1:
        names = ", ".join(lists)
        yield line, Fault(line, f"the file holds several lists of rows ({names}); write each to a file of its own")
    else:
        at = _value_at(text, start, lists[0])
        yield from _elements(_Window(text=text), at)


def _is_rows(value: Any) -> bool:
    """Whether a value is a list of objects that aren't the turns of one conversation."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and not ("role" in first or "from" in first or "human" in first)


def _value_at(text: str, start: int, key: str) -> int:
    """Where the value of `key` begins in the valid JSON object that begins at `start`."""
    at = start
    while True:
        name, end = _DECODER.raw_decode(text, _skip(text, at + 1))
        at = _skip(text, _skip(text, end) + 1)  # past the colon
        if name == key:
            return at
        at = _skip(text, _DECODER.raw_decode(text, at)[1])  # at the comma


def read_csv(path: Path) -> Rows:
    """A table with a header; commas, or semicolons or tabs where the header has no comma."""
    yield from _bom(path)
    csv.field_size_limit(2**31 - 1)
    header_line = next((text for _, text in lines_of(path) if text.strip()), "")
    delimiter = next((mark for mark in (",", ";", "\t") if mark in header_line), ",")
    reader = csv.reader((text for _, text in lines_of(path)), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, Fault(line, f"not a valid CSV row: {error}")
            continue
        if not any(field.strip() for field in fields):
            continue
        if not header:
            header = [field.strip() for field in fields]
            if len(set(header)) < len(header):
                raise DataError(f"{path}: line {line}: two columns have the same name; there are {', '.join(header)}")
        elif len(fields) != len(header):
            yield line, Fault(line, f"{len(fields)} fields, but the header has {len(header)}: {', '.join(header)}")
        elif any(_BAD_BYTES.search(field) for field in fields):
            yield line, Fault(line, _NOT_UTF8)
        else:
            yield line, dict(zip(header, fields, strict=True))


def read_parquet(path: Path) -> Rows:
    """A Parquet table; the line is the row's number."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} can't be read as Parquet: {' '.join(str(error).split())}") from None


def read_text(path: Path) -> Rows:
    """Documents separated by blank lines; the line is the document's first."""
    yield from _bom(path)
    start, document = 0, ""
    for number, text in lines_of(path):
        if text.strip():
            start = start or number
            document += text
        elif start:
            yield start, _document(start, document)
            start, document = 0, ""
    if start:
        yield start, _document(start, document)


def _document(start: int, text: str) -> Any:
    bad = _BAD_BYTES.search(text)
    if bad:
        return Fault(start + text.count("\n", 0, bad.start()), _NOT_UTF8)
    return {"text": text.strip("\r\n").replace("\r\n", "\n")}


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
}

"""Files that were tokenised before: kept in the user's cache folder, under a name made of everything that decides the tokens.

A folder holds `tokens`, `texts` and `table` (see `store`), and `summary`: a checksum, then JSON with the rest and the sizes
and checksums of the others. It is written aside and renamed, so that it is there whole or not at all; what can't be used
is removed and made again. Nothing here is ever an error: without a cache, the rows are in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tokenizers

import lorafit
from lorafit.data.example import Fault
from lorafit.data.parts import Part, Work
from lorafit.data.store import TABLE, Blob, Store
from lorafit.files import cache_folder, sha256

FORMAT = 2  # raised when the same file would get other tokens, or what is written changes
LIMIT = 5_000_000_000  # bytes of all folders together
ABANDONED = 86_400  # seconds after which a scratch folder is nobody's
_SCRATCH = ".tmp"


@dataclass
class File:
    """What a data file holds: its usable rows, and what there is to say of the others. Fields as in `Part`."""

    store: Store
    table: np.ndarray
    faults: list[Fault] = field(default_factory=list)
    notes: list[Fault] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    long: list[int] = field(default_factory=list)
    rows: int = 0
    skipped: int = 0


def folder() -> Path:
    """Where the cache is."""
    return cache_folder() / "rows"


def name_of(path: Path, work: Work) -> str | None:
    """The name of a file's tokens under these settings; None where something that decides them can't be told."""
    chat = work.chat
    try:
        tokenizer = chat.tokenizer.backend_tokenizer.to_str()
        values = {
            "format": FORMAT,
            "versions": [lorafit.__version__, tokenizers.__version__, jinja2.__version__, sys.version_info[:2]],
            "file": [sha256(path), path.suffix.lower()],
            "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(),
            "special": [str(chat.tokenizer.special_tokens_map), chat.tokenizer.eos_token_id, chat.around, chat.splits],
            "chat": chat.to_json() | {"date": chat.date if chat.uses("strftime_now") else ""},
            "settings": [work.mapping, work.learn, work.max_tokens, work.long],
        }
    except Exception:  # a tokenizer with parts in Python, or a file that went away
        return None
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:40]


def find(name: str) -> File | None:
    """The file that was kept under this name, if it is there and whole."""
    place = folder() / name
    if not place.is_dir():
        return None
    try:
        made = _open(place)
        os.utime(place)  # the folder that wasn't used for the longest time goes first
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(place, ignore_errors=True)
        return None
    return made


class Writer:
    """Takes the parts of a file: into a folder of the cache, or into memory where there is none or no space left."""

    def __init__(self, name: str | None) -> None:
        self.name, self.trouble = name, ""
        self._scratch: Path | None = None
        self._streams: dict[str, Any] = {}
        self._sums = {"tokens": 0, "texts": 0, "table": 0}
        self._sizes = dict(self._sums)
        self._memory = {"tokens": bytearray(), "texts": bytearray()}
        self._tables: list[np.ndarray] = []
        self._parts = Part(np.empty(0, TABLE), b"", b"")
        if name is not None:
            try:
                folder().mkdir(parents=True, exist_ok=True)
                self._scratch = Path(tempfile.mkdtemp(prefix=f"{name}.", suffix=_SCRATCH, dir=folder()))
                self._streams = {key: (self._scratch / key).open("wb", buffering=0) for key in self._memory}
            except OSError as error:
                self._retreat(error)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        for stream in self._streams.values():
            stream.close()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def add(self, part: Part) -> None:
        """The next rows of the file."""
        whole = self._parts
        self._tables.append(part.table)
        whole.rows += part.rows
        whole.examples += part.examples
        whole.formats.update(part.formats)
        whole.faults += part.faults
        whole.notes += part.notes
        whole.long += part.long
        whole.skipped += part.skipped
        for key, data in (("tokens", part.codes), ("texts", part.texts)):
            self._write(key, data)

    def finish(self, keep: bool) -> File:
        """The file as a whole; with `keep`, for the next time too."""
        table = np.concatenate([np.empty(0, TABLE), *self._tables])
        self._tables.clear()
        whole = self._parts
        whole.faults.sort(key=lambda fault: fault.line)
        store = None
        if self._scratch is not None:
            try:
                store = self._publish(self._scratch, table, keep)
            except OSError as error:
                self._retreat(error)
        if store is None:
            store = Store(table, *(Blob(self._memory[key]) for key in ("tokens", "texts")))
        return File(
            store, table, whole.faults, whole.notes, whole.formats, whole.long, rows=whole.rows, skipped=whole.skipped
        )

    def _write(self, key: str, data: bytes) -> None:
        if self._scratch is not None:
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[self._streams[key].write(rest) :]
            except OSError as error:
                self._retreat(error)
        if self._scratch is None:
            self._memory[key] += data
        self._sums[key] = zlib.crc32(data, self._sums[key])
        self._sizes[key] += len(data)

    def _retreat(self, error: OSError) -> None:
        """Goes on in memory with what was written so far."""
        self.trouble = f"{folder()}: {error.strerror or error}"
        for key, stream in self._streams.items():
            stream.close()
            with open(stream.name, "rb") as file:
                self._memory[key] += file.read(self._sizes[key])
        self._streams.clear()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch = None

    def _publish(self, scratch: Path, table: np.ndarray, keep: bool) -> Store:
        for stream in self._streams.values():
            stream.close()
        if keep and sum(self._sizes.values()) + table.nbytes <= LIMIT:
            data = table.tobytes()
            (scratch / "table").write_bytes(data)
            self._sizes["table"], self._sums["table"] = len(data), zlib.crc32(data)
            whole = self._parts
            text = json.dumps(
                {
                    "sizes": self._sizes,
                    "sums": self._sums,
                    "faults": [[fault.line, fault.reason] for fault in whole.faults],
                    "notes": [[note.line, note.reason] for note in whole.notes],
                    "formats": list(whole.formats.items()),
                    "long": whole.long,
                    "rows": whole.rows,
                    "skipped": whole.skipped,
                }
            )
            (scratch / "summary").write_text(f"{zlib.crc32(text.encode())}\n{text}", encoding="utf-8")
        store = Store(table, Blob(scratch / "tokens"), Blob(scratch / "texts"))
        if (scratch / "summary").exists():
            place = folder() / str(self.name)
            with contextlib.suppress(OSError):  # another process was faster
                scratch.rename(place)
            _tidy(place)
        return store


def _open(place: Path) -> File:
    """Raises OSError, ValueError, KeyError or TypeError for a folder that isn't whole."""
    check, _, text = (place / "summary").read_text(encoding="utf-8").partition("\n")
    if int(check) != zlib.crc32(text.encode()):
        raise ValueError("the summary is damaged")
    summary = json.loads(text)
    blobs = {key: Blob(place / key) for key in ("tokens", "texts", "table")}
    for key, blob in blobs.items():
        found = 0
        for part in blob.parts():
            found = zlib.crc32(part, found)
        if blob.size != summary["sizes"][key] or found != summary["sums"][key]:
            raise ValueError(f"{key} is damaged")
    table = np.frombuffer(blobs["table"].read(0, blobs["table"].size), TABLE)
    return File(
        Store(table, blobs["tokens"], blobs["texts"]),
        table,
        [Fault(line, reason) for line, reason in summary["faults"]],
        [Fault(line, reason, note=True) for line, reason in summary["notes"]],
        Counter(dict(summary["formats"])),
        summary["long"],
        rows=summary["rows"],
        skipped=summary["skipped"],
    )


def _tidy(newest: Path) -> None:
    """Removes what wasn't used for the longest time until the cache is small enough, and what a kill left behind."""
    used = []
    with contextlib.suppress(OSError):
        for place in folder().iterdir():
            with contextlib.suppress(OSError):
                when = place.stat().st_mtime
                if place.suffix == _SCRATCH and time.time() - when > ABANDONED:
                    shutil.rmtree(place, ignore_errors=True)
                elif place.suffix != _SCRATCH and place != newest:
                    used.append((when, sum(_sizes(place)), place))
    total = sum(_sizes(newest)) + sum(size for _, size, _ in used)
    for _, size, place in sorted(used, key=lambda entry: entry[0]):
        if total <= LIMIT:
            break
        shutil.rmtree(place, ignore_errors=True)
        total -= size


def _sizes(place: Path) -> Iterator[int]:
    for file in place.iterdir() if place.is_dir() else ():
        with contextlib.suppress(OSError):
            yield file.stat().st_size

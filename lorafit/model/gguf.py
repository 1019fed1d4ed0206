"""Reading GGUF, llama.cpp's format (ggml's docs/gguf.md): the header of a file, and its tensors one at a time.

The header is read here because gguf.GGUFReader takes seconds for a vocabulary, and can't say where a file is cut off. What the
bits of each type mean is left to the gguf package.

A base made from such a file is a small folder without weights (gguf_folder.py makes it). Its `source.json` says where the
file is and where in it each tensor of the model lies.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorafit.errors import ModelError
from lorafit.files import load_json, samples

SOURCE = "source.json"
MAGIC = b"GGUF"
CHUNK = 1 << 20  # numbers dequantised at once: what that needs beside the tensor is some 30 MB
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# --- the header --------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor of a file: its type, its shape in torch's order, where its bytes begin and how many they are."""

    type: str
    shape: tuple[int, ...]
    begin: int
    size: int


@dataclass(frozen=True)
class Header:
    """The metadata and tensors of a file, and how many bytes stand before the weights."""

    values: dict[str, Any]
    tensors: dict[str, Stored]
    length: int


def is_gguf(path: Path) -> bool:
    """It is called one, or begins like one."""
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """The header of a file. ModelError if it isn't GGUF, is cut off, or has tensors of a type that isn't known."""
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ModelError(f"{path} isn't a GGUF file: it doesn't begin with the letters GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parsed(path, _Cursor(data))
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from None
    except (struct.error, EOFError, ArithmeticError, MemoryError, KeyError, TypeError, ValueError):
        raise ModelError(f"{path} is damaged or cut off: its header can't be read; get the file again") from None


class _Cursor:
    """A place in a file's bytes that moves on as values are read. EOFError or struct.error at the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, len(MAGIC)

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        """So many numbers of one of struct's types."""
        layout = f"<{count}{code}"
        found = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return found

    def text(self) -> str:
        """A string."""
        (length,) = self.numbers("Q")
        found = self.data[self.at : self.at + length]
        if len(found) < length:
            raise EOFError
        self.at += length
        return found.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A value of one of the metadata's types."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.numbers("IQ")
            return (
                list(self.numbers(_NUMBERS[inner], count))
                if inner in _NUMBERS
                else [self.value(inner) for _ in range(count)]
            )
        return self.numbers(_NUMBERS[kind])[0]


def _parsed(path: Path, cursor: _Cursor) -> Header:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    (version,) = cursor.numbers("I")
    if version not in _VERSIONS:
        what = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise ModelError(f"{path} is a {what} GGUF file; little-endian ones of version 2 and 3 can be read")
    count, pairs = cursor.numbers("QQ")
    values = {}
    for _ in range(pairs):
        key = cursor.text()
        values[key] = cursor.value(cursor.numbers("I")[0])
    entries = []
    for _ in range(count):
        name = cursor.text()
        shape = tuple(reversed(cursor.numbers("Q", cursor.numbers("I")[0])))
        number, offset = cursor.numbers("IQ")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise ModelError(
                f"{path}: {name} has a type that isn't known here (number {number}); {readable()}"
            ) from None
        block, width = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise ModelError(
                f"{path} is damaged: {name} is {kind.name} with rows of {shape[-1] if shape else 0} numbers"
            )
        entries.append((name, kind.name, shape, offset, math.prod(shape) // block * width))
    alignment = values.get("general.alignment", 32)
    length = -(-cursor.at // alignment) * alignment
    tensors = {name: Stored(kind, shape, length + offset, size) for name, kind, shape, offset, size in entries}
    for name, stored in tensors.items():
        if stored.begin + stored.size > len(cursor.data):
            raise ModelError(
                f"{path} is cut off: {name} ends at byte {stored.begin + stored.size}, the file at {len(cursor.data)};"
                " get it again"
            )
    return Header(values, tensors, length)


def can_read(kind: str) -> bool:
    """Tensors of this type can be turned into numbers."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    if kind in _PLAIN:
        return True
    try:
        quants.dequantize(
            np.zeros((1, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]), np.uint8), GGMLQuantizationType[kind]
        )
    except NotImplementedError:
        return False
    return True


def readable() -> str:
    """The types that `can_read` allows, in words."""
    from gguf import GGMLQuantizationType

    return f"there are {', '.join(kind.name for kind in GGMLQuantizationType if can_read(kind.name))}"


# --- the weights -------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A tensor of the transformers model: which one of the file it is, and what llama.cpp did to it that is undone.

    `heads`: within each of so many heads, rows of the two halves alternate (its rotary positions turn neighbours, those of
    transformers the halves). `turned`: (out, in) instead of Conv1D's (in, out). `plus_one`: a norm's weight with 1 added.
    """

    stored: str
    type: str
    shape: tuple[int, ...]
    begin: int
    size: int
    heads: int = 0
    turned: bool = False
    plus_one: bool = False


class GgufWeights:
    """The tensors of a GGUF file under the names of the transformers model, read one at a time; like shards.Shards."""

    def __init__(self, folder: Path) -> None:
        """ModelError if the file that the folder was made from isn't there any more, or is another one now."""
        values = load_json(folder / SOURCE, ModelError) or {}
        try:
            self.file, header = Path(values["file"]), values["header"]
            self._stored = {name: Stored(*entry) for name, entry in values["stored"].items()}
            self._entries = {name: Entry(*entry) for name, entry in values["tensors"].items()}
            self.bytes, length = int(values["bytes"]), int(values["length"])
        except (KeyError, TypeError) as error:
            raise ModelError(
                f"{folder / SOURCE} is damaged ({error}); delete {folder} and name the GGUF file again"
            ) from None
        if not self.file.is_file():
            raise ModelError(f"{self.file} isn't there any more; put it back, or name it where it is now with --model")
        if self.file.stat().st_size != self.bytes or _hash(self.file, length) != header:
            raise ModelError(
                f"{self.file} isn't the file any more that {folder} was made from; name it with --model again"
            )
        self.folder = folder
        self.shapes = {name: torch.Size(entry.shape) for name, entry in self._entries.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor in `dtype`, in memory of its own; or else as it is stored (fp32 if that is in blocks), and where nothing
        has to be done to it, its memory is that of the file."""
        entry = self._entries[name]
        data = np.asarray(np.memmap(self.file, np.uint8, "c", entry.begin, (entry.size,)))
        shape = entry.shape[::-1] if entry.turned else entry.shape
        order = None if not entry.heads else torch.arange(shape[0]).view(entry.heads, -1, 2).transpose(1, 2).reshape(-1)
        if entry.type in _PLAIN:
            made = torch.from_numpy(data).view(_PLAIN[entry.type]).view(shape)
            if order is not None:
                made = made[order]
            elif dtype is not None and not entry.plus_one:
                made = made.to(dtype, copy=True)
        else:
            made = _dequantised(data, entry.type, shape, order, dtype if not entry.plus_one else None)
        if entry.plus_one:
            made = made.float() - 1
        made = made if dtype is None else made.to(dtype)
        return made.t().contiguous() if entry.turned else made

    def dtype(self) -> torch.dtype:
        """What most numbers are stored in; bf16 for blocks."""
        sizes: dict[str, int] = {}
        for stored in self._stored.values():
            sizes[stored.type] = sizes.get(stored.type, 0) + math.prod(stored.shape)
        return _PLAIN.get(max(sizes, key=lambda kind: sizes[kind]), torch.bfloat16)

    def fingerprint(self) -> str:
        """Which weights these are, wherever the file is: every tensor's name, type and shape, and samples of it."""
        whole = hashlib.sha256()
        with self.file.open("rb") as data:
            for name, stored in sorted(self._stored.items()):
                whole.update(f"{name} {stored.type} {list(stored.shape)};".encode())
                for part in samples(data, stored.begin, stored.size):
                    whole.update(part)
        return whole.hexdigest()[:32]


def is_folder(folder: Path) -> bool:
    """It was made from a GGUF file, whatever has become of that."""
    return (folder / SOURCE).is_file()


def of(folder: Path) -> GgufWeights | None:
    """The weights of a folder that was made from a GGUF file; None for any other folder."""
    return GgufWeights(folder) if is_folder(folder) else None


def origin(folder: Path) -> Path:
    """The GGUF file that a folder was made from, or else the folder."""
    values = load_json(folder / SOURCE, ModelError)
    return folder if values is None else Path(values["file"])


def source(file: Path, header: Header, tensors: dict[str, Entry]) -> dict[str, Any]:
    """What source.json holds."""
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "length": header.length,
        "header": _hash(file, header.length),
        "stored": header.tensors,
        "tensors": tensors,
    }


def _hash(file: Path, length: int) -> str:
    with file.open("rb") as data:
        return hashlib.sha256(data.read(length)).hexdigest()


def _dequantised(
    data: Any, kind: str, shape: tuple[int, ...], order: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    """Blocks as numbers, some rows at a time, in the given order of rows."""
    from gguf import GGMLQuantizationType, quants

    width = shape[-1]
    rows = data.reshape(math.prod(shape[:-1]), -1)
    made = torch.empty(len(rows), width, dtype=dtype or torch.float32)
    step = max(1, CHUNK // width)
    dequantise: Callable[..., Any] = quants.dequantize
    for at in range(0, len(rows), step):
        part = rows[at : at + step] if order is None else rows[order[at : at + step].numpy()]
        made[at : at + step] = torch.from_numpy(dequantise(part, GGMLQuantizationType[kind]))
    return made.view(shape)

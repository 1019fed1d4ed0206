"""Safetensors files read and written one tensor at a time, so that no more of a model than a weight is ever in memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lorafit.errors import ModelError
from lorafit.files import write_json

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in TYPES.items()}
# What reading a damaged header raises.
DAMAGED = (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError)


class Files(Protocol):
    """The tensors of a model's folder, by the names that the folder gives them."""

    folder: Path
    shapes: dict[str, torch.Size]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, its numbers in `dtype`, or else as they are stored: then its memory is that of the file."""


# --- reading -----------------------------------------------------------------------------------------------------------


class Shards:
    """The tensors of a folder's safetensors files. Of a file no more is mapped than the tensors that are in use: pages of
    others neither count as this process's memory nor against a limit of it."""

    def __init__(self, folder: Path) -> None:
        """ModelError for a file that is damaged. (safetensors' own reader maps whole files, writable at that.)"""
        self.folder = folder
        self.shapes: dict[str, torch.Size] = {}
        self._places: dict[str, tuple[Path, str, int, int]] = {}  # file, type, first byte, bytes
        for file in sorted(folder.glob("*.safetensors")):
            try:
                start, entries = read_header(file)
                for name, entry in entries.items():
                    begin, end = entry["data_offsets"]
                    self._places[name] = file, entry["dtype"], start + begin, end - begin
                    self.shapes[name] = torch.Size(entry["shape"])
                    if start + end > file.stat().st_size:
                        raise ValueError(f"it is cut off within {name}")
            except DAMAGED as error:
                raise ModelError(f"{file} is damaged: {error}") from None

    def dtype(self) -> torch.dtype:
        """What most numbers are stored in: bf16, fp16 or, for all other types, fp32."""
        sizes: dict[str, int] = {}
        for name, (_, kind, _, _) in self._places.items():
            sizes[kind] = sizes.get(kind, 0) + self.shapes[name].numel()
        most = max(sizes, key=lambda kind: sizes[kind], default="F32")
        return TYPES[most] if most in ("F16", "BF16") else torch.float32

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """As in Files. ModelError for a type of numbers that isn't known here."""
        file, kind, begin, size = self._places[name]
        if kind not in TYPES:
            raise ModelError(f"{file}: {name} is stored as {kind}; there are {', '.join(TYPES)}")
        if not size:
            return torch.empty(self.shapes[name], dtype=dtype or TYPES[kind])
        data = np.asarray(np.memmap(file, np.uint8, "c", begin, (size,)))
        found = torch.from_numpy(data)
        found = (found if begin % TYPES[kind].itemsize == 0 else found.clone()).view(TYPES[kind])
        found = found.view(self.shapes[name])
        return found if dtype is None or not found.is_floating_point() else found.to(dtype)


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the first tensor begins, and each tensor's entry. One of DAMAGED where it isn't a header."""
    with file.open("rb") as data:
        (length,) = struct.unpack("<Q", data.read(8))
        entries = json.loads(data.read(min(length, file.stat().st_size)))
    entries.pop("__metadata__", None)
    return 8 + length, entries


# --- writing -----------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, entries: Iterable[Entry], tensors: Iterable[Mapping[str, Tensor]]) -> None:
    """A file of these entries, from tensors that come a few at a time, in any order."""
    with path.open("wb") as file:
        places = _write_header(file, entries)
        for some in tensors:
            for name, tensor in some.items():
                _put(file, places[name], tensor)


def write_shards(folder: Path, entries: Sequence[Entry], tensors: Iterable[Mapping[str, Tensor]], most: int) -> None:
    """A model's weights as transformers reads them: files of at most `most` bytes, or of one tensor, and where there are
    several an index. The tensors come a few at a time, in any order; one that isn't among the entries is an error."""
    groups = list(_grouped(entries, most))
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    where: dict[str, tuple[Path, int]] = {}
    for name, group in zip(names, groups, strict=True):
        with (folder / name).open("wb") as file:
            where |= {key: (folder / name, place) for key, place in _write_header(file, group).items()}
    for some in tensors:
        for key, tensor in some.items():
            path, place = where[key]
            with path.open("r+b") as file:
                _put(file, place, tensor)
    if len(groups) > 1:
        total = {
            "total_size": sum(entry.size for entry in entries),
            "total_parameters": sum(math.prod(entry.shape) for entry in entries),
        }
        index = {key: path.name for key, (path, _) in sorted(where.items())}
        write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": index})


def _grouped(entries: Sequence[Entry], most: int) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    for entry in entries:
        if group and sum(e.size for e in group) + entry.size > most:
            yield group
            group = []
        group.append(entry)
    yield group


def _write_header(file: Any, entries: Iterable[Entry]) -> dict[str, int]:
    """Write the header of a safetensors file, and say where each tensor's bytes go: the widest numbers first, so that all
    are aligned."""
    header, places, at = {}, {}, 0
    for entry in sorted(entries, key=lambda entry: -entry.dtype.itemsize):
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.size],
        }
        places[entry.name] = at
        at += entry.size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text = text.ljust(-(-len(text) // 64) * 64 - 8 + 64)  # the first number is at a multiple of 64
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + at)
    return {name: 8 + len(text) + place for name, place in places.items()}


def _put(file: Any, place: int, tensor: Tensor) -> None:
    file.seek(place)
    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

"""Which weights a base has: a hash that doesn't depend on the folder's place, the precision it is loaded in, or its size.

Every tensor's name, type and shape counts (the header of each safetensors file), and 2 KiB at eight places of every tensor:
another checkpoint, a fine-tuned copy or a merged one differs in all of them. A change of a few numbers in between is missed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lorafit.errors import ModelError
from lorafit.files import samples
from lorafit.model import gguf
from lorafit.model.shards import DAMAGED, read_header


def fingerprint(folder: Path) -> str:
    """32 hexadecimal digits for the safetensors files of a Hugging Face folder, or the GGUF file that it was made from.
    ModelError if one is missing or damaged."""
    if (weights := gguf.of(folder)) is not None:
        return weights.fingerprint()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no .safetensors file")
    whole = hashlib.sha256()
    for path in files:
        try:
            _add(whole, path)
        except DAMAGED as error:
            raise ModelError(f"{path} is damaged: {error}") from None
    return whole.hexdigest()[:32]


def _add(whole: Any, path: Path) -> None:
    start, tensors = read_header(path)
    with path.open("rb") as file:
        for name, entry in sorted(tensors.items()):
            begin, end = entry["data_offsets"]
            whole.update(f"{name} {entry['dtype']} {entry['shape']};".encode())
            for part in samples(file, start + begin, end - begin):
                whole.update(part)

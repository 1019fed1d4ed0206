"""Which weights a base has: a hash that doesn't depend on the folder's place, the precision it is loaded in, or its size.

Every tensor's name, type and shape counts (the header of each safetensors file), and 4 KiB of bytes at 64 places of each
file: another checkpoint, a fine-tuned copy or a merged one differs in all of them.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from lorafit.errors import ModelError

_PLACES, _BYTES = 64, 4096


def fingerprint(folder: Path) -> str:
    """32 hexadecimal digits for the safetensors files of a Hugging Face folder. ModelError if there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no .safetensors file")
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = path.stat().st_size
            try:
                (length,) = struct.unpack("<Q", file.read(8))
            except struct.error:
                raise ModelError(f"{path} is damaged: shorter than a safetensors header") from None
            whole.update(file.read(min(length, size)))
            body = size - 8 - length
            for place in range(_PLACES):
                file.seek(8 + length + max(0, (body - _BYTES) * place // (_PLACES - 1)))
                whole.update(file.read(_BYTES))
    return whole.hexdigest()[:32]

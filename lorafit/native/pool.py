"""Memory for torch's larger tensors on the CPU that is kept and resized instead of given back and mapped anew.

The C library's heap, told to keep what is freed, grows to multiples of what is ever in use: with activation checkpointing a
1.5B model's step of 4096 tokens took 7.5 GB that way and takes 3.0 from here (see docs/memory.md).
"""

from __future__ import annotations

import ctypes
import threading

from lorafit.machine import keeper, limited
from lorafit.native import build

_pool: ctypes.CDLL | None = None
_lock = threading.Lock()


def start() -> bool:
    """Have tensors of 128 KiB and more come from the pool from here on; False where it can't be built or is off."""
    global _pool
    with _lock:
        if _pool is None and (found := build.pool()) is not None:
            found.lorafit_pool_kept.restype = ctypes.c_uint64
            if found.lorafit_pool_start():
                keeper(keep)
                _pool = found
        return _pool is not None


def keep(on: bool) -> None:
    """Whether what is freed is kept for the next tensor: True at first. With False what is kept goes back to the system."""
    if _pool is not None:
        _pool.lorafit_pool_keep(int(on))


def give_back() -> None:
    """What is kept goes back to the system, and what was once in use no longer counts. For the end of a job."""
    if _pool is not None and not limited():
        keep(False)
        keep(True)


def kept() -> int:
    """Bytes that lie ready for the next tensor: with those in use at most a quarter more than were once in use at a time."""
    return int(_pool.lorafit_pool_kept()) if _pool is not None else 0

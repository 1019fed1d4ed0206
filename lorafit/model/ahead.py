"""Pages of a mapped base are asked for before they are needed, so that a base larger than memory streams from its file.

Where memory is short the system drops pages of files first, and reads them again, a few at a time, when a product meets
them. Asked for a layer ahead, they are read in long pieces while the layer before is computed with.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from torch import Tensor, nn

from lorafit.model.quant import QuantLinear

_WILL_NEED = 3  # POSIX_MADV_WILLNEED
SMALLEST = 1 << 20  # bytes of a layer that are worth a call


class Ahead:
    """`ahead(i)` asks for the i-th layer; a number that is no layer's is none."""

    def __init__(self, layers: Iterable[list[Tensor]]) -> None:
        self._spans = [[_pages(t) for t in tensors] for tensors in layers]

    @staticmethod
    def of(layers: Iterable[nn.Module]) -> Ahead | None:
        """For layers whose codes lie in memory that the system can ask for; None where there are none."""
        codes = [[m.codes for m in layer.modules() if isinstance(m, QuantLinear)] for layer in layers]
        found = [t for tensors in codes for t in tensors]
        large = found and all(t.device.type == "cpu" for t in found) and _bytes(found) >= SMALLEST * len(codes)
        return Ahead(codes) if large and _advise() is not None else None

    def __call__(self, number: int) -> None:
        """Ask for the pages of a layer; returns while they are being read."""
        advise = _advise()
        if advise is not None and 0 <= number < len(self._spans):
            for start, length in self._spans[number]:
                advise(start, length, _WILL_NEED)  # advice: whether it was taken makes no difference to the result


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _pages(t: Tensor) -> tuple[int, int]:
    """Address and bytes of the whole pages that a tensor touches."""
    start = t.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    return start, t.data_ptr() + t.numel() * t.element_size() - start


@cache
def _advise() -> Callable[[int, int, int], Any] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        advise = ctypes.CDLL(None).posix_madvise
    except (OSError, AttributeError):
        return None
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    found: Callable[[int, int, int], Any] = advise
    return found

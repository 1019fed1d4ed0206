"""What the operating system tells and asks: memory, and the wish that the program stop."""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def memory() -> int:
    """Resident memory of this process in bytes (its peak where the system doesn't tell the present)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory()


def peak_memory() -> int:
    """The most resident memory this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Stop:
    """Whether somebody asked the program to stop. Inside `with`, the first Ctrl-C or SIGTERM sets `asked` (and calls
    `said`); a second one raises KeyboardInterrupt."""

    def __init__(self, said: Callable[[], object]) -> None:
        self.asked, self._said = False, said
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        with contextlib.suppress(ValueError):  # not in the main thread, where no signal arrives anyway
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._said()


def keep_memory() -> None:
    """Keep freed memory for the next step instead of giving it back to the system, page by page: a training step frees and
    asks for the same blocks again. glibc only, for this process only; what is kept never exceeds what was in use at once."""
    import ctypes

    trim_threshold, mmap_threshold = -1, -3  # mallopt's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)

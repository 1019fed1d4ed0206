"""What the operating system tells and asks: memory and its limits, and the wish that the program stop."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SPARE = 0.1  # of the memory that is left, kept for the system and for whatever else grows
RESERVE = 64_000_000  # see Gauge

# How those that allocate say no. "a primitive" is oneDNN's: it has one message for a kernel that it can't make, whatever
# the reason, and the reason met in practice is memory (measured: bf16 products under a limit).
_NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "bad_alloc",
    "could not create a primitive",
    "could not execute a primitive",
    "could not create a memory",
    "can't start new thread",  # its stack is private memory too
)


def memory() -> int:
    """Resident memory of this process in bytes (its peak where the system doesn't tell the present)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory()


def gpu_memory() -> int:
    """Bytes that torch holds on the current CUDA device, 0 where there is none in use."""
    cuda = _cuda()
    return int(cuda.memory_reserved()) if cuda is not None else 0


def gpu_peak() -> int:
    """The most that torch has held of the current CUDA device, in bytes; 0 where there is none in use. What CUDA takes for
    itself comes on top."""
    cuda = _cuda()
    return int(cuda.max_memory_reserved()) if cuda is not None else 0


def _cuda() -> Any:
    """torch.cuda where this process uses it, None elsewhere; torch isn't imported for that."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def peak_memory() -> int:
    """The most resident memory this process has had, in bytes."""
    if own := _field("/proc/self/status", "VmHWM"):
        return own  # Linux hands ru_maxrss on to the programs that a process starts, so there it may be the starter's
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory couldn't be had: Python's, torch's (on any device), C++'s or oneDNN's."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _NO_MEMORY)


def attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    """`work()` and "", or None and the error's first line where memory wasn't enough; all that it held is free then."""
    error = ""
    try:
        return work(), ""
    except Exception as caught:
        if not out_of_memory(caught):
            raise
        error = _reason(caught)
    # Only here, after the except clause, is the error gone, and with its traceback the tensors of the attempt.
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library without malloc_trim: nothing to do
        ctypes.CDLL(None).malloc_trim(0)
    _frugal()
    if (cuda := _cuda()) is not None:
        cuda.empty_cache()
    return None, error


def _reason(error: BaseException) -> str:
    """The first line of an error, without the place in torch's source and what follows the number of bytes."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line.rpartition("DefaultCPUAllocator: ")[2].partition(". Error code")[0][:200]


class Gauge:
    """Raises MemoryError while there is still some memory left under RLIMIT_DATA; call it between the layers of a model.

    A tensor that can't be had is an error like any other. The kernels that oneDNN writes for new shapes are not: where it
    gets no memory for one, it makes none ever after in that thread, or the process crashes (measured with bf16 attention
    and products under a limit). So tensors have to stop short of the limit. What is kept for kernels is twice what memory
    grew by between two calls, at least RESERVE, and never more than half of what there was at first.
    """

    def __init__(self) -> None:
        for renew in _limits[-1:]:
            renew()
        limit = resource.getrlimit(resource.RLIMIT_DATA)[0] if sys.platform == "linux" else resource.RLIM_INFINITY
        self._limit = 0 if limit == resource.RLIM_INFINITY else limit
        self._start = self._last = self._now()
        self._growth = 0

    def __bool__(self) -> bool:
        return bool(self._limit and self._start)

    def __call__(self) -> None:
        """Look now."""
        now = self._now()
        self._growth, self._last = max(self._growth, now - self._last), now
        kept = min(max(RESERVE, 2 * self._growth), (self._limit - self._start) // 2)
        # Memory that the C library holds from before may be used whatever is left; it counts already.
        if now > self._start and self._limit - now < kept:
            raise MemoryError(
                f"{(self._limit - now) // 10**6} MB are left under the limit of {self._limit // 10**6} MB"
            )

    def _now(self) -> int:
        try:
            return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        except (OSError, IndexError):
            return 0


def available() -> int:
    """Bytes that this process may still take: of the system's, of its control groups' and under a limit of its own."""
    rooms = _rooms()
    if sys.platform == "linux" and (limit := resource.getrlimit(resource.RLIMIT_DATA)[0]) != resource.RLIM_INFINITY:
        rooms.append(max(0, limit - private_memory()))
    return min(rooms) if rooms else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def private_memory() -> int:
    """Bytes of this process's private writable memory, as the system counts them against RLIMIT_DATA; 0 if unknown."""
    return _field("/proc/self/status", "VmData")


@contextlib.contextmanager
def memory_limit(most: int | None = None) -> Iterator[None]:
    """Inside `with`, an allocation fails that would take more than `most` bytes, or more than the machine has left.

    Linux gives out memory that it doesn't have and kills the process that then touches it, which nothing can catch. With a
    soft RLIMIT_DATA the allocation itself fails, which can be caught. That limit (since Linux 4.7) counts private
    writable mappings, so heap and mmap alike; not reservations without access, such as glibc's unused arenas, and not
    files mapped read-only. RLIMIT_AS would count those too. It does count what is mapped and never touched: thread stacks
    (8 MB each), oneDNN's buffers for kernels (0.3 GB after a step, measured). So it isn't set to an amount, but to what
    is mapped now and what may still be added, and anew before each micro-batch.

    A tighter limit that is there already stays; nothing is ever raised over it. Where the system knows no such limit,
    nothing happens. `most` is of resident memory; None: the machine's limit alone.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    given = before[0] != resource.RLIM_INFINITY

    def renew() -> None:
        ours = private_memory()
        rooms = [] if most is None else [max(0, most - memory())]
        rooms += [int(n * (1 - SPARE)) for n in _rooms()]
        limits = [ours + room for room in rooms if ours] + ([before[0]] if given else [])
        with contextlib.suppress(ValueError, OSError):
            if limits and sys.platform == "linux":
                resource.setrlimit(resource.RLIMIT_DATA, (min(limits), before[1]))

    if most is not None or given:
        _frugal()
    renew()
    _limits.append(renew)
    try:
        yield
    finally:
        _limits.remove(renew)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, before)
        if not _limits and not given:
            for keep in _keepers:
                keep(True)


@contextlib.contextmanager
def gpu_memory_limit(most: int | None = None) -> Iterator[None]:
    """Inside `with`, an allocation fails that would take more than `most` bytes of the current CUDA device."""
    import torch

    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if most is None else min(1.0, most / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


_limits: list[Callable[[], None]] = []  # those that are in force, the innermost last
_keepers: list[Callable[[bool], object]] = []


def keeper(keep: Callable[[bool], object]) -> None:
    """Somebody keeps freed memory for later: `keep` is called with False where that has to end, because a limit is set or was
    met, and with True when no limit is left."""
    _keepers.append(keep)


def limited() -> bool:
    """A memory_limit is in force."""
    return bool(_limits)


def _frugal() -> None:
    """Have every larger block mapped by itself, so that it is gone once it is freed.

    Otherwise freed tensors stay in a heap that anything small above them keeps from shrinking, and its addresses count
    against the limit although nothing is in them: after a failed attempt nearly all of the limit was taken up by air
    (measured). Mapping costs time, so this is done only where a limit is set or has been met.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 1 << 30)  # M_MMAP_MAX: any number of them
        mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    for keep in _keepers:
        keep(False)


def _rooms() -> list[int]:
    """Bytes that the system has left, and each control group of this process; none where it doesn't tell."""
    return [n for n in (_field("/proc/meminfo", "MemAvailable"), *_groups()) if n > 0]


def _groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left in this process's control groups and those above them, version 2 and 1. Pages of files count as left, those
    that are in use too: a base that is mapped from a file gives way to whatever needs the memory."""
    found = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        names = (
            (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
            if not kinds
            else (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
        )
        for top in (root, root / "unified") if not kinds else (root / "memory",):
            place = top / path.strip("/")
            # In a container the path may be the host's, of which only the upper end is there.
            for folder in [place, *place.parents]:
                if folder.is_relative_to(top):
                    found += _left(folder, *names)
    return found


def _left(folder: Path, limits: tuple[str, ...], usage: str, caches: tuple[str, ...]) -> list[int]:
    found = []
    for name in limits:
        with contextlib.suppress(OSError, ValueError):  # "max", or no such file: no limit
            most = int((folder / name).read_text())
            if most < 1 << 60:  # what version 1 writes for none
                files = sum(_field(str(folder / "memory.stat"), cache, 1) for cache in caches)
                used = int((folder / usage).read_text()) - files
                found.append(max(1, most - used))
    return found


def _field(path: str, name: str, unit: int = 1024) -> int:
    """A number in a file of `name value` lines, 0 if it isn't there."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(path).read_text().splitlines():
            if line.split()[:1] in ([name], [f"{name}:"]):
                return int(line.split()[1]) * unit
    return 0


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

    trim_threshold, mmap_max = -1, -4  # mallopt's M_TRIM_THRESHOLD and M_MMAP_MAX
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)  # M_MMAP_THRESHOLD can't be raised above 32 MiB; a chunk of logits is larger
        libc.mallopt(trim_threshold, (1 << 31) - 1)

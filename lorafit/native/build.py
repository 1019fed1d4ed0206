"""The C++ kernels: compiled once for the processor at hand, kept in the user's cache, loaded with ctypes.

The sources need no headers but the compiler's own, so building takes seconds and the library outlives torch's updates. It
shares torch's OpenMP runtime: two pools of threads on the same cores would wait for each other. Without a compiler, or
switched off, `library()` is None and every kernel's plain twin does the work.

pool.cpp does need torch's headers. It is a library of its own, so that a torch it can't be built against costs no kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lorafit.files import cache_folder

FLAGS = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-w"]
RETRY = 86_400  # seconds after which a failed build is tried again
WIDE = "-mprefer-vector-width=512"  # gcc halves its vectors by default, for the sake of clocks that don't fall any more

_HERE = Path(__file__).parent
_POOL = _HERE / "pool.cpp"
KERNELS = tuple(path for path in sorted(_HERE.glob("*.cpp")) if path != _POOL)
_lock = threading.Lock()
_built: ctypes.CDLL | None = None
_tried = False
_on = True
_off = "switched off"
_why = ""  # there is no library
_no_pool = ""  # why tensors' memory isn't from the pool, where that was asked for


def library() -> ctypes.CDLL | None:
    """The kernels, built if need be (some seconds, once per machine); None where there are none or they are off."""
    global _built, _tried, _why
    if not _on:
        return None
    if not _tried:
        with _lock:
            if not _tried:
                try:
                    _built = ctypes.CDLL(str(_find(kernels())))
                except _NotBuilt as error:
                    _why = str(error)
                except OSError as error:
                    _why = f"the built kernels can't be loaded ({error})"
                _tried = True
    return _built


def pool() -> ctypes.CDLL | None:
    """pool.cpp, built if need be (some two seconds); None where it can't be, or kernels are off. torch has to be loaded."""
    global _no_pool
    if not _on or sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(str(_find(_pool())))
    except (_NotBuilt, OSError, importlib.metadata.PackageNotFoundError) as error:
        _no_pool = str(error)
    return None


def pooled() -> bool:
    """Tensors' memory is from the pool, or will be once it is asked for."""
    return _on and sys.platform == "linux" and not _no_pool and _hopeful(_pool)


def prepare() -> None:
    """Begin building in a process of its own, which goes on when this one ends, unless that is done already."""
    if _on and not _tried and not built():
        command = [sys.executable, "-m", "lorafit.native.build"]
        nothing = subprocess.DEVNULL
        with contextlib.suppress(OSError):
            subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)


def built() -> bool:
    """Asking for the library won't take long: it is built, or can't be."""
    if _tried:
        return True
    try:
        place = _place(kernels())[1]
        return place.is_file() or bool(_failed(place))
    except (_NotBuilt, OSError):
        return True


def possible() -> bool:
    """There is a library, or there will be once it is asked for."""
    return _built is not None if _tried else _hopeful(kernels)


def _hopeful(library: Callable[[], Library]) -> bool:
    """There is a compiler, and no word of a library that it can't be built."""
    try:
        return not _failed(_place(library())[1])
    except (_NotBuilt, OSError, importlib.metadata.PackageNotFoundError):
        return False


@contextlib.contextmanager
def switched(on: bool) -> Iterator[None]:
    """Kernels on or off inside the context."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def switch(on: bool, why: str = "switched off") -> None:
    """Kernels on or off from here on; `why` is what `state` says of it."""
    global _on, _off
    _on, _off = on, why


def on() -> bool:
    """Fast paths may be taken: `native=false` switches off those on a GPU with the kernels."""
    return _on


def has_tiles() -> bool:
    """The kernels were built for a processor that multiplies bf16, in AMX tiles that the system lets us use or in vectors."""
    lib = library()
    return lib is not None and bool(lib.tiles_permitted())


def multiplies_codes() -> bool:
    """The kernels multiply 8-bit whole numbers, which `quant=w8a8` is made for: the processor has VNNI."""
    lib = library()
    return lib is not None and bool(lib.multiplies_codes())


def slow_in_bf16() -> bool:
    """The kernels multiply bf16 in vectors, which codes of 8 bits outrun (`quant=w8a8`): there are no AMX tiles."""
    lib = library()
    return lib is not None and has_tiles() and not lib.amx()


def state() -> str:
    """What is in use, in words."""
    if not _on:
        return f"plain ({_off})"
    if (lib := library()) is None:
        return f"plain ({_why})"
    unit = ", AMX" if lib.amx() else ", AVX512-BF16" if has_tiles() else ""
    return f"native{unit}" + (f", without the pool ({_no_pool})" if _no_pool else "")


class _NotBuilt(Exception):
    """Why there are no kernels."""


class Library(NamedTuple):
    """What is compiled into a file, and how: its name there and in words, `flags` beside FLAGS; `made_for` is what else it is no
    good without."""

    name: str
    words: str
    sources: tuple[Path, ...]
    flags: tuple[str, ...]
    links: tuple[str, ...]
    made_for: str = ""


@cache
def kernels() -> Library:
    """The kernels, linked with the very OpenMP library that torch has loaded."""
    bundled = sorted((_torch() / "lib").glob("libgomp*"))
    return Library("native", "the kernels", KERNELS, (), (str(bundled[0]) if bundled else "-fopenmp",))


def _pool() -> Library:
    """The pool, written to torch's headers, which ask for C++20, and to the part of torch that hands out memory."""
    headers, memory = f"-I{_torch() / 'include'}", str(_torch() / "lib" / "libc10.so")
    return Library(
        "pool", "the pool", (_POOL,), ("-std=c++20", headers), (memory,), importlib.metadata.version("torch")
    )


def _torch() -> Path:
    """Where torch is installed."""
    torch = importlib.util.find_spec("torch")
    return Path(torch.origin).parent if torch is not None and torch.origin else Path()


@cache
def _place(library: Library) -> tuple[str, Path]:
    """The compiler, and where what it makes of a library for this processor is kept."""
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise _NotBuilt("no C++ compiler found; installing g++ makes training several times faster")
    key = hashlib.sha256()
    for path in [*sorted(_HERE.glob("*.h")), *library.sources]:
        key.update(path.name.encode() + path.read_bytes())
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise _NotBuilt(f"{compiler} can't be started: {error}") from None
    how = [FLAGS, WIDE, library.flags, library.links, library.made_for]
    key.update(f"{version} {how} {_processor()}".encode())
    return compiler, cache_folder() / f"{library.name}-{key.hexdigest()[:16]}.so"


def _find(library: Library) -> Path:
    """A library, from the cache or made now."""
    compiler, place = _place(library)
    if place.is_file():
        return place
    if why := _failed(place):
        raise _NotBuilt(why)
    with _alone(place.with_suffix(".lock")):  # two processes that begin together compile once
        return place if place.is_file() else _make(compiler, library, place)


def _failed(place: Path) -> str:
    """Why there is no library, where building it failed a short while ago; what was missing may have been installed since."""
    with contextlib.suppress(OSError):
        reason = place.with_suffix(".failed")
        if time.time() - reason.stat().st_mtime < RETRY:
            return reason.read_text(encoding="utf-8") or "it can't be built"
    return ""


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            lock.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(lock.open("w")), fcntl.LOCK_EX)
        yield
        with contextlib.suppress(OSError):
            lock.unlink(missing_ok=True)


def _make(compiler: str, library: Library, place: Path) -> Path:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="native.", dir=place.parent))
    except OSError:  # a cache that can't be written: build for this process alone
        folder = Path(tempfile.mkdtemp(prefix="lorafit-native."))
        place = folder.with_name(f"{folder.name}.so")
    try:
        wide = [WIDE] if "clang" not in Path(os.path.realpath(compiler)).name else []
        objects = [folder / f"{path.stem}.o" for path in library.sources]
        steps = [
            subprocess.Popen(
                [compiler, *FLAGS, *wide, *library.flags, "-c", str(path), "-o", str(to)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for path, to in zip(library.sources, objects, strict=True)
        ]
        said = [step.communicate()[1] for step in steps]
        link = [compiler, "-shared", *map(str, objects), "-o", str(folder / "lib.so"), *library.links]
        if all(step.returncode == 0 for step in steps):
            done = subprocess.run(link, capture_output=True, text=True)
            steps[0].returncode, said = done.returncode, [done.stderr]
        if any(step.returncode for step in steps):
            first = next((line for text in said for line in text.splitlines() if "error" in line), "no message")
            why = f"{Path(compiler).name} can't build {library.words}: {first.strip()}"
            with contextlib.suppress(OSError):  # the same compiler needn't be asked at every start
                place.with_suffix(".failed").write_text(why, encoding="utf-8")
            raise _NotBuilt(why)
        (folder / "lib.so").replace(place)
        return place
    except OSError as error:
        raise _NotBuilt(f"the kernels can't be built: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    import platform

    return f"{platform.machine()} {platform.processor()}"


if __name__ == "__main__":
    os.nice(10)  # a short run that doesn't wait goes first
    with contextlib.suppress(_NotBuilt):  # whoever asks for the library is told
        _find(kernels())

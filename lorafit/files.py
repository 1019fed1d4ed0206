"""Writing files and folders whole or not at all, and saying so in words when a disk won't take them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lorafit.errors import DataError, RunError, UserError


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/lorafit`, or `~/.cache/lorafit`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorafit"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def samples(file: BinaryIO, begin: int, size: int, places: int = 8, length: int = 2048) -> Iterator[bytes]:
    """What stands for `size` bytes of a file where reading all takes too long: some at the start, the end, and between."""
    for place in range(places):
        file.seek(begin + max(0, (size - length) * place // (places - 1)))
        yield file.read(min(length, size))


def need_data(name: str) -> None:
    """DataError where there is no such file."""
    if not Path(name).expanduser().is_file():
        raise DataError(f"no such file: {name}; give a data file (.jsonl, .json, .csv, .parquet, .txt)")


def free(out: Path) -> Path:
    """The absolute path of a folder to be written. RunError where there is something in it."""
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists already and isn't empty; name another folder")
    return out


def write_text(path: Path, text: str, again: str = "go on with --resume") -> None:
    """Replace a file by this text. RunError when the disk is full or refuses; `again` as in `refused`."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("w", encoding="utf-8", errors="replace") as file:  # a row can hold half a surrogate pair
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise refused(path, error, again) from None


def write_json(path: Path, values: Any) -> None:
    """Replace a file by these values as JSON."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none that can be read."""
    found = read_json_lines(path, whole=True)
    return found[0] if found else {}


def read_json_lines(path: Path, whole: bool = False) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line (`whole`: one in all), without those that can't be read.

    The last line is torn when a run was killed while writing it. Lines end with "\\n" alone: an answer may hold other
    characters that Python takes for line ends.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):  # a path out of a damaged file may be none
        return []
    found = []
    for part in [text] if whole else text.split("\n"):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def load_json(path: Path, error: type[UserError]) -> dict[str, Any] | None:
    """The JSON object that must be readable if the file is there; None if it isn't. Raises `error` otherwise."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as fault:
        raise error(f"{path} can't be read: {fault}") from None
    if not isinstance(values, dict):
        raise error(f"{path} must hold a JSON object")
    return values


def unfinished_search(folder: Path) -> bool:
    """Whether a folder is of a search (lorafit tune) that isn't over, so `lorafit tune --resume` goes on with it."""
    over = (folder / "tune.json").exists() and (folder / "report.html").exists()
    return (folder / "tune" / "search.json").is_file() and not over


LOCK = "lock"  # in a run's folder, and of a search in its tune/: of the process that is at work there


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """In the context no other process gets into the folder this way; however the process ends, it is free again. RunError that
    names the one that is in it. Where the system or the disk knows no such locks, all get in."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise refused(folder / LOCK, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                raise RunError(
                    f"process {file.seek(0) or file.read().strip()} is at work in {folder}; wait for it, or stop it first"
                ) from None
        with contextlib.suppress(OSError):  # a full disk keeps nobody out
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{os.getpid()}\n".encode())
        yield


HELD = (errno.EAGAIN, errno.EACCES)  # what it is called where another process has a lock


def at_work(folder: Path) -> str:
    """The process that is in a folder by `alone`; '' for none."""
    try:
        import fcntl

        with (folder / LOCK).open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return file.read().strip() if error.errno in HELD else ""
    except (ImportError, OSError):
        pass
    return ""


def busy(folder: Path) -> str:
    """The process, other than this one, that trains or searches in a run's folder; '' for none."""
    process = at_work(folder / "tune") or at_work(folder)
    return "" if process == str(os.getpid()) else process


def write_folder(path: Path, fill: Callable[[Path], None], again: str = "go on with --resume") -> None:
    """Replace a folder by what `fill` writes into an empty one; nothing is replaced if `fill` raises.

    RunError when the disk is full or refuses; `again` says what to do after making space.
    """
    with _aside(path, again) as scratch:
        scratch.chmod(0o755)
        fill(scratch)
        for file in scratch.iterdir():
            if file.is_file():
                file.chmod(0o644)  # safetensors files come out readable by their owner alone
                _sync(file)
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            path.rename(old)
        scratch.rename(path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, fill: Callable[[Path], None], again: str) -> None:
    """Make a file by what `fill` writes at another path of the same name; there is none if `fill` raises. `fill` may leave
    files beside it, which go. RunError when the disk is full or refuses, `again` as in `write_folder`."""
    with _aside(path, again) as scratch:
        fill(scratch / path.name)
        _sync(scratch / path.name)
        os.replace(scratch / path.name, path)
        _sync(path.parent)


@contextlib.contextmanager
def _aside(path: Path, again: str) -> Iterator[Path]:
    """An empty folder beside `path` to write in, which is gone afterwards, as are the folders above it that were made for it
    where that came to nothing; what the disk refuses inside is a RunError."""
    scratch = None
    above = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        yield scratch
        above = []
    except OSError as error:
        raise refused(path, error, again) from None
    except Exception as error:  # safetensors wraps the operating system's errors in its own
        if "No space left" in str(error) or "os error" in str(error):
            raise RunError(f"can't write {path}: {error}; free some space, then {again}") from None
        raise
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        for folder in above:
            with contextlib.suppress(OSError):  # of someone else's, who has put something there
                folder.rmdir()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refused(path: Path, error: OSError, again: str = "go on with --resume") -> RunError:
    """The error for a file that can't be written; `again` says what to do after making space, if anything."""
    short = error.errno is None and "requested and" in str(error)  # of numpy, which names no number for it
    said = os.strerror(errno.ENOSPC) if short else error.strerror or error
    full = short or error.errno in (errno.ENOSPC, errno.EDQUOT)
    todo = f"free some space, then {again}" if full else "check the folder's permissions"
    return RunError(f"can't write {path}: {said}" + (f"; {todo}" if again else ""))

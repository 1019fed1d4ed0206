"""Writing files and folders whole or not at all, and saying so in words when a disk won't take them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafit.errors import RunError


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a file by this text. RunError when the disk is full or refuses."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise refused(path, error) from None


def write_json(path: Path, values: Any) -> None:
    """Replace a file by these values as JSON."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Replace a folder by what `fill` writes into an empty one. RunError when the disk is full or refuses."""
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        scratch.chmod(0o755)
        fill(scratch)
        for file in scratch.iterdir():
            if file.is_file():
                _sync(file)
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            path.rename(old)
        scratch.rename(path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise refused(path, error) from None
    except Exception as error:  # safetensors wraps the operating system's errors in its own
        if "No space left" in str(error) or "os error" in str(error):
            raise RunError(f"can't write {path}: {error}; free some space, then go on with --resume") from None
        raise
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refused(path: Path, error: OSError) -> RunError:
    """The error for a file that can't be written."""
    todo = (
        "free some space, then go on with --resume" if error.errno == errno.ENOSPC else "check the folder's permissions"
    )
    return RunError(f"can't write {path}: {error.strerror or error}; {todo}")

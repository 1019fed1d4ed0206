"""The run folder: everything a training run leaves behind, and what it needs to go on after a kill.

    config.yaml        every setting, resolved            data.json        the data report
    chat.json          template, stop tokens, system prompt that the run began with
    metrics.jsonl      one object a step                  evaluations.jsonl  held-out loss and sample answers
    checkpoints/       step-000120/ {adapter, optimizer, state}; the newest two and the best
    adapter/           the best adapter, PEFT format       summary.json, report.html   at the end
    stopped.json       why it ended before its end; gone when it goes on
    lock               held by the process that trains in it

Checkpoints appear whole or not at all (written aside, then renamed) and carry the SHA-256 of their files. safetensors and
JSON only.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lorafit import files
from lorafit.errors import OutOfMemory, RunError

KEEP = 2
STOPPED = "stopped.json"
_STEP = re.compile(r"step-(\d{6,})$")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk. `state` is what `Run.checkpoint` was given."""

    folder: Path
    step: int
    state: dict[str, Any]

    def adapter(self) -> dict[str, Tensor]:
        """The adapter's tensors by parameter name."""
        return dict(safetensors.torch.load_file(self.folder / "adapter.safetensors"))

    def optimizer(self) -> dict[str, Tensor]:
        """The optimiser's tensors, see optim.state."""
        return dict(safetensors.torch.load_file(self.folder / "optimizer.safetensors"))


class Run:
    """A run folder that exists."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def create(folder: Path, search: bool = False) -> Run:
        """A new, empty run folder; `search`: for a search. RunError if there is something in it already."""
        if folder.exists() and (not folder.is_dir() or any(file.name != files.LOCK for file in folder.iterdir())):
            if process := files.busy(folder):
                raise RunError(
                    f"{folder} exists already, and process {process} is at work in it; name another folder with --out"
                )
            ways = f"--resume goes on with it, --from {folder} starts anew from its adapter, or "
            if search:  # which starts from no adapter
                ways = (
                    f"lorafit tune --resume --out {folder} goes on with the search in it, or "
                    * files.unfinished_search(folder)
                )
            raise RunError(f"{folder} exists already; {ways}name another folder with --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.refused(folder, error) from None
        return Run(folder)

    @staticmethod
    def open(folder: Path) -> Run:
        """An existing run folder. RunError if it isn't one."""
        if not (folder / "config.yaml").is_file():
            if search := searching(folder):
                raise RunError(f"{folder} is {search}; there is no run in it yet")
            near = ", ".join(str(p.parent) for p in sorted(folder.parent.glob("*/config.yaml"))[:5])
            raise RunError(f"{folder} is not a run (it has no config.yaml){'; there are: ' + near if near else ''}")
        return Run(folder)

    @property
    def adapter(self) -> Path:
        """The folder of the finished adapter."""
        return self.folder / "adapter"

    def pages(self, n: int, dtype: torch.dtype) -> Tensor:
        """Zeros (n,) whose memory is a file of this folder, so that the system can take it back and read it again.

        The file has no name: however the process ends, nothing of it is left. RunError where the disk has no place for it.
        """
        size = max(1, n) * dtype.itemsize
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                if hasattr(os, "posix_fallocate"):  # a page without a place on disk would kill the process later
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype)[:n]
        except OSError as error:
            raise files.refused(self.folder, error) from None

    def begin(self) -> None:
        """It is going on: what is known of an earlier end doesn't hold any more."""
        (self.folder / STOPPED).unlink(missing_ok=True)

    def broke_off(self, error: Exception) -> None:
        """Note why it ended before its end, if there is a place to write to."""
        with contextlib.suppress(RunError, OSError):
            what = {"what": error.what} if isinstance(error, OutOfMemory) else {}
            files.write_json(self.folder / STOPPED, {"kind": type(error).__name__, "reason": str(error), **what})

    # --- records ---------------------------------------------------------------------------------------------------

    def record(self, name: str, values: Mapping[str, Any]) -> None:
        """Append one object to `<name>.jsonl`. NaN becomes null, since JSON has none."""
        path = self.folder / f"{name}.jsonl"
        clean = {
            k: None if isinstance(v, float) and (v != v or abs(v) == float("inf")) else v for k, v in values.items()
        }
        try:
            with path.open("a", encoding="utf-8", errors="replace") as file:
                file.write(json.dumps(clean, ensure_ascii=False) + "\n")
        except OSError as error:
            raise files.refused(path, error) from None

    def records(self, name: str) -> list[dict[str, Any]]:
        """The objects of `<name>.jsonl`; a torn last line (a kill while writing) is left out."""
        return files.read_json_lines(self.folder / f"{name}.jsonl")

    def rewind(self, step: int) -> None:
        """Drop what was recorded after `step`: those steps are taken again."""
        for name in ("metrics", "evaluations"):
            self._rewrite(name, [r for r in self.records(name) if r.get("step", 0) <= step])

    def amend(self, name: str, values: Mapping[int, Mapping[str, Any]]) -> None:
        """Put values into the records of these steps."""
        self._rewrite(name, [{**r, **values.get(r.get("step", -1), {})} for r in self.records(name)])

    def _rewrite(self, name: str, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        files.write_text(self.folder / f"{name}.jsonl", text)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def checkpoint(
        self,
        step: int,
        adapter: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        best: int | None = None,
    ) -> Path:
        """Write a checkpoint, then drop the old ones except the newest two and that of step `best`."""
        folder = self.folder / "checkpoints" / f"step-{step:06d}"

        def fill(place: Path) -> None:
            safetensors.torch.save_file(dict(adapter), place / "adapter.safetensors")
            safetensors.torch.save_file(dict(optimizer), place / "optimizer.safetensors")
            hashes = {name: files.sha256(place / name) for name in ("adapter.safetensors", "optimizer.safetensors")}
            (place / "state.json").write_text(json.dumps({"step": step, **state, "sha256": hashes}, indent=2))

        files.write_folder(folder, fill)
        self._prune(best)
        return folder

    def put(self, step: int, content: Mapping[str, bytes], best: int | None = None) -> None:
        """The same of the files of a checkpoint that was made elsewhere."""

        def fill(place: Path) -> None:
            for name, data in content.items():
                (place / name).write_bytes(data)

        files.write_folder(self.folder / "checkpoints" / f"step-{step:06d}", fill)
        self._prune(best)

    def remove(self) -> None:
        """All of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _prune(self, best: int | None) -> None:
        steps = sorted(self._steps())
        for old in steps[:-KEEP]:
            if old != best:
                shutil.rmtree(self.folder / "checkpoints" / f"step-{old:06d}", ignore_errors=True)

    def newest(self, say: Callable[[str], object] = lambda text: None) -> Checkpoint | None:
        """The newest whole checkpoint; `say` is told of each damaged one that is passed over."""
        for step in sorted(self._steps(), reverse=True):
            try:
                return self.at(step)
            except RunError as error:
                say(f"{error}; trying an older checkpoint")
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step. RunError if it isn't whole."""
        folder = self.folder / "checkpoints" / f"step-{step:06d}"
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            bad = [name for name, want in state["sha256"].items() if files.sha256(folder / name) != want]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{folder} is damaged ({type(error).__name__}: {error})") from None
        if bad or set(state["sha256"]) != {"adapter.safetensors", "optimizer.safetensors"}:
            raise RunError(f"{folder} is damaged ({', '.join(bad) or 'files'} changed since it was written)")
        return Checkpoint(folder, step, state)

    def _steps(self) -> list[int]:
        place = self.folder / "checkpoints"
        return [int(m[1]) for p in (place.iterdir() if place.is_dir() else []) if (m := _STEP.match(p.name))]


def searching(folder: Path) -> str:
    """What a folder is where there is a search in it that isn't over; '' for others."""
    if process := files.at_work(folder / "tune"):
        return f"a search that is going on (process {process})"
    if files.unfinished_search(folder):
        return f"a search that hasn't ended; lorafit tune --resume --out {folder} goes on"
    return ""


def next_folder(data: str, parent: Path = Path("runs")) -> Path:
    """`runs/<name of the data>-<number>`, the first number that is free."""
    stem = re.sub(r"[^\w.-]+", "-", Path(data).stem).strip("-.") or "run"
    number = 1
    while (parent / f"{stem}-{number}").exists():
        number += 1
    return parent / f"{stem}-{number}"

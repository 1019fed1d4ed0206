"""Runs workers, the sides in turn, and puts their figures in proportion."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.bench.work import UNMATCHED, Work
from lorafit.errors import ConfigError, MissingExtra
from lorafit.log import Terminal, size

Result = dict[str, Any]  # what a worker printed, or {"error": why it didn't}
Runs = dict[str, list[Result]]  # by side, one for each repeat

# Memory given back to the system has to be cleared anew when it is next asked for; these keep it, in huge pages.
TUNED = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736:glibc.malloc.hugetlb=1"
MODES = ("trainer", "script", "trl", "trlpack", "kbit")  # of the peers' worker, which says what they are
INSTALL = "pip install 'lorafit[bench]'"


@dataclass(frozen=True)
class Side:
    """One way of training: ours, or a mode of the peers' worker, perhaps tuned."""

    name: str

    @property
    def ours(self) -> bool:
        """It is lorafit."""
        return self.name == "ours"

    @property
    def mode(self) -> str:
        """The peers' mode."""
        return self.name.removesuffix("+tuned")

    @property
    def tuned(self) -> bool:
        """Without autocast, with tuned malloc."""
        return self.name.endswith("+tuned")


OURS = Side("ours")


def sides(names: Sequence[str]) -> list[Side]:
    """The peers' sides by name ('trainer', 'trl+tuned', …). ConfigError for one that isn't."""
    for name in names:
        if Side(name).mode not in MODES:
            raise ConfigError(f"unknown peer '{name}'; there are {', '.join(MODES)}, each also as NAME+tuned")
    return [Side(name) for name in names]


def need(peers: Sequence[Side], rest: str, quant: str = "none") -> None:
    """MissingExtra if what these sides run on isn't installed; `rest` says what can be measured without. ConfigError for a
    mode that is about a quantised base where there is none."""
    if quant in UNMATCHED and any(side.mode == "kbit" for side in peers):
        raise ConfigError("the peer 'kbit' is about a quantised base; add --quant nf4")
    wanted = {"peft"} | ({"trl", "datasets"} if any(side.mode.startswith("trl") for side in peers) else set())
    wanted |= {"bitsandbytes"} if quant not in UNMATCHED else set()
    missing = sorted(name for name in wanted if importlib.util.find_spec(name) is None)
    if peers and missing:
        raise MissingExtra(f"the comparison needs {' and '.join(missing)}; {INSTALL}, or measure {rest} alone")


def worker(module: str, words: Sequence[str], env: dict[str, str] | None = None) -> Result:
    """Run a worker; the JSON of its last line, or an error in one line."""
    command = [sys.executable, "-m", f"lorafit.bench.{module}", *words, "--began", str(time.time())]
    done = subprocess.run(command, env=env or dict(os.environ), capture_output=True, text=True, errors="replace")
    with suppress(ValueError, IndexError):
        if done.returncode == 0:
            found: Result = json.loads(done.stdout.splitlines()[-1])
            return found
    if done.returncode == -9:
        return {"error": "killed, most likely for want of memory"}
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"error": lines[-1].strip() if lines else f"exit code {done.returncode}"}


@contextmanager
def ended_with_workers() -> Iterator[None]:
    """Within it, a SIGTERM ends the program as Ctrl-C does: no worker goes on without anyone to read its line."""

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not in the main thread, where no signal arrives anyway
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def train(side: Side, work: Work, held_out: bool = False) -> Result:
    """One training by one side, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = [str(work.write(Path(folder) / "work.json")), *(["--held-out"] if held_out else [])]
        if side.ours:
            return worker("ours", words)
        env = dict(os.environ)
        env.pop("GLIBC_TUNABLES", None)  # theirs as it is installed, or tuned on purpose
        if side.tuned:
            env["GLIBC_TUNABLES"] = TUNED
        words += ["--mode", side.mode, *(["--tuned"] if side.tuned else [])]
        return worker("peers", words, env)


def compare(
    name: str, work: Work, peers: Sequence[Side], repeats: int, terminal: Terminal, held_out: bool = False
) -> Runs:
    """Every side in turn, `repeats` times round: what the machine does meanwhile falls on all of them.

    The held-out loss, which doesn't vary with the machine, is taken in the first round alone. A side that fails isn't
    tried again.
    """
    runs: Runs = {side.name: [] for side in (OURS, *peers)}
    for turn in range(repeats):
        for side in (OURS, *peers):
            label = f"{name}: {side.name}, {turn + 1} of {repeats}"
            if any("error" in run for run in runs[side.name]):
                continue
            with terminal.working(label):
                found = train(side, work, held_out and turn == 0)
            runs[side.name].append(found)
            terminal.say(f"{label}: {_said(found)}")
    return runs


def _said(found: Result) -> str:
    if "error" in found:
        return f"failed: {found['error']}"
    return f"{found['tokens_per_second']:,.0f} tokens/s, {size(found['peak_rss_bytes'])}"


def median(runs: Sequence[Result], key: str) -> float | None:
    """The median of a figure over the runs that have it."""
    values = [run[key] for run in runs if run.get(key) is not None]
    return statistics.median(values) if values else None


def ratios(runs: Runs, side: str, key: str) -> list[float]:
    """Ours over theirs, round by round: neighbours in time are compared with each other."""
    return [
        ours[key] / theirs[key]
        for ours, theirs in zip(runs[OURS.name], runs[side], strict=False)
        if ours.get(key) and theirs.get(key)
    ]


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import torch

    cpu = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version for name in ("torch", "transformers", "peft", "trl") if (version := _version(name))},
    }


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

"""What is compared. Each case takes the settings and a scratch folder and gives plain values for JSON; see tables.py."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorafit.bench import harness, shapes
from lorafit.bench import work as works
from lorafit.bench.harness import OURS, Runs, Side
from lorafit.bench.work import Document, Work, batches
from lorafit.errors import ConfigError, LorafitError
from lorafit.log import Terminal

TRAINED = ("speed", "memory", "loss")  # three tables of the same runs
CASES = (*TRAINED, "cases", "limit", "profile", "start")
WITH_PEERS = (*TRAINED, "cases")
ALONE = "limit,profile,start"
STEP = 8  # rows


@dataclass
class Settings:
    """What to measure and on what. `peers` are names of sides; the first is what the grid of cases is compared with."""

    model: str = "smollm2"
    data: str | None = None
    cases: Sequence[str] = CASES
    peers: Sequence[str] = ("trainer", "trainer+tuned", "trl+tuned", "trlpack+tuned")
    rows: int = 96
    held_out: int = 100
    repeats: int = 3
    precision: str = "auto"
    r: int = 16
    max_tokens: int = 512
    timed: int = 3  # steps a case of the grid times, after one that warms up
    grid: Sequence[str] = ()  # names of the grid's cases; all by default
    share: bool = True  # our side computes once what rows of a step begin with
    quant: str = "none"  # how both sides store the base
    checkpointing: bool = False  # our side recomputes activations in the backward
    both: bool = True  # limit and profile in fp32 too where bf16 is what is trained in


def quick(**changes: Any) -> Settings:
    """Settings that take minutes instead of hours."""
    few: dict[str, Any] = {
        "cases": ("speed", "memory", "loss", "limit"),
        "peers": ("trainer", "trainer+tuned"),
        "rows": 2 * STEP,
        "held_out": STEP,
        "timed": 1,
        "both": False,
    }
    return Settings(**(few | changes))


@dataclass
class Bench:
    """A sitting: settings, the model's folder, the documents, and a scratch folder for what is made on the way."""

    settings: Settings
    terminal: Terminal
    model: Path
    precision: str
    documents: list[Document]
    scratch: Path
    peers: list[Side] = field(default_factory=list)

    @property
    def precisions(self) -> list[str]:
        """What our side is looked at in. bf16 only where the processor computes in it, or the user asks for it."""
        return ["bf16", "fp32"] if self.precision == "bf16" and self.settings.both else [self.precision]

    def work(self, **changes: Any) -> Work:
        """The main work: the first rows to train on, the last to score on."""
        s = self.settings
        rows, held = self.documents[: s.rows], self.documents[max(s.rows, len(self.documents) - s.held_out) :]
        precision = changes.pop("precision", self.precision)
        r = changes.get("r", s.r)
        model = changes.pop("model", str(self.model))
        start = str(self.scratch / f"start-{Path(model).name}-{r}")
        steps = batches(rows, STEP)
        main = Work(model, precision, steps, start, held, s.r, max_tokens=s.max_tokens, share=s.share, quant=s.quant)
        return main.but(checkpointing=s.checkpointing, **changes)


def run(settings: Settings, terminal: Terminal) -> dict[str, Any]:
    """Measure everything the settings name. UserErrors come before anything is measured."""
    unknown = [name for name in settings.cases if name not in CASES]
    if unknown:
        raise ConfigError(f"unknown case '{unknown[0]}'; there are {', '.join(CASES)}")
    if settings.repeats < 1 or settings.rows < 2 * STEP:
        raise ConfigError(f"at least 1 repeat and {2 * STEP} rows are needed: one step warms up, the others count")
    if "loss" in settings.cases and settings.held_out < 1:
        raise ConfigError("the held-out loss needs rows to score on: --held-out 8, or leave loss out of --cases")
    compares = any(name in WITH_PEERS for name in settings.cases)
    peers = harness.sides(settings.peers) if compares else []
    harness.need(peers, f"--cases {ALONE}", settings.quant)
    with harness.ended_with_workers(), tempfile.TemporaryDirectory(prefix="lorafit-bench-") as folder:
        bench = _open(settings, terminal, Path(folder), peers)
        found: dict[str, Any] = {
            "machine": harness.machine(),
            "settings": asdict(settings),
            "precision": bench.precision,
            "documents": _described(bench),
        }
        if any(name in TRAINED for name in settings.cases):
            found["trained"] = trained(bench)
        for name, measure in {"cases": grid, "limit": limit, "profile": profile, "start": start}.items():
            if name in settings.cases:
                found[name] = measure(bench)
    return found


def _open(settings: Settings, terminal: Terminal, scratch: Path, peers: list[Side]) -> Bench:
    import torch

    from lorafit.model.load import context_of, locate, pick_dtype

    wanted = settings.rows + settings.held_out
    with terminal.working("reading the model and the data") as spinner:
        model = locate(settings.model, spinner.rename)
        most = min(settings.max_tokens, context_of(model))
        data = settings.data
        documents = works.from_file(data, model, most) if data else works.alpaca_like(wanted, model, most)
    if len(documents) < wanted:
        have = len(documents)
        raise ConfigError(
            f"{settings.data} has {have} rows, {settings.rows} to train on and {settings.held_out} to score on are asked"
            f" for; --rows {max(0, have - settings.held_out)} would do"
        )
    precision = {torch.bfloat16: "bf16"}.get(pick_dtype(settings.precision, torch.device("cpu")), "fp32")
    return Bench(settings, terminal, model, precision, documents, scratch, peers)


def _described(bench: Bench) -> dict[str, Any]:
    work = bench.work()
    return {
        "data": Path(bench.settings.data).name if bench.settings.data else None,
        "rows": sum(len(step) for step in work.steps),
        "tokens": work.tokens,
        "targets": work.targets,
        "held_out": len(work.held_out),
        "steps": len(work.steps),
    }


def trained(bench: Bench) -> Runs:
    """The main comparison: speed, memory and loss come from the same runs."""
    held_out = "loss" in bench.settings.cases
    runs = harness.compare("training", bench.work(), bench.peers, bench.settings.repeats, bench.terminal, held_out)
    for run in runs[OURS.name]:
        if "error" in run:
            raise LorafitError(f"training: {run['error']}")
    return runs


# --- the grid of cases -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One row of the grid: what differs from the main work."""

    name: str
    steps: Callable[[Bench], list[list[Document]]]
    shape: str = ""  # "" for the model itself
    precision: str = ""
    r: int | None = None


def _ordinary(bench: Bench) -> list[list[Document]]:
    return bench.work().steps[: 1 + bench.settings.timed]


def _of(lengths: Sequence[int]) -> Callable[[Bench], list[list[Document]]]:
    return lambda bench: batches(works.of_lengths([*lengths, *lengths], bench.model), len(lengths))


GRID = [
    *(Case(f"r={r}", _ordinary, r=r) for r in (4, 16, 64, 256)),
    Case("fp32", _ordinary, precision="fp32"),
    Case("1 x 8192", _of([8192])),
    Case("1 x 8192 fp32", _of([8192]), precision="fp32"),
    Case("200 x 40", _of([40] * 200)),
    Case("200 x 40 fp32", _of([40] * 200), precision="fp32"),
    Case("8 x 40", _of([40] * 8)),
    *(
        Case(f"{shape} {precision}", _ordinary, shape=shape, precision=precision)
        for shape in shapes.SHAPES
        for precision in ("bf16", "fp32")
    ),
]


def grid(bench: Bench) -> list[dict[str, Any]]:
    """Each case against the first of the peers."""
    from lorafit.model.load import context_of

    made: dict[str, Path] = {}
    names = bench.settings.grid or [case.name for case in GRID]
    unknown = sorted(set(names) - {case.name for case in GRID})
    if unknown:
        raise ConfigError(f"no case '{unknown[0]}' in the grid; there are {', '.join(case.name for case in GRID)}")
    found = []
    for case in GRID:
        if case.name not in names or (case.precision == "bf16" and bench.precision == "fp32"):
            continue
        model = bench.model
        if case.shape:
            if case.shape not in made:
                made[case.shape] = shapes.build(case.shape, bench.model, bench.scratch / case.shape)
            model = made[case.shape]
        steps = case.steps(bench)
        if (longest := max(len(ids) for step in steps for ids in step)) > context_of(model):
            bench.terminal.say(f"{case.name}: left out, the model's context is shorter than {longest} tokens")
            continue
        work = bench.work(
            model=str(model), precision=case.precision or bench.precision, r=case.r or bench.settings.r, steps=steps
        )
        runs = harness.compare(case.name, work, bench.peers[:1], bench.settings.repeats, bench.terminal)
        tokens = round(statistics.mean(sum(map(len, step)) for step in steps))
        found.append({"name": case.name, "precision": work.precision, "tokens_a_step": tokens, "runs": runs})
    return found


# --- our side alone ----------------------------------------------------------------------------------------------------


def limit(bench: Bench) -> list[dict[str, Any]]:
    """Steps beside their necessary products, measured before and after them in the same process."""
    found = []
    for precision in bench.precisions:
        steps = bench.work().steps[: 1 + max(bench.settings.timed, 2)]
        work = bench.work(precision=precision, steps=steps)
        runs = [
            _alone(bench, f"limit: {precision}, {turn + 1} of {bench.settings.repeats}", work, "--limit")
            for turn in range(bench.settings.repeats)
        ]
        found.append({"precision": precision, "steps": len(steps) - 1, "runs": runs})
    return found


def profile(bench: Bench) -> list[dict[str, Any]]:
    """Where a step's time goes."""
    work = bench.work()
    return [
        {"precision": precision, **_alone(bench, f"profile: {precision}", work.but(precision=precision), "--profile")}
        for precision in bench.precisions
    ]


def _alone(bench: Bench, label: str, work: Work, option: str) -> dict[str, Any]:
    with bench.terminal.working(label):
        found = harness.worker("ours", [str(work.write(bench.scratch / "work.json")), option])
    if "error" in found:
        raise LorafitError(f"{label}: {found['error']}")
    return found


def start(bench: Bench) -> dict[str, list[dict[str, float]]]:
    """Seconds from the command until the first step `begins` and `ends`: with native code to be built, with it built, and
    theirs.

    Ours is the `lorafit train` that a user types; theirs a script that has nothing to do but train, if PEFT is installed.
    """
    work = bench.work(steps=bench.work().steps[:1])
    data = bench.scratch / "start.jsonl"
    tokenizer = _tokenizer(bench.model)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in work.steps[0]]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    peers = [Side("trainer")] if not _missing() else []
    found: dict[str, list[dict[str, float]]] = {}
    for turn in range(bench.settings.repeats):
        with tempfile.TemporaryDirectory(dir=bench.scratch) as cache:  # empty: what is built once isn't there
            for name in ("cold", "warm"):
                with bench.terminal.working(f"start: {name}, {turn + 1} of {bench.settings.repeats}"):
                    found.setdefault(name, []).append(_first_step(bench, data, Path(cache)))
                took = found[name][-1]["ends"]
                bench.terminal.say(f"start: {name}, {turn + 1} of {bench.settings.repeats}: {took:.1f} s")
        for side in peers:
            with bench.terminal.working(f"start: {side.name}, {turn + 1} of {bench.settings.repeats}"):
                theirs = harness.train(side, work)
            if "error" not in theirs:
                first = {"begins": theirs["first_step_begins"], "ends": theirs["first_step_ends"]}
                found.setdefault(side.name, []).append(first)
    return found


def _first_step(bench: Bench, data: Path, cache: Path) -> dict[str, float]:
    """When the first step of a `lorafit train` begins and ends, seen by its files: the last one before it is chat.json, the
    first one after it metrics.jsonl."""
    run = Path(tempfile.mkdtemp(dir=bench.scratch)) / "run"
    words = ["train", str(data), "--model", str(bench.model), "--out", str(run)]
    words += ["steps=1", "samples=0", "held_out_share=0", "batch_tokens=1000000", f"precision={bench.precision}"]
    words += ["device=cpu", "long=truncate"]
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "TORCH_EXTENSIONS_DIR": str(cache / "torch_extensions")}
    waited = {"begins": run / "chat.json", "ends": run / "metrics.jsonl"}
    found: dict[str, float] = {}
    begin = time.perf_counter()
    command = [sys.executable, "-m", "lorafit", *words]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            while len(found) < len(waited):
                over = process.poll() is not None
                for name, file in waited.items():
                    if name not in found and file.is_file() and file.stat().st_size:
                        found[name] = time.perf_counter() - begin
                if over:
                    break
                time.sleep(0.01)
            _, said = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise LorafitError(f"lorafit train failed: {(said.strip().splitlines() or ['without a word'])[-1]}")
    return found


def _tokenizer(model: Path) -> Any:
    from lorafit.model.load import load_tokenizer

    return load_tokenizer(model)


def _missing() -> bool:
    from importlib.util import find_spec

    return find_spec("peft") is None


__all__ = ["ALONE", "CASES", "GRID", "OURS", "WITH_PEERS", "Bench", "Case", "Settings", "quick", "run"]

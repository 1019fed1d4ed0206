"""Successive halving beside the whole grid that it searches, and what `lorafit tune` finds beside the defaults.

    python benchmarks/search.py DATA.json DATA.json … --out search.json          goes on with what is missing after a stop
    python benchmarks/search.py DATA.json --parts whole,halving --out search.json
    python benchmarks/search.py --from search.json --write docs/tune.md docs/zh/tune.md       the tables again

Of each DATA the rows of at most --max-tokens tokens are split: the last --test of them are seen by no choice, the --held-out
before them are what choices are made by, the others are trained on. The parts of a task:

    whole      four rates a factor of 3 apart, from a third of the default one, x ranks 8, 16, 64; each trained to its end
    halving    the same points with `lorafit tune --search grid`
    defaults   `lorafit train` with no settings
    staged     `lorafit tune` as it is, with 8 candidates

All take the same number of steps of the same size over the same rows, in the same way: the grid's points share their steps
too. What a part costs is told in whole trainings (the steps taken, of those of a training; exact), in seconds of the
processor, and of the clock. Those of whole and halving are of searching with its evaluations, without loading the model; the
others' are of the whole command. Other work on the machine widens the seconds, those of the clock most.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafit import fit
from lorafit.advice import default_lr
from lorafit.bench import harness
from lorafit.bench.tables import markdown, put
from lorafit.files import write_json
from lorafit.fit import Training
from lorafit.log import Terminal
from lorafit.model.load import locate, shape_of
from lorafit.run import Run
from lorafit.tried import words
from lorafit.tune.halving import EIGHTHS, Verdicts
from lorafit.tune.options import Options
from lorafit.tune.samplers import Grid
from lorafit.tune.space import Values, digits
from lorafit.tune.study import Study

BEGIN, END = "<!-- search: begin; benchmarks/search.py --write replaces what follows -->", "<!-- search: end -->"
PARTS = ("whole", "halving", "defaults", "staged")
FACTORS = (1 / 3, 1.0, 3.0, 9.0)  # of the default rate
RANKS = (8, 16, 64)
BUDGET = 8  # candidates of the staged search
SAME = {"samples": "0", "patience": "0"}  # nobody ends before the last step but by being cut
QUIET = Terminal(quiet=True)


# --- the whole grid -----------------------------------------------------------------------------------------------------


class Whole:
    """A Strategy: every point of a grid, none of them cut."""

    wants_rate = False

    def __init__(self, grid: Grid) -> None:
        self.grid, self.asked = grid, 0
        self.size: int | None = len(grid.whole)
        self.reached: tuple[set[int], ...] = tuple(set() for _ in EIGHTHS)

    def centre(self, rate: float) -> None:
        """Not wanted."""

    @property
    def whole(self) -> bool:
        """Whether every point has been asked for."""
        return self.asked >= len(self.grid.whole)

    def resize(self, size: int) -> int:
        """It is as large as it is."""
        return len(self.grid.whole)

    def ask(self) -> Values | None:
        """The next point."""
        self.asked += 1
        return self.grid.whole[self.asked - 1] if self.asked <= len(self.grid.whole) else None

    def report(self, number: int, rung: int, loss: float) -> None:
        """Whatever its loss, it goes on."""
        self.reached[rung].add(number)

    def verdicts(self) -> Verdicts:
        """Everybody who got there passes."""
        return Verdicts({rung: frozenset(there) for rung, there in enumerate(self.reached)}, {})

    def cost(self, size: int, steps: int) -> float:
        """Whole trainings."""
        return float(size)


def side(given: Mapping[str, str], space: Mapping[str, Any], part: str) -> None:
    """A search of the grid into given["out"], as `lorafit tune` makes it; the part `whole` with a strategy that cuts nobody.
    Prints the seconds of the processor that it took, with its evaluations, without loading."""
    base = Training(fit.read_config(None, given), QUIET)
    folder = Path(given["out"])
    study = Study(Run(folder), given, Options(search="grid", space=space), base, QUIET)
    if part == "whole":
        study.search.strategy = Whole(Grid(study.proposals.space, base.config.seed))
    Run.create(folder)
    study.begin(given)
    began = time.process_time()
    study.run_to_its_end()
    print(json.dumps({"searching": time.process_time() - began}))


# --- a task's parts -----------------------------------------------------------------------------------------------------


def split(args: argparse.Namespace, data: Path, scratch: Path) -> dict[str, Path]:
    """Files of the rows to train on, to choose by, and to score."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    every = scratch / "every.jsonl"
    every.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = {"data": str(every), "model": args.model, "max_tokens": args.max_tokens, "long": "skip"}
    found = fit.read_data(fit.build({**asked, "held_out_share": 0.0}), QUIET, strict=False)[2]
    fits = [rows[line - 1] for line in sorted(row.example.line for row in found.train)]
    fits = fits[-(args.rows + args.held_out + args.test) :]
    ends = (0, len(fits) - args.held_out - args.test, len(fits) - args.test, len(fits))
    files = {name: scratch / f"{name}.json" for name in ("train", "held_out", "test")}
    for file, begin, end in zip(files.values(), ends, ends[1:], strict=False):
        file.write_text(json.dumps(fits[max(0, begin) : end]), encoding="utf-8")
    return files


def ran(command: Sequence[str]) -> tuple[str, dict[str, float]]:
    """What a command prints, and the seconds of the processor and of the clock that it took. SystemExit with what it said if
    it fails."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    after, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-600:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, {"cpu": cpu, "clock": clock}


def measured(args: argparse.Namespace, part: str, files: Mapping[str, Path], scratch: Path) -> dict[str, Any]:
    """What one part found, and its cost."""
    out = scratch / part
    given = {"data": str(files["train"]), "held_out": str(files["held_out"]), "model": args.model, **SAME}
    given |= {"steps": str(args.steps), "batch_tokens": str(args.tokens), "max_tokens": str(args.max_tokens)}
    given |= {"precision": args.precision, "seed": str(args.seed), "out": str(out)}
    shared = [f"{key}={value}" for key, value in given.items()]
    if part in ("whole", "halving"):
        said, cost = ran([__file__, "--side", json.dumps([given, grid(args), part])])
        found = {**cost, **json.loads(said.splitlines()[-1]), **searched(out)}
    elif part == "staged":
        found = {**ran(["-m", "lorafit", "tune", *shared, "--budget", str(BUDGET)])[1], **searched(out)}
    else:
        found = {**ran(["-m", "lorafit", "train", *shared])[1], **trained(out), "trainings": 1.0}
    return {**found, "test": scored(out, files["test"])}


def grid(args: argparse.Namespace) -> dict[str, list[float]]:
    """The space."""
    rate = default_lr(shape_of(locate(args.model)), args.tokens)
    return {"lr": [digits(rate * factor) for factor in FACTORS], "r": list(RANKS)}


def trained(out: Path) -> dict[str, Any]:
    """The figures of a run."""
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    config = fit.settings.read_yaml(out / "config.yaml")
    before, after = summary["held_out_loss_before"], summary["held_out_loss_after"]
    rows = {key: summary[key] for key in ("train_rows", "held_out_rows", "steps")}
    best = after if summary["best_step"] else before
    return {"before": before, "best": best, "values": {key: config[key] for key in ("lr", "r")}, **rows}


def searched(out: Path) -> dict[str, Any]:
    """The figures of a search: beside those of its winner, the loss of everybody at each of its evaluations."""
    found = json.loads((out / "tune.json").read_text(encoding="utf-8"))
    candidates = []
    for one in found["candidates"]:
        run = Run(out / "tune" / f"{one['number']:03d}")
        losses = [[row["step"], row["held_out_loss"]] for row in run.records("evaluations")]
        own = {key: one[key] for key in ("number", "values", "state", "why", "losses", "taken", "best_loss")}
        candidates.append({**own, "evaluations": losses})
    values = found["candidates"][found["winner"] - 1]["values"]
    shown = {"winner": found["winner"], "trainings": found["trainings"], "candidates": candidates}
    return {**trained(out), "values": values, **shown}


def scored(out: Path, test: Path) -> dict[str, float]:
    """Losses of the base and of a run's adapter on rows that no choice has seen."""
    scores = json.loads(ran(["-m", "lorafit", "eval", str(out), str(test), "--json"])[0])["scores"]
    ours = next(score for name, score in scores.items() if name != "base")
    return {"base": scores["base"]["loss"], "ours": ours["loss"]}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All parts of all tasks that --out doesn't hold yet."""
    keys = ("model", "precision", "steps", "tokens", "max_tokens", "held_out", "test", "seed")
    settings = {key: getattr(args, key) for key in keys}
    results: dict[str, Any] = {"machine": harness.machine(), "tasks": {}}
    if args.out.exists():
        results = json.loads(args.out.read_text(encoding="utf-8"))
    for data in args.data:
        task = results["tasks"].setdefault(data.stem, {"settings": settings})
        if task["settings"] != settings:
            raise SystemExit(f"{args.out} has {data.stem} with {task['settings']}; give another --out")
        with tempfile.TemporaryDirectory() as folder:
            files = split(args, data, Path(folder))
            for part in [part for part in args.parts.split(",") if part not in task]:
                task[part] = measured(args, part, files, Path(folder))
                write_json(args.out, results)
                figures = {key: task[part][key] for key in ("best", "values", "trainings", "cpu", "clock", "test")}
                print(f"{data.stem} {part}: {figures}", file=sys.stderr, flush=True)
    return results


# --- tables -------------------------------------------------------------------------------------------------------------


def against_the_grid(tasks: Mapping[str, Any], chinese: bool) -> str:
    """What halving found and cost, beside the whole grid."""
    head = (
        ["数据", "整个网格的最好损失", "减半搜索的", "差", "完整训练数", "占比", "处理器秒数", "占比", "测试损失"]
        if chinese
        else [
            "data",
            "the grid's best",
            "halving's",
            "worse by",
            "trainings",
            "share",
            "CPU seconds",
            "share",
            "test loss",
        ]
    )
    rows = []
    for name, task in tasks.items():
        if not {"whole", "halving"} <= task.keys():
            continue
        full, cut = task["whole"], task["halving"]
        losses = [f"{full['best']:.4f}", f"{cut['best']:.4f}", f"{cut['best'] / full['best'] - 1:.2%}"]
        work = [f"{full['trainings']:.2f} → {cut['trainings']:.2f}", f"{cut['trainings'] / full['trainings']:.1%}"]
        spent, less = full["searching"], cut["searching"]
        seconds = [f"{spent:.0f} → {less:.0f}", f"{less / spent:.1%}"]
        rows.append([name, *losses, *work, *seconds, f"{full['test']['ours']:.4f} → {cut['test']['ours']:.4f}"])
    return markdown(head, rows)


def points(task: Mapping[str, Any], chinese: bool) -> str:
    """The whole grid's best losses by rank and rate; those that halving trained to their ends are bold, and those that it cut
    at the first comparison are in brackets."""
    halved = {words(c["values"]): c for c in task["halving"]["candidates"]}
    full = {(c["values"]["r"], c["values"]["lr"]): c for c in task["whole"]["candidates"]}
    rates = sorted({rate for _, rate in full})

    def cell(r: int, rate: float) -> str:
        one, far = full[r, rate], halved[words(full[r, rate]["values"])]
        text = f"{one['best_loss']:.4f}"
        if one["state"] == "failed":
            text = "发散" if chinese else "diverged"
        if far["taken"] == task["whole"]["steps"]:
            return f"**{text}**"
        return text if len(far["losses"]) == len(EIGHTHS) else f"({text})"

    rows = [[str(r), *(cell(r, rate) for rate in rates)] for r in sorted({r for r, _ in full})]
    return markdown(["秩" if chinese else "rank", *(f"lr {rate:g}" for rate in rates)], rows)


def beside_defaults(tasks: Mapping[str, Any], chinese: bool) -> str:
    """What a staged search found, beside a training with the defaults."""
    head = (
        ["数据", "", "留出损失", "测试损失", "设置", "完整训练数", "处理器秒数"]
        if chinese
        else ["data", "", "held-out loss", "test loss", "settings", "trainings", "CPU seconds"]
    )
    names = ("训练前", "默认", "搜索后") if chinese else ("before", "defaults", "tuned")
    rows = []
    for name, task in tasks.items():
        if not {"defaults", "staged"} <= task.keys():
            continue
        plain, tuned = task["defaults"], task["staged"]
        rows.append([name, names[0], f"{plain['before']:.4f}", f"{plain['test']['base']:.4f}", "", "", ""])
        for called, one in zip(names[1:], (plain, tuned), strict=True):
            settings = words(one["values"]) or ("默认设置" if chinese else "as they were")
            figures = [f"{one['best']:.4f}", f"{one['test']['ours']:.4f}", settings]
            rows.append(["", called, *figures, f"{one['trainings']:.2f}", f"{one['cpu']:.0f}"])
    return markdown(head, rows)


def tables(results: Mapping[str, Any], chinese: bool = False) -> str:
    """All of them."""
    tasks = results["tasks"]
    found = [against_the_grid(tasks, chinese)]
    for name, task in tasks.items():
        if {"whole", "halving"} <= task.keys():
            found.append(f"{name}{'：' if chinese else ':'}\n\n{points(task, chinese)}")
    if any({"defaults", "staged"} <= task.keys() for task in tasks.values()):
        found.append(beside_defaults(tasks, chinese))
    return "\n\n".join(found)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="*", help="JSON lists of rows")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96, help="of a step")
    parser.add_argument("--max-tokens", type=int, default=160, help="of a row")
    parser.add_argument("--rows", type=int, default=10**9, help="to train on, at most")
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--test", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("search.json"))
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="measure nothing")
    parser.add_argument(
        "--write", nargs="*", type=Path, default=[], metavar="PAGE", help="pages whose tables to replace"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side(*json.loads(args.side))
        return
    results = json.loads(args.source.read_text(encoding="utf-8")) if args.source else measure(args)
    print(tables(results))
    for page in args.write:
        put(page, BEGIN, tables(results, "zh" in page.parts), END)


if __name__ == "__main__":
    main()

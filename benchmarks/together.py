"""Candidates of a search trained together, beside the same ones trained one after another, and beside PEFT's.

    python benchmarks/together.py --tokens 64 --out together-64.json
    python benchmarks/together.py --tokens 64 --candidates 1,2,4,8,16,32 --peers ""        the curve

The candidates have ranks 8 to 64 and four learning rates, and steps of --tokens tokens each. Together and one after another
are timed in turn in one process, so that a slow minute falls on both; the median of their steps counts, without the first.
Peaks of memory are of processes of their own: all together, and the candidate of the largest rank alone, both with
--optimizer. PEFT's candidates run one after another under transformers' Trainer, one of each rank. Nothing else should run
meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lorafit.bench import harness
from lorafit.bench.ours import GivenPlan
from lorafit.bench.work import Document, Work, as_tokens, of_lengths
from lorafit.config import choices
from lorafit.host import Host
from lorafit.machine import peak_memory
from lorafit.model.load import load, locate
from lorafit.model.quant import Quant
from lorafit.native import build, pool
from lorafit.train import optim
from lorafit.train.loop import Job, train

RANKS = (8, 16, 32, 64)
RATES = (1e-4, 2e-4, 4e-4, 8e-4)
DOCUMENT = 48  # tokens, about: short ones, as several of them make a small step


def steps_of(args: argparse.Namespace, number: int) -> list[list[Document]]:
    """The documents of a candidate's steps, its own."""
    each = max(1, round(args.tokens / DOCUMENT))
    lengths = [args.tokens // each] * (each * args.steps)
    documents = of_lengths(lengths, locate(args.model))
    turned = documents[number * each % len(documents) :] + documents[: number * each % len(documents)]
    return [turned[i : i + each] for i in range(0, len(turned), each)]


def started(host: Host, args: argparse.Namespace, numbers: Sequence[int]) -> list[Job]:
    """Fresh adapters of these candidates on the host, and their jobs."""
    jobs = []
    for number in numbers:
        name = str(number)
        host.add(name, "lora", r=RANKS[number % 4], alpha=32.0, seed=number)
        steps = [as_tokens(step) for step in steps_of(args, number)]
        plan = GivenPlan([row for step in steps for row in step], args.tokens, given=steps, seed=number)
        lr = RATES[number // 4 % 4]
        optimizer = optim.optimizer(host.adapters[name], lr, 0.0, args.optimizer)
        jobs.append(Job(name, plan, len(steps), lr, warmup=0.0, optimizer=optimizer))
    return jobs


def seconds(host: Host, args: argparse.Namespace, numbers: Sequence[int]) -> float:
    """Of a step of these candidates together: the median, without the first."""
    jobs = started(host, args, numbers)
    marks = [time.perf_counter()]
    for step in train(host, jobs):
        assert not any(figures.failed for figures in step.jobs.values())
        marks.append(time.perf_counter())
    for job in jobs:
        host.remove(job.name)
    return statistics.median([b - a for a, b in pairwise(marks[1:])])


def opened(args: argparse.Namespace) -> Host:
    """The base, with the kernels and the pool that `lorafit train` takes."""
    build.prepare()
    build.library()
    pool.start()
    return Host(load(args.model, precision=args.precision, device="cpu", quant=Quant.of(args.quant)))


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own measures."""
    host = opened(args)
    count = int(args.candidates)
    if args.side == "memory":
        seconds(host, args, [3] if args.alone else range(count))
        return {"peak_rss_bytes": peak_memory()}
    rounds = []
    for _ in range(args.repeats):
        together = seconds(host, args, range(count))
        alone = [seconds(host, args, [number]) for number in range(min(count, 8))]
        rounds.append({"together": together, "alone": sum(alone) * count / len(alone), "each": alone})
    return {"rounds": rounds, "kernels": build.state()}


def ask(args: argparse.Namespace, side: str, count: int, *more: str) -> dict[str, Any]:
    """A worker's figures."""
    words = ["--side", side, "--candidates", str(count), "--tokens", str(args.tokens), "--steps", str(args.steps)]
    given = ["--model", args.model, "--precision", args.precision, "--repeats", str(args.repeats)]
    given += ["--optimizer", args.optimizer, "--quant", args.quant, *more]
    done = subprocess.run([sys.executable, __file__, *words, *given], stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peers(args: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens a second of PEFT under each mode, one candidate of each rank."""
    found: dict[str, list[float]] = {}
    for mode in filter(None, args.peers.split(",")):
        for number, r in enumerate(RANKS):
            with tempfile.TemporaryDirectory() as start:
                work = Work(str(locate(args.model)), args.precision, steps_of(args, number), start, [], r=r)
                done = harness.train(harness.sides([mode])[0], work)
            if "error" in done:
                raise SystemExit(f"{mode}: {done['error']}")
            found.setdefault(mode, []).append(done["tokens_per_second"])
            print(f"{mode} r={r}: {found[mode][-1]:.0f} tokens/s", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument(
        "--quant", default="none", choices=choices("quant"), help="how our base is stored; PEFT's is as it comes"
    )
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "adamw_8bit"))
    parser.add_argument("--candidates", default="8", help="how many; several numbers make a curve")
    parser.add_argument("--tokens", type=int, default=64, help="of a candidate's step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default="trainer", help="modes of `lorafit bench --peers`; '' for none")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--side", choices=("speed", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(worker(args)))
        return
    found: dict[str, Any] = {
        "tokens": args.tokens,
        "quant": args.quant,
        "optimizer": args.optimizer,
        "machine": harness.machine(),
        "counts": {},
    }
    alone = ask(args, "memory", 8, "--alone")["peak_rss_bytes"]
    for count in map(int, args.candidates.split(",")):
        speed = ask(args, "speed", count)
        speed["peak_rss_bytes"] = ask(args, "memory", count)["peak_rss_bytes"]
        speed["of_one"] = speed["peak_rss_bytes"] / alone
        found["counts"][count] = speed
        ratios = sorted(one["alone"] / one["together"] for one in speed["rounds"])
        middle = statistics.median(one["together"] for one in speed["rounds"])
        print(
            f"{count:3} candidates: {statistics.median(ratios):.2f}x ({ratios[0]:.2f}-{ratios[-1]:.2f}), a step"
            f" {middle * 1e3:.0f} ms, {middle * 1e3 / count:.0f} ms each, {count * args.tokens / middle:.0f} tokens/s; peak"
            f" {speed['peak_rss_bytes'] / 1e6:.0f} MB, {speed['of_one']:.2f} of one's; kernels {speed['kernels']}",
            flush=True,
        )
    found["peers"] = peers(args)
    for mode, rates in found["peers"].items():
        each = len(rates) / sum(1 / rate for rate in rates)  # of all of them one after another
        for count, speed in found["counts"].items():
            ratio = count * args.tokens / statistics.median(one["together"] for one in speed["rounds"]) / each
            print(f"{count:3} candidates: {ratio:.1f}x {mode} one after another ({each:.0f} tokens/s)")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

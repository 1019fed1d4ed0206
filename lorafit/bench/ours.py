"""The worker of our side: trains a `Work` with the very parts that `lorafit train` is made of, and prints one JSON line.

With --limit it measures the necessary matrix products before and after the timed steps, with --profile it takes one step
apart instead.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from lorafit.batches import Plan, pack
from lorafit.bench import products
from lorafit.bench.profile import profile_step
from lorafit.bench.work import Document, Work, as_tokens, read
from lorafit.data import Tokens
from lorafit.errors import RunError
from lorafit.evaluate import evaluate
from lorafit.host import Host
from lorafit.machine import peak_memory
from lorafit.model.load import load
from lorafit.model.quant import Quant
from lorafit.train.loop import Job, Step, train

NAME = "adapter"


@dataclass(frozen=True)
class GivenPlan(Plan):
    """A plan whose steps are given instead of drawn."""

    given: Sequence[list[Tokens]] = ()

    def since(self, step: int) -> Iterator[list[Tokens]]:
        """The given steps from this one on, over and over."""
        return islice(cycle(self.given), step, None)


def prepared(work: Work) -> tuple[Host, Job]:
    """Base, adapter and job of a `Work`, made as `lorafit train` makes them."""
    host = Host(load(work.model, precision=work.precision, device="cpu", quant=Quant.of(work.quant)))
    if host.base.body is not None:
        host.base.body.shares = work.share
    if work.checkpointing:
        host.base.checkpointing(True)
    start = Path(work.start)
    if (start / "adapter_config.json").is_file():
        host.load(start, NAME)
    else:
        host.add(NAME, "lora", r=work.r, alpha=2.0 * work.r)
        start.mkdir(parents=True, exist_ok=True)
        host.save(NAME, start)
    steps = [as_tokens(step) for step in work.steps]
    most = max(sum(len(row.ids) for row in step) for step in steps)
    plan = GivenPlan([row for step in steps for row in step], most, given=steps)
    # No warm-up: the other side's warm-up starts at another rate, so only without one are the schedules the same.
    return host, Job(NAME, plan, len(steps), work.lr, schedule="cosine", warmup=0.0)


def run(work: Work, *, held_out: bool = False, limit: bool = False, began: float | None = None) -> dict[str, Any]:
    """Train and say what was measured; see `figures`."""
    since = began or time.time()
    host, job = prepared(work)
    marks, tokens, losses, times = [time.perf_counter()], [], [], [time.time() - since]
    measured: list[list[float]] = []
    for step in _steps(host, job):
        marks.append(time.perf_counter())
        times.append(time.time() - since)
        tokens.append(step.tokens)
        losses.append(step.jobs[NAME].loss)
        if limit and len(tokens) == 1:
            measured.append(_products(host, work))
            marks[-1] = time.perf_counter()
    peak = peak_memory()
    found = figures(tokens, marks, peak, times, work.targets) | {"losses": losses}
    found["tokens_through"] = sum(_through(host, step)[0] for step in work.steps)
    if limit:
        measured.append(_products(host, work))
        found |= {
            "products_before": sum(measured[0]),
            "products_after": sum(measured[1]),
            "products_flop": sum(products.flop(host, *_through(host, step)) for step in work.steps[1:]),
            "seconds_timed": marks[-1] - marks[1],
        }
    if held_out:
        found["held_out_loss"] = evaluate(host, as_tokens(work.held_out), NAME).loss
    return found


def profiled(work: Work) -> dict[str, Any]:
    """Where the time of a step goes, after one that warms up."""
    host, job = prepared(work)
    steps = _steps(host, job)
    next(steps)
    return profile_step(host, work.r, lambda: next(steps).tokens)


def figures(
    tokens: Sequence[int], marks: Sequence[float], peak: int, times: Sequence[float], targets: int
) -> dict[str, Any]:
    """What both sides report. `marks` holds when training began and when each step was done, `times` the seconds from the
    command to the begin and the end of the first step (and of others, which are left out).

    `tokens_per_second` leaves the first step out, which warms up; `…_whole` has everything.
    """
    whole = sum(tokens) / (marks[-1] - marks[0])
    after = sum(tokens[1:]) / (marks[-1] - marks[1]) if len(tokens) > 1 else whole
    return {
        "tokens": sum(tokens),
        "targets": targets,
        "steps": len(tokens),
        "seconds": marks[-1] - marks[0],
        "tokens_per_second": after,
        "tokens_per_second_whole": whole,
        "first_step_begins": times[0],
        "first_step_ends": times[1],
        "peak_rss_bytes": peak,
    }


def _steps(host: Host, job: Job) -> Iterator[Step]:
    for step in train(host, [job]):
        if step.jobs[NAME].failed:
            raise RunError(step.jobs[NAME].failed)
        yield step


def _through(host: Host, step: Sequence[Document]) -> tuple[int, int]:
    """How many tokens of a step go through the body, and how many through the head: beginnings that are shared, once."""
    micro = pack(as_tokens(step), share=host.shares({NAME}))
    return micro.tokens, len(micro.labels)


def _products(host: Host, work: Work) -> list[float]:
    """Seconds of the necessary products of every timed step."""
    return [products.seconds(host, *_through(host, step)) for step in work.steps[1:]]


def main() -> None:
    """Read the work, do it, print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--limit", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--began", type=float)
    args = parser.parse_args()
    work = read(args.work)
    done = profiled(work) if args.profile else run(work, held_out=args.held_out, limit=args.limit, began=args.began)
    print(json.dumps(done))


if __name__ == "__main__":
    main()

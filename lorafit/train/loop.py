"""The loop: a generator of `Step`. It does no input or output; whoever drives it records, evaluates and saves.

Jobs share the base's forward and nothing else: each has its own documents, loss normalisation, clipping, schedule, optimiser
and failure, so N jobs together compute what N runs alone do.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from lorafit.adapter import Adapter
from lorafit.batches import Micro, Plan, join, targets
from lorafit.data.tokens import Tokens
from lorafit.host import Host
from lorafit.route import Route
from lorafit.train import optim
from lorafit.train.loss import losses


@dataclass
class Job:
    """One adapter of the host to train: its name, its plan of documents, and how."""

    name: str
    plan: Plan
    steps: int
    lr: float
    schedule: optim.Schedule = "cosine"
    warmup: float = 0.03
    clip: float = 1.0
    weight_decay: float = 0.0
    done: int = 0  # steps taken; set before `train` to go on from a checkpoint
    optimizer: torch.optim.AdamW | None = None
    failed: str = ""


@dataclass(frozen=True)
class Figures:
    """What a step told of one job. `loss` is the mean over its learned tokens, before the update."""

    loss: float
    lr: float
    target_tokens: int
    grad_norm: float
    failed: str = ""


@dataclass(frozen=True)
class Step:
    """`number` counts from 1. `jobs` by name; `tokens` of all of them."""

    number: int
    tokens: int
    jobs: dict[str, Figures] = field(default_factory=dict)


def train(host: Host, jobs: Sequence[Job]) -> Iterator[Step]:
    """Train each job's adapter to its number of steps, one step of every unfinished job at a time.

    A job whose loss or gradient isn't finite is left as it was before that step, marked `failed`, and takes no further
    part. The generator may be dropped after any step: adapters and optimisers hold everything.
    """
    for job in jobs:
        adapter = host.adapters[job.name]
        job.optimizer = job.optimizer or optim.optimizer(adapter, job.lr, job.weight_decay)
    feeds = {job.name: job.plan.since(job.done) for job in jobs}
    while True:
        live = [job for job in jobs if not job.failed and job.done < job.steps]
        if not live:
            return
        documents = {job.name: next(feeds[job.name]) for job in live}
        sums = _gradients(host, live, documents)
        figures = {
            job.name: _update(host.adapters[job.name], job, sums[i], documents[job.name]) for i, job in enumerate(live)
        }
        yield Step(
            max(job.done for job in live), sum(len(row.ids) for rows in documents.values() for row in rows), figures
        )


def _gradients(host: Host, live: Sequence[Job], documents: dict[str, list[Tokens]]) -> list[float]:
    """Add up every job's gradient of its mean loss over the step; returns each job's mean loss."""
    counts = torch.tensor([max(1, targets(documents[job.name])) for job in live], dtype=torch.float64)
    totals = torch.zeros(len(live), dtype=torch.float64)
    for number, micro in enumerate(_micros(live, documents)):
        for job in live:
            adapter = host.adapters[job.name]
            adapter.train()
            adapter.reseed(zlib.crc32(f"{job.plan.seed}:{job.done}:{number}".encode()))
        route = Route.of((tokens, live[owner].name) for owner, tokens in micro.segments)
        with host.route(route):  # open until backward ends: a recomputed forward reads it again
            each = losses(host, micro)
            owners = micro.owners.to(each.device)
            (each / counts.to(each)[owners]).sum().backward()
        totals.index_add_(0, micro.owners, each.detach().cpu().double())
    for job in live:
        host.adapters[job.name].eval()
    return (totals / counts).tolist()


def _micros(live: Sequence[Job], documents: dict[str, list[Tokens]]) -> Iterator[Micro]:
    cut = [job.plan.micros(documents[job.name]) for job in live]
    for number in range(max(len(parts) for parts in cut)):
        yield join([(i, parts[number]) for i, parts in enumerate(cut) if number < len(parts)])


def _update(adapter: Adapter, job: Job, loss: float, documents: Sequence[Tokens]) -> Figures:
    assert job.optimizer is not None
    lr = job.lr * optim.rate(job.done, job.steps, job.schedule, job.warmup)
    norm = optim.clip(adapter, job.clip)
    if math.isfinite(loss) and math.isfinite(norm):
        optim.set_rate(job.optimizer, lr)
        job.optimizer.step()
        job.done += 1
    else:
        job.failed = f"the loss is {loss:.4g} and the gradient's norm {norm:.4g} at step {job.done + 1}"
    job.optimizer.zero_grad(set_to_none=True)
    return Figures(loss, lr, targets(documents), norm, job.failed)

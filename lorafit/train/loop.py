"""The loop: a generator of `Step`. It does no input or output; whoever drives it records, evaluates and saves.

Jobs share the base's forward and nothing else: each has its own documents, loss normalisation, clipping, schedule, optimiser
and failure, so N jobs together compute what N runs alone do.

A step that runs out of memory is thrown away and repeated in smaller micro-batches. The documents are the same and the loss
is a sum divided once, so only rounding (and, with dropout, the draw) can tell.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lorafit.adapter import Adapter
from lorafit.batches import Micro, Plan, fill, join, targets
from lorafit.data.tokens import Tokens
from lorafit.errors import OutOfMemory
from lorafit.host import Host
from lorafit.machine import Gauge, attempt
from lorafit.route import Route
from lorafit.train import optim
from lorafit.train.loss import losses

# Tokens of a micro-batch up to which jobs share it: beyond, the products gain nothing from more rows, and memory grows.
TOGETHER = 2048


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
    optimizer: optim.Optimizer | None = None
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
    """`number` counts from 1. `jobs` by name; `tokens` of all of them.

    `micro_tokens` are those of the largest micro-batch, `halvings` how often micro-batches have been halved so far, and
    `too_large` the sizes that this step was tried with before, and that memory wasn't enough for.
    """

    number: int
    tokens: int
    jobs: dict[str, Figures] = field(default_factory=dict)
    micro_tokens: int = 0
    halvings: int = 0
    too_large: tuple[int, ...] = ()


def train(host: Host, jobs: Sequence[Job], halvings: int = 0) -> Iterator[Step]:
    """Train each job's adapter to its number of steps, one step of every unfinished job at a time.

    A job whose loss or gradient isn't finite is left as it was before that step, marked `failed`, and takes no further
    part. The generator may be dropped after any step: adapters and optimisers hold everything.

    Whoever drives it may change a list of jobs between two steps: a job that is put there joins in, one that is taken out
    leaves, and the others don't notice either.

    Each micro-batch is cut into 2^`halvings` pieces. Where memory isn't enough for a step, that number grows and stays;
    OutOfMemory if single documents are too large: adapters and optimisers are then as the last step left them.
    """
    feeds: dict[int, Iterator[list[Tokens]]] = {}
    while True:
        live = [job for job in jobs if not job.failed and job.done < job.steps]
        if not live:
            return
        feeds = {id(job): feeds.get(id(job)) or job.plan.since(job.done) for job in live}
        for job in live:
            job.optimizer = job.optimizer or optim.optimizer(host.adapters[job.name], job.lr, job.weight_decay)
        documents = {job.name: next(feeds[id(job)]) for job in live}
        too_large: list[int] = []
        while True:
            sums, error = attempt(partial(_gradients, host, live, documents, halvings))
            if sums is not None:
                break
            too_large.append(_largest(_micros(live, documents, halvings)))
            halvings = _smaller(live, documents, halvings, error)
        figures = {
            job.name: _update(host.adapters[job.name], job, sums[i], documents[job.name]) for i, job in enumerate(live)
        }
        yield Step(
            max(job.done for job in live),
            sum(len(row.ids) for rows in documents.values() for row in rows),
            figures,
            _largest(_micros(live, documents, halvings)),
            halvings,
            tuple(too_large),
        )


Piece = list[tuple[int, Tokens]]  # a micro-batch: documents and whose they are, each owner's side by side


def _gradients(host: Host, live: Sequence[Job], documents: dict[str, list[Tokens]], halvings: int = 0) -> list[float]:
    """Add up every job's gradient of its mean loss over the step, and of its method's penalty; returns each job's mean loss. An
    error leaves none."""
    counts = torch.tensor([max(1, targets(documents[job.name])) for job in live], dtype=torch.float64)
    totals = torch.zeros(len(live), dtype=torch.float64)
    adapters = [host.adapters[job.name] for job in live]
    taken: Counter[int] = Counter()  # micro-batches so far, of each job: what it draws doesn't depend on the others
    try:
        for adapter in adapters:
            adapter.train()
        for piece in _micros(live, documents, halvings):
            present = {owner for owner, _ in piece}
            for owner in present:
                job = live[owner]
                adapters[owner].reseed(zlib.crc32(f"{job.plan.seed}:{job.done}:{taken[owner]}".encode()))
                taken[owner] += 1
            micro = _joined(piece, host.shares(live[owner].name for owner in present))
            route = Route.of((tokens, live[owner].name) for owner, tokens in micro.segments)
            with host.route(route), watched(host):  # open until backward ends: a recomputed forward reads it again
                each = losses(host, micro)
                owners = micro.owners.to(each.device)
                mean = (each / counts.to(each)[owners]).sum()
                if mean.requires_grad:  # not where nothing is learned here that meets an adapter
                    mean.backward()
            totals.index_add_(0, micro.owners, each.detach().cpu().double())
        for adapter in adapters:
            if (penalty := adapter.penalty()) is not None:
                penalty.backward()
    except BaseException:
        for adapter in adapters:
            adapter.zero_grad(set_to_none=True)
        raise
    finally:
        for adapter in adapters:
            adapter.eval()
    return (totals / counts).tolist()


@contextmanager
def watched(host: Host) -> Iterator[None]:
    """Inside `with`, a forward and its backward fail between two layers of the base before memory's limit is reached."""
    if host.base.device.type != "cpu":  # the limit is on the computer's memory; a GPU's allocator says no in time
        yield
        return
    gauge = Gauge()
    body = host.base.body
    if body is not None:
        body.between = gauge if gauge else None
        try:
            yield
        finally:
            body.between = None
        return
    lists = [module for module in host.base.model.modules() if isinstance(module, torch.nn.ModuleList)]
    hooks = []

    def before(module: Any, args: Any) -> None:
        gauge()

    def after(module: Any, args: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda gradient: gauge())

    for layer in lists[0] if gauge and lists else ():  # the outermost list: the layers of the body
        hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _micros(live: Sequence[Job], documents: dict[str, list[Tokens]], halvings: int) -> list[Piece]:
    """The step's micro-batches: one of each job's side by side, as many jobs as keep within `TOGETHER` tokens or the largest
    of them, each lot cut into 2^halvings pieces.

    A job's micro-batch stays whole as long as nothing is halved, so that it draws what it draws alone.
    """
    cut = [job.plan.micros(documents[job.name]) for job in live]
    found = []
    for number in range(max(len(parts) for parts in cut)):
        beside = [[(i, row) for row in parts[number]] for i, parts in enumerate(cut) if number < len(parts)]
        sizes = [sum(len(row.ids) for _, row in part) for part in beside]
        for lot in fill(sizes, max(TOGETHER, *sizes)):
            whole = [item for part in lot for item in beside[part]]
            lengths = [len(row.ids) for _, row in whole]
            found += [[whole[k] for k in run] for run in fill(lengths, max(1, -(-sum(lengths) // 2**halvings)))]
    return found


def _joined(piece: Piece, share: bool) -> Micro:
    return join([(owner, [row for _, row in rows]) for owner, rows in groupby(piece, key=lambda item: item[0])], share)


def _largest(pieces: Sequence[Piece]) -> int:
    return max(sum(len(row.ids) for _, row in piece) for piece in pieces)


def _smaller(live: Sequence[Job], documents: dict[str, list[Tokens]], halvings: int, error: str) -> int:
    """The next number of halvings that makes a difference to this step."""
    now = [len(piece) for piece in _micros(live, documents, halvings)]
    if max(now) == 1:
        longest = max(len(row.ids) for rows in documents.values() for row in rows)
        raise OutOfMemory(
            f"out of memory at step {max(job.done for job in live) + 1} with one document at a time; its longest has"
            f" {longest} tokens ({error})"
        )
    while [len(piece) for piece in _micros(live, documents, halvings)] == now:
        halvings += 1
    return halvings


def _update(adapter: Adapter, job: Job, loss: float, documents: Sequence[Tokens]) -> Figures:
    assert job.optimizer is not None
    lr = job.lr * optim.rate(job.done, job.steps, job.schedule, job.warmup)
    norm = optim.clip(job.optimizer, job.clip)
    number = job.done + 1
    if math.isfinite(loss) and math.isfinite(norm):
        optim.set_rate(job.optimizer, lr)
        try:
            adapter.update(optim.Stepper(job.optimizer), number, job.steps)
            job.done = number
        except ArithmeticError as error:
            job.failed = f"{error} at step {number}"
    else:
        job.failed = f"the loss is {loss:.4g} and the gradient's norm {norm:.4g} at step {number}"
    job.optimizer.zero_grad(set_to_none=True)
    return Figures(loss, lr, targets(documents), norm, job.failed)

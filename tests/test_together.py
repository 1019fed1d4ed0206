"""Jobs that differ in everything, trained in the same steps: each as if it were alone."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from tiny import base, rows

from lorafit.batches import Plan
from lorafit.host import Host
from lorafit.methods.base import Method
from lorafit.train import loop
from lorafit.train.loop import Job, train

STEPS = 50
LENGTHS = [9, 13, 11, 17, 8, 12, 10, 14, 25, 6]
# Each: the adapter, and what its job differs in.
JOBS = {
    "plain": (dict(method="lora", r=4), dict(lr=2e-3)),
    "large": (dict(method="rslora", r=16, alpha=8.0), dict(lr=1e-3, schedule="linear", clip=0.1)),
    "few": (dict(method="lora", r=2, targets=["q_proj", "down_proj"]), dict(lr=4e-3, schedule="constant")),
    "drawn": (dict(method="lora", r=8, dropout=0.3), dict(lr=1e-3, warmup=0.2)),
    "dora": (dict(method="dora", r=4), dict(lr=1e-3, weight_decay=0.1)),
    "ia3": (dict(method="ia3"), dict(lr=5e-3)),
    "plus": (dict(method="lora+", r=4), dict(lr=2e-4)),
    "budget": (dict(method="adalora", r=4), dict(lr=1e-3)),
    "codes": (dict(method="qrlora", r=8), dict(lr=1e-2)),
}


def started(names, dtype=torch.float32, shape="llama", **changes):
    host = Host(base(shape, dtype, **changes))
    jobs = []
    for number, name in enumerate(JOBS):
        adapter, how = JOBS[name]
        if name not in names:
            continue
        host.add(name, **{"seed": number, **adapter}).to(dtype)
        plan = Plan(rows(LENGTHS[: 6 + number % 4], seed=number), 20 + 9 * number, 1 + number % 3, seed=number)
        jobs.append(Job(name, plan, STEPS - 5 * (number % 3), **how))
    return host, jobs


def trained(names, **how):
    """Losses of every step and the adapter's numbers at the end, by job."""
    host, jobs = started(names, **how)
    found = defaultdict(list)
    for step in train(host, jobs):
        for name, figures in step.jobs.items():
            assert not figures.failed
            found[name].append(figures.loss)
    return found, {name: host.adapters[name].state_dict() for name in names}


@pytest.mark.parametrize(
    "kind", [dict(), dict(dtype=torch.float64), dict(shape="gpt2"), dict(shape="mixtral")], ids=str
)
def test_each_job_is_what_it_is_alone(kind):
    """fp32: losses and parameters within 1e-6 after 50 steps (of experts, whose sums are added up in another order, 3e-6); fp64
    within 1e-10, so that what is left is rounding."""
    names = [n for n in JOBS if kind.get("shape") != "mixtral" or n in ("plain", "large", "drawn")]
    names = [n for n in names if n not in ("few", "ia3") or kind.get("shape") != "gpt2"]  # it has no such modules
    losses, states = trained(names, **kind)
    tolerance = 1e-10 if "dtype" in kind else 3e-6 if kind.get("shape") == "mixtral" else 1e-6
    for name in names:
        alone, alone_states = trained([name], **kind)
        assert len(alone[name]) == len(losses[name])
        assert abs(alone[name][0] - alone[name][-1]) > 1e-3  # it learned
        off = max(abs(a - b) for a, b in zip(alone[name], losses[name], strict=True))
        for key, value in alone_states[name].items():
            wanted, found = value.double(), states[name][key].double()
            off = max(off, float((found - wanted).abs().max() / max(1, wanted.abs().max())))
        assert off < tolerance, name


def test_another_default_dtype_changes_nothing():
    code = """
import sys
sys.path[:0] = ["tests"]
import torch
from test_together import started
from lorafit.train.loop import train
sizes = dict(hidden_size=64, intermediate_size=96)  # which the kernel of products takes
made = [started(["plain", "dora"], dtype=dtype, **sizes) for dtype in (torch.float32, torch.bfloat16)]
if sys.argv[1] == "bf16":
    torch.set_default_dtype(torch.bfloat16)
for host, jobs in made:
    for adapter in host.adapters.values():
        adapter.float()
    for step in train(host, jobs):
        print([figures.loss for figures in step.jobs.values()])
"""
    said = [
        subprocess.run(
            [sys.executable, "-c", code, name], capture_output=True, text=True, cwd=Path(__file__).parent.parent
        )
        for name in ("bf16", "usual")
    ]
    assert [done.returncode for done in said] == [0, 0], said[0].stderr[-500:]
    assert said[0].stdout == said[1].stdout and said[0].stdout.count("\n") > 50


def test_dropout_draws_the_same_bits(monkeypatch):
    drawn = defaultdict(list)
    plain = Method.dropped

    def recorded(self, x):
        out = plain(self, x)
        if self.draws:
            drawn[self.seed].append(out == 0)
        return out

    monkeypatch.setattr(Method, "dropped", recorded)
    trained(["plain", "drawn", "dora"])
    together, count = dict(drawn), len(drawn)
    drawn.clear()
    trained(["drawn"])
    assert count == len(drawn) > STEPS
    for seed, masks in drawn.items():
        assert len(masks) == len(together[seed])
        assert all(torch.equal(a, b) for a, b in zip(masks, together[seed], strict=True))


def test_a_job_that_diverges_leaves_the_others_as_they_are():
    wanted, states = trained(["plain", "large"], dtype=torch.float64)
    host, jobs = started(["plain", "large", "few"], torch.float64)
    host.adapters["few"].state_dict()
    sick = next(job for job in jobs if job.name == "few")
    losses, failed = defaultdict(list), []
    for number, step in enumerate(train(host, jobs), 1):
        for name, figures in step.jobs.items():
            losses[name].append(figures.loss)
            failed += [(number, name)] if figures.failed else []
        if number == 7:
            with torch.no_grad():
                next(host.adapters["few"].parameters()).fill_(math.nan)
    assert failed == [(8, "few")]
    assert sick.failed
    for name in ("plain", "large"):
        assert len(losses[name]) == len(wanted[name])
        for key, value in states[name].items():
            assert (host.adapters[name].state_dict()[key] - value).abs().max() < 1e-10


def test_memory_of_a_micro_batch_stays_within_bounds(monkeypatch):
    """Many jobs don't make a larger micro-batch than one of them would, or than the products gain from."""
    monkeypatch.setattr(loop, "TOGETHER", 60)
    _, jobs = started(JOBS)
    host, jobs = started(JOBS)
    largest = [step.micro_tokens for step, _ in zip(train(host, jobs), range(3), strict=False)]
    documents = [next(job.plan.since(0)) for job in jobs]
    alone = max(
        sum(len(r.ids) for r in part) for job, d in zip(jobs, documents, strict=True) for part in job.plan.micros(d)
    )
    assert max(largest) <= max(60, alone + max(LENGTHS))

"""Train two adapters at once on one base, then send three documents of one packed row through three routes.

    python examples/07_two_adapters_one_batch.py

One adapter learns the answers as they are written, the other learns them in capitals. A document's logits in the mixed
row are those that it has alone.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from lorafit.batches import Plan
from lorafit.data import Fault, encode, read
from lorafit.host import Host
from lorafit.model.load import load
from lorafit.route import Route
from lorafit.session import base_chat
from lorafit.train.loop import Job, train

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="smollm2")
parser.add_argument("--steps", default=8, type=int)
args = parser.parse_args()

base = load(args.model, precision="fp32", device="cpu")
chat, host = base_chat(base), Host(base)
examples = [item for item in read(Path(__file__).parent / "data" / "library.jsonl") if not isinstance(item, Fault)]


def loud(example):
    user, said = example.messages
    return replace(example, messages=(user, replace(said, content=said.content.upper())))


rows = {"plain": [encode(e, chat) for e in examples], "loud": [encode(loud(e), chat) for e in examples]}
for name in rows:
    host.add(name, r=8)
jobs = [Job(name, Plan(found, tokens=256), args.steps, lr=1e-3) for name, found in rows.items()]
for step in train(host, jobs):  # each job has its own loss, clipping, schedule and optimiser
    print(f"step {step.number}: " + ", ".join(f"{name} {job.loss:.3f}" for name, job in step.jobs.items()))

documents = [torch.from_numpy(rows["plain"][i].ids.astype("int64")) for i in (0, 1, 2)]
lengths, stacks = [len(ids) for ids in documents], [None, "plain", "loud"]
with torch.no_grad():
    with host.route(Route.of(zip(lengths, stacks, strict=True))):
        mixed = host.logits(torch.cat(documents), lengths).split(lengths)
    for ids, spec, together in zip(documents, stacks, mixed, strict=True):
        plain = host.logits(ids, [len(ids)])  # no route open: the base
        with host.route(spec):
            alone = host.logits(ids, [len(ids)])
        moved, difference = float((alone - plain).abs().max()), float((alone - together).abs().max())
        print(f"{spec or 'base':<6} moves the logits by {moved:.2g}; mixed and alone differ by {difference:.1g}")
        assert difference < 1e-3

"""A base in nf4 on a GPU, beside the same base in 16 bits and beside PEFT: tokens a second and memory of a training step.

    python benchmarks/gpu.py --model DIR --tokens 2048 --steps 8 --out gpu.json

Sides: `bf16` and `nf4`, ours; `peft` and `bnb`, PEFT over transformers with a plain loop (flash attention of torch's, a fused
AdamW, batches of equal rows, so that nothing is padded), the latter over bitsandbytes' 4 bits. With --checkpointing all
recompute activations. Each side is a process of its own; memory is what the GPU's allocator held at most. They take turns,
--repeats times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lorafit.bench.ours import NAME, GivenPlan
from lorafit.bench.work import as_tokens, of_lengths
from lorafit.host import Host
from lorafit.model.load import load, locate
from lorafit.model.quant import Quant
from lorafit.train.loop import Job, train

DOCUMENT = 512  # tokens
SIDES = ("bf16", "nf4", "peft", "bnb")


def ours(args: argparse.Namespace, side: str, rows: list[list[int]]) -> Iterator[float]:
    """The loss of each step."""
    host = Host(load(args.model, quant=Quant.of("none" if side == "bf16" else side), precision="bf16", device="cuda"))
    host.base.checkpointing(args.checkpointing)
    if args.compiled and host.base.body is not None:
        host.base.body.compiled = True
    host.add(NAME, r=args.r)
    given = as_tokens(rows)
    plan = GivenPlan(given, args.tokens, given=[given])
    job = Job(NAME, plan, args.steps + args.warm, 1e-4, schedule="constant", warmup=0.0)
    for step in train(host, [job]):
        yield step.jobs[NAME].loss


def theirs(args: argparse.Namespace, side: str, rows: list[list[int]]) -> Iterator[float]:
    """The same with PEFT."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    stored = {"quantization_config": bits} if side == "bnb" else {}
    base = AutoModelForCausalLM.from_pretrained(
        locate(args.model), dtype=torch.bfloat16, device_map={"": 0}, local_files_only=True, **stored
    )
    base.config.use_cache = False
    if stored:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=args.checkpointing)
    elif args.checkpointing:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    wanted = LoraConfig(r=args.r, lora_alpha=2 * args.r, task_type="CAUSAL_LM", target_modules="all-linear")
    model = get_peft_model(base, wanted).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    batch = torch.tensor(rows, device="cuda")
    for _ in range(args.steps + args.warm):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield float(loss)


def measured(args: argparse.Namespace, side: str) -> dict[str, Any]:
    """Of this process."""
    rows = of_lengths([min(DOCUMENT, args.tokens)] * max(1, args.tokens // DOCUMENT), locate(args.model))
    marks, losses = [], []
    for loss in (ours if side in ("bf16", "nf4") else theirs)(args, side, rows):
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
        losses.append(loss)
    seconds = [b - a for a, b in pairwise(marks[args.warm - 1 :])]
    tokens = sum(map(len, rows))
    return {
        "tokens_per_second": tokens / statistics.median(seconds),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "losses": losses,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm", type=int, default=3, help="steps before those that count")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument(
        "--compiled", action="store_true", help="our 16-bit side through torch.compile, as long runs are"
    )
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measured(args, args.side)))
        return
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.repeats):
        for side in args.sides.split(","):
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side], stdout=subprocess.PIPE)
            if done.returncode == 0:
                found.setdefault(side, []).append(json.loads(done.stdout.splitlines()[-1]))
    for side, runs in found.items():
        speed = statistics.median(run["tokens_per_second"] for run in runs)
        memory = statistics.median(run["peak_bytes"] for run in runs)
        loss = runs[-1]["losses"][-1]
        print(f"{side:6} {speed:9.0f} tokens/s {memory / 1e9:7.2f} GB   last loss {loss:.4f}")
    if args.out:
        args.out.write_text(json.dumps({"tokens": args.tokens, "sides": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

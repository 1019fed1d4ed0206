"""A base in nf4 beside the same base in 16 bits: seconds of a training step, peak memory, and what rounding costs.

    python benchmarks/quant.py --out quant.json
    python benchmarks/quant.py --model DIR --tokens 512 --steps 4
    python benchmarks/quant.py --fit data.json             held-out perplexity before and after training, 16 bits and nf4
    python benchmarks/quant.py --model DIR --limited 0.6   steps with memory for 60 % of the base in 4 bits (needs root)

Both bases are in one process and take their steps in turn, so that a slow minute hits both. Peaks are of processes of their
own. If bitsandbytes is installed, its codes and its error are compared with ours, weight by weight. `lorafit bench --quant
nf4 --peers trainer,kbit` compares with PEFT on bitsandbytes' base.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lorafit.bench.ours import NAME, GivenPlan
from lorafit.bench.work import as_tokens, of_lengths
from lorafit.host import Host
from lorafit.machine import peak_memory
from lorafit.model.load import load, locate
from lorafit.model.quant import Quant
from lorafit.model.quant_load import FILE, folder
from lorafit.native import quantised
from lorafit.train.loop import Job, Step, train

DOCUMENT = 256  # tokens


def steps(args: argparse.Namespace, kind: str) -> tuple[Host, Iterator[Step]]:
    """A host with a fresh adapter, and the steps of its training."""
    host = Host(load(args.model, quant=Quant.of(kind), precision=args.precision, device="cpu"))
    host.base.checkpointing(args.checkpointing)
    host.add(NAME, r=args.r)
    lengths = [min(DOCUMENT, args.tokens)] * max(1, args.tokens // DOCUMENT)
    rows = as_tokens(of_lengths(lengths, locate(args.model)))
    return host, train(host, [Job(NAME, GivenPlan(rows, args.tokens, given=[rows]), args.steps + 1, 1e-4)])


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step of each, and the median of the ratios of neighbours."""
    both = {kind: steps(args, kind)[1] for kind in ("none", args.kind)}
    seconds: dict[str, list[float]] = {kind: [] for kind in both}
    for _ in range(args.steps + 1):
        for kind, taken in both.items():
            begin = time.perf_counter()
            next(taken)
            seconds[kind].append(time.perf_counter() - begin)
    seconds = {kind: found[1:] for kind, found in seconds.items()}  # the first warms up
    ratios = [a / b for a, b in zip(seconds["none"], seconds[args.kind], strict=True)]
    return {
        "threads": torch.get_num_threads(),
        "tokens": args.tokens,
        "seconds": {kind: statistics.median(found) for kind, found in seconds.items()},
        "throughput": statistics.median(ratios),
        "from": min(ratios),
        "to": max(ratios),
    }


def peak(args: argparse.Namespace, kind: str) -> int:
    """Of a process that takes two steps."""
    words = ["--peak-of", kind, "--model", args.model, "--tokens", str(args.tokens), "--precision", args.precision]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return int(done.stdout)


def errors(args: argparse.Namespace) -> dict[str, Any]:
    """Relative errors of the weights, ours and bitsandbytes'; how many codes differ."""
    host = Host(load(args.model, precision="fp32", device="cpu"))
    found, theirs, different, most = [], [], 0, 0.0
    peer = importlib.util.find_spec("bitsandbytes") is not None
    for site in host.sites.values():
        if site.kind != "linear" or site.head:
            continue
        w = site.weight()
        q = quantised.quantise(w, args.kind)
        made = quantised.dequantise(q, torch.float32)
        found.append(float((made - w).norm() / w.norm()))
        if peer and args.kind != "int8":
            from bitsandbytes import functional

            codes, state = functional.quantize_4bit(w, quant_type=args.kind, compress_statistics=True)
            different += int((codes != q.codes).sum()) + int((state.absmax != q.absmax).sum())
            other = functional.dequantize_4bit(codes, state)
            theirs.append(float((other - w).norm() / w.norm()))
            most = max(most, float((other - made).abs().max()))
    result: dict[str, Any] = {"weights": len(found), "error": [min(found), statistics.mean(found), max(found)]}
    if theirs:
        result |= {
            "bitsandbytes": [min(theirs), statistics.mean(theirs), max(theirs)],
            "codes that differ": different,
            "largest difference of numbers": most,
        }
    return result


def fitted(args: argparse.Namespace) -> dict[str, Any]:
    """Held-out perplexity of the base and of an adapter trained on it, by what the base is stored in."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in ("none", args.kind):
            words = [
                args.fit,
                "--model",
                args.model,
                "--out",
                f"{scratch}/{kind}",
                f"quant={kind}",
                "samples=0",
                "--json",
            ]
            words += [
                f"steps={args.steps}",
                f"batch_tokens={args.tokens}",
                f"r={args.r}",
                "patience=0",
                "long=truncate",
            ]
            done = subprocess.run(
                [sys.executable, "-m", "lorafit", "train", *words], stdout=subprocess.PIPE, check=True
            )
            summary = json.loads(done.stdout)
            before, after = summary["held_out_loss_before"], summary["held_out_loss_after"]
            found[kind] = {"base": math.exp(before), "trained": math.exp(after), "peak": summary["peak_rss_bytes"]}
            found[kind]["tokens_per_second"] = summary["tokens_per_second"]
    return found


def limited(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of steps in a process that may use a share of what the base takes in 4 bits, beside one that may use all."""
    model = load(args.model, quant=Quant.of(args.kind), precision=args.precision, device="cpu")
    codes = sum(b.numel() * b.element_size() for m in model.model.modules() for b in m.buffers(recurse=False))
    numbers = sum(p.numel() * p.element_size() for p in model.model.parameters())
    most = int(args.limited * (codes + numbers))
    files = [*locate(args.model).glob("*.safetensors"), folder(model.fingerprint, Quant(args.kind)) / FILE]
    del model
    words = ["--seconds-of", args.kind, "--model", args.model, "--tokens", str(args.tokens), "--steps", str(args.steps)]
    words += ["--precision", args.precision, *(["--checkpointing"] if args.checkpointing else [])]
    found: dict[str, Any] = {"codes": codes, "numbers": numbers, "limit": most}
    for name, limit in (("all", 0), ("limited", most)):
        for file in files:  # what the system keeps of them would count for another group
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        group = Path("/sys/fs/cgroup/memory/lorafit") if limit else None
        if group:
            group.mkdir(exist_ok=True)
            (group / "memory.limit_in_bytes").write_text(str(limit))
        enter = f"echo $$ > {group}/cgroup.procs && " if group else ""
        command = ["sh", "-c", f'{enter}exec "$@"', "sh", sys.executable, __file__, *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        found[name] = json.loads(done.stdout) if not done.returncode else {"failed": done.returncode}
        if group:
            found[name]["most in use"] = int((group / "memory.max_usage_in_bytes").read_text())
            group.rmdir()
    if "seconds" in found["all"] and "seconds" in found["limited"]:
        found["times as long"] = found["limited"]["seconds"] / found["all"]["seconds"]
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--kind", choices=quantised.KINDS, default="nf4")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--fit", metavar="DATA", help="train on this, and print perplexities alone")
    parser.add_argument("--limited", type=float, metavar="SHARE", help="print what a limit of memory costs alone")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--seconds-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.seconds_of:
        _, taken = steps(args, args.seconds_of)
        marks = [time.perf_counter() for _ in taken]
        seconds = statistics.median(b - a for a, b in pairwise(marks))
        print(json.dumps({"seconds": seconds, "peak": peak_memory()}))
        return
    if args.fit or args.limited:
        print(json.dumps(fitted(args) if args.fit else limited(args), indent=1))
        return
    if args.peak_of:
        args.steps = 1
        host, taken = steps(args, args.peak_of)
        assert len(list(taken)) == 2 and host.adapters
        print(peak_memory())
        return
    found: dict[str, Any] = {"model": args.model, "kind": args.kind, "speed": speed(args)}
    print(json.dumps(found["speed"]), file=sys.stderr, flush=True)  # minutes of it, with a large model
    found["errors"] = errors(args)
    found["peak"] = {kind: peak(args, kind) for kind in ("none", args.kind)}
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

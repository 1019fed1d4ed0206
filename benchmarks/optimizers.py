"""Seconds that an update of each kind of AdamW takes on this machine's processor, with and without kernels.

    python benchmarks/optimizers.py                     adapters of 1, 5 and 40 million numbers
    python benchmarks/optimizers.py --numbers 5000000 --tensors 420

The kinds take their updates in turn, so that a slow minute hits all of them; the median is shown.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from lorafit.log import count, table
from lorafit.native import build
from lorafit.train import optim
from lorafit.train.adamw8 import AdamW8bit

KINDS = ("adamw", "adamw_8bit", "adamw_8bit, native=false")


def made(kind: str, numbers: int, tensors: int) -> tuple[list[torch.nn.Parameter], optim.Optimizer]:
    """Parameters of so many numbers in equal tensors, with gradients, and their optimiser."""
    given = [torch.nn.Parameter(torch.randn(numbers // tensors)) for _ in range(tensors)]
    for p in given:
        p.grad = torch.randn_like(p)
    if kind == "adamw":
        return given, torch.optim.AdamW(given, lr=1e-4, fused=True)
    return given, AdamW8bit([{"params": given, "scale": 1.0}], 1e-4, 0.01, optim.in_memory)


def seconds(numbers: int, tensors: int, updates: int) -> list[float]:
    """The median of each kind's updates."""
    both = {kind: made(kind, numbers, tensors)[1] for kind in KINDS}
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(updates + 1):
        for kind, one in both.items():
            with build.switched("native=false" not in kind):
                began = time.perf_counter()
                one.step()
                found[kind].append(time.perf_counter() - began)
    return [statistics.median(each[1:]) for each in found.values()]  # the first warms up


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, nargs="*", default=[1_000_000, 5_000_000, 40_000_000])
    parser.add_argument("--tensors", type=int, default=420)
    parser.add_argument("--updates", type=int, default=7)
    args = parser.parse_args()
    if build.library() is None:
        raise SystemExit(f"no kernels here: {build.state()}")
    rows = []
    for numbers in args.numbers:
        found = seconds(numbers, min(args.tensors, max(1, numbers // 4096)), args.updates)
        rows.append([count(numbers), *(f"{1e3 * s:.1f} ms" for s in found), f"{found[1] / found[0]:.1f}"])
    print(table(["numbers", *KINDS, "8bit over adamw"], rows))


if __name__ == "__main__":
    main()

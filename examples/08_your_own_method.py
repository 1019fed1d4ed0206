"""A method of your own: a factor on every input of a weight, after (IA)3 (arXiv 2205.05638), trained like any other.

    python examples/08_your_own_method.py runs/gain

Inside the package a method is a file in lorafit/methods and a line in its registry.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from lorafit import fit
from lorafit.methods import METHODS, Method


class Gain(Method):
    """W becomes W·diag(1 + g). g starts at zero, so a fresh adapter changes nothing."""

    about = "a factor on each input of a weight"
    kinds = frozenset({"linear", "conv1d"})  # inputs must be vectors, not ids
    targets = ("all-linear",)
    lr_factor = 5.0  # of the default learning rate

    def __init__(self, site, generator=None, *, spread: float = 0.0) -> None:  # keyword arguments are settings
        super().__init__()
        self.g = nn.Parameter(spread * torch.randn(site.shape[-1], generator=generator))

    def delta_weight(self, w):
        """What is added to w (out, in)."""
        return w.float() * self.g

    def forward(self, x, y, mm, weight):
        """The same on activations: mm(x, M) is the product with a matrix shaped like the site."""
        return mm(x * self.g.to(x.dtype), weight())


METHODS["gain"] = Gain

parser = argparse.ArgumentParser()
parser.add_argument("run", nargs="?", default="runs/gain")
parser.add_argument("--model", default="smollm2")
parser.add_argument("--steps", default=20, type=int)
args = parser.parse_args()

data = Path(__file__).parent / "data" / "library.jsonl"
settings = {"method": "gain", "out": args.run, "model": args.model, "steps": args.steps, "samples": 0}
run = fit.fit(fit.read_config(str(data), settings))
summary = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
print(f"{summary['trainable_parameters']:,} trainable numbers, held-out loss", end=" ")
print(f"{summary['held_out_loss_before']:.3f} -> {summary['held_out_loss_after']:.3f}")

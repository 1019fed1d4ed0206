"""Codes of a weight that are made together with a part of low rank, which takes up what rounding would lose.

The weight is then codes + b·a. LoftQ (arXiv 2310.08659): b·a is the leading part of what the codes miss, and codes and part
are made in turn. PiSSA (arXiv 2404.02948, section 4): b·a is the leading part of the weight itself, the codes are of the
rest. Training goes on from this part, see methods/loftq.py and methods/pissa.py; for everything else it belongs to the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafit.errors import ConfigError
from lorafit.native.quantised import Quantised, dequantise
from lorafit.native.svd import leading

FEWEST = {"loftq": 1, "pissa": 0}  # iterations, by method
PASSES = (
    4  # of the power method: what codes miss is then within 0.4 % of the exact decomposition's (measured on SmolLM2)
)


@dataclass(frozen=True)
class Start:
    """What codes were made for: a method of FEWEST, its rank, the sites that it adapts, and how thoroughly it was made:
    LoftQ's alternations, or the passes of PiSSA's decomposition (0: exact)."""

    method: str
    r: int
    iterations: int
    targets: tuple[str, ...]
    rank_pattern: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if min([self.r, *(r for _, r in self.rank_pattern)]) < 1:
            raise ConfigError(f"r={self.r}: must be at least 1, also in rank_pattern")
        if self.iterations < FEWEST[self.method]:
            raise ConfigError(
                f"{self.method} with {self.iterations} iterations: must be at least {FEWEST[self.method]}"
            )

    def to_json(self) -> dict[str, Any]:
        """In JSON types."""
        return {**asdict(self), "targets": list(self.targets), "rank_pattern": dict(self.rank_pattern)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Start:
        """The reverse. KeyError, TypeError or ValueError where it isn't one."""
        if values["method"] not in FEWEST:
            raise ValueError(f"unknown method {values['method']!r}")
        return Start(
            values["method"],
            int(values["r"]),
            int(values["iterations"]),
            tuple(values["targets"]),
            tuple(sorted(values["rank_pattern"].items())),
        )

    def __str__(self) -> str:
        return f"{self.method} r={self.r} iterations={self.iterations}"


class Part(NamedTuple):
    """What a method has put beside a weight's codes: a (r, in) and b (out, r), fp32; and the weight's relative error in the
    Frobenius norm, with codes alone as they would be without it (`plain`), and with codes and b·a (`after`)."""

    method: str
    a: Tensor
    b: Tensor
    plain: float
    after: float


@torch.no_grad()
def split(
    weight: Tensor, start: Start, r: int, seed: int, coded: Callable[[Tensor], Quantised]
) -> tuple[Quantised, Part]:
    """A weight (out, in), of any float type, as codes and a part of rank `r` at most. `coded` quantises."""
    q = coded(weight)
    w = weight.float()
    generator = torch.Generator().manual_seed(seed)
    r = min(r, *w.shape)
    rest = w - dequantise(q, torch.float32)
    norm = float(w.norm()) or 1.0
    plain = float(rest.norm()) / norm
    if start.method == "pissa":
        b, a = leading(w, r, start.iterations, generator)
        q = coded(w - b @ a)
        rest = w - dequantise(q, torch.float32)
    else:
        b, a = leading(rest, r, PASSES, generator)
        for _ in range(start.iterations - 1):
            q = coded(w - b @ a)
            rest = w - dequantise(q, torch.float32)
            b, a = leading(rest, r, PASSES, generator)
    return q, Part(start.method, a, b, plain, float((rest - b @ a).norm()) / norm)

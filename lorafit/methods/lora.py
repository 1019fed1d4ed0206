"""LoRA (arXiv 2106.09685): ΔW = s·B·A with s = alpha/r; rsLoRA (arXiv 2312.03732): s = alpha/√r.

A is uniform in ±1/√in and B zero, as PEFT starts them; where inputs are ids, A is zero and B normal, because a row of A is
then met only by its own id. Both are fp32 whatever the base is; they are cast to the activations' type for the product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorafit.errors import ConfigError
from lorafit.methods.base import Matrix, Method


def fresh(site: Matrix, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """a (*lead, r, in) and b (*lead, out, r) of rank r that training starts from; their product is zero."""
    *lead, out, width = site.shape
    a, b = torch.zeros(*lead, r, width), torch.zeros(*lead, out, r)
    if site.lookup:
        b.normal_(generator=generator)
    else:
        a.uniform_(-(width**-0.5), width**-0.5, generator=generator)
    return a, b


def check(r: int, dropout: float) -> None:
    """ConfigError for a rank or a dropout that there can't be."""
    if r < 1:
        raise ConfigError(f"r={r}: must be at least 1")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout={dropout}: must be at least 0 and below 1")


def given(site: Matrix, a: Tensor, b: Tensor) -> LoRA:
    """A LoRA of scale 1 with these factors, a (*lead, r, in) and b (*lead, out, r)."""
    r = a.shape[-2]
    made = LoRA(site, None, r=r, alpha=float(r))
    made.load_state_dict({"a": a, "b": b})
    return made


class LoRA(Method):
    """a (*lead, r, in) and b (*lead, out, r), both trained."""

    about = "low-rank update B·A, the default"
    formula = "(alpha/r)·B·A"
    paper = "2106.09685"

    def __init__(
        self,
        site: Matrix,
        generator: torch.Generator | None = None,
        *,
        r: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        rslora: bool = False,
    ) -> None:
        super().__init__()
        check(r, dropout)
        self.scale = alpha / (r**0.5 if rslora else r)
        self.dropout = dropout
        self.a, self.b = map(nn.Parameter, fresh(site, r, generator))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Its own two matrices. Dropout falls on the input alone, as in the paper."""
        return self.a, self.b, self.scale

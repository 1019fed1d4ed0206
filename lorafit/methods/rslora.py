"""rsLoRA (arXiv 2312.03732): LoRA with s = alpha/√r, so that the gradient of a product of two matrices doesn't shrink as r grows.

That is shown for plain gradient steps. Adam divides the gradient's size out, and there s = alpha/√r makes a step √r times as
large as s = alpha/r: to compare the two, compare them at the same s. The default alpha is the one with which both start
alike at the default r.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorafit.methods.base import Matrix, Method
from lorafit.methods.lora import check, fresh


class RsLoRA(Method):
    """a (*lead, r, in) and b (*lead, out, r), both trained."""

    about = "LoRA with the scale alpha/√r instead of alpha/r"
    formula = "(alpha/√r)·B·A"
    paper = "2312.03732"

    def __init__(
        self,
        site: Matrix,
        generator: torch.Generator | None = None,
        *,
        r: int = 16,
        alpha: float = 8.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check(r, dropout)
        self.scale = alpha / r**0.5
        self.dropout = dropout
        self.a, self.b = map(nn.Parameter, fresh(site, r, generator))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Its own two matrices."""
        return self.a, self.b, self.scale

"""LoRA+ (arXiv 2402.12354): LoRA whose B learns `lr_ratio` times as fast as its A. The setting `lr` is A's rate, as it is in the
paper and in PEFT.

In the first step only B moves, so multiplying its rate alone makes that step as many times larger. Hence the lower default
rate; the ratio is to be tuned together with it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorafit.errors import ConfigError
from lorafit.methods.base import Matrix, Method
from lorafit.methods.lora import check, fresh


class LoRAPlus(Method):
    """a (*lead, r, in) and b (*lead, out, r), both trained. Of an embedding, where A is what begins at zero, A is the faster."""

    about = "LoRA with a larger learning rate for B"
    formula = "(alpha/r)·B·A"
    paper = "2402.12354"
    lr_factor = 0.1  # of four rates the best on SmolLM2 (docs/methods.md)

    def __init__(
        self,
        site: Matrix,
        generator: torch.Generator | None = None,
        *,
        r: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        lr_ratio: float = 16.0,
    ) -> None:
        super().__init__()
        check(r, dropout)
        if lr_ratio <= 0:
            raise ConfigError(f"lr_ratio={lr_ratio}: must be more than 0")
        self.scale = alpha / r
        self.dropout = dropout
        self.a, self.b = map(nn.Parameter, fresh(site, r, generator))
        self.fast = {"a" if site.lookup else "b": lr_ratio}

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Its own two matrices."""
        return self.a, self.b, self.scale

    def lr_scale(self) -> dict[str, float]:
        """Of the matrix that begins at zero."""
        return self.fast

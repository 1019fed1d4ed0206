"""LoftQ (arXiv 2310.08659): LoRA that starts from what a quantised base would lose. Codes and start are made together, see
model/starts.py; here the start is taken over, so that s·B₀·A₀ is the part of the weight that stands beside its codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafit.errors import ConfigError
from lorafit.methods.base import Matrix, Method
from lorafit.methods.lora import fresh
from lorafit.methods.moved import Moved, scale_of


class LoftQ(Method):
    """See Moved. A weight that isn't quantised loses nothing: there B₀ is zero and A₀ random, as LoRA's."""

    about = "LoRA from what quantising lost; needs quant, makes codes of its own"
    formula = "s·(B·A − B₀·A₀), B₀·A₀ the leading part of what quantising lost"
    paper = "2310.08659"
    kinds = frozenset({"linear", "conv1d", "embedding"})  # a base with experts isn't quantised
    codes = "iterations"
    needs_codes = True

    def __init__(
        self,
        site: Matrix,
        generator: torch.Generator | None = None,
        *,
        r: int = 16,
        alpha: float = 16.0,
        iterations: int = 5,
    ) -> None:
        super().__init__()
        self.scale = scale_of(r, alpha)
        if iterations < 1:
            raise ConfigError(f"iterations={iterations}: must be at least 1")
        r, given = min(r, *site.shape[-2:]), site.start("loftq")
        if given is None:
            self.moved = Moved(*fresh(site, r, generator))
            return
        a, b = (part / self.scale**0.5 for part in given)
        if a.shape[0] != r:
            raise ConfigError(f"the base's codes were made for loftq with r={a.shape[0]}, not r={r}")
        self.moved = Moved(a, b)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Of the change."""
        return *self.moved(), self.scale

"""PiSSA (arXiv 2404.02948): LoRA that starts from the weight's leading part, s·B₀·A₀ = U·S·Vᵀ of the r largest singular values.

B₀ = U·√(S/s) and A₀ = √(S/s)·Vᵀ with s = alpha/r, so the start is the same for any alpha. On a quantised base whose codes
were made for it (QPiSSA), the part is the one that was kept out of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafit.errors import ConfigError
from lorafit.methods.base import Matrix, Method
from lorafit.methods.moved import Moved, scale_of
from lorafit.native.svd import leading


class PiSSA(Method):
    """See Moved. The rank is at most that of the weight."""

    about = "LoRA from the weight's largest singular values; with quant, codes of the rest"
    formula = "s·(B·A − B₀·A₀), B₀·A₀ the leading part of W"
    paper = "2404.02948"
    lr_factor = (
        0.3  # of 1, 0.3 and 0.1 the best on SmolLM2; a step moves large factors, and the product by as much more
    )
    codes = "niter"

    def __init__(
        self,
        site: Matrix,
        generator: torch.Generator | None = None,
        *,
        r: int = 16,
        alpha: float = 16.0,
        niter: int = 4,
    ) -> None:
        super().__init__()
        self.scale = scale_of(r, alpha)
        if niter < 0:
            raise ConfigError(f"niter={niter}: must be at least 0, which is the exact decomposition")
        r = min(r, *site.shape[-2:])
        given = site.start("pissa")
        if given is not None and len(given[0]) == r:
            a, b = given
        else:
            b, a = leading(site.weight(), r, niter, generator)
        self.moved = Moved(a / self.scale**0.5, b / self.scale**0.5)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Of the change."""
        return *self.moved(), self.scale

"""OLoRA (arXiv 2406.01775): LoRA that starts from W = Q·R, with B₀ the first r columns of Q, which are orthonormal, and A₀ the
first r rows of R. As s·B₀·A₀ is to be that part of W, A₀ is divided by s = alpha/r; the paper has no s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafit.methods.base import Matrix, Method
from lorafit.methods.moved import Moved, scale_of


class OLoRA(Method):
    """See Moved. The rank is at most that of the weight."""

    about = "LoRA from the first columns of the weight's QR decomposition"
    formula = "s·(B·A − B₀·A₀), B₀·A₀ the first r parts of W = Q·R"
    paper = "2406.01775"
    lr_factor = 0.1  # of 1, 0.3 and 0.1 the best on SmolLM2: A₀ is larger still than PiSSA's

    def __init__(
        self,
        site: Matrix,
        generator: torch.Generator | None = None,
        *,
        r: int = 16,
        alpha: float = 16.0,
    ) -> None:
        super().__init__()
        self.scale = scale_of(r, alpha)
        w = site.weight().float()
        # Q's first columns depend on W's first columns alone, and R's first rows are their products with W.
        q = torch.linalg.qr(w[..., : min(r, *w.shape[-2:])]).Q
        self.moved = Moved((q.mT @ w) / self.scale, q.contiguous())

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Of the change."""
        return *self.moved(), self.scale

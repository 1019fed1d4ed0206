"""Full fine-tuning, as an adapter: one dense ΔW a weight, so that the base stays shared and unedited here too.

ΔW is fp32 and is multiplied apart from W: small updates that a bf16 weight would swallow are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorafit.methods.base import Matrix, Method


class Full(Method):
    """delta (*lead, out, in), trained, at `rate` times the adapter's learning rate: not 1 where it stands in another method's
    adapter."""

    about = "every number of the chosen weights, for comparison; norm gains and biases stay as they are"
    formula = "ΔW"
    targets = ("all",)
    lr_factor = 0.1  # the best rate of full fine-tuning is about a tenth of LoRA's (Schulman et al. 2025)

    rate: float = 1.0

    def __init__(self, site: Matrix, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(site.shape))

    def delta_weight(self, w: Tensor) -> Tensor:
        """The delta itself."""
        return self.delta

    def lr_scale(self) -> dict[str, float]:
        """Of the one parameter."""
        return {"delta": self.rate}


def beside(site: Matrix, kind: type[Method]) -> Full:
    """A layer in an adapter of another method: it learns at its own default rate, not at that method's."""
    layer = Full(site)
    layer.rate = Full.lr_factor / kind.lr_factor
    return layer

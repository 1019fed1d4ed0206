"""(IA)³ (arXiv 2205.05638): a learned factor on each output of keys and values, and on each input of the feed-forward's last
product. Nothing else is trained. As in PEFT, the factors are stored as they are, and an output's bias is scaled with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lorafit.methods.base import MM, Matrix, Method, Scaled
from lorafit.model.sites import matches

FEEDFORWARD = ["down_proj"]


class IA3(Method):
    """scale, (in,) at the sites that `feedforward` names and (out,) at all others; trained, one at first."""

    about = "a factor on each key and value, and on each input of down_proj"
    formula = "(l − 1)·W: rows, or columns at down_proj"
    paper = "2205.05638"
    kinds = frozenset({"linear", "conv1d"})
    targets = ("k_proj", "v_proj", "down_proj")
    lr_factor = 10.0  # at a width of 4096 then 2e-3, near the 3e-3 of the paper

    def __init__(
        self, site: Matrix, generator: torch.Generator | None = None, *, feedforward: list[str] = FEEDFORWARD
    ) -> None:
        super().__init__()
        self.inputs = any(matches(name, site.path) for name in feedforward)
        self.scale = nn.Parameter(torch.ones(site.shape[-1 if self.inputs else -2]))

    def delta_weight(self, w: Tensor) -> Tensor:
        """W's columns, or rows, times what the factors are off one."""
        gain = self.scale - 1
        return w.float() * (gain if self.inputs else gain[:, None])

    def delta_bias(self, bias: Tensor) -> Tensor | None:
        """As W's rows."""
        return None if self.inputs else bias.float() * (self.scale - 1)

    def forward(self, x: Tensor, y: Tensor, mm: MM, weight: Callable[[], Tensor]) -> Tensor:
        """Of inputs it takes another product with W."""
        gain = (self.scale - 1).to(y.dtype)
        return mm(x * gain, weight()) if self.inputs else y * gain

    def scaled(self, weight: Callable[[], Tensor]) -> Scaled | None:
        """Of outputs it takes none."""
        return None if self.inputs else Scaled(gain=self.scale - 1)

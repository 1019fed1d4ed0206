"""A low-rank pair that doesn't start from zero: B·A − B₀·A₀, where training moves A and B away from A₀ and B₀.

Papers take B₀·A₀ out of the base and train what is left. Here the base is shared, so what training changed is added to it
instead, which is the same sum: the base is as it was, a fresh pair adds exactly nothing, and what is stored is a plain LoRA
of twice the rank. Kept are A₀, B₀ and the changes a = A − A₀, b = B − B₀, because

    B·A − B₀·A₀ = [B₀ + b, b] · [a; A₀]

has no difference of large numbers in it: in 16 bits, small changes aren't rounded away beside the numbers they changed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorafit.errors import ConfigError


class Moved(nn.Module):
    """a (*lead, r, in) and b (*lead, out, r), trained, zero at first; a0 and b0, which are theirs to move away from."""

    a0: Tensor
    b0: Tensor

    def __init__(self, a0: Tensor, b0: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros_like(a0)), nn.Parameter(torch.zeros_like(b0))
        self.register_buffer("a0", a0)
        self.register_buffer("b0", b0)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The two factors of the change, of rank 2r."""
        return torch.cat([self.a, self.a0], -2), torch.cat([self.b0 + self.b, self.b], -1)


def scale_of(r: int, alpha: float) -> float:
    """alpha / r. ConfigError where nothing could be divided by it."""
    if r < 1:
        raise ConfigError(f"r={r}: must be at least 1")
    if alpha <= 0:
        raise ConfigError(f"alpha={alpha}: must be more than 0")
    return alpha / r

"""y + gain·(y − apart), column by column: what turns a product that is there already into that of a weight with scaled rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rescale(y: Tensor, gain: Tensor, apart: Tensor | None = None) -> Tensor:
    """y (n, out), gain (out,) fp32, apart (out,), which has no gradient. Exactly y where gain is zero."""
    made: Tensor = _Rescale.apply(y, gain, apart)  # type: ignore[no-untyped-call]
    return made


def plain_rescale(y: Tensor, gain: Tensor, apart: Tensor | None = None) -> Tensor:
    """The twin, with torch's own gradients."""
    return y + gain.to(y.dtype) * (y if apart is None else y - apart)


class _Rescale(torch.autograd.Function):
    """Keeps y − apart alone. Sums are made in fp32 and rounded once: asked for in fp32 they take five times as long."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gain: Tensor, apart: Tensor | None) -> Tensor:
        bare = y if apart is None else y - apart
        ctx.save_for_backward(bare, gain)
        return torch.addcmul(y, bare, gain.to(y.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (dz,) = grads
        bare, gain = ctx.saved_tensors
        return torch.addcmul(dz, dz, gain.to(dz.dtype)), (dz * bare).sum(0).to(gain.dtype), None

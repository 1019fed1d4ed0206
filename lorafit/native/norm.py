"""RMS norm (arXiv 1910.07467), with the addition of a residual that comes before it in a decoder layer.

The gain is frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafit.native.kernel import Kernel, usable, wide

_forward = Kernel("rms_norm", "ppppppiif")
_again = Kernel("rms_norm_again", "ppppii")
_backward = Kernel("rms_norm_backward", "ppppppii")


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x (..., width) divided by its root mean square, times gain (width,)."""
    if usable(x, gain):
        out: Tensor = _RmsNorm.apply(x, gain, eps)  # type: ignore[no-untyped-call]
        return out
    return plain_rms_norm(x, gain, eps)


def add_rms_norm(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + y, its norm, both (n, width), and 1/rms (n,) fp32, with which `again` makes the norm once more."""
    if usable(x, y, gain):
        made: tuple[Tensor, Tensor, Tensor] = _AddRmsNorm.apply(x, y, gain, eps)  # type: ignore[no-untyped-call]
        return made
    both = x + y
    rstd = (wide(both.detach()).square().mean(-1) + eps).rsqrt()
    return both, plain_rms_norm(both, gain, eps), rstd


def again(x: Tensor, gain: Tensor, rstd: Tensor) -> Tensor:
    """The norm of x (n, width) from its 1/rms (n,), without a gradient."""
    x = x.detach()
    if usable(x, gain):
        out = torch.empty_like(x)
        _again(x.dtype, x, gain, rstd, out, x.shape[0], x.shape[1])
        return out
    return (wide(x) * rstd[:, None] * wide(gain)).to(x.dtype)


def plain_rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The twin, in torch's own operations."""
    broad = wide(x)
    return (broad * (broad.square().mean(-1, keepdim=True) + eps).rsqrt() * wide(gain)).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1]
        out, rstd = torch.empty_like(x), x.new_empty(x.numel() // width, dtype=torch.float32)
        _forward(x.dtype, x, None, gain, None, out, rstd, len(rstd), width, eps)
        ctx.save_for_backward(x, gain, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gradient(ctx, grads[0], None), None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, ...]:
        x, y = x.contiguous(), y.contiguous()
        both, out = torch.empty_like(x), torch.empty_like(x)
        rstd = x.new_empty(x.shape[0], dtype=torch.float32)
        _forward(x.dtype, x, y, gain, both, out, rstd, x.shape[0], x.shape[1], eps)
        ctx.save_for_backward(both, gain, rstd)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        return both, out, rstd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        past, through = grads[0], grads[1]
        dx = past if through is None else _gradient(ctx, through, past)
        return dx, dx, None, None


def _gradient(ctx: Any, dout: Tensor, rest: Tensor | None) -> Tensor:
    x, gain, rstd = ctx.saved_tensors
    dout = dout.contiguous()
    rest = rest if rest is None else rest.contiguous()
    dx = torch.empty_like(x)
    _backward(x.dtype, dout, rest, x, gain, rstd, dx, len(rstd), x.shape[-1])
    return dx

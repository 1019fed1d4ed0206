"""Rotary position embedding (arXiv 2104.09864) of packed tokens, the halves of a head apart as Hugging Face stores them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafit.native.kernel import Kernel, usable

_rotate = Kernel("rotary", "pipppiiif")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (n, heads, dim) turned by its tokens' angles: cos and sin (n, dim), fp32 (fp64 for an fp64 x)."""
    if usable(x):
        out: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
        return out
    return plain_rotate(x, cos, sin)


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The twin, in torch's own operations."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos[:, None] + torch.cat((-right, left), dim=-1) * sin[:, None]).to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, turn: float) -> Tensor:
    n, heads, dim = x.shape
    if x.stride(2) != 1 or x.stride(1) != dim:
        x = x.contiguous()
    out = torch.empty(n, heads, dim, dtype=x.dtype)
    _rotate(x.dtype, x, x.stride(0), cos, sin, out, n, heads, dim, turn)
    return out

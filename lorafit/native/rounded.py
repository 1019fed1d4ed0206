"""Products whose both sides are 8-bit whole numbers: a weight's codes, times an input that is rounded to codes of its own.

Forward and for the input's gradient, as SwitchBack (arXiv 2304.13013, algorithm 1) has it: each row of what is multiplied
has a scale, and the gradient of rounding is that of the number rounded. In language models a few numbers of a row are far
larger than the others, which then have few codes left (2208.07339). So both sides are turned first by a Hadamard matrix, in
blocks of 32 numbers, as QuaRot does (2404.00456): a product is the same turned, and no number stands out. Weights are turned
on both sides before they get their codes (`turned`), so gradients are too; results are turned back. A row's result depends
on no other row.

`codes.h` does this in kernels; here it is in torch's operations.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

from lorafit.native.quantised import ROUNDED, Quantised, turned

MOST = 127.0


def rounds(weight: Tensor | Quantised) -> TypeGuard[Quantised]:
    """Products with this weight round what they are multiplied with."""
    return isinstance(weight, Quantised) and weight.kind == ROUNDED


def codes_of(x: Tensor, by: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 in fp32 for x (n, k), turned and times `by` (k,), and what one stands for in each row
    (n, 1). Of a row with a number that isn't finite neither is that."""
    x = turned(x.float())
    x = x if by is None else x * by
    most = x.abs().amax(1, keepdim=True)
    return (x * torch.where(most > 1e-30, MOST / most, torch.zeros_like(most))).round(), most * (1 / MOST)


def across(x: Tensor, q: Quantised) -> Tensor:
    """x (n, in) times the weight (out, in), transposed: (n, out), in x's type."""
    codes, scale = codes_of(x)
    return turned(codes @ q.codes.t().float() * (q.absmax * (1 / MOST) * scale)).to(x.dtype)


def along(dy: Tensor, q: Quantised) -> Tensor:
    """dy (n, out) times the weight: (n, in), in dy's type. The scales of the weight's rows are dy's before it is rounded."""
    codes, scale = codes_of(dy, q.absmax * (1 / MOST))
    return turned(codes @ q.codes.float() * scale).to(dy.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Quantised) -> Tensor:
        ctx.q = q
        return across(x, q)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return along(dy, ctx.q), None


def product(x: Tensor, q: Quantised) -> Tensor:
    """`across`, with `along` for its gradient."""
    made: Tensor = _Product.apply(x, q)  # type: ignore[no-untyped-call]
    return made

"""Products whose both sides are 8-bit whole numbers: a weight's codes, times an input that is rounded to codes of its own.

Forward and for the input's gradient, as SwitchBack (arXiv 2304.13013, algorithm 1) has it: the gradient of rounding is that of
the number rounded. In language models a few numbers of a row are far larger than the others, which then have few codes left
(2208.07339). So both sides are turned first by a Hadamard matrix, in blocks of 32 numbers, as QuaRot does (2404.00456): a
product is the same turned, and no number stands out of its block. Blocks still may, most of all in a text's first token: so
what is multiplied has a scale for each 256 numbers of a row. Weights are turned on both sides before they get their codes
(`turned`), so gradients are too; results are turned back. A row's result depends on no other row.

`codes.h` does this in kernels: for bf16 as a part of lowrank.cpp's sums, for fp32 in products of their own. `across`, `along` and
`product` are the twin, in torch's operations.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lorafit.native import build
from lorafit.native.kernel import Kernel
from lorafit.native.quantised import ROUNDED, Quantised, turned

MOST = 127.0
GROUP = 256  # numbers of a row that share a scale; the last of a row may be fewer
DEEP = 64  # the kernels take 64 codes of the inner dimension at a time, and whole panels of 32 columns

_coded_products = Kernel("coded_products", "piiippi")


class _Coded(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p if name in ("weight", "share", "y") else ctypes.c_int64)
        for name in ("weight", "ldw", "across", "share", "y", "ldy", "columns", "more")
    ]


def rounds(weight: Tensor | Quantised) -> TypeGuard[Quantised]:
    """Products with this weight round what they are multiplied with."""
    return isinstance(weight, Quantised) and weight.kind == ROUNDED


def codes_of(x: Tensor, by: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 in fp32 for x (n, k), turned and times `by` (k,), and what one stands for in each group
    (n, groups). Of a row with a number that isn't finite none of these is."""
    x = turned(x.float())
    x = x if by is None else x * by
    groups = x.split(GROUP, 1)
    most = torch.stack([group.abs().amax(1) for group in groups], 1)
    most = most + (most * 0).sum(1, keepdim=True)
    each = torch.where(most > 1e-30, MOST / most, torch.zeros_like(most))
    codes = [(group * each[:, i, None]).round() for i, group in enumerate(groups)]
    return torch.cat(codes, 1), most * (1 / MOST)


def _sums(codes: Tensor, units: Tensor, weight: Tensor) -> Tensor:
    """Codes (n, k) times a weight's (k, columns), group by group."""
    parts = zip(codes.split(GROUP, 1), units.unbind(1), weight.split(GROUP), strict=True)
    return torch.stack([(group @ part) * unit[:, None] for group, unit, part in parts]).sum(0)


def across(x: Tensor, q: Quantised) -> Tensor:
    """x (n, in) times the weight (out, in), transposed: (n, out), in x's type."""
    return turned(_sums(*codes_of(x), q.codes.t().float()) * (q.absmax * (1 / MOST))).to(x.dtype)


def along(dy: Tensor, q: Quantised) -> Tensor:
    """dy (n, out) times the weight: (n, in), in dy's type. The scales of the weight's rows are dy's before it is rounded."""
    return turned(_sums(*codes_of(dy, q.absmax * (1 / MOST)), q.codes.float())).to(dy.dtype)


def across_all(x: Tensor, weights: Sequence[Quantised]) -> list[Tensor]:
    """`across` for weights that share an input, which the kernel rounds once."""
    if not weights or not _takes(x, weights):
        return [across(x, q) for q in weights]
    given = _lines(x)
    made = [given.new_empty(len(x), q.shape[0]) for q in weights]
    _call(given, None, [_coded(q, True, y, False) for q, y in zip(weights, made, strict=True)])
    return [y.to(x.dtype) for y in made]


def along_onto(dy: Tensor, q: Quantised, dx: Tensor | None) -> Tensor:
    """`along`, on top of `dx` (n, in) of dy's type where there is one; that is used up."""
    taken = _takes(dy, [q])
    if not taken or (dx is not None and dx.dtype != torch.float32):
        made = along_onto(dy, q, None) if taken else along(dy, q)
        return made if dx is None else dx.add_(made)
    given = _lines(dy)
    to = given.new_empty(len(dy), q.shape[1]) if dx is None else dx
    _call(given, q.absmax, [_coded(q, False, to, dx is not None)])
    return to.to(dy.dtype)


def _lines(x: Tensor) -> Tensor:
    """x in fp32, each row's numbers side by side."""
    x = x.float()
    return x if x.stride(1) == 1 else x.contiguous()


def suits(q: Quantised) -> bool:
    """The kernels take products with this weight."""
    return all(size % DEEP == 0 for size in q.shape)


def _takes(x: Tensor, weights: Sequence[Quantised]) -> bool:
    return x.device.type == "cpu" and len(x) > 0 and all(map(suits, weights)) and build.multiplies_codes()


def _coded(q: Quantised, across: bool, y: Tensor, more: bool) -> _Coded:
    share = q.absmax.data_ptr() if across else None
    return _Coded(q.codes.data_ptr(), q.codes.stride(0), across, share, y.data_ptr(), y.stride(0), y.shape[1], more)


def _call(x: Tensor, scales: Tensor | None, products: Sequence[_Coded]) -> None:
    given = (_Coded * len(products))(*products)
    _coded_products(x.dtype, x, x.stride(0), *x.shape, scales, ctypes.addressof(given), len(products))


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

"""Sums of matrix products, accumulated in fp32 and rounded once: one pass over the result instead of one a product."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafit.native.build import has_tiles
from lorafit.native.kernel import Kernel

DEEP = 32  # the kernel takes 32 numbers of the inner dimension at a time

_sum_products = Kernel("sum_products", "piiipip")


@dataclass(frozen=True)
class Part:
    """a (rows, k) times b: (columns, k) transposed where `across`, (k, columns) as it is otherwise."""

    a: Tensor
    b: Tensor
    across: bool = True


class _CPart(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("a", "lda", "b", "ldb", "k", "across", "first", "last")]


def native(x: Tensor, *depths: int) -> bool:
    """The kernel takes products of x's number type and place with these inner dimensions."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and all(k % DEEP == 0 for k in depths) and has_tiles()


def sum_products(parts: Sequence[Part], *, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Σ a·b (+ bias (columns,)), into `out` (which may be a slice of columns) or a new tensor."""
    first = parts[0]
    rows, columns = first.a.shape[0], first.b.shape[0 if first.across else 1]
    if not native(first.a, *(part.a.shape[1] for part in parts)):
        return plain_sum_products(parts, out=out, bias=bias)
    c = torch.empty(rows, columns, dtype=first.a.dtype) if out is None else out
    sides = [(lines(part.a), lines(part.b)) for part in parts]
    given = (_CPart * len(parts))(
        *(
            _CPart(a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), a.shape[1], part.across, 0, rows)
            for part, (a, b) in zip(parts, sides, strict=True)
        )
    )
    _sum_products(
        c.dtype,
        ctypes.addressof(given),
        len(parts),
        rows,
        columns,
        c,
        c.stride(0),
        bias,
    )
    return c


def plain_sum_products(parts: Sequence[Part], *, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The twin, in torch's own operations."""
    sides = [(part.a, part.b.t() if part.across else part.b) for part in parts]
    total = sides[0][0] @ sides[0][1] if out is None else torch.mm(*sides[0], out=out)
    for a, b in sides[1:]:
        total.addmm_(a, b)
    return total if bias is None else total.add_(bias)


def lines(x: Tensor) -> Tensor:
    """x (rows, columns), or a copy, with each row's numbers side by side, as the kernels take it."""
    return x if x.stride(1) == 1 else x.contiguous()

"""Frozen products that share an input, each with a low-rank addition, as one function of autograd.

y_i = x·W_iᵀ + bias_i + s_i (x·A_iᵀ)·B_iᵀ. The A's are one thin product; each base product and its addition are one sum;
the gradient for x is one sum over all of them; x is kept once, or not at all where the caller can make it again.
`_Tiled` is that in two calls of C++ kernels, `_Composed` in torch's operations; `plain_products` says what both compute.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafit.native.gemm import DEEP, lines, native
from lorafit.native.kernel import Kernel, wide
from lorafit.native.quantised import Quantised, dequantise, dequantise_all

_forward = Kernel("low_rank_forward", "p")
_backward = Kernel("low_rank_backward", "pp")


@dataclass(frozen=True)
class LowRank:
    """The addition scale·b·a to a weight: a (r, in), b (out, r), trained, of any float type."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Frozen:
    """A weight that isn't trained: (out, in) where `across`, (in, out) as GPT-2 stores it otherwise; bias (out,). A quantised
    one is (out, in); its numbers are made for each product and gone after it. `low` is a part of the weight kept apart."""

    weight: Tensor | Quantised
    bias: Tensor | None = None
    across: bool = True
    low: LowRank | None = None

    def suits(self, dtype: torch.dtype) -> bool:
        """Its numbers are of this type, and those of a row side by side."""
        w = self.weight
        return isinstance(w, Quantised) or (w.dtype == dtype and w.stride(1) == 1)


@dataclass(frozen=True)
class Remake:
    """How to make an input once more in the backward: `make(*tensors)`, tensors that somebody else keeps anyway."""

    make: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def products(
    x: Tensor, frozen: Sequence[Frozen], added: Sequence[LowRank | None], remake: Remake | None = None
) -> tuple[Tensor, ...]:
    """x (n, in) through each weight: (n, out_i). With `remake`, x isn't kept for the backward."""
    added = [_joined(base.low, low) for base, low in zip(frozen, added, strict=True)]
    trained = [t for low in added if low is not None for t in (low.a, low.b)]
    scales = tuple(None if low is None else low.scale for low in added)
    function = _Tiled if _takes(x, frozen, trained) else _Composed
    made: tuple[Tensor, ...] = function.apply(x, tuple(frozen), scales, remake, *trained)  # type: ignore[no-untyped-call]
    return made


def _joined(low: LowRank | None, other: LowRank | None) -> LowRank | None:
    """Both additions as one."""
    if low is None or other is None:
        return low or other
    return LowRank(torch.cat([low.a, other.a]), torch.cat([low.b * low.scale, other.b * other.scale], 1), 1.0)


def plain_products(x: Tensor, frozen: Sequence[Frozen], added: Sequence[LowRank | None]) -> tuple[Tensor, ...]:
    """The twin, in torch's own operations and torch's own gradients."""
    made = []
    for base, low in zip(frozen, added, strict=True):
        w = base.weight if isinstance(base.weight, Tensor) else dequantise(base.weight, x.dtype)
        y = x @ (w.t() if base.across else w)
        y = y if base.bias is None else y + base.bias
        for part in (base.low, low):
            if part is not None:
                y = y + (x @ part.a.t().to(x.dtype)) @ part.b.t().to(x.dtype) * part.scale
        made.append(y)
    return tuple(made)


def _numbers(frozen: Sequence[Frozen], dtype: torch.dtype) -> list[Tensor]:
    """The weights as tensors; those that have to be made, of `dtype`, are there until the next call."""
    made = iter(dequantise_all([base.weight for base in frozen if isinstance(base.weight, Quantised)], dtype))
    return [base.weight if isinstance(base.weight, Tensor) else next(made) for base in frozen]


def _paired(scales: Sequence[float | None], trained: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, float] | None]:
    """(a, b, scale) of each product that has an addition."""
    given = iter(trained)
    return [None if scale is None else (next(given), next(given), scale) for scale in scales]


def _typed(found: Sequence[Tensor | None], trained: Sequence[Tensor]) -> list[Tensor | None]:
    return [g if g is None else g.to(t.dtype) for g, t in zip(found, trained, strict=True)]


class _Composed(torch.autograd.Function):
    """In torch's operations, in x's number type."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: tuple[Frozen, ...],
        scales: tuple[float | None, ...],
        remake: Remake | None,
        *trained: Tensor,
    ) -> tuple[Tensor, ...]:
        pairs = _paired(scales, trained)
        stacked = torch.cat([pair[0] for pair in pairs if pair]).to(x.dtype) if trained else None
        thin = [] if stacked is None else list((x @ stacked.t()).split([pair[0].shape[0] for pair in pairs if pair], 1))
        made, xas = [], iter(thin)
        for base, pair in zip(frozen, pairs, strict=True):
            (weight,) = _numbers([base], x.dtype)
            weight = weight.t() if base.across else weight
            y = x @ weight if base.bias is None else torch.addmm(base.bias, x, weight)
            made.append(y if pair is None else y.addmm_(next(xas), (pair[1] * pair[2]).to(x.dtype).t()))
        ctx.frozen, ctx.scales, ctx.make = frozen, scales, remake.make if remake is not None else lambda x: x
        ctx.set_materialize_grads(False)
        if trained:
            kept = remake.tensors if remake is not None else (x,)
            ctx.sizes = (len(trained), len(thin))
            ctx.save_for_backward(*trained, *thin, *kept)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        trained: Sequence[Tensor] = ()
        thin: Iterator[Tensor] = iter(())
        x: Tensor | None = None
        if saved := ctx.saved_tensors:  # asked for once: checkpointing computes them anew for every asking
            trainables, thins = ctx.sizes
            trained, thin = saved[:trainables], iter(saved[trainables : trainables + thins])
            x = ctx.make(*saved[trainables + thins :])
        dx: Tensor | None = None
        found: list[Tensor | None] = []
        for dy, base, pair in zip(grads, ctx.frozen, _paired(ctx.scales, trained), strict=True):
            xa = next(thin) if pair is not None else None
            if dy is None:
                found += [] if pair is None else [None, None]
                continue
            if ctx.needs_input_grad[0]:
                (weight,) = _numbers([base], dy.dtype)
                weight = weight if base.across else weight.t()
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            if pair is not None and xa is not None and x is not None:
                a, b, scale = pair
                dxa = dy @ (b * scale).to(dy.dtype)
                found += [wide(dxa.t() @ x), wide(dy.t() @ xa) * scale]
                dx = dx if dx is None else dx.addmm_(dxa, a.to(dy.dtype))
        return dx, None, None, None, *_typed(found, trained)


class _Low(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p if name in ("weight", "bias", "a", "b", "y", "da", "db") else ctypes.c_int64)
            for name in ("weight", "ldw", "across", "out", "bias", "a", "b", "r", "y", "ldy", "da", "db")
        ),
        ("scale", ctypes.c_double),
    ]


class _Group(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p if name in ("lows", "x", "xa", "thin") else ctypes.c_int64)
        for name in ("lows", "count", "x", "ldx", "rows", "in", "xa", "width", "thin")
    ]


def _takes(x: Tensor, frozen: Sequence[Frozen], trained: Sequence[Tensor]) -> bool:
    """The kernels take these: whole tiles, and fp32 additions whose rows lie one after another."""
    sizes = {size for base in frozen for size in base.weight.shape}
    return (
        native(x, *sizes)
        and len(x) > 0
        and all(base.suits(x.dtype) for base in frozen)
        and all(t.dtype == torch.float32 and t.is_contiguous() for t in trained)
    )


def _low(
    base: Frozen,
    weight: Tensor,
    pair: tuple[Tensor, Tensor, float] | None,
    y: Tensor | None,
    grads: Sequence[Tensor] = (),
) -> _Low:
    """One product as the kernels take it; y its result, or what arrives in the backward; grads those of a and b. Whoever calls
    keeps the weight's numbers until the kernel is done."""
    bias = base.bias
    out = weight.shape[0 if base.across else 1]
    low = _Low(weight.data_ptr(), weight.stride(0), base.across, out, None if bias is None else bias.data_ptr())
    if pair is not None:
        low.a, low.b, low.r, low.scale = pair[0].data_ptr(), pair[1].data_ptr(), pair[0].shape[0], pair[2]
    if y is not None:
        low.y, low.ldy = y.data_ptr(), y.stride(0)
    if grads:
        low.da, low.db = (g.data_ptr() for g in grads)
    return low


def _call(kernel: Kernel, lows: Any, x: Tensor, shape: tuple[int, int], xa: Tensor, thin: Tensor, *more: Any) -> None:
    """`shape` is x's (rows, in), also where x isn't there because nothing is added to its products."""
    first = (ctypes.addressof(lows), len(lows), x.data_ptr(), x.stride(0), *shape)
    group = _Group(*first, xa.data_ptr(), xa.shape[1], thin.data_ptr())
    kernel(x.dtype, ctypes.addressof(group), *more)


def _packed(lows: Iterable[_Low], inner: int) -> tuple[int, int]:
    """How many columns x·Aᵀ has, all additions side by side, and how many numbers the A's and B's are as they are packed."""
    start, width, room = 0, 0, 0
    for low in lows:
        span = -(-low.r // DEEP) * DEEP
        width, start, room = max(width, start + span), start + low.r, room + low.out * span
    width = -(-width // DEEP) * DEEP
    return width, width * inner + room


class _Tiled(torch.autograd.Function):
    """In one call of a kernel each way."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: tuple[Frozen, ...],
        scales: tuple[float | None, ...],
        remake: Remake | None,
        *trained: Tensor,
    ) -> tuple[Tensor, ...]:
        x, pairs = lines(x), _paired(scales, trained)
        made = [x.new_empty(len(x), base.weight.shape[0 if base.across else 1]) for base in frozen]
        weights = _numbers(frozen, x.dtype)
        lows = (_Low * len(made))(*map(_low, frozen, weights, pairs, made))
        width, thin = _packed(lows, x.shape[1])
        xa = x.new_empty(len(x), width)
        _call(_forward, lows, x, (len(x), x.shape[1]), xa, x.new_empty(thin))
        ctx.frozen, ctx.scales = frozen, scales
        ctx.set_materialize_grads(False)
        if trained:
            ctx.make = remake.make if remake is not None else lambda x: x
            ctx.save_for_backward(xa, *trained, *(remake.tensors if remake is not None else (x,)))
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dys = [None if dy is None else lines(dy) for dy in grads]
        some = next((dy for dy in dys if dy is not None), None)
        if some is None:
            return (None,) * len(ctx.needs_input_grad)
        width = ctx.frozen[0].weight.shape[1 if ctx.frozen[0].across else 0]
        trained: Sequence[Tensor] = ()
        if saved := ctx.saved_tensors:
            trainables = 2 * sum(scale is not None for scale in ctx.scales)
            xa, *others = saved
            trained, x = others[:trainables], lines(ctx.make(*others[trainables:]))
        else:
            x, xa = some.new_empty(len(some), 0), some.new_empty(0, 0)
        pairs, lows = _paired(ctx.scales, trained), (_Low * len(dys))()
        found: list[Tensor | None] = []
        weights = _numbers(ctx.frozen, some.dtype)
        for i, (base, pair, dy) in enumerate(zip(ctx.frozen, pairs, dys, strict=True)):
            made = [] if pair is None or dy is None else [torch.empty_like(pair[0]), torch.empty_like(pair[1])]
            lows[i] = _low(base, weights[i], pair, dy, made)
            found += [None, None] if pair is not None and dy is None else made
        dx = some.new_empty(len(some), width) if ctx.needs_input_grad[0] else None
        thin = some.new_empty(_packed(lows, width)[1] if saved else 0)
        _call(_backward, lows, x, (len(some), width), xa, thin, dx)
        return dx, None, None, None, *found

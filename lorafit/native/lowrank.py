"""Frozen products that share an input, each with low-rank additions, as one function of autograd.

y_i = x·W_iᵀ + bias_i + s_i (x·A_iᵀ)·B_iᵀ, where the rows of x may lie in runs, each with A's and B's of its own: the base's
products are those of all rows, and nothing is padded to the largest rank. The A's of a run are one thin product; each base
product and its additions are one sum; the gradient for x is one sum over all of them; x is kept once, or not at all where
the caller can make it again. `_Tiled` is that in two calls of C++ kernels, `_Composed` in torch's operations;
`plain_products` says what both compute.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafit.native import rounded
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
        """Its numbers are of this type, and those of a row side by side; or its codes are so many as the kernel takes."""
        w = self.weight
        if isinstance(w, Tensor):
            return w.dtype == dtype and w.stride(1) == 1
        return not rounded.rounds(w) or rounded.suits(w)


@dataclass(frozen=True)
class Remake:
    """How to make an input once more in the backward: `make(*tensors)`, tensors that somebody else keeps anyway."""

    make: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Run:
    """So many rows, one after another, and the addition to each product (None: nothing) for them."""

    rows: int
    added: Sequence[LowRank | None]


def products(
    x: Tensor, frozen: Sequence[Frozen], runs: Sequence[Run], remake: Remake | None = None
) -> tuple[Tensor, ...]:
    """x (n, in) through each weight: (n, out_i). The runs have all rows. With `remake`, x isn't kept for the backward."""
    lows = [_joined(base.low, low) for run in runs for base, low in zip(frozen, run.added, strict=True)]
    trained = [t for low in lows if low is not None for t in (low.a, low.b)]
    shape = Shape(tuple(run.rows for run in runs), tuple(None if low is None else low.scale for low in lows))
    function = _Tiled if _takes(x, frozen, trained) else _Composed
    made: tuple[Tensor, ...] = function.apply(x, tuple(frozen), shape, remake, *trained)  # type: ignore[no-untyped-call]
    return made


def _joined(low: LowRank | None, other: LowRank | None) -> LowRank | None:
    """Both additions as one."""
    if low is None or other is None:
        return low or other
    return LowRank(torch.cat([low.a, other.a]), torch.cat([low.b * low.scale, other.b * other.scale], 1), 1.0)


def plain_products(x: Tensor, frozen: Sequence[Frozen], runs: Sequence[Run]) -> tuple[Tensor, ...]:
    """The twin, in torch's own operations and torch's own gradients."""
    made = []
    for i, base in enumerate(frozen):
        if rounded.rounds(base.weight):
            y = rounded.product(x, base.weight)
        else:
            w = base.weight if isinstance(base.weight, Tensor) else dequantise(base.weight, x.dtype)
            y = x @ (w.t() if base.across else w)
        y = y if base.bias is None else y + base.bias
        rows = []
        for xs, ys, run in zip(*(t.split([run.rows for run in runs]) for t in (x, y)), runs, strict=True):
            for part in (base.low, run.added[i]):
                if part is not None:
                    ys = ys + (xs @ part.a.t().to(x.dtype)) @ part.b.t().to(x.dtype) * part.scale
            rows.append(ys)
        made.append(torch.cat(rows))
    return tuple(made)


class Shape(NamedTuple):
    """How many rows each run has, and the scale of each addition, run by run; None for none."""

    rows: tuple[int, ...]
    scales: tuple[float | None, ...]

    def paired(self, trained: Sequence[Tensor]) -> list[Pair]:
        """(a, b, scale) of each addition."""
        given = iter(trained)
        return [None if scale is None else (next(given), next(given), scale) for scale in self.scales]


Pair = tuple[Tensor, Tensor, float] | None


def _numbers(frozen: Sequence[Frozen], dtype: torch.dtype) -> list[Tensor]:
    """The weights as tensors; those that have to be made, of `dtype`, are there until the next call. Codes where products are
    of codes."""
    weights = [base.weight for base in frozen]
    made = iter(dequantise_all([w for w in weights if isinstance(w, Quantised) and not rounded.rounds(w)], dtype))
    return [w if isinstance(w, Tensor) else w.codes if rounded.rounds(w) else next(made) for w in weights]


def _through(x: Tensor, frozen: Sequence[Frozen]) -> list[Tensor]:
    """x times each weight, and the bias."""
    coded = iter(rounded.across_all(x, [base.weight for base in frozen if rounded.rounds(base.weight)]))
    made = []
    for base in frozen:
        if rounded.rounds(base.weight):
            y = next(coded)
            made.append(y if base.bias is None else y.add_(base.bias))
            continue
        (weight,) = _numbers([base], x.dtype)
        weight = weight.t() if base.across else weight
        made.append(x @ weight if base.bias is None else torch.addmm(base.bias, x, weight))
    return made


def _back(dy: Tensor, base: Frozen, dx: Tensor | None) -> Tensor:
    """What arrives at the weight's input, on top of `dx`."""
    if rounded.rounds(base.weight):
        return rounded.along_onto(dy, base.weight, dx)
    (weight,) = _numbers([base], dy.dtype)
    weight = weight if base.across else weight.t()
    return dy @ weight if dx is None else dx.addmm_(dy, weight)


def _typed(found: Sequence[Tensor | None], trained: Sequence[Tensor]) -> list[Tensor | None]:
    return [g if g is None else g.to(t.dtype) for g, t in zip(found, trained, strict=True)]


class _Composed(torch.autograd.Function):
    """In torch's operations, in x's number type."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen: tuple[Frozen, ...], shape: Shape, remake: Remake | None, *trained: Tensor
    ) -> tuple[Tensor, ...]:
        pairs, count = shape.paired(trained), len(frozen)
        made = _through(x, frozen)
        thin, at = [], 0
        for number, rows in enumerate(shape.rows):
            own = pairs[number * count : (number + 1) * count]
            if given := [pair for pair in own if pair is not None]:
                stacked = torch.cat([pair[0] for pair in given]).to(x.dtype)
                xas = (x[at : at + rows] @ stacked.t()).split([pair[0].shape[0] for pair in given], 1)
                thin += xas
                for y, (_, b, scale), xa in zip(_having(made, own), given, xas, strict=True):
                    y[at : at + rows].addmm_(xa, (b * scale).to(x.dtype).t())
            at += rows
        ctx.frozen, ctx.shape, ctx.make = frozen, shape, remake.make if remake is not None else lambda x: x
        ctx.set_materialize_grads(False)
        if trained:
            kept = remake.tensors if remake is not None else (x,)
            ctx.sizes = (len(trained), len(thin))
            ctx.save_for_backward(*trained, *thin, *kept)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        shape, count = ctx.shape, len(ctx.frozen)
        trained: Sequence[Tensor] = ()
        thin: Iterator[Tensor] = iter(())
        x: Tensor | None = None
        if saved := ctx.saved_tensors:  # asked for once: checkpointing computes them anew for every asking
            trainables, thins = ctx.sizes
            trained, thin = saved[:trainables], iter(saved[trainables : trainables + thins])
            x = ctx.make(*saved[trainables + thins :])
        dx: Tensor | None = None
        for dy, base in zip(grads, ctx.frozen, strict=True):
            if dy is not None and ctx.needs_input_grad[0]:
                dx = _back(dy, base, dx)
        found: list[Tensor | None] = []
        at, pairs = 0, iter(shape.paired(trained))
        for rows in shape.rows:
            own = slice(at, at + rows)
            for dy, pair in zip(grads, islice(pairs, count), strict=True):
                if pair is None:
                    continue
                xa = next(thin)
                if dy is None or x is None:
                    found += [None, None]
                    continue
                a, b, scale = pair
                dxa = dy[own] @ (b * scale).to(dy.dtype)
                found += [wide(dxa.t() @ x[own]), wide(dy[own].t() @ xa) * scale]
                if dx is not None:
                    dx[own].addmm_(dxa, a.to(dy.dtype))
            at += rows
        return dx, None, None, None, *_typed(found, trained)


def _having(things: Iterable[Tensor], pairs: Iterable[Pair]) -> list[Tensor]:
    return [thing for thing, pair in zip(things, pairs, strict=True) if pair is not None]


def _fields(pointers: str, numbers: str, order: str) -> list[tuple[str, Any]]:
    kinds = dict.fromkeys(pointers.split(), ctypes.c_void_p) | dict.fromkeys(numbers.split(), ctypes.c_int64)
    return [(name, kinds.get(name, ctypes.c_double)) for name in order.split()]


class _Base(ctypes.Structure):
    _fields_ = _fields("weight bias scale y", "ldw across out ldy", "weight ldw across out bias scale y ldy")


class _Low(ctypes.Structure):
    _fields_ = _fields("a b da db", "r", "a b r da db scale")


class _Group(ctypes.Structure):
    _fields_ = _fields("bases lows rows x xa thin", "count runs ldx in", "bases count lows rows runs x ldx in xa thin")


def _takes(x: Tensor, frozen: Sequence[Frozen], trained: Sequence[Tensor]) -> bool:
    """The kernels take these: whole tiles, and fp32 additions whose rows lie one after another."""
    sizes = {size for base in frozen for size in base.weight.shape}
    return (
        native(x, *sizes)
        and len(x) > 0
        and all(base.suits(x.dtype) for base in frozen)
        and all(t.dtype == torch.float32 and t.is_contiguous() for t in trained)
    )


def _base(base: Frozen, weight: Tensor, y: Tensor | None) -> _Base:
    """One product as the kernels take it; y its result, or what arrives in the backward. Whoever calls keeps the weight's numbers
    until the kernel is done."""
    bias = None if base.bias is None else base.bias.data_ptr()
    scale = base.weight.absmax.data_ptr() if rounded.rounds(base.weight) else None
    out = weight.shape[0 if base.across else 1]
    return _Base(weight.data_ptr(), weight.stride(0), base.across, out, bias, scale, *_place(y))


def _place(y: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if y is None else (y.data_ptr(), y.stride(0))


def _low(pair: Pair, da: Tensor | None = None, db: Tensor | None = None) -> _Low:
    """One addition; da and db are where its gradients go."""
    if pair is None:
        return _Low()
    a, b, scale = pair
    places = (None, None) if da is None or db is None else (da.data_ptr(), db.data_ptr())
    return _Low(a.data_ptr(), b.data_ptr(), a.size(0), *places, scale)  # not len, which takes longer than all of this


def _call(kernel: Kernel, bases: Any, lows: Any, shape: Shape, x: Tensor, xa: Tensor, *more: Any) -> None:
    """x (rows, in) may have no rows where nothing is added to its products."""
    rows = (ctypes.c_int64 * len(shape.rows))(*shape.rows)
    addresses = [ctypes.addressof(part) for part in (bases, lows, rows)]
    group = _Group(
        *(addresses[0], len(bases), *addresses[1:], len(rows)),
        *(x.data_ptr(), x.stride(0), x.shape[1], xa.data_ptr()),
    )
    kernel(x.dtype, ctypes.addressof(group), *more)


def _thin(pairs: Sequence[Pair], shape: Shape) -> int:
    """How many numbers x·Aᵀ has: for each run all additions side by side."""
    numbers, count = 0, len(pairs) // len(shape.rows)
    for number, rows in enumerate(shape.rows):
        start, width = 0, 0
        for pair in pairs[number * count : (number + 1) * count]:
            if pair is not None:
                r = pair[0].size(0)
                width, start = max(width, start + -(-r // DEEP) * DEEP), start + r
        numbers += rows * -(-width // DEEP) * DEEP
    return numbers


def _places(like: Sequence[Tensor], make: Callable[..., Tensor] = torch.empty) -> Iterator[Tensor]:
    """A tensor like each of these, of one piece of memory: thousands of small ones of their own take a tenth of a small step."""
    sizes = [t.numel() for t in like]
    pieces = make(sum(sizes), dtype=torch.float32).split(sizes) if like else ()
    return (piece.view(t.shape) for piece, t in zip(pieces, like, strict=True))


class _Tiled(torch.autograd.Function):
    """In one call of a kernel each way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen: tuple[Frozen, ...], shape: Shape, remake: Remake | None, *trained: Tensor
    ) -> tuple[Tensor, ...]:
        x = lines(x)
        made = [x.new_empty(len(x), base.weight.shape[0 if base.across else 1]) for base in frozen]
        weights = _numbers(frozen, x.dtype)
        bases = (_Base * len(made))(*map(_base, frozen, weights, made))
        pairs = shape.paired(trained)
        lows = (_Low * len(pairs))(*map(_low, pairs))
        xa = x.new_empty(_thin(pairs, shape))
        _call(_forward, bases, lows, shape, x, xa)
        ctx.frozen, ctx.shape = frozen, shape
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
        frozen, shape = ctx.frozen, ctx.shape
        width = frozen[0].weight.shape[1 if frozen[0].across else 0]
        trained: Sequence[Tensor] = ()
        if saved := ctx.saved_tensors:
            xa, *others = saved
            trainables = 2 * sum(scale is not None for scale in shape.scales)
            trained, x = others[:trainables], lines(ctx.make(*others[trainables:]))
        else:
            x, xa = some.new_empty(0, width), some.new_empty(0)
        pairs = shape.paired(trained)
        wanted = [None if dys[i % len(dys)] is None else pair for i, pair in enumerate(pairs)]
        make = torch.empty if all(shape.rows) else torch.zeros  # the kernel knows nothing of runs without rows
        places = _places([t for pair in wanted if pair is not None for t in pair[:2]], make)
        lows, found = [], []
        for pair, want in zip(pairs, wanted, strict=True):
            da, db = (None, None) if want is None else (next(places), next(places))
            lows.append(_low(pair, da, db))
            found += [] if pair is None else [da, db]
        weights = _numbers(frozen, some.dtype)
        bases = (_Base * len(dys))(*map(_base, frozen, weights, dys))
        dx = some.new_empty(len(some), width) if ctx.needs_input_grad[0] else None
        _call(_backward, bases, (_Low * len(lows))(*lows), shape, x, xa, dx)
        return dx, None, None, None, *found

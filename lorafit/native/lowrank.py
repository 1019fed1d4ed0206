"""Frozen products that share an input, each with a low-rank addition, as one function of autograd.

y_i = x·W_iᵀ + bias_i + s_i (x·A_iᵀ)·B_iᵀ. The A's are one thin product; each base product and its addition are one sum;
the gradient for x is one sum over all of them; x is kept once, or not at all where the caller can make it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafit.native.gemm import DEEP, Part, native, outer, sum_products


@dataclass(frozen=True)
class Frozen:
    """A weight that isn't trained: (out, in) where `across`, (in, out) as GPT-2 stores it otherwise; bias (out,)."""

    weight: Tensor
    bias: Tensor | None = None
    across: bool = True


@dataclass(frozen=True)
class LowRank:
    """The addition scale·b·a to a weight: a (r, in), b (out, r), trained, of any float type."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Remake:
    """How to make an input once more in the backward: `make(*tensors)`, tensors that somebody else keeps anyway."""

    make: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def products(
    x: Tensor, frozen: Sequence[Frozen], added: Sequence[LowRank | None], remake: Remake | None = None
) -> tuple[Tensor, ...]:
    """x (n, in) through each weight: (n, out_i). With `remake`, x isn't kept for the backward."""
    trained = [t for low in added if low is not None for t in (low.a, low.b)]
    made: tuple[Tensor, ...] = _Products.apply(  # type: ignore[no-untyped-call]
        x, tuple(frozen), tuple(low and low.scale for low in added), remake, *trained
    )
    return made


def plain_products(x: Tensor, frozen: Sequence[Frozen], added: Sequence[LowRank | None]) -> tuple[Tensor, ...]:
    """The twin, in torch's own operations and torch's own gradients."""
    made = []
    for base, low in zip(frozen, added, strict=True):
        y = x @ (base.weight.t() if base.across else base.weight)
        y = y if base.bias is None else y + base.bias
        if low is not None:
            y = y + (x @ low.a.t().to(x.dtype)) @ low.b.t().to(x.dtype) * low.scale
        made.append(y)
    return tuple(made)


@dataclass
class _Thin:
    """The A's of a group, one under another, and where each begins; `span` columns of the product belong to one."""

    a: Tensor  # (width, in)
    b: list[Tensor | None]  # s·B (out, span)
    start: list[int]
    r: list[int]
    span: list[int]


def _thin(x: Tensor, scales: Sequence[float | None], trained: Sequence[Tensor]) -> _Thin | None:
    """In x's number type; padded with zeros to what the kernel takes at a time."""
    if not trained:
        return None
    step = DEEP if native(x, x.shape[1]) else 1
    start, ranks, span, at = [], [], [], 0
    pairs = iter(zip(trained[::2], trained[1::2], strict=True))
    given = [next(pairs) if scale is not None else None for scale in scales]
    for pair in given:
        r = pair[0].shape[0] if pair is not None else 0
        start.append(at)
        ranks.append(r)
        span.append(-(-r // step) * step)
        at += r
    width = -(-max(s + n for s, n in zip(start, span, strict=True)) // step) * step
    a = x.new_empty(width, x.shape[1])
    a[at:] = 0
    b: list[Tensor | None] = []
    for pair, scale, s, r, n in zip(given, scales, start, ranks, span, strict=True):
        if pair is None or scale is None:
            b.append(None)
            continue
        a[s : s + r] = pair[0]
        scaled = x.new_empty(pair[1].shape[0], n)
        scaled[:, :r] = pair[1] * scale
        scaled[:, r:] = 0
        b.append(scaled)
    return _Thin(a, b, start, ranks, span)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: tuple[Frozen, ...],
        scales: tuple[float | None, ...],
        remake: Remake | None,
        *trained: Tensor,
    ) -> tuple[Tensor, ...]:
        thin = _thin(x, scales, trained)
        xa = sum_products([Part(x, thin.a)]) if thin is not None else None
        made = []
        for i, base in enumerate(frozen):
            parts = [Part(x, base.weight, base.across)]
            if thin is not None and xa is not None and (b := thin.b[i]) is not None:
                parts.append(Part(xa[:, thin.start[i] : thin.start[i] + thin.span[i]], b))
            made.append(sum_products(parts, bias=base.bias))
        ctx.frozen, ctx.scales, ctx.types = frozen, scales, [t.dtype for t in trained]
        ctx.set_materialize_grads(False)
        if thin is not None:
            ctx.make = remake.make if remake is not None else lambda x: x
            ctx.layout = (thin.start, thin.r)
            ctx.save_for_backward(xa, thin.a, *thin.b, *(remake.tensors if remake is not None else (x,)))
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dys = {i: dy if dy.stride(1) == 1 else dy.contiguous() for i, dy in enumerate(grads) if dy is not None}
        if not dys:
            return (None,) * (4 + len(ctx.types))
        parts = [Part(dy, ctx.frozen[i].weight, not ctx.frozen[i].across) for i, dy in dys.items()]
        found: list[Tensor | None] = []
        if ctx.types:
            xa, a, *rest = ctx.saved_tensors
            bs, x = rest[: len(grads)], ctx.make(*rest[len(grads) :])
            start, ranks = ctx.layout
            dxa = xa.new_zeros(xa.shape)
            for i, dy in dys.items():
                if (b := bs[i]) is not None:
                    # exactly r columns: what lies beyond belongs to the next one
                    s, r = start[i], ranks[i]
                    sum_products([Part(dy, b[:, :r], False)], out=dxa[:, s : s + r])
            parts.append(Part(dxa, a, False))
            das = outer(dxa[:, : sum(ranks)], x)
            for i, scale in enumerate(ctx.scales):
                if scale is None:
                    continue
                s, r = start[i], ranks[i]
                found += [das[s : s + r], outer(xa[:, s : s + r], dys[i]).t() * scale] if i in dys else [None, None]
        dx = sum_products(parts) if ctx.needs_input_grad[0] else None
        typed = [g if g is None else g.to(t) for g, t in zip(found, ctx.types, strict=True)]
        return dx, None, None, None, *typed

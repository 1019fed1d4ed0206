"""Attention for packed rows: documents end to end, each causal, none seeing another.

`attend` is flash attention (arXiv 2205.14135, 2307.08691): on a CPU in C++ with a backward of its own, on a GPU torch's for
documents of any length. `plain_attend` says the same in ordinary torch, document by document, and is what both are tested
against and what runs where they can't.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafit.native import build
from lorafit.native.kernel import Kernel, usable

_TAIL = "ppiiiifi"  # starts, what each goes on from, documents, heads, kv heads, dim, scale, window
_forward = Kernel("attention_forward", "pi" * 3 + "pp" + _TAIL)
_backward = Kernel("attention_backward", "pi" * 3 + "ppp" + "pi" * 3 + _TAIL)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    scale: float | None = None,
    window: int | None = None,
    before: Sequence[int | None] = (),
) -> Tensor:
    """Causal attention inside each document: q (n, heads, dim), k and v (n, kv heads, dim) -> (n, heads · dim).

    `lengths` are the documents' tokens, n in all. Where `before` names another one for a document, one that itself has
    none, its tokens go on from that one's: they see them too. Query i sees key j of its document if 0 <= i - j, and
    i - j < `window` where one is given. Scores are multiplied by `scale`, dim^-0.5 by default. Each group of
    heads / kv heads neighbouring query heads shares a kv head. Products are of the tensors' type; sums and the softmax are
    fp32.
    """
    scale = _check(q, k, v, lengths, scale, window, before)
    if q.numel() and usable(q, k, v):
        out: Tensor = _Attention.apply(q, k, v, tuple(lengths), scale, window or 0, tuple(before))  # type: ignore[no-untyped-call]
        return out
    varlen = _varlen(q.device, q.dtype, q.shape[2]) if q.is_cuda and build.on() else None
    if q.numel() and varlen is not None and not any(other is not None for other in before):
        starts, longest = _starts(tuple(lengths), q.device), max(lengths)
        left = -1 if window is None or window >= longest else window - 1
        out = varlen(q, k, v, starts, starts, longest, longest, scale=scale, window_size=(left, 0))
        return out.flatten(1)
    return plain_attend(q, k, v, lengths, scale, window, before)


@cache
def _varlen(device: torch.device, dtype: torch.dtype, dim: int) -> Callable[..., Tensor] | None:
    """torch's flash attention over packed documents; None where it, this GPU or this torch can't do what `attend` does."""
    fits = dtype in (torch.bfloat16, torch.float16) and dim % 8 == 0 and dim <= 256
    if not fits or not torch.backends.cuda.is_flash_attention_available():
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention import varlen
    except ImportError:  # torch before 2.10
        return None
    found: Callable[..., Any] = varlen.varlen_attn
    takes = inspect.signature(found).parameters
    if "scale" not in takes or "window_size" not in takes:
        return None
    return partial(found, enable_gqa=True) if "enable_gqa" in takes else found


@lru_cache(maxsize=4)
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where documents begin and the last one ends, (documents + 1,) int32; made once for all layers of a step."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def plain_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    scale: float | None = None,
    window: int | None = None,
    before: Sequence[int | None] = (),
) -> Tensor:
    """`attend` in ordinary torch, on any device and in any type."""
    scale = _check(q, k, v, lengths, scale, window, before)
    # `split`, because the gradient of a slice is a whole tensor of zeros around it.
    queries, keys, values = (x.split(list(lengths)) for x in (q, k, v))
    found = []
    for i, other in enumerate(before or [None] * len(lengths)):
        if lengths[i]:
            key, value = (x[i] if other is None else torch.cat([x[other], x[i]]) for x in (keys, values))
            found.append(_plain_document(queries[i], key, value, scale, window))
    return (torch.cat(found) if found else q).flatten(1)


def _plain_document(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """(n, heads, dim) of the last tokens of one document -> the same."""
    mask, shared = band(k.shape[0], window, q.device, q.shape[0]), q.shape[1] != k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=shared)
    return out[0].transpose(0, 1)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    scale: float | None,
    window: int | None,
    before: Sequence[int | None],
) -> float:
    """The scale, if everything fits together."""
    n, heads, dim = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[2]) != (n, dim) or heads % k.shape[1]:
        raise ValueError(f"queries {tuple(q.shape)} don't go with keys {tuple(k.shape)} and values {tuple(v.shape)}")
    if sum(lengths) != n or min(lengths, default=0) < 0:
        raise ValueError(f"documents of {sum(lengths)} tokens in all can't cut a row of {n}")
    others = [other for other in before if other is not None]
    if before and (
        len(before) != len(lengths) or any(not 0 <= i < len(before) or before[i] is not None for i in others)
    ):
        raise ValueError(f"{len(lengths)} documents can't go on from {list(before)}")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} tokens sees nothing")
    scale = dim**-0.5 if scale is None else scale
    if not scale > 0:  # the kernel takes a row's largest product for its largest score; torch's own gives NaN
        raise ValueError(f"a scale of {scale} doesn't order scores by their products")
    return scale


def band(length: int, window: int | None, device: torch.device, last: int | None = None) -> Tensor | None:
    """The causal mask (last, length) of a sliding window for the `last` tokens of a document, all by default; None where the
    plain causal one is enough."""
    last = length if last is None else last
    window = length if window is None else window
    if length <= window and last == length:
        return None
    i = torch.arange(length, device=device)
    distance = i[length - last :, None] - i[None, :]
    return (distance >= 0) & (distance < window)


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, the output and one float a row; the backward makes the probabilities anew."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: tuple[int, ...],
        scale: float,
        window: int,
        before: tuple[int | None, ...],
    ) -> Tensor:
        n, heads, dim = q.shape
        q, k, v = (_heads_together(x) for x in (q, k, v))
        out, lse = q.new_empty(n, heads * dim), torch.empty(heads, n, dtype=torch.float32)
        starts = (ctypes.c_int64 * (len(lengths) + 1))(*accumulate(lengths, initial=0))
        others = (ctypes.c_int64 * max(1, len(lengths)))(
            *(-1 if other is None else other for other in before or [None] * len(lengths))
        )
        ctx.tail = (starts, others, len(lengths), heads, k.shape[1], dim, scale, window)
        _forward(q.dtype, *_rows(q, k, v), out, lse, *ctx.tail)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        _backward(q.dtype, *_rows(q, k, v), out, lse, dout, *_rows(*grads), *ctx.tail)
        return *grads, None, None, None, None


def _heads_together(x: Tensor) -> Tensor:
    """The tensor itself if a token's heads lie one after another, as in a slice of fused projections; else a copy."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _rows(*tensors: Tensor) -> list[Any]:
    """Each tensor and its elements from row to row."""
    return [part for x in tensors for part in (x, x.stride(0))]

"""Attention for packed rows: several documents lie one after another in one row and never see each other.

Registered with transformers under the name `lorafit`; a forward that passes `doc_lengths` gets one causal attention per
document, any other forward (generation with a cache, padded batches) gets transformers' own `sdpa`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lorafit.native.attention import attend, band
from lorafit.native.kernel import wide

NAME = "lorafit"

# A 4-D mask is used by transformers as it is, so this one keeps it from building a (row length)² mask nobody reads.
UNREAD_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    doc_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (batch, heads, n, dim), key and value (batch, kv heads, m, dim).

    Returns (batch, n, heads, dim). `doc_lengths` cuts a row of n = m tokens into documents. `softcap` and `s_aux` (sinks)
    are computed explicitly, because torch's fused attention has neither.
    """
    treated = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    one = _explicit if treated else _fused
    if doc_lengths is None:
        return one(module, query, key, value, attention_mask, dropout, scaling, **kwargs), None
    window = kwargs.get("sliding_window")
    lengths = list(doc_lengths)
    if not treated and not dropout:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # one row: (n, heads, dim)
        return attend(q, k, v, lengths, scaling, window).view(1, *q.shape), None
    parts = [
        one(module, q, k, v, _four(band(q.shape[2], window, q.device)), dropout, scaling, **kwargs)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), None


def _four(mask: Tensor | None) -> Tensor | None:
    """A mask as transformers takes it, (batch, heads, n, m)."""
    return mask if mask is None else mask[None, None]


def _fused(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, scaling: float | None, **kw: Any
) -> Tensor:
    out: Tensor = sdpa_attention_forward(module, q, k, v, mask, dropout=p, scaling=scaling, **kw)[0]
    return out


def _explicit(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, scaling: float | None, **kw: Any
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = wide(q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    cap, sinks = kw.get("softcap"), kw.get("s_aux")
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    n, m = scores.shape[-2:]
    if mask is None and n > 1:
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    if mask is not None:
        # The least finite number, not -inf: a padding row that sees nothing must give no NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:  # a learned score per head that takes probability away and gives no value
        scores = torch.cat([scores, sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = F.dropout(scores.softmax(-1)[..., :m], p=p).to(v.dtype)
    return (weights @ v).transpose(1, 2)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

"""Loss of tokens under a frozen output head, and its gradient for their hidden states, from one chunk of logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.native.gemm import Part, sum_products
from lorafit.native.kernel import Kernel, usable, wide

APART = 32  # numbers between two rows of logits

_exponentials = Kernel("exponentials", "pipppii")


def head_loss(
    h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses (n,) fp32 of h (n, width) under weight (vocabulary, width), bias (vocabulary,), labels (n,); and, if asked
    for, d loss_i / d h_i (n, width) = (softmax_i - onehot_i)·W."""
    if not usable(h, weight):
        return plain_head_loss(h, weight, bias, labels, gradient)
    h = h.contiguous()
    words = weight.shape[0]
    # Rows a multiple of a page apart would all fall on the same few lines of the processor's first cache.
    rows = torch.empty(len(h), words + APART, dtype=h.dtype)
    # oneDNN reads past the end of a bf16 row, to a multiple of 32 (torch 2.13): NaN there would spread.
    rows[:, words:] = 0
    logits = rows[:, :words]
    sum_products([Part(h, weight)], bias=bias, out=logits)
    loss, inverse = (torch.empty(len(h), dtype=torch.float32) for _ in range(2))
    _exponentials(h.dtype, logits, logits.stride(0), labels, loss, inverse, len(h), words)
    if not gradient:
        return loss, None
    dh = sum_products([Part(logits, weight, False)])
    return loss, dh.mul_(inverse[:, None])


def plain_head_loss(
    h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The twin, in torch's own operations."""
    logits = wide(F.linear(h, weight, bias))
    top = logits.logsumexp(-1)
    loss = top - logits.gather(1, labels[:, None]).squeeze(1)
    if not gradient:
        return loss, None
    p = logits.sub_(top[:, None]).exp_()
    p[torch.arange(len(labels), device=h.device), labels] -= 1
    return loss, p.to(h.dtype) @ weight

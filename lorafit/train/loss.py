"""Negative log-likelihood of the learned tokens, never more than a chunk of logits in memory.

The loss is a sum; whoever adds up micro-batches divides once, by the learned tokens of the whole step. That makes batch,
accumulation and packing mere questions of memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorafit.batches import Micro
from lorafit.host import Host
from lorafit.native.kernel import wide
from lorafit.native.loss import head_loss

CHUNK = 512  # positions whose logits exist at once


def losses(host: Host, micro: Micro) -> Tensor:
    """Loss of each learned token, (targets,), fp32, under the host's open route."""
    device = host.base.device
    ids, positions, labels = (t.to(device) for t in (micro.ids, micro.positions, micro.labels))
    if not host.base.plain_head:
        return _nll(host.logits(ids, micro.packing.lengths)[positions], labels)
    hidden = host.hidden(ids, micro.packing)[positions]
    head = host.base.head
    frozen = host.head_is_frozen
    parts = []
    for h, p, y in zip(hidden.split(CHUNK), positions.split(CHUNK), labels.split(CHUNK), strict=True):
        if frozen and not torch.is_grad_enabled():
            parts.append(head_loss(h, head.weight, getattr(head, "bias", None), y, False)[0])
        elif frozen:
            parts.append(FrozenHeadLoss.apply(h, head.weight, getattr(head, "bias", None), y))  # type: ignore[no-untyped-call]
        elif torch.is_grad_enabled():
            parts.append(checkpoint(lambda h, p, y: _nll(host.head(h, p), y), h, p, y, use_reentrant=False))
        else:
            parts.append(_nll(host.head(h, p), y))
    each = torch.cat(parts) if parts else hidden.new_zeros(0).float()
    return each if micro.copies is None else each[micro.copies.to(device)]


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(wide(logits), labels, reduction="none")


class FrozenHeadLoss(torch.autograd.Function):
    """Loss of each row of h (n, width) under a frozen head, its gradient for h computed in the forward.

    d loss_i / d h_i = (softmax_i − onehot_i)·W, so the logits needn't be kept or computed twice.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """h (n, width), weight (vocabulary, width), labels (n,) -> (n,) fp32."""
        loss, dh = head_loss(h, weight, bias, labels, ctx.needs_input_grad[0])
        if dh is not None:
            ctx.save_for_backward(dh)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Row by row: the saved gradient times the incoming one."""
        (dh,) = ctx.saved_tensors
        return ((dh * grads[0][:, None]).to(dh.dtype), None, None, None)  # multiplied in fp32, rounded once

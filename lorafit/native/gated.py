"""The gated activation act(gate) * up of a Llama-like layer (arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.native.kernel import Kernel, usable

_KERNELS = {act: (Kernel(act, "pppi"), Kernel(f"{act}_backward", "pppppi")) for act in ("silu", "gelu_tanh")}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}  # in configs


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up, all of one shape; act is silu or gelu_tanh."""
    if usable(gate, up):
        out: Tensor = _Gated.apply(gate, up, act)  # type: ignore[no-untyped-call]
        return out
    return plain_gated(gate, up, act)


def plain_gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """The twin, in torch's own operations."""
    return (F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")) * up


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _KERNELS[act][0](gate.dtype, gate, up, out, gate.numel())
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _KERNELS[ctx.act][1](gate.dtype, grads[0].contiguous(), gate, up, dgate, dup, gate.numel())
        return dgate, dup, None

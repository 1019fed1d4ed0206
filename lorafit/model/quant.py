"""A frozen base in 4 or 8 bits (QLoRA, arXiv 2305.14314): its linear weights are quantised once, with the codes that
bitsandbytes gives them, and computed with through `QuantLinear`, which makes the numbers anew for every product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafit.errors import ModelError
from lorafit.native import quantised
from lorafit.native.lowrank import Frozen, products
from lorafit.native.quantised import BLOCK, NESTED, Quantised


@dataclass(frozen=True)
class Quant:
    """How linear weights are stored: a kind of native.quantised.KINDS; `double`: the absmax of blocks are quantised too."""

    kind: str
    double: bool = True

    @staticmethod
    def of(kind: str, double: bool = True) -> Quant | None:
        """As the settings `quant` and `double_quant` say it; None for `none`."""
        return None if kind == "none" else Quant(kind, double)

    def notes(self) -> dict[str, Any]:
        """What an adapter remembers of the base it was trained on."""
        return {"quant": self.kind, "double_quant": self.double}

    def __str__(self) -> str:
        return self.kind if self.double or self.kind == "int8" else f"{self.kind} without double quantisation"

    def size(self, shape: torch.Size) -> int:
        """Bytes that a weight (out, in) takes."""
        if self.kind == "int8":
            return shape.numel() + 4 * shape[0]
        blocks = -(-shape.numel() // BLOCK)
        return -(-shape.numel() // 2) + (blocks + 4 * -(-blocks // NESTED) + 4 if self.double else 4 * blocks)


_PARTS = ("codes", "absmax", "nested", "offset")  # the tensors of a Quantised


class QuantLinear(nn.Module):
    """A frozen linear layer that holds codes. In the place of nn.Linear, or of GPT-2's Conv1D (`turned`).

    It keeps nothing but codes between calls, and for the backward no more than it was given: bitsandbytes' layer repacks its
    codes for inference on a CPU and is wrong, and without a gradient, when it is trained after that.
    """

    codes: Tensor
    absmax: Tensor
    nested: Tensor | None
    offset: Tensor | None

    def __init__(self, q: Quantised, bias: Tensor | None, dtype: torch.dtype, turned: bool = False) -> None:
        super().__init__()
        self.kind, self.shape, self.dtype, self.turned = q.kind, q.shape, dtype, turned
        self.out_features, self.in_features = q.shape
        for name in _PARTS:
            self.register_buffer(name, getattr(q, name))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def quantised(self) -> Quantised:
        """The weight as it is stored."""
        return Quantised(self.kind, self.shape, self.codes, self.absmax, self.nested, self.offset)

    def hold(self, q: Quantised) -> None:
        """Another weight of this kind and shape from now on. For merging alone."""
        assert (q.kind, q.shape) == (self.kind, self.shape)
        for name in _PARTS:
            setattr(self, name, getattr(q, name))

    def numbers(self) -> Tensor:
        """The weight (out, in) in the base's number type, made now."""
        return quantised.dequantise(self.quantised, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        rows, q = x.reshape(-1, self.in_features), self.quantised
        y = None if rows.requires_grad else quantised.few_rows(rows, q, self.bias)
        if y is None:
            (y,) = products(rows, [Frozen(q, self.bias)], [None])
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What a printed model shows of it."""
        return f"{self.in_features}, {self.out_features}, {self.kind}"


def quantise(weight: Tensor, quant: Quant, name: str) -> Quantised:
    """A weight (out, in). ModelError naming it if it isn't finite: what shares a block with such a number would be lost."""
    made = quantised.quantise(weight, quant.kind, quant.double)
    if not torch.isfinite(made.absmax if made.nested is None else made.nested).all():
        raise ModelError(f"{name} isn't finite, so it can't be quantised; the model is damaged")
    return made


def linears(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The linear modules of a causal language model that are quantised: all but its output head, by path.

    ModelError for weights of experts, which aren't linear modules: they are most of such a model.
    """
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if hasattr(module, "has_gate") and hasattr(module, "num_experts"):
            raise ModelError(f"{path}: experts can't be quantised yet; leave quant out")
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            yield path, module


@torch.no_grad()
def convert(model: Any, quant: Quant) -> None:
    """Quantise a model that is in memory, module by module."""
    dtype = model.dtype
    for path, module in list(linears(model)):
        turned = isinstance(module, Conv1D)
        weight: Any = module.weight
        q = quantise(weight.t() if turned else weight, quant, f"{path}.weight")
        put(model, path, QuantLinear(q, module.bias, dtype, turned))  # type: ignore[arg-type]


@torch.no_grad()
def restore(model: Any) -> None:
    """Undo `convert` but for what it rounded: modules of the model's number type that hold what the codes stand for."""
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            with torch.device("meta"):
                out, width = module.shape
                made: Any = Conv1D(out, width) if module.turned else nn.Linear(width, out, module.bias is not None)
            weight = module.numbers()
            made.weight = nn.Parameter(weight.t().contiguous() if module.turned else weight, requires_grad=False)
            made.bias = module.bias
            put(model, path, made)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the module at a path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)

"""A frozen base in 4 or 8 bits (QLoRA, arXiv 2305.14314): its linear weights are quantised once, with the codes that
bitsandbytes gives them, and computed with through `QuantLinear`, which makes the numbers anew for every product.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafit.errors import ModelError
from lorafit.model.starts import Part, Start, split
from lorafit.native import quantised
from lorafit.native.lowrank import Frozen, LowRank, Run, products
from lorafit.native.quantised import BLOCK, BY_ROWS, NESTED, Quantised


@dataclass(frozen=True)
class Quant:
    """How linear weights are stored: a kind of native.quantised.KINDS; `double`: the absmax of blocks are quantised too;
    `start`: a method that makes codes of its own, with a part of low rank beside them."""

    kind: str
    double: bool = True
    start: Start | None = None

    @staticmethod
    def of(kind: str, double: bool = True) -> Quant | None:
        """As the settings `quant` and `double_quant` say it; None for `none`."""
        return None if kind == "none" else Quant(kind, double)

    def notes(self) -> dict[str, Any]:
        """What an adapter remembers of the base it was trained on."""
        start = {} if self.start is None else {"quant_start": self.start.to_json()}
        return {"quant": self.kind, "double_quant": self.double, **start}

    def __str__(self) -> str:
        double = "" if self.double or self.kind in BY_ROWS else " without double quantisation"
        return f"{self.kind}{double}{f' ({self.start})' if self.start else ''}"

    def size(self, shape: torch.Size) -> int:
        """Bytes that a weight (out, in) takes."""
        if self.kind in BY_ROWS:
            return shape.numel() + 4 * shape[0]
        blocks = -(-shape.numel() // BLOCK)
        return -(-shape.numel() // 2) + (blocks + 4 * -(-blocks // NESTED) + 4 if self.double else 4 * blocks)


_PARTS = ("codes", "absmax", "nested", "offset")  # the tensors of a Quantised


class QuantLinear(nn.Module):
    """A frozen linear layer that holds codes. In the place of nn.Linear, or of GPT-2's Conv1D (`turned`).

    It keeps nothing but codes between calls, and for the backward no more than it was given: bitsandbytes' layer repacks its
    codes for inference on a CPU and is wrong, and without a gradient, when it is trained after that. Where codes were made
    with a part of low rank, the layer's weight is both together.
    """

    codes: Tensor
    absmax: Tensor
    nested: Tensor | None
    offset: Tensor | None
    start_a: Tensor | None
    start_b: Tensor | None

    def __init__(
        self,
        q: Quantised,
        bias: Tensor | None,
        dtype: torch.dtype,
        turned: bool = False,
        part: Part | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.shape, self.dtype, self.turned = q.kind, q.shape, dtype, turned
        self.out_features, self.in_features = q.shape
        for name in _PARTS:
            self.register_buffer(name, getattr(q, name))
        for name in ("a", "b"):
            self.register_buffer(f"start_{name}", None if part is None else getattr(part, name))
        self._part = None if part is None else (part.method, part.plain, part.after)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def quantised(self) -> Quantised:
        """The weight as it is stored."""
        return Quantised(self.kind, self.shape, self.codes, self.absmax, self.nested, self.offset)

    def hold(self, q: Quantised) -> None:
        """These codes alone, of the same kind and shape, from now on. For merging alone."""
        assert (q.kind, q.shape) == (self.kind, self.shape)
        for name in _PARTS:
            setattr(self, name, getattr(q, name))
        self.start_a = self.start_b = self._part = None

    @property
    def part(self) -> Part | None:
        """What was put beside the codes, where they were made with it."""
        if self._part is None or self.start_a is None or self.start_b is None:
            return None
        method, plain, after = self._part
        return Part(method, self.start_a, self.start_b, plain, after)

    @property
    def frozen(self) -> Frozen:
        """The layer as `products` takes it."""
        part = self.part
        return Frozen(self.quantised, self.bias, low=None if part is None else LowRank(part.a, part.b, 1.0))

    def numbers(self) -> Tensor:
        """The weight (out, in) in the base's number type, made now."""
        part = self.part
        if part is None:
            return quantised.dequantise(self.quantised, self.dtype)
        return (quantised.dequantise(self.quantised, torch.float32) + part.b @ part.a).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        rows, part = x.reshape(-1, self.in_features), self.part
        y = None if rows.requires_grad else quantised.few_rows(rows, self.quantised, self.bias)
        if y is None:
            (y,) = products(rows, [self.frozen], [Run(len(rows), [None])])
        elif part is not None:
            y = y.addmm_(rows @ part.a.t().to(rows.dtype), part.b.t().to(rows.dtype))
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


def stored(weight: Tensor, quant: Quant, r: int | None, name: str) -> tuple[Quantised, Part | None]:
    """A weight (out, in) as `quant` stores it; `r` is the rank of the part beside its codes, None for none."""
    if quant.start is None or r is None:
        return quantise(weight, quant, name), None
    return split(weight, quant.start, r, zlib.crc32(name.encode()), lambda w: quantise(w, quant, name))


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
def convert(model: Any, quant: Quant, ranks: Mapping[str, int] | None = None) -> None:
    """Quantise a model that is in memory, module by module. `ranks`: of the part of low rank beside the codes, by path."""
    dtype = model.dtype
    for path, module in list(linears(model)):
        turned = isinstance(module, Conv1D)
        weight: Any = module.weight
        q, part = stored(weight.t() if turned else weight, quant, (ranks or {}).get(path), f"{path}.weight")
        put(model, path, QuantLinear(q, module.bias, dtype, turned, part))  # type: ignore[arg-type]


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the module at a path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)

"""One forward for mixture-of-experts layers whose weights are 3-D tensors, open to deltas on either product.

transformers dispatches such layers through a registry; this entry computes what its own entries compute, and lets a host
add something to each product. Rows are sorted by expert, so that a product is one matrix product an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "lorafit"


@dataclass(frozen=True)
class Rows:
    """Which token and which expert each sorted row belongs to: both (rows,), rows = tokens x experts per token."""

    token: Tensor
    expert: Tensor
    experts: int

    def counts(self) -> list[int]:
        """Rows of each expert; rows are sorted by it."""
        found: list[int] = torch.bincount(self.expert, minlength=self.experts).tolist()
        return found

    def take(self, index: Tensor) -> Rows:
        """The rows at `index` (ascending), still sorted by expert."""
        return Rows(self.token[index], self.expert[index], self.experts)


Delta = Callable[[str, Tensor, Tensor, Rows], Tensor]  # (parameter name, x, y, rows) -> y with the delta added
_deltas: WeakKeyDictionary[nn.Module, Delta] = WeakKeyDictionary()
_chosen: WeakKeyDictionary[nn.Module, Callable[[Tensor], Tensor]] = WeakKeyDictionary()  # sees and may change `index`


def attach(module: nn.Module, delta: Delta) -> None:
    """Have `delta` called after each product of this experts module, until `detach`."""
    _deltas[module] = delta


def detach(module: nn.Module) -> None:
    """Undo `attach`."""
    _deltas.pop(module, None)


class Choices:
    """Which experts the layers of a model chose, call by call, for another pass over the same tokens.

    Where two experts are nearly level, rounding of fp32 chooses between them, and one such token's answer is another one: two
    ways to compute the same can only be compared where both make the same choices.
    """

    def __init__(self, model: nn.Module | None) -> None:
        modules = model.modules() if model is not None else ()
        self._modules = [m for m in modules if hasattr(m, "has_gate") and hasattr(m, "num_experts")]
        self._made: dict[nn.Module, list[Tensor]] = {module: [] for module in self._modules}

    def remembered(self) -> AbstractContextManager[None]:
        """Within it what is chosen is kept."""

        def see(made: list[Tensor], index: Tensor) -> Tensor:
            made.append(index)
            return index

        return self._seen(lambda module: partial(see, self._made[module]))

    def repeated(self) -> AbstractContextManager[None]:
        """Within it the same is chosen again, from the first call on."""

        def again(made: Iterator[Tensor], index: Tensor) -> Tensor:
            return next(made)

        return self._seen(lambda module: partial(again, iter(self._made[module])))

    @contextmanager
    def _seen(self, by: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> Iterator[None]:
        _chosen.update({module: by(module) for module in self._modules})
        try:
            yield
        finally:
            for module in self._modules:
                _chosen.pop(module, None)


def grouped(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """Rows of x (rows, in), sorted by expert, times their expert's matrix of weight (experts, out, in)."""
    weight = weight.to(x.dtype)
    parts = [F.linear(rows, w) for rows, w in zip(x.split(counts), weight.unbind(0), strict=True) if len(rows)]
    return torch.cat(parts)


def experts_forward(module: Any, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    """transformers' experts interface: hidden (tokens, dim), index and gates (tokens, experts per token)."""
    if (chosen := _chosen.get(module)) is not None:
        index = chosen(index)
    tokens, k = index.shape
    order = torch.argsort(index.reshape(-1), stable=True)
    rows = Rows(order // k, index.reshape(-1)[order], module.num_experts)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    y = _product(module, first, hidden[rows.token], rows)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = _product(module, "down_proj", y, rows)
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    y = y * gates.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return y[back].view(tokens, k, -1).sum(dim=1).to(hidden.dtype)


def _product(module: Any, name: str, x: Tensor, rows: Rows) -> Tensor:
    weight = getattr(module, name)
    y = grouped(x, weight.transpose(1, 2) if module.is_transposed else weight, rows.counts())
    if module.has_bias:
        y = y + getattr(module, f"{name}_bias")[rows.expert]
    delta = _deltas.get(module)
    return y if delta is None else delta(name, x, y, rows)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)

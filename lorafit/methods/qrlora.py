"""QR-LoRA (arXiv 2508.21810): ΔW = Σ λᵢ·Qᵢ·Rᵢ over the first r columns of Q and rows of R, where W's columns, in the order that
pivoting takes them, are Q·R. Only λ is trained, r numbers a weight.

Each pivot is the column of which most is left outside of the columns taken before. Q and R aren't stored but made from W and
the pivots; with them is kept a mark of W, by which another weight is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.errors import AdapterError
from lorafit.methods.base import MM, Matrix, Method
from lorafit.methods.lora import check


class QRLoRA(Method):
    """lam (r,), trained, zero at first; order (r,), the pivots; mark (8,), of the weight in bf16. r is at most W's rank."""

    about = "r numbers a weight, between fixed factors of its pivoted QR decomposition"
    formula = "Σ λᵢ·Qᵢ·Rᵢ over r parts of W's pivoted QR"
    paper = "2508.21810"
    kinds = frozenset({"linear", "conv1d"})
    lr_factor = 10.0  # few numbers, between factors of the weight's size

    order: Tensor
    mark: Tensor
    q: Tensor
    rows: Tensor

    def __init__(self, site: Matrix, generator: torch.Generator | None = None, *, r: int = 64) -> None:
        super().__init__()
        check(r, 0.0)
        self.path, self.weight = site.path, site.weight
        w = site.weight().detach()
        self.lam = nn.Parameter(torch.zeros(min(r, *w.shape)))
        q, order = pivoted(w.float(), len(self.lam))
        self.register_buffer("order", order)
        self.register_buffer("mark", _mark(w))
        self.register_buffer("q", q, persistent=False)
        self.register_buffer("rows", q.t() @ w.float(), persistent=False)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        mark = state_dict.get(f"{prefix}mark")
        if mark is not None and not self.mark.is_meta and not torch.equal(mark.to(self.mark), self.mark):
            raise AdapterError(
                f"{self.path} isn't the weight that this qrlora adapter was made for; load it on its own base, and merge one that"
                " was trained in 4 bits with --into dequantised"
            )
        super()._load_from_state_dict(state_dict, prefix, *others)
        if not self.order.is_meta:  # of columns almost alike, another machine's rounding may take another
            w = self.weight().detach().float()
            self.q = pivoted(w, len(self.lam), self.order)[0]
            self.rows = self.q.t() @ w

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        """R's rows, and Q's columns times λ."""
        return self.rows, self.q * self.lam, 1.0

    def delta_weight(self, w: Tensor) -> Tensor:
        """Their product."""
        a, b, _ = self.low_rank()
        return b @ a

    def forward(self, x: Tensor, y: Tensor, mm: MM, weight: Callable[[], Tensor]) -> Tensor:
        """The same on activations."""
        a, b, _ = self.low_rank()
        return mm(mm(x, a), b)


def pivoted(w: Tensor, r: int, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Q's first r columns (out, r) of w (out, in) fp32, and the columns (r,) of w that pivoting takes, or those in `order`. By
    Gram and Schmidt: torch has no pivoted decomposition, and of a whole one little would be used."""
    q = w.new_zeros(len(w), r)
    if w.is_meta:  # sizes are all that is asked for
        return q, w.new_empty(r, dtype=torch.int64)
    left = w.square().sum(0)
    taken = []
    for k in range(r):
        at = left.argmax().reshape(1) if order is None else order[k : k + 1]
        column = w.index_select(1, at)
        for _ in range(2):  # once more for what rounding left
            column = column - q[:, :k] @ (q[:, :k].t() @ column)
        q[:, k : k + 1] = column / column.norm().clamp(min=1e-30)
        left = (left - (q[:, k] @ w).square()).index_fill(0, at, -1.0)
        taken.append(at)
    return q, torch.cat(taken)


def _mark(w: Tensor) -> Tensor:
    """Of the numbers in bf16, as which a base computes the same in any precision."""
    if w.is_meta:
        return torch.empty(8, dtype=torch.int64, device="meta")
    numbers = w.detach().to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy()
    return torch.tensor(list(hashlib.sha256(numbers.tobytes()).digest()[:8]), dtype=torch.int64)

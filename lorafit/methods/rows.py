"""Rows of a table that are trained, such as those of new tokens in the embedding and in the output head. In an adapter they
stand beside the layers of its method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lorafit.methods.base import MM, Matrix, Method


class Rows(Method):
    """delta (n, width), trained: what is added to the rows `ids` (n,) of a table (rows, width)."""

    ids: Tensor
    at: Tensor

    def __init__(self, site: Matrix, ids: Sequence[int]) -> None:
        super().__init__()
        self.lookup, self.shape = site.lookup, site.shape
        width, count = site.shape if site.lookup else reversed(site.shape)
        self.delta = nn.Parameter(torch.zeros(len(ids), width))
        at = torch.full((count,), len(ids))
        at[torch.tensor(ids)] = torch.arange(len(ids))
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.register_buffer("at", at, persistent=False)  # by id, which row of delta: of others one behind the last

    def delta_weight(self, w: Tensor) -> Tensor:
        """Zero but for these rows: columns where the site looks ids up."""
        whole = self.delta.new_zeros(self.shape)
        rows = self.delta.t() if self.lookup else self.delta
        return whole.index_copy(1 if self.lookup else 0, self.ids, rows)

    def forward(self, x: Tensor, y: Tensor, mm: MM, weight: Callable[[], Tensor]) -> Tensor:
        """Without that matrix."""
        if not self.lookup:
            return self.turned(x, weight)
        rows = torch.cat([self.delta, self.delta.new_zeros(1, self.delta.shape[1])])
        return rows[self.at[x]].to(y.dtype)

    def turned(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """What it adds to a head that shares the table."""
        found = x.new_zeros(len(x), len(self.at))
        return found.index_copy(1, self.ids, x @ self.delta.t().to(x.dtype))

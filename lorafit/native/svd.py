"""The leading part of a matrix: its best approximation of a low rank."""

from __future__ import annotations

import torch
from torch import Tensor

BESIDE = 16  # columns that are followed besides the wanted ones


@torch.no_grad()
def leading(w: Tensor, r: int, passes: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """b (*lead, out, r) and a (*lead, r, in), both fp32: b·a is the best approximation of w (*lead, out, in) of rank r, which
    is at most out and in, and either of them takes the root of the singular values.

    With `passes` 0 it is exact. Otherwise the range is found from random columns (arXiv 0909.4061, algorithms 4.4 and 5.1),
    with as many passes of the power method: a matrix of 4096 × 11008 takes a fraction of a second, its whole decomposition
    a minute.
    """
    w = w.float()
    if not passes:
        u, s, v = torch.linalg.svd(w, full_matrices=False)
    else:
        columns = min(r + BESIDE, *w.shape[-2:])
        start = torch.randn(w.shape[-1], columns, generator=generator).to(w.device)
        q = torch.linalg.qr(w @ start).Q
        for _ in range(passes):
            q = torch.linalg.qr(w.mT @ q).Q
            q = torch.linalg.qr(w @ q).Q
        # The decomposition of qᵀ·w, which is wide, is that of a small triangle.
        base, small = torch.linalg.qr(w.mT @ q)
        v, s, u = torch.linalg.svd(small, full_matrices=False)
        u, v = q @ u.mT, (base @ v).mT
    root = s[..., :r].sqrt()
    return (u[..., :r] * root[..., None, :]).contiguous(), (v[..., :r, :] * root[..., :, None]).contiguous()

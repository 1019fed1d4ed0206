"""DoRA (arXiv 2402.09353): W' = m · V / ‖V‖ with V = W + s·B·A, row by row of the (out, in) weight; m, A and B are trained.

m begins as the norms of W's rows, so W' = W at first. In the backward ‖V‖ counts as a constant (section 4.3 of the paper).
It needs no V: with the rows' norms of W, which never change,

    ‖V‖² = ‖W‖² + 2·s·(W·Aᵀ ∘ B)·1 + s²·(B·(A·Aᵀ) ∘ B)·1

takes a product with A in place of one with x, once for each value of A and B. All of this is in fp32, and c = m / ‖V‖ is kept
as c − 1 = (m − ‖V‖) / ‖V‖, which is exactly zero at first and isn't rounded beside the 1 in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lorafit.methods.base import MM, Matrix, Method, Scaled
from lorafit.methods.lora import check, fresh

PIECE = 1 << 20  # numbers of a weight in fp32 at once
LEAST = 1e-30  # of a squared norm: a row of zeros has a direction too


class DoRA(Method):
    """a (r, in), b (out, r) and m (out,), all trained."""

    about = "LoRA with a trained norm for each row of the weight"
    formula = "m·V/‖V‖ − W with V = W + s·B·A, row by row"
    paper = "2402.09353"
    kinds = frozenset(
        {"linear", "conv1d", "embedding"}
    )  # an expert's rows would need norms of their own in a mixed product

    square: Tensor
    bias: Tensor | None

    def __init__(
        self,
        site: Matrix,
        generator: torch.Generator | None = None,
        *,
        r: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        rslora: bool = False,
    ) -> None:
        super().__init__()
        check(r, dropout)
        self.scale = alpha / (r**0.5 if rslora else r)
        self.dropout = dropout
        self.a, self.b = map(nn.Parameter, fresh(site, r, generator))
        square = torch.cat([rows.square().sum(1) for rows in _rows(site.weight())])
        self.register_buffer("square", square, persistent=False)
        self.register_buffer("bias", site.bias, persistent=False)
        self.m = nn.Parameter(square.clamp(min=LEAST).sqrt())
        self._norm: tuple[tuple[int, int], Tensor] | None = None

    def train(self, mode: bool = True) -> DoRA:
        """Training changes A and B; a new norm then."""
        self._norm = None
        return super().train(mode)

    @torch.no_grad()
    def norm(self, weight: Callable[[], Tensor]) -> Tensor:
        """‖V‖ (out,), row by row."""
        of = (self.a._version, self.b._version)
        if self._norm is None or self._norm[0] != of:
            a, b, s = self.a, self.b, self.scale
            across = torch.cat([rows.to(a.dtype) @ a.t() for rows in _rows(weight())])
            square = self.square + 2 * s * (across * b).sum(1) + s * s * ((b @ (a @ a.t())) * b).sum(1)
            self._norm = of, square.clamp(min=LEAST).sqrt()
        return self._norm[1]

    def gain(self, weight: Callable[[], Tensor]) -> Tensor:
        """c − 1 (out,)."""
        norm = self.norm(weight)
        return (self.m - norm) / norm

    def delta_weight(self, w: Tensor) -> Tensor:
        """(c − 1)·W + c·s·B·A."""
        low = (self.b * self.scale) @ self.a
        return low + self.gain(lambda: w)[:, None] * (w.float() + low)

    def forward(self, x: Tensor, y: Tensor, mm: MM, weight: Callable[[], Tensor]) -> Tensor:
        """The same on activations. Dropout falls on both terms, as in PEFT, and then W's product is needed once more."""
        dropped = self.dropped(x)
        low = mm(mm(dropped, self.a), self.b) * self.scale
        bare = mm(dropped, weight()) if dropped is not x else y if self.bias is None else y - self.bias
        return low + self.gain(weight).to(low.dtype) * (bare + low)

    def scaled(self, weight: Callable[[], Tensor]) -> Scaled | None:
        """The same in one product; not where dropout gives it an input of its own."""
        if self.draws:
            return None
        return Scaled((self.a, self.b, self.scale), self.gain(weight), self.bias)


def _rows(weight: Tensor) -> Iterator[Tensor]:
    """Some rows of the weight after the other, in fp32."""
    for rows in weight.split(max(1, PIECE // weight.shape[1])):
        yield rows.float()

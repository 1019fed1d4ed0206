"""RefLoRA (arXiv 2505.18877): LoRA whose steps don't depend on how the product B·A is split into B and A.

(B·P⁻ᵀ, Pᵀ·A) are the same adapter for any P, but a gradient step takes each elsewhere. Of all splits the best is given by
S = P·Pᵀ with S·(A·Aᵀ)·S = Bᵀ·B, the one under which both sides are alike. RefLoRA takes the step as that split would: A's
gradient is multiplied by S⁻¹, B's by S. RefLoRA-S uses the best single number instead, and splits anew after each step so that
‖A‖ = ‖B‖, which AdamW's state has to follow.

S is undefined while B is zero, and bad while it is small, so both begin with some steps of plain LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorafit.errors import ConfigError
from lorafit.methods.base import Matrix, Method, Stepper
from lorafit.methods.lora import fresh
from lorafit.methods.moved import scale_of


class RefLoRA(Method):
    """a (*lead, r, in) and b (*lead, out, r), trained. `plain`: the share of the steps that are plain LoRA's, at first."""

    about = "LoRA with steps that don't depend on how B·A is split"
    formula = "(alpha/r)·B·A"
    paper = "2505.18877"

    def __init__(
        self,
        site: Matrix,
        generator: torch.Generator | None = None,
        *,
        r: int = 16,
        alpha: float = 32.0,
        plain: float = 0.1,
    ) -> None:
        super().__init__()
        self.scale, self.plain = scale_of(r, alpha), _share(plain)
        self.a, self.b = map(nn.Parameter, fresh(site, r, generator))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Its own two matrices."""
        return self.a, self.b, self.scale

    @staticmethod
    def update(layers: Sequence[Method], optimizer: Stepper, step: int, steps: int) -> None:
        """The optimiser's step on the gradients that the best split would have."""
        own = [layer for layer in layers if isinstance(layer, RefLoRA)]
        if step > own[0].plain * steps:
            for layer, (da, db) in zip(own, [_turned(layer) for layer in own], strict=True):
                layer.a.grad, layer.b.grad = da, db
        optimizer.step()


class RefLoRAS(Method):
    """a (*lead, r, in) and b (*lead, out, r), trained. `plain`: the share of the steps that are plain LoRA's, at first."""

    about = "RefLoRA with one number a weight instead of a matrix"
    formula = "(alpha/r)·B·A"
    paper = "2505.18877"
    rescales = True

    def __init__(
        self,
        site: Matrix,
        generator: torch.Generator | None = None,
        *,
        r: int = 16,
        alpha: float = 32.0,
        plain: float = 0.1,
    ) -> None:
        super().__init__()
        self.scale, self.plain = scale_of(r, alpha), _share(plain)
        self.a, self.b = map(nn.Parameter, fresh(site, r, generator))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Its own two matrices."""
        return self.a, self.b, self.scale

    @staticmethod
    def update(layers: Sequence[Method], optimizer: Stepper, step: int, steps: int) -> None:
        """The optimiser's step; then A and B are made equally large, and the state as if they had always been."""
        optimizer.step()
        for layer in layers:
            if not isinstance(layer, RefLoRAS) or step <= layer.plain * steps:
                continue
            sizes = [torch.linalg.matrix_norm(part, keepdim=True) for part in (layer.a, layer.b)]
            factor = (sizes[1] / sizes[0]).sqrt()
            factor = torch.where((factor > 0) & factor.isfinite(), factor, 1.0)
            layer.a.mul_(factor)
            layer.b.div_(factor)
            optimizer.rescale(layer.a, 1 / factor)
            optimizer.rescale(layer.b, factor)


def _share(plain: float) -> float:
    if not 0 <= plain < 1:
        raise ConfigError(f"plain={plain}: a share of the steps, at least 0 and below 1")
    return plain


def _turned(layer: RefLoRA) -> tuple[Tensor | None, Tensor | None]:
    """S⁻¹ times A's gradient, B's times S."""
    da, db = layer.a.grad, layer.b.grad
    if da is None or db is None:
        return da, db
    s, inverse = metric(layer.a, layer.b)
    turned = (inverse @ da.double()).to(da.dtype), (db.double() @ s).to(db.dtype)
    if not all(part.isfinite().all() for part in turned):
        raise ArithmeticError("RefLoRA's gradients are too large for a number")
    return turned


def metric(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """S and S⁻¹ (*lead, r, r) of a (*lead, r, in) and b (*lead, out, r), fp64; the identity where one of them is all zero.

    With P = A·Aᵀ and Q = Bᵀ·B: S = P^-½·(P^½·Q·P^½)^½·P^-½, in which eigenvalues below 1e-10 of the largest count as that.
    """
    a, b = a.double(), b.double()
    p, q = a @ a.mT, b.mT @ b
    there = (p.diagonal(dim1=-2, dim2=-1).sum(-1) > 0) & (q.diagonal(dim1=-2, dim2=-1).sum(-1) > 0)
    eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    p, q = (torch.where(there[..., None, None], m, eye) for m in (p, q))
    try:
        root, inverse_root = _roots(p)
        middle, inverse_middle = _roots(root @ q @ root)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise ArithmeticError("RefLoRA's factors have no eigenvalues") from None
    return inverse_root @ middle @ inverse_root, root @ inverse_middle @ root


def _roots(m: Tensor) -> tuple[Tensor, Tensor]:
    """m^½ and m^-½ of symmetric matrices."""
    values, vectors = torch.linalg.eigh(m)
    root = values.clamp(min=1e-10 * values[..., -1:]).sqrt()[..., None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT

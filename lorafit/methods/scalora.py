"""ScaLoRA (arXiv 2510.23818), experimental: LoRA that moves on. Every few steps B's columns and A's rows are scaled so that the
next step does as much as it can for the loss, and what the scaling takes away from B·A is kept aside. So what has been learned
in the end isn't of low rank.

The paper adds it to the base's weight. Here the base is shared, so it is the adapter's: a dense matrix for each weight, as
`full` has one (but neither gradients nor optimiser state of it). Hence it takes that much memory and disk, no other program
loads such an adapter, and merging is the way to give it away. On a quantised base it works, as anything here does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lorafit.errors import ConfigError
from lorafit.methods.base import MM, Matrix, Method, Stepper
from lorafit.methods.lora import fresh
from lorafit.methods.moved import scale_of

LEAST, MOST = 0.5, 2.0  # of a scaling: the best one for a step may be far off for the next


class ScaLoRA(Method):
    """a (*lead, r, in) and b (*lead, out, r), trained; aside (*lead, out, in), what scaling took away.

    `l_eta` is the paper's L·η, how much of the loss's curvature a step uses up: the smaller, the larger A and B become. It
    matters a lot. `interval`: steps from one scaling to the next.
    """

    about = "experimental: LoRA that becomes more than low rank; large, to be merged, not for PEFT"
    formula = "a dense matrix and (alpha/r)·B·A"
    paper = "2510.23818"
    rescales = True

    def __init__(
        self,
        site: Matrix,
        generator: torch.Generator | None = None,
        *,
        r: int = 16,
        alpha: float = 32.0,
        l_eta: float = 0.3,
        interval: int = 10,
    ) -> None:
        super().__init__()
        self.scale = scale_of(r, alpha)
        if l_eta <= 0:
            raise ConfigError(f"l_eta={l_eta}: must be more than 0")
        if interval < 1:
            raise ConfigError(f"interval={interval}: must be at least 1")
        self.l_eta, self.interval = l_eta, interval
        self.a, self.b = map(nn.Parameter, fresh(site, r, generator))
        self.register_buffer("aside", torch.zeros(site.shape))

    def delta_weight(self, w: Tensor) -> Tensor:
        """What is kept aside and the product."""
        return self.get_buffer("aside") + (self.b * self.scale) @ self.a

    def forward(self, x: Tensor, y: Tensor, mm: MM, weight: Callable[[], Tensor]) -> Tensor:
        """The same, one after the other."""
        return mm(x, self.get_buffer("aside")) + mm(mm(x, self.a), self.b) * self.scale

    @staticmethod
    def update(layers: Sequence[Method], optimizer: Stepper, step: int, steps: int) -> None:
        """Scale, with the gradients and the state that go with it; then the optimiser's step."""
        own = [layer for layer in layers if isinstance(layer, ScaLoRA)]
        if step % own[0].interval == 0:
            for layer, scaling in [(layer, layer.scaling()) for layer in own]:
                if scaling is not None:
                    layer.move(*scaling, optimizer)
        optimizer.step()

    def scaling(self) -> tuple[Tensor, Tensor] | None:
        """α of B's columns and β of A's rows, (*lead, r); None without gradients.

        They make (B·diag(α²)·Bᵀ·G + G·Aᵀ·diag(β²)·A)·L·η, which a step of gradient descent does, as near as can be to G. That
        is a system of 2r equations; where its solution has no roots, the one of a single α and a single β.
        """
        if self.a.grad is None or self.b.grad is None:
            return None
        a, b = self.a.double(), self.b.double()
        da, db = self.a.grad.double() / self.scale, self.b.grad.double() / self.scale
        left, right = torch.cat([b, db], -1), torch.cat([da.mT, a.mT], -1)
        system = (left.mT @ left) * (right.mT @ right)
        wanted = torch.cat([da.square().sum(-1), db.square().sum(-2)], -1)
        r = a.shape[-2]
        blocks = system.unflatten(-1, (2, r)).unflatten(-3, (2, r)).sum((-1, -3))
        try:
            found = _solve(system, wanted)
            pair = _solve(blocks, wanted.unflatten(-1, (2, r)).sum(-1)).repeat_interleave(r, -1)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise ArithmeticError("ScaLoRA's scaling can't be computed") from None
        found = torch.where((found >= 0).all(-1, keepdim=True), found, pair)
        factors = (found / self.l_eta).clamp(min=0).sqrt().clamp(LEAST, MOST)
        factors = torch.where((found >= 0).all(-1, keepdim=True) & factors.isfinite(), factors, 1.0)
        alpha, beta = factors.to(self.a.dtype).split(r, -1)
        return alpha, beta

    def move(self, alpha: Tensor, beta: Tensor, optimizer: Stepper) -> None:
        """Scale B's columns and A's rows. B·α has the gradient B had times β, and A·β the one A had times α."""
        assert self.a.grad is not None and self.b.grad is not None
        rows, columns = beta[..., :, None], alpha[..., None, :]
        before = (self.b * self.scale) @ self.a
        self.b.mul_(columns)
        self.a.mul_(rows)
        self.get_buffer("aside").add_(before.sub_((self.b * self.scale) @ self.a))
        for parameter, factor in ((self.b, beta[..., None, :]), (self.a, alpha[..., :, None])):
            assert parameter.grad is not None
            parameter.grad.mul_(factor)
            optimizer.rescale(parameter, factor)


def _solve(m: Tensor, y: Tensor) -> Tensor:
    """m⁻¹·y of symmetric m (…, n, n) and y (…, n); the shortest solution where there are many, as while B is zero."""
    inverse: Tensor = torch.linalg.pinv(m, rtol=1e-12, hermitian=True)
    return (inverse @ y[..., None])[..., 0]

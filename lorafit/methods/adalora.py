"""AdaLoRA (arXiv 2303.10512): ΔW = s·P·Λ·Q, in the form of a singular value decomposition, whose ranks move to where they matter.

All weights begin with more rank than is asked for. After each step a triplet (one number of Λ, its column of P and its row of
Q) has a score from how much the loss depends on its numbers, |p·∂L/∂p|, smoothed, times how much that varies. As training goes
on, Λ is set to zero for the lowest scores of the whole adapter, until r a weight are left on average. They aren't frozen: they
may grow again before the last part of training, in which what is zero stays zero. A penalty keeps P and Q near orthonormal.

s = alpha / the first rank, and stays so. Stored is a plain LoRA, each weight with a rank of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorafit.errors import ConfigError
from lorafit.methods.base import Matrix, Method, Stepper
from lorafit.methods.moved import scale_of


class AdaLoRA(Method):
    """a (*lead, r₀, in), b (*lead, out, r₀) and e (*lead, r₀), trained: Q, P and Λ's diagonal. r₀ is init_r, 1.5·r if not given,
    and at most the weight's own rank; r the share of this weight in the final budget. tinit and tfinal are shares of all steps:
    before the ranks begin to fall, and after."""

    about = "as LoRA, ranks go where they matter until they are r on average"
    formula = "s·P·Λ·Q"
    paper = "2303.10512"
    lr_factor = 10.0  # of 1, 3 and 10 the best on SmolLM2 in a few steps: Λ starts at zero between two small factors

    def __init__(
        self,
        site: Matrix,
        generator: torch.Generator | None = None,
        *,
        r: int = 16,
        alpha: float = 32.0,
        init_r: int | None = None,
        tinit: float = 0.1,
        tfinal: float = 0.3,
        deltaT: int = 5,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_reg_weight: float = 0.5,
    ) -> None:
        super().__init__()
        first = init_r if init_r is not None else -(-3 * r // 2)
        self.scale = scale_of(first, alpha)
        if not 1 <= r <= first:
            raise ConfigError(f"r={r}: must be at least 1 and at most init_r={first}, from which it falls")
        for name, value in (("tinit", tinit), ("tfinal", tfinal)):
            if not 0 <= value < 1:
                raise ConfigError(f"{name}={value}: a share of the steps, at least 0 and below 1")
        if tinit + tfinal >= 1:
            raise ConfigError(f"tinit={tinit} and tfinal={tfinal} leave no steps for ranks to fall; together below 1")
        if deltaT < 1:
            raise ConfigError(f"deltaT={deltaT}: must be at least 1")
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 < value < 1:
                raise ConfigError(f"{name}={value}: must be between 0 and 1")
        if orth_reg_weight < 0:
            raise ConfigError(f"orth_reg_weight={orth_reg_weight}: must be at least 0")
        self.tinit, self.tfinal, self.every, self.weight = tinit, tfinal, deltaT, orth_reg_weight
        self.betas = (beta1, beta2)
        *lead, out, width = site.shape
        first = min(first, out, width)
        self.r = min(r, first)
        self.a = nn.Parameter(torch.empty(*lead, first, width).normal_(std=0.02, generator=generator))
        self.b = nn.Parameter(torch.empty(*lead, out, first).normal_(std=0.02, generator=generator))
        self.e = nn.Parameter(torch.zeros(*lead, first))
        for name, parameter in list(self.named_parameters()):
            self.register_buffer(f"importance_{name}", torch.zeros_like(parameter))
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(parameter))
        self.register_buffer("kept", torch.ones(*lead, first, dtype=torch.bool))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Λ·Q and P, all of the first rank."""
        return self.e[..., None] * self.a, self.b, self.scale

    def stored(self) -> tuple[Tensor, Tensor, float]:
        """Without triplets that were dropped and add nothing. All of an expert's, whose file has one rank for all experts."""
        a, b, scale = self.factors()
        if a.dim() > 2:
            return a, b, scale
        rows = self.get_buffer("kept") | (self.e != 0)
        return a[rows], b[:, rows], scale

    def measure(self) -> None:
        """Take the gradients of a step into the smoothed importance and its uncertainty."""
        for name, parameter in self.named_parameters():
            if parameter.grad is None:
                continue
            now = (parameter * parameter.grad).abs()
            importance, uncertainty = self.get_buffer(f"importance_{name}"), self.get_buffer(f"uncertainty_{name}")
            importance.mul_(self.betas[0]).add_(now, alpha=1 - self.betas[0])
            uncertainty.mul_(self.betas[1]).add_((now - importance).abs(), alpha=1 - self.betas[1])

    def scores(self) -> Tensor:
        """Of each triplet, (*lead, r₀)."""
        a, b, e = (self.get_buffer(f"importance_{n}") * self.get_buffer(f"uncertainty_{n}") for n in "abe")
        return e + a.mean(-1) + b.mean(-2)

    @staticmethod
    def penalty(layers: Sequence[Method]) -> Tensor | None:
        """How far P and Q are from orthonormal, ‖PᵀP − I‖ and ‖QQᵀ − I‖ (Frobenius), on average."""
        own = [layer for layer in layers if isinstance(layer, AdaLoRA) and layer.weight]
        if not own:
            return None
        found = []
        for layer in own:
            eye = torch.eye(layer.e.shape[-1], dtype=layer.a.dtype, device=layer.a.device)
            for gram in (layer.a @ layer.a.mT, layer.b.mT @ layer.b):
                found.append(own[0].weight * torch.linalg.matrix_norm(gram - eye).flatten())
        return torch.cat(found).mean()

    @staticmethod
    def update(layers: Sequence[Method], optimizer: Stepper, step: int, steps: int) -> None:
        """A step of the optimiser; then measure, and drop what the budget has no place for."""
        optimizer.step()
        own = [layer for layer in layers if isinstance(layer, AdaLoRA)]
        begin, end = round(own[0].tinit * steps), steps - round(own[0].tfinal * steps)
        if step < max(end, 2):  # what is left then is what has mattered on the way; the only step of a run matters too
            for layer in own:
                layer.measure()
        if step == end or (begin < step < end and step % own[0].every == 0):
            allocate(own, budget(own, step, begin, end))
        elif step > end:
            for layer in own:
                layer.e.mul_(layer.get_buffer("kept"))


def budget(layers: Sequence[AdaLoRA], step: int, begin: int, end: int) -> int:
    """How many triplets there is place for after a step: from all until `begin`, down to the final number at `end`, fast at first
    (with the third power of what is left of the way)."""
    first, final = sum(layer.e.numel() for layer in layers), sum(layer.r * layer.e[..., 0].numel() for layer in layers)
    left = 1 - (step - begin) / (end - begin) if step < end else 0.0
    return int((first - final) * left**3 + final)


def allocate(layers: Sequence[AdaLoRA], places: int) -> None:
    """Keep exactly so many triplets of the layers together, those of the highest scores."""
    scores = torch.cat([layer.scores().flatten() for layer in layers])
    kept = torch.ones_like(scores, dtype=torch.bool)
    kept[scores.argsort(stable=True)[: len(scores) - places]] = False
    for layer, mine in zip(layers, kept.split([layer.e.numel() for layer in layers]), strict=True):
        layer.get_buffer("kept").copy_(mine.view_as(layer.e))
        layer.e.mul_(layer.get_buffer("kept"))

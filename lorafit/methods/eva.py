"""EVA (arXiv 2410.07170): LoRA whose A starts from the directions in which a site's inputs vary most, and whose ranks go to the
sites where those explain most. B starts at zero, so the base is as it was and what is stored is a plain LoRA.

Before the first step the inputs of learned tokens go, batch by batch, through an incremental decomposition for each site;
sites with the same input (q, k, v) share one. It ends when the directions that will be used have stopped turning. Then all
directions of all sites are put in order by the share of their site's variance that they explain, and the first Σ r of them
are taken, at most rho·r at one site. The scale stays alpha/r at every site, whatever rank it has then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.errors import ConfigError
from lorafit.methods.base import Matrix, Method, Observer, Scaled
from lorafit.methods.lora import check, fresh
from lorafit.native.svd import leading

PASSES = 4  # of the power method, see native/svd.py


class EVA(Method):
    """a (rank, in) and b (out, rank), both trained; r is the rank that it was asked to have on average. Until it has seen inputs
    it is a LoRA as any."""

    about = "LoRA that starts from what varies in the inputs, with more rank where that explains more"
    formula = "(alpha/r)·B·A"
    paper = "2410.07170"
    kinds = frozenset({"linear", "conv1d"})

    r: Tensor

    def __init__(
        self,
        site: Matrix,
        generator: torch.Generator | None = None,
        *,
        r: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        rho: float = 2.0,
        tau: float = 0.99,
    ) -> None:
        super().__init__()
        check(r, dropout)
        if rho < 1:
            raise ConfigError(f"rho={rho}: must be at least 1, with which every site keeps r")
        if not 0 <= tau < 1:
            raise ConfigError(f"tau={tau}: a cosine, at least 0 and below 1")
        self.scale, self.dropout, self.tau = alpha / r, dropout, tau
        self.most = min(round(rho * r), *site.shape)
        self.asked = min(r, self.most)
        self.register_buffer("r", torch.tensor(r))
        self.a, self.b = map(nn.Parameter, fresh(site, r, generator))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Its own two matrices, as LoRA's."""
        return self.a, self.b, self.scale

    def scaled(self, weight: Any) -> Scaled | None:
        """With no rank left, the base's output."""
        return super().scaled(weight) if len(self.a) else Scaled()

    def take(self, a: Tensor) -> None:
        """Start from these rows (rank, in)."""
        self.b = nn.Parameter(self.b.new_zeros(self.b.shape[0], len(a)))
        self.a = nn.Parameter(a.to(self.b, copy=True))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        a, r = state_dict.get(f"{prefix}a"), state_dict.get(f"{prefix}r")
        if a is not None and r is not None and a.shape != self.a.shape and not a.is_meta and int(r) == int(self.r):
            self.take(torch.empty_like(a))  # a checkpoint of the same settings, written when inputs had been seen
        super()._load_from_state_dict(state_dict, prefix, *others)

    @staticmethod
    def observer(layers: Mapping[str, Method]) -> Observer | None:
        """It asks for inputs before the first step."""
        return Looking({path: layer for path, layer in layers.items() if isinstance(layer, EVA)})


class Looking:
    """The inputs of an adapter's sites as they come in, and what follows for its ranks."""

    def __init__(self, layers: Mapping[str, EVA]) -> None:
        self.layers = layers
        self.leader: dict[str, str] = {}  # by site, the one whose decomposition it shares
        self.spreads: dict[str, Spread] = {}
        self.ranks = {path: layer.most for path, layer in layers.items()}
        self.last: tuple[str, Tensor | None] = ("", None)

    def see(self, path: str, x: Tensor) -> None:
        """x (n, in); the very same tensor where sites have the same input."""
        if path not in self.leader:
            at, before = self.last
            self.leader[path] = at if x is before else path
        if self.leader[path] != path:
            return
        self.last = path, x
        spread = self.spreads.setdefault(path, Spread(self.layers[path].most))
        if not self.settled(path):
            spread.add(x)

    def settled(self, path: str) -> bool:
        """The directions that this decomposition's sites will use have stopped turning."""
        needed = max(self.ranks[other] for other, leader in self.leader.items() if leader == path)
        return bool((self.spreads[path].same[:needed] >= self.layers[path].tau).all())

    def enough(self) -> bool:
        """After a batch: whether all have."""
        self.last = "", None
        if all(len(spread.share) for spread in self.spreads.values()):
            self.ranks = self.shared_out()
        return all(self.settled(path) for path in self.spreads)

    def shared_out(self) -> dict[str, int]:
        """A rank for each site, by the order of what directions explain."""
        paths = sorted(self.leader, key=lambda path: self.leader[path] != path)  # of equals the leader comes first
        shares = [self.spreads[self.leader[path]].share[: self.layers[path].most] for path in paths]
        owner = torch.arange(len(paths)).repeat_interleave(torch.tensor([len(share) for share in shares]))
        places = sum(self.layers[path].asked for path in paths)
        taken = owner[torch.cat(shares).cpu().argsort(descending=True, stable=True)[:places]]
        return dict(zip(paths, taken.bincount(minlength=len(paths)).tolist(), strict=True))

    def end(self) -> None:
        """Give every layer its start."""
        for path, leader in self.leader.items():
            if len(v := self.spreads[leader].v):
                self.layers[path].take(v[: self.ranks[path]])


class Spread:
    """Principal directions of rows that come in batches, by incremental decomposition with a moving mean (Ross, Lim, Lin and
    Yang, 2008). At most `most` are followed: v (most, in), orthonormal, with the share of the variance that each explains;
    `same` is the cosine of each with itself a batch ago."""

    def __init__(self, most: int) -> None:
        self.most, self.count, self.variance = most, 0, 0.0
        self.mean = self.v = self.s = self.share = torch.empty(0)
        self.same = torch.zeros(most)
        self.waiting: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """A batch x (n, in); kept for the next one where it has fewer rows than there are directions."""
        self.waiting.append(x.float())
        if sum(map(len, self.waiting)) < self.most:
            return
        x, self.waiting = torch.cat(self.waiting), []
        mean = x.mean(0, dtype=torch.float64)
        x = x - mean.float()
        self.variance += float(x.square().sum(dtype=torch.float64))
        total = self.count + len(x)
        if self.count:
            between = (self.count * len(x) / total) ** 0.5 * (self.mean - mean)
            self.variance += float(between.square().sum())
            x = torch.cat([self.s[:, None] * self.v, x, between.float()[None]])
            mean = self.mean + (mean - self.mean) * (len(x) - len(self.s) - 1) / total
        before, self.mean, self.count = self.v, mean, total
        _, rows = leading(x, self.most, PASSES, torch.Generator().manual_seed(0))
        length = rows.norm(dim=1)
        largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))  # of two signs the one that makes it positive
        self.s, self.v = length.square(), rows * (largest.sign() / length.clamp(min=1e-30)[:, None])
        self.share = self.s.double().square() / max(self.variance, 1e-30)
        if len(before):
            self.same = (self.v * before).sum(1).cpu()

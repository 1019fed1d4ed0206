"""What a method is: parameters made from a weight, and the delta that they add to it.

A method never sees a layer type, a quantiser or another adapter. The one trick that makes this possible is `mm(x, M)`,
"multiply by a matrix shaped like this site": `x @ M.T` for linear layers, a table look-up when x holds ids, a grouped
product when rows are sorted by expert.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

MM = Callable[[Tensor, Tensor], Tensor]


class Matrix(Protocol):
    """What a method may know of its site: the (*lead, out, in) weight, and whether inputs are ids."""

    @property
    def path(self) -> str:
        """Where it is in the model, for settings that name sites."""

    @property
    def shape(self) -> torch.Size:
        """(*lead, out, in)."""

    @property
    def lookup(self) -> bool:
        """Inputs are ids."""

    @property
    def bias(self) -> Tensor | None:
        """(*lead, out), which the site adds to its product; None where it has none."""

    def weight(self) -> Tensor:
        """The weight, (*lead, out, in)."""

    def start(self, method: str) -> tuple[Tensor, Tensor] | None:
        """(a (r, in), b (out, r)) where the weight is codes that `method` has made with b·a beside them; else None."""


class Scaled(NamedTuple):
    """A site that gives y + gain·(y − apart), where y is the base's output with scale·(x·aᵀ)·bᵀ in its sum: the base's product is
    then the only one of its size. Each is None where there is none."""

    low: tuple[Tensor, Tensor, float] | None = None  # a (r, in), b (out, r), scale
    gain: Tensor | None = None  # (out,)
    apart: Tensor | None = None  # (out,), such as a bias


class Stepper(Protocol):
    """The optimiser of an adapter, as a method may see it: AdamW, in whatever way it keeps its state."""

    def step(self) -> None:
        """Update the parameters from their gradients."""

    def rescale(self, parameter: Tensor, factor: Tensor) -> None:
        """Make the state what it would be had every gradient of this parameter so far been `factor` times itself; the factor's
        shape spreads over the parameter's."""


class Observer(Protocol):
    """What looks at the inputs of an adapter's sites before the first step."""

    def see(self, path: str, x: Tensor) -> None:
        """A site's input x (n, in), of learned tokens; the very same tensor at sites that have the same."""

    def enough(self) -> bool:
        """After each batch: no more are needed."""

    def end(self) -> None:
        """Start the layers from what was seen."""


class Method(nn.Module):
    """The interface. Law: `forward(x, y, mm, weight) == mm(x, delta_weight(weight()))` in exact arithmetic, and
    delta_bias where there is one.

    Keyword arguments of a subclass's `__init__` after `generator` are the method's settings, with their defaults.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "embedding", "experts"})
    targets: ClassVar[tuple[str, ...]] = ("all-linear",)  # adapted when the user names none
    about: ClassVar[str] = ""
    formula: ClassVar[str] = ""  # what it adds to W
    paper: ClassVar[str] = ""  # its number at arXiv
    lr_factor: ClassVar[float] = 1.0  # of the default learning rate
    codes: ClassVar[str] = ""  # the setting that, with r, decides the codes this method has a quantised base stored in
    needs_codes: ClassVar[bool] = False  # it is nothing without them
    rescales: ClassVar[bool] = False  # its `update` rescales the optimiser's state

    # Random choices of a forward (dropout) are drawn from this seed, which the training loop sets anew for each
    # micro-batch: the same in a recomputed forward, after a resume, and with other adapters in the batch or without.
    seed: int = 0
    dropout: float = 0.0  # of a floating-point input, in training; a method that has it as a setting sets it

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """(a (*lead, r, in), b (*lead, out, r), scale) where what the method adds is scale·b·a, whatever the weight: then the
        rest follows, and it is stored as a LoRA. None where it isn't."""
        return None

    def stored(self) -> tuple[Tensor, Tensor, float] | None:
        """`factors` as a file holds them, without what adds nothing; one of rank 0 isn't stored."""
        return self.factors()

    def delta_weight(self, w: Tensor) -> Tensor:
        """What the method adds to w (*lead, out, in), in fp32, same shape."""
        factors = self.factors()
        if factors is None:
            raise NotImplementedError
        a, b, scale = factors
        return (b * scale) @ a

    def delta_bias(self, bias: Tensor) -> Tensor | None:
        """What the method adds to the site's bias (*lead, out), in fp32; None for nothing."""
        return None

    def forward(self, x: Tensor, y: Tensor, mm: MM, weight: Callable[[], Tensor]) -> Tensor:
        """What the method adds to y (n, out), the base's own output for x ((n, in), or ids (n,)): mm(x, weight()) and bias."""
        factors = self.factors()
        if factors is None:
            return mm(x, self.delta_weight(weight()))
        a, b, scale = factors
        return mm(mm(self.dropped(x), a), b) * scale

    def turned(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """What a layer of an embedding adds to the output of a head that shares its weight: x·ΔW, (n, in), for x (n, out)."""
        factors = self.factors()
        if factors is None:
            return x @ self.delta_weight(weight()).to(x.dtype)
        a, b, scale = factors
        return (x @ b.to(x.dtype)) @ a.to(x.dtype) * scale

    def dropped(self, x: Tensor) -> Tensor:
        """x as training with dropout sees it; x itself otherwise."""
        if not self.draws or not x.is_floating_point():
            return x
        generator = torch.Generator(x.device).manual_seed(self.seed)
        return x * torch.empty_like(x).bernoulli_(1 - self.dropout, generator=generator) / (1 - self.dropout)

    @property
    def draws(self) -> bool:
        """Whether a forward in training makes random choices, so that equal tokens needn't give equal deltas."""
        return bool(self.dropout) and self.training

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """(a (r, in), b (out, r), scale) where this forward adds exactly scale·(x·aᵀ)·bᵀ, so that it can be computed in
        one sum with the base's product; None where it doesn't, or dropout gives each site an input of its own."""
        factors = None if self.draws else self.factors()
        return factors if factors is not None and factors[0].dim() == 2 else None

    def scaled(self, weight: Callable[[], Tensor]) -> Scaled | None:
        """The site's output in one product, where this forward can be had so; of low rank it can."""
        low = self.low_rank()
        return None if low is None else Scaled(low)

    def lr_scale(self) -> dict[str, float]:
        """Learning-rate factors by parameter name; 1 for those that aren't named."""
        return {}

    # What training asks of the method, not of each of its layers. What it has to remember from step to step are buffers of
    # the layers: so a checkpoint holds it, and it is the adapter's own, whatever is trained beside.

    @staticmethod
    def observer(layers: Mapping[str, Method]) -> Observer | None:
        """What wants to see the inputs of these sites before the first step; None for nothing. It may change the shapes of
        parameters: optimisers come after it."""
        return None

    @staticmethod
    def penalty(layers: Sequence[Method]) -> Tensor | None:
        """What is added to the step's mean loss, once a step, from the adapter's layers alone; None for nothing."""
        return None

    @staticmethod
    def update(layers: Sequence[Method], optimizer: Stepper, step: int, steps: int) -> None:
        """Take step number `step` (from 1) of `steps`. Parameters have their gradients, clipped, until this is over.

        ArithmeticError, before anything is changed, where the step can't be taken.
        """
        optimizer.step()


def settings(method: Callable[..., Method]) -> dict[str, tuple[Any, Any]]:
    """A method's own settings: name -> (type, default), read from its signature."""
    found = {}
    target = method.__init__ if inspect.isclass(method) else method
    hints = typing.get_type_hints(target)
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "generator":
            found[name] = (hints[name], parameter.default)
    return found

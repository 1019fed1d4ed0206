"""AdamW for one adapter: groups by the method's learning-rate factors, schedule, clipping, and a state that can be saved
without pickle.

Kinds, as the setting `optimizer` names them: `adamw`; `8bit`, see adamw8.py; `paged`, with the state where the caller makes
room for it. On CUDA all but `adamw` are those of bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lorafit.adapter import Adapter
from lorafit.errors import ConfigError
from lorafit.native import adamw
from lorafit.native.adamw8 import BLOCK
from lorafit.train.adamw import AdamW, Room, state_of
from lorafit.train.adamw8 import AdamW8bit

SLIGHT = 1e-6  # what torch adds to a norm before it divides by it
Schedule = Literal["constant", "linear", "cosine"]


class Optimizer(Protocol):
    """What the loop and a checkpoint need of one."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameters with their learning rate."""

    @property
    def state(self) -> Any:
        """Numbers and tensors by key, by parameter."""

    def step(self) -> Any:
        """Update the parameters from their gradients."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""


def rate(step: int, steps: int, schedule: Schedule, warmup: float) -> float:
    """The learning-rate factor of a step (from 0): rising over the warm-up share, then as the schedule says."""
    rising = round(steps * warmup)
    if step < rising:
        return (step + 1) / (rising + 1)
    done = (step - rising) / max(1, steps - rising)
    if schedule == "linear":
        return max(0.0, 1.0 - done)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return 1.0


def in_memory(n: int, dtype: torch.dtype) -> Tensor:
    """Zeros (n,)."""
    return torch.zeros(n, dtype=dtype)


def optimizer(
    adapter: Adapter, lr: float, weight_decay: float, kind: str = "adamw", pages: Room = in_memory
) -> Optimizer:
    """AdamW over an adapter's parameters, one group for each learning-rate factor (kept as `scale` in the group). On the CPU
    the state of a paged kind is where `pages` makes room."""
    factors: dict[float, list[torch.nn.Parameter]] = {}
    for _, layer in adapter.items():
        scales = layer.lr_scale()
        for name, parameter in layer.named_parameters():
            factors.setdefault(scales.get(name, 1.0), []).append(parameter)
    groups: list[dict[str, Any]] = [{"params": params, "scale": scale} for scale, params in factors.items()]
    if kind != "adamw" and next(adapter.parameters()).device.type == "cuda":
        return _bitsandbytes(kind, groups, lr, weight_decay)
    paged = kind.startswith("paged_")
    if kind.endswith("_8bit"):
        return AdamW8bit(groups, lr, weight_decay, pages if paged else in_memory)
    if next(adapter.parameters()).device.type == "cpu":
        return AdamW(groups, lr, weight_decay, pages if paged else in_memory)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def _bitsandbytes(kind: str, groups: list[dict[str, Any]], lr: float, weight_decay: float) -> Optimizer:
    from bitsandbytes import optim

    kinds = {"paged_adamw": optim.PagedAdamW, "adamw_8bit": optim.AdamW8bit, "paged_adamw_8bit": optim.PagedAdamW8bit}
    made: Any = kinds[kind](groups, lr=lr, weight_decay=weight_decay)
    for i, group in enumerate(made.param_groups):
        for k, parameter in enumerate(group["params"]):
            made.init_state(group, parameter, i, k)  # now, so that `restore` finds it where it belongs
    found: Optimizer = made
    return found


def state_bytes(kind: str, numbers: int) -> int:
    """Bytes of memory that the state of so many parameters can't do without; what is paged can be taken away."""
    if kind.startswith("paged_"):
        return 0
    return 2 * (numbers + 4 * -(-numbers // BLOCK)) if kind.endswith("_8bit") else 8 * numbers


def set_rate(optimizer: Optimizer, lr: float) -> None:
    """The learning rate of each group: lr times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def clip(optimizer: Optimizer, norm: float) -> float:
    """Scale the gradients of its parameters to at most `norm` (0: leave them); returns the norm they had."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [p.grad for p in parameters]
    if not adamw.takes(*gradients):
        return float(torch.nn.utils.clip_grad_norm_(parameters, norm if norm > 0 else math.inf))
    found = adamw.norm(gradients)
    if 0 < norm < found + SLIGHT:
        adamw.scale(gradients, norm / (found + SLIGHT))
    return found


@dataclass(frozen=True)
class Stepper:
    """An optimiser as methods see it (methods/base.py)."""

    optimizer: Optimizer

    def step(self) -> None:
        """Update the parameters from their gradients."""
        self.optimizer.step()

    def rescale(self, parameter: Tensor, factor: Tensor) -> None:
        """As if its gradients had been `factor` times themselves. ConfigError for the 8 bits of bitsandbytes."""
        if isinstance(self.optimizer, AdamW8bit):
            self.optimizer.rescale(parameter, factor)
            return
        state = self.optimizer.state.get(parameter, {})
        averages = [state[key] for key in ("exp_avg", "exp_avg_sq", "state1", "state2") if key in state]
        if any(not average.is_floating_point() for average in averages):
            raise ConfigError("this method rescales AdamW's state, which isn't possible in 8 bits on a GPU")
        for average, power in zip(averages, (factor, factor.square()), strict=False):
            average.mul_(power)


_TABLES = {"qmap1", "qmap2"}  # of bitsandbytes, made anew and shared by all parameters


def state(adapter: Adapter, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name: `<name>.exp_avg`, `<name>.exp_avg_sq`, `<name>.step`, and what else it has."""
    return {
        f"{name}.{key}": torch.as_tensor(value).detach().cpu()
        for name, parameter in adapter.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if key not in _TABLES
    }


def restore(adapter: Adapter, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The reverse of `state`. KeyError if a tensor is missing, or belongs to another kind of optimiser."""
    saved: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition(".")
        saved.setdefault(name, {})[key] = tensor
    for name, parameter in adapter.named_parameters():
        if name not in saved:
            continue  # a parameter that hadn't had a gradient yet
        there = optimizer.state[parameter]
        if not there:
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)  # where the fused optimiser counts
            there.update(state_of(parameter, step, torch.zeros_like(parameter), torch.zeros_like(parameter)))
        if wrong := saved[name].keys() ^ (there.keys() - _TABLES):
            raise KeyError(f"{name}.{min(wrong)}")
        for key, tensor in saved[name].items():
            if isinstance(there[key], Tensor):
                there[key].copy_(tensor)
            else:
                there[key] = type(there[key])(tensor)

"""AdamW for one adapter: groups by the method's learning-rate factors, schedule, clipping, and a state that can be saved
without pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lorafit.adapter import Adapter

Schedule = Literal["constant", "linear", "cosine"]


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


def optimizer(adapter: Adapter, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over an adapter's parameters, one group for each learning-rate factor (kept as `scale` in the group)."""
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for _, layer in adapter.items():
        scales = layer.lr_scale()
        for name, parameter in layer.named_parameters():
            groups.setdefault(scales.get(name, 1.0), []).append(parameter)
    made = [{"params": params, "scale": scale} for scale, params in groups.items()]
    return torch.optim.AdamW(made, lr=lr, weight_decay=weight_decay, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of each group: lr times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def clip(adapter: Adapter, norm: float) -> float:
    """Scale the adapter's gradients to at most `norm` (0: leave them); returns the norm they had."""
    parameters = [p for p in adapter.parameters() if p.grad is not None]
    found = torch.nn.utils.clip_grad_norm_(parameters, norm if norm > 0 else math.inf)
    return float(found)


def state(adapter: Adapter, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name: `<name>.exp_avg`, `<name>.exp_avg_sq`, `<name>.step`."""
    return {
        f"{name}.{key}": value.detach().cpu()
        for name, parameter in adapter.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore(adapter: Adapter, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The reverse of `state`. KeyError if a tensor is missing."""
    for name, parameter in adapter.named_parameters():
        if not any(key.startswith(f"{name}.") for key in tensors):
            continue  # a parameter that hadn't had a gradient yet
        optimizer.state[parameter] = {  # all where the parameter is: the fused optimiser counts steps there too
            key: tensors[f"{name}.{key}"].to(parameter.device).clone() for key in ("step", "exp_avg", "exp_avg_sq")
        }

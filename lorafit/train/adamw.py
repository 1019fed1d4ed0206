"""AdamW with its state in fp32: torch's, but for where the state lies and who updates it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lorafit.native.adamw import Factors, takes, update

Room = Callable[[int, torch.dtype], Tensor]  # zeros (n,) of a type, wherever they lie


class AdamW:
    """What torch's fused AdamW does, for all parameters of a group in one call where there is a kernel for it.

    The state is there from the beginning and in one piece: small blocks that are made where activations have just been stay
    there, and the next step's don't fit between them (7B: 1 GB more, measured). Parameters are on the CPU.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], lr: float, weight_decay: float, room: Room) -> None:
        # Fused, torch's takes the numbers of a parameter and its gradient as they lie in memory, whatever their strides.
        self._fused = all(p.is_contiguous() for group in groups for p in group["params"])
        self._torch = torch.optim.AdamW([dict(g) for g in groups], lr=lr, weight_decay=weight_decay, fused=self._fused)
        self.param_groups: list[dict[str, Any]] = self._torch.param_groups
        self.state = self._torch.state
        self._parameters = parameters = [p for group in groups for p in group["params"]]
        self._steps = torch.zeros(len(parameters), dtype=torch.float32)
        places = room(sum(2 * p.numel() for p in parameters), parameters[0].dtype)
        for parameter, step in zip(parameters, self._steps, strict=True):
            mean, square, places = places.split([parameter.numel()] * 2 + [len(places) - 2 * parameter.numel()])
            self.state[parameter] = state_of(parameter, step, mean, square)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        given = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        every = [p for parameters in given for p in parameters]
        if not every:
            return
        if not takes(*every, *(p.grad for p in every)):  # type: ignore[misc]
            for p in every if self._fused else ():
                p.grad = p.grad.contiguous()  # type: ignore[union-attr]
            self._torch.step()
            increment_version(every)  # which torch's own doesn't do, see native/adamw.py
            return
        if len(every) == len(self._steps):
            self._steps += 1
        else:
            torch._foreach_add_([self.state[p]["step"] for p in every], 1)
        steps = dict(zip(self._parameters, self._steps.tolist(), strict=True))
        for group, parameters in zip(self.param_groups, given, strict=True):
            # All are at the same step, but for those that lacked a gradient once.
            for step, members in groupby(parameters, key=steps.__getitem__):
                self._update(group, list(members), step)

    def _update(self, group: Mapping[str, Any], members: Sequence[Tensor], step: float) -> None:
        states = [self.state[p] for p in members]
        update(
            members,
            [p.grad for p in members],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            Factors.of(step, group["lr"], group["weight_decay"], group["betas"], group["eps"]),
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def state_of(parameter: Tensor, step: Tensor, mean: Tensor, square: Tensor) -> dict[str, Tensor]:
    """What torch's AdamW keeps of a parameter: its steps () fp32, and both averages, as many numbers as the parameter has."""
    return {"step": step, "exp_avg": mean.view_as(parameter), "exp_avg_sq": square.view_as(parameter)}

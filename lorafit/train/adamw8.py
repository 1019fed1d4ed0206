"""AdamW with its state in 8 bits (arXiv 2110.02861): a quarter of the memory, in the format of bitsandbytes.

The averages are codes, see native/adamw8.py. Tensors of fewer than 4096 numbers stay fp32. The state of all others lies end to
end, so that without the kernel an update takes a few sweeps over pieces of it, however many tensors there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafit.native.adamw import Factors
from lorafit.native.adamw8 import BLOCK, Coded, plain_update, update
from lorafit.native.quantised import dynamic
from lorafit.train.adamw import Room

SMALL = 4096  # numbers below which a tensor's state stays fp32
PIECE = 1 << 16  # numbers that a sweep has in fp32 at once: they stay in the processor's cache


@dataclass(frozen=True)
class Span:
    """The numbers `start` to `stop` of a parameter; their state begins at `at`, where a block does."""

    parameter: Tensor
    start: int
    stop: int
    at: int

    @property
    def end(self) -> int:
        """Where the state of the next span begins."""
        return self.at + _whole(self.stop - self.start)

    def of(self, tensor: Tensor) -> Tensor:
        """These numbers of a tensor of the parameter's shape, as a view of it."""
        return tensor.view(-1)[self.start : self.stop]


class AdamW8bit:
    """What torch's AdamW does, with another state.

    `state` of a parameter: `step`, and `exp_avg` and `exp_avg_sq` in its shape. Of a large one these are codes, each with
    an `..._absmax` (blocks,). Parameters are fp32, contiguous and on the CPU.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], lr: float, weight_decay: float, room: Room) -> None:
        def those(large: bool) -> list[dict[str, Any]]:
            return [{**g, "params": [p for p in g["params"] if (p.numel() >= SMALL) == large]} for g in groups]

        self._small = torch.optim.AdamW(those(large=False), lr=lr, weight_decay=weight_decay, fused=True)
        defaults = {key: self._small.defaults[key] for key in ("lr", "weight_decay", "betas", "eps")}
        self._large = [{**defaults, **group} for group in those(large=True)]
        self.param_groups: list[dict[str, Any]] = [*self._small.param_groups, *self._large]
        self.state = self._small.state
        self._spans: list[list[Span]] = []
        at = 0
        for group in self._large:
            self._spans.append(spans := _spans(group["params"], at))
            at = spans[-1].end if spans else at
        self._mean, self._square = _zeros(at, True, room), _zeros(at, False, room)
        for span in (span for spans in self._spans for span in spans if span.start == 0):
            state = self.state[span.parameter] = {"step": torch.zeros((), dtype=torch.float32)}
            for key, average in (("exp_avg", self._mean), ("exp_avg_sq", self._square)):
                mine = average.part(span.at, span.at + _whole(span.parameter.numel()))
                state[key] = mine.codes[: span.parameter.numel()].view(span.parameter.shape)
                state[f"{key}_absmax"] = mine.absmax

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            parameter.grad = parameter.grad.contiguous()  # numbers are taken as they lie in memory
        self._small.step()
        for group, spans in zip(self._large, self._spans, strict=True):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["step"] += 1
            for piece in self._pieces(spans):
                if not self._swept(group, piece):
                    self._update(group, piece)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def rescale(self, parameter: Tensor, factor: Tensor) -> None:
        """Make the state what it would be had the parameter's gradients been `factor` times themselves, but for rounding."""
        powers = (factor, factor.square())
        state = self.state[parameter]
        if parameter.numel() < SMALL:
            for key, power in zip(("exp_avg", "exp_avg_sq"), powers, strict=True):
                if key in state:
                    state[key].mul_(power)
            return
        for span in (span for spans in self._spans for span in spans if span.parameter is parameter):
            for average, power in zip((self._mean, self._square), powers, strict=True):
                mine = average.part(span.at, span.end)
                numbers = mine.read()
                numbers[: span.stop - span.start].mul_(span.of(power.expand_as(parameter).contiguous()))
                mine.write(numbers)

    def _pieces(self, spans: Iterable[Span]) -> list[list[Span]]:
        """The spans with a gradient, those together that lie side by side and are at the same step."""
        pieces: list[list[Span]] = []
        before: tuple[int, float] = (-1, 0)
        for span in spans:
            if span.parameter.grad is None:
                continue
            step = float(self.state[span.parameter]["step"])
            if (span.at, step) == before and span.end - pieces[-1][0].at <= PIECE:
                pieces[-1].append(span)
            else:
                pieces.append([span])
            before = (span.end, step)
        return pieces

    def _swept(self, group: Mapping[str, Any], piece: Sequence[Span]) -> bool:
        """The update by the kernel; False where there is none."""
        factors = self._factors(group, piece)
        return all(
            update(
                span.of(span.parameter.detach()),
                span.of(span.parameter.grad),  # type: ignore[arg-type]
                self._mean.part(span.at, span.end),
                self._square.part(span.at, span.end),
                factors,
            )
            for span in piece
        )

    def _update(self, group: Mapping[str, Any], piece: Sequence[Span]) -> None:
        at, end = piece[0].at, piece[-1].end
        gradient = torch.zeros(end - at, dtype=torch.float32)
        for span in piece:
            gradient[span.at - at :][: span.stop - span.start] = span.of(span.parameter.grad)  # type: ignore[arg-type]
        factors = self._factors(group, piece)
        added = plain_update(gradient, self._mean.part(at, end), self._square.part(at, end), factors)
        for span in piece:
            mine = slice(span.at - at, span.at - at + span.stop - span.start)
            span.of(span.parameter.detach()).mul_(factors.decay).add_(added[mine])

    def _factors(self, group: Mapping[str, Any], piece: Sequence[Span]) -> Factors:
        step = float(self.state[piece[0].parameter]["step"])
        return Factors.of(step, group["lr"], group["weight_decay"], group["betas"], group["eps"])


def _zeros(n: int, signed: bool, room: Room) -> Coded:
    """An average of n numbers, whole blocks, that are zero."""
    made = Coded(room(n, torch.uint8), room(n // BLOCK, torch.float32), signed)
    # What fills up a tensor's last block stays zero, whatever absmax is restored.
    made.codes.fill_(int((dynamic("cpu", signed) == 0).nonzero()))
    return made


def _whole(n: int) -> int:
    """n numbers, filled up to whole blocks."""
    return -(-n // BLOCK) * BLOCK


def _spans(parameters: Iterable[Tensor], at: int) -> list[Span]:
    """The parameters one after the other from `at` on, cut where they are larger than a piece."""
    found: list[Span] = []
    for parameter in parameters:
        for start in range(0, parameter.numel(), PIECE):
            found.append(Span(parameter, start, min(start + PIECE, parameter.numel()), at))
            at = found[-1].end
    return found

"""AdamW with its state in 8 bits (arXiv 2110.02861): a quarter of the memory, in the format of bitsandbytes.

Both averages are cut into blocks of 256 numbers. A block keeps its largest magnitude in fp32 (absmax), a number the code of
the value nearest to its share of that, in a dynamic type: signed for the average of gradients, unsigned for that of their
squares. Tensors of fewer than 4096 numbers stay fp32. The state of all others lies end to end, so that an update takes a few
sweeps over pieces of it, however many tensors there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorafit.native.quantised import dynamic

BLOCK = 256  # numbers that share an absmax
SMALL = 4096  # numbers below which a tensor's state stays fp32
PIECE = 1 << 16  # numbers that a sweep has in fp32 at once: they stay in the processor's cache

Room = Callable[[int, torch.dtype], Tensor]  # zeros (n,) of a type, wherever they lie


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


class Average:
    """A running average of n numbers, whole blocks: codes (n,) uint8 and absmax (n / BLOCK,) fp32. It begins at zero."""

    def __init__(self, n: int, signed: bool, room: Room) -> None:
        self.signed = signed
        self.codes, self.absmax = room(n, torch.uint8), room(n // BLOCK, torch.float32)
        # What fills up a tensor's last block stays zero, whatever absmax is restored.
        self.codes.fill_(int((dynamic("cpu", signed) == 0).nonzero()))

    def read(self, at: int, end: int) -> Tensor:
        """The numbers from `at` to `end`, where blocks begin, in fp32."""
        shares = torch.index_select(dynamic("cpu", self.signed), 0, self.codes[at:end].int())
        return shares.view(-1, BLOCK).mul_(self.absmax[at // BLOCK : end // BLOCK, None]).view(-1)

    def write(self, at: int, numbers: Tensor) -> None:
        """Overwrite the numbers from `at` on."""
        blocks = numbers.view(-1, BLOCK)
        absmax = blocks.abs().amax(1)
        shares = (blocks / absmax.clamp(min=1e-38)[:, None]).view(-1)
        self.codes[at : at + len(shares)] = nearest(shares, self.signed)
        self.absmax[at // BLOCK : at // BLOCK + len(absmax)] = absmax

    def of(self, at: int, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (in the parameter's shape) and absmax of the parameter whose numbers begin at `at`."""
        n = parameter.numel()
        blocks = self.absmax[at // BLOCK : (at + _whole(n)) // BLOCK]
        return self.codes[at : at + n].view(parameter.shape), blocks


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
        self._mean, self._square = Average(at, True, room), Average(at, False, room)
        for span in (span for spans in self._spans for span in spans if span.start == 0):
            state = self.state[span.parameter] = {"step": torch.zeros(())}
            state["exp_avg"], state["exp_avg_absmax"] = self._mean.of(span.at, span.parameter)
            state["exp_avg_sq"], state["exp_avg_sq_absmax"] = self._square.of(span.at, span.parameter)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        self._small.step()
        for group, spans in zip(self._large, self._spans, strict=True):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["step"] += 1
            for piece in self._pieces(spans):
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
                numbers = average.read(span.at, span.end)
                numbers[: span.stop - span.start].mul_(span.of(power.expand_as(parameter).contiguous()))
                average.write(span.at, numbers)

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

    def _update(self, group: Mapping[str, Any], piece: Sequence[Span]) -> None:
        at, end = piece[0].at, piece[-1].end
        gradient = torch.zeros(end - at)
        for span in piece:
            gradient[span.at - at :][: span.stop - span.start] = span.of(span.parameter.grad)  # type: ignore[arg-type]
        (beta1, beta2), lr = group["betas"], group["lr"]
        step = float(self.state[piece[0].parameter]["step"])
        mean = self._mean.read(at, end).mul_(beta1).add_(gradient, alpha=1 - beta1)
        square = self._square.read(at, end).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = (square.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        for span in piece:
            mine = slice(span.at - at, span.at - at + span.stop - span.start)
            numbers = span.of(span.parameter.detach()).mul_(1 - lr * group["weight_decay"])
            numbers.addcdiv_(mean[mine], size[mine], value=-lr / (1 - beta1**step))
        self._mean.write(at, mean)
        self._square.write(at, square)


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


def nearest(shares: Tensor, signed: bool) -> Tensor:
    """The codes (n,) uint8 of the type's values nearest to shares (n,) fp32 in [-1, 1].

    Not by bisection, which is 50 times as slow (torch.bucketize, measured): the upper 16 bits of a share say which value it
    is, or which of two.
    """
    lower, middles = _cells(signed)
    cells = (shares.view(torch.int32) >> 16) + 32768
    codes = torch.index_select(lower, 0, cells)
    codes += shares > torch.index_select(middles, 0, cells)
    return codes


@cache
def _cells(signed: bool) -> tuple[Tensor, Tensor]:
    """For numbers with the same upper 16 bits, in the order of these as a whole number: the code of the least of them
    (65536,) uint8, and the middle between its value and the next, above which they have the next code (65536,) fp32."""
    values = dynamic("cpu", signed)
    between = (values[:-1] + values[1:]) / 2
    cells = torch.arange(-32768, 32768, dtype=torch.int32) << 16
    ends = torch.stack([cells, cells | 0xFFFF]).view(torch.float32).nan_to_num()
    codes = torch.bucketize(ends.amin(0), between)
    return codes.to(torch.uint8), torch.cat([between, torch.tensor([torch.inf])])[codes]

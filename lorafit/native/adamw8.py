"""AdamW's update where both averages are codes of 8 bits (arXiv 2110.02861): the kernel, and its twin.

A block of 256 numbers keeps its largest magnitude in fp32 (absmax), a number the code of the value nearest to its share of
that, in a dynamic type: signed for the average of gradients, unsigned for that of their squares.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lorafit.native.adamw import Factors
from lorafit.native.kernel import Kernel, gives
from lorafit.native.quantised import dynamic

BLOCK = 256  # numbers that share an absmax

_update = Kernel("adamw8", "ppppppppppppiffffffff")


@dataclass(frozen=True)
class Coded:
    """A running average of n numbers, whole blocks: codes (n,) uint8 and absmax (n / BLOCK,) fp32."""

    codes: Tensor
    absmax: Tensor
    signed: bool

    def part(self, at: int, end: int) -> Coded:
        """The numbers from `at` to `end`, where blocks begin; a view."""
        return Coded(self.codes[at:end], self.absmax[at // BLOCK : end // BLOCK], self.signed)

    def read(self) -> Tensor:
        """The numbers, (n,) fp32."""
        shares = torch.index_select(dynamic("cpu", self.signed), 0, self.codes.int())
        return shares.view(-1, BLOCK).mul_(self.absmax[:, None]).view(-1)

    def write(self, numbers: Tensor) -> None:
        """Overwrite them with (n,) fp32."""
        blocks = numbers.view(-1, BLOCK)
        absmax = blocks.abs().amax(1)
        self.codes.copy_(nearest((blocks / absmax.clamp(min=1e-38)[:, None]).view(-1), self.signed))
        self.absmax.copy_(absmax)


def update(numbers: Tensor, gradient: Tensor, mean: Coded, square: Coded, factors: Factors) -> bool:
    """Update numbers (n,) fp32 on the CPU and both averages with its gradient (n,), in one sweep; False, and nothing is done,
    where there is no kernel. The averages hold n numbers, filled up to whole blocks."""
    if numbers.dtype != torch.float32 or not gives(numbers.dtype, numbers, gradient, mean.codes, square.codes):
        return False
    tables = (*_tables(mean.signed), *_tables(square.signed))
    states = (mean.codes, mean.absmax, square.codes, square.absmax)
    _update(numbers.dtype, numbers, gradient, *states, *tables, len(numbers), *factors.scalars())
    increment_version(numbers)  # as torch's own operations do: DoRA sees by it that a norm is out of date
    return True


def plain_update(gradient: Tensor, mean: Coded, square: Coded, factors: Factors) -> Tensor:
    """The twin: updates the averages of n numbers, whole blocks, with their gradient (n,) and returns what is added to the
    numbers, once these are decayed.

    Only of operations that are rounded alike everywhere, so that the kernel's result is the same bit for bit: not those of torch
    that multiply and add at once, nor its root in fp32, which isn't always the nearest number.
    """
    average = mean.read().mul_(factors.beta1).add_(gradient * (1 - factors.beta1))
    squares = square.read().mul_(factors.beta2).add_((gradient * gradient).mul_(1 - factors.beta2))
    size = squares.double().sqrt_().float().div_(factors.spread).add_(factors.eps)
    mean.write(average)
    square.write(squares)
    return average.mul_(factors.pace).div_(size)


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
def _tables(signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As the kernel takes a type: its values by code (256,), the least code of numbers with the same upper 16 bits (65536,)
    uint8, and the middles between neighbouring values (256,), the last of which nothing is above."""
    values = dynamic("cpu", signed)
    return values, _cells(signed)[0], torch.cat([_between(values), torch.tensor([torch.inf])])


@cache
def _cells(signed: bool) -> tuple[Tensor, Tensor]:
    """For numbers with the same upper 16 bits, in the order of these as a whole number: the code of the least of them
    (65536,) uint8, and the middle between its value and the next, above which they have the next code (65536,) fp32."""
    between = _between(dynamic("cpu", signed))
    cells = torch.arange(-32768, 32768, dtype=torch.int32) << 16
    ends = torch.stack([cells, cells | 0xFFFF]).view(torch.float32).nan_to_num()
    codes = torch.bucketize(ends.amin(0), between)
    return codes.to(torch.uint8), torch.cat([between, torch.tensor([torch.inf])])[codes]


def _between(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2

"""AdamW's update (arXiv 1711.05101) and the norm of gradients, for all tensors of an adapter in one call. The twins are torch's
own, see train/adamw.py and train/optim.py."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lorafit.native.kernel import Kernel, gives

_sum_squares = Kernel("sum_squares", "pip")
_scale = Kernel("scale", "pif")
_update = Kernel("adamw", "piffffffff")


@dataclass(frozen=True)
class Factors:
    """What an update multiplies and divides by. The kernels, and the twin of adamw8's, round each to fp32."""

    beta1: float
    beta2: float
    eps: float
    decay: float  # of the parameter, by weight decay
    spread: float  # of the root of the squares, which begin at zero
    pace: float  # of the mean: minus the learning rate, and what the mean lacks at first

    @staticmethod
    def of(step: float, lr: float, weight_decay: float, betas: tuple[float, float], eps: float) -> Factors:
        """Of a step, counted from 1."""
        beta1, beta2 = betas
        spread, pace = math.sqrt(1 - beta2**step), -lr / (1 - beta1**step)
        return Factors(beta1, beta2, eps, 1 - lr * weight_decay, spread, pace)

    def scalars(self) -> tuple[float, ...]:
        """As the kernels take them."""
        f = self
        return f.beta1, 1 - f.beta1, f.beta2, 1 - f.beta2, f.eps, f.decay, f.spread, f.pace


def takes(*tensors: Tensor) -> bool:
    """There are kernels for these tensors: fp32, on the CPU, numbers one after another."""
    return gives(torch.float32, *tensors) and all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


def norm(gradients: Sequence[Tensor]) -> float:
    """The root of the sum of all squares. The tensors are such as `takes` takes."""
    found = ctypes.c_double()
    _sum_squares(torch.float32, *_items(gradients=gradients), ctypes.addressof(found))
    return math.sqrt(found.value) if found.value >= 0 else math.nan


def scale(gradients: Sequence[Tensor], factor: float) -> None:
    """Multiply all by a factor, in place."""
    _scale(torch.float32, *_items(gradients=gradients), factor)
    increment_version(gradients)


def update(
    numbers: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    factors: Factors,
) -> None:
    """Update the i-th of the numbers and both of its averages with the i-th gradient, all of one shape."""
    _update(torch.float32, *_items(numbers, gradients, means, squares), *factors.scalars())
    increment_version(numbers)  # as torch's own operations do: DoRA sees by it that a norm is out of date


def _items(
    numbers: Sequence[Tensor] = (),
    gradients: Sequence[Tensor] = (),
    means: Sequence[Tensor] = (),
    squares: Sequence[Tensor] = (),
) -> tuple[ctypes.Array[ctypes.c_int64], int]:
    """An array of the kernels' items, and how many."""
    many = len(gradients)
    places = [
        map(Tensor.data_ptr, tensors) if tensors else repeat(0, many)
        for tensors in (numbers, gradients, means, squares)
    ]
    flat = list(chain.from_iterable(zip(*places, map(Tensor.numel, gradients), strict=True)))
    return (ctypes.c_int64 * len(flat))(*flat), many

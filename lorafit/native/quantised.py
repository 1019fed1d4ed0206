"""A frozen weight in 4 or 8 bits, and the way there and back.

The layout is that of bitsandbytes. In 4 bits (`nf4`: arXiv 2305.14314, section 3; `fp4`: a sign, two bits of exponent and one
of mantissa): the weight row after row in blocks of 64 numbers, each block with its largest magnitude in fp32 (absmax), each
number a code for what it is as a share of that; two codes to a byte, the first in the upper half. With double quantisation
the absmax are themselves codes of 8 bits, in blocks of 256, after their mean was taken off. `int8`: a whole number from -127
to 127 for each weight, and the largest magnitude of each row. `w8a8`: the same of the weight turned on
both sides (`turned`), for products that round what they are multiplied with too (rounded.py).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from lorafit.native import build
from lorafit.native.kernel import Kernel, gives

BLOCK = 64  # numbers that share an absmax
NESTED = 256  # absmax that share one of theirs

# Where each kind's codes lie in [-1, 1], by code. nf4: quantiles of the normal distribution, as published.
TABLES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sign * size / 12.0 for sign in (1.0, -1.0) for size in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)),
}
ROUNDED = "w8a8"
BY_ROWS = ("int8", ROUNDED)
KINDS = (*TABLES, *BY_ROWS)

PIECE = (
    1 << 22
)  # numbers that the twin quantises at a time: what it needs besides the weight and its codes is some 100 MB

_quantise = Kernel("quantise_four_bits", "pppppi")
_four_bits = Kernel("dequantise_four_bits", "ppppppppi")
_eight_bits = Kernel("dequantise_eight_bits", "pppii")
_few_rows = Kernel("few_rows", "ppppppppppiii")

FEW = 8  # rows up to which a product reads codes: with more of them the numbers are made once for all


@dataclass(frozen=True)
class Quantised:
    """A weight (out, in) of a kind in KINDS.

    4 bits: codes (⌈out·in / 2⌉, 1) uint8; absmax (blocks,) fp32, or uint8 with `nested` (⌈blocks / 256⌉,) and `offset` (),
    both fp32. BY_ROWS: codes (out, in) int8; absmax (out,) fp32.
    """

    kind: str
    shape: torch.Size
    codes: Tensor
    absmax: Tensor
    nested: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        scales = [self.absmax] if self.nested is None else [self.nested, self.offset]
        assert all(t is not None and t.dtype == torch.float32 for t in scales), "absmax were cast with the model"

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        parts = (self.codes, self.absmax, self.nested, self.offset)
        return sum(t.nbytes for t in parts if t is not None)


@torch.no_grad()
def quantise(weight: Tensor, kind: str, double: bool = True) -> Quantised:
    """The weight (out, in), of any float type, as `kind`; `double` quantisation of the absmax where they are of blocks.

    A number that isn't finite makes the absmax of its block so.
    """
    if kind == ROUNDED:
        return replace(_by_rows(_turned_both(weight)), kind=kind)
    if kind == "int8":
        return _by_rows(weight)
    shape, flat = weight.shape, weight.reshape(-1)
    codes = torch.empty((len(flat) + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-len(flat) // BLOCK), dtype=torch.float32, device=weight.device)
    if gives(flat.dtype, flat):
        _quantise(flat.dtype, flat, *_middles(kind, "cpu"), codes, absmax, len(flat))
    else:
        plain_blocks(flat, kind, codes[:, 0], absmax)
    if not double:
        return Quantised(kind, shape, codes, absmax)
    offset = absmax.mean()
    return Quantised(kind, shape, codes, *_nested(absmax - offset), offset)


def plain_blocks(flat: Tensor, kind: str, codes: Tensor, absmax: Tensor) -> None:
    """The kernel's twin: codes (⌈n / 2⌉,) and absmax (blocks,) of the numbers (n,), written to where they belong.

    A share is compared with the middles between the table's values; whole blocks are multiplied by 1/absmax, the rest is
    divided: as bitsandbytes does, so that both round alike.
    """
    if len(flat) > PIECE:
        for start in range(0, len(flat), PIECE):
            plain_blocks(flat[start : start + PIECE], kind, codes[start // 2 :], absmax[start // BLOCK :])
        return
    flat = flat.float()
    whole = len(flat) // BLOCK
    blocks, rest = flat[: whole * BLOCK].view(whole, BLOCK), flat[whole * BLOCK :]
    absmax[:whole] = blocks.abs().amax(1)
    shares = [(blocks * (1 / absmax[:whole].clamp(min=1e-38))[:, None]).clamp_(-1, 1).flatten()]
    if len(rest):
        absmax[whole] = rest.abs().amax().clamp(min=1e-38)
        shares.append((rest / absmax[whole]).clamp_(-1, 1))
    if len(flat) % 2:
        shares.append(flat.new_zeros(1))
    middles, order = _middles(kind, str(flat.device))
    found = order[torch.bucketize(torch.cat(shares), middles, out_int32=True)]
    codes[: len(found) // 2] = (found[::2] << 4) | found[1::2]


@cache
def _middles(kind: str, device: str) -> tuple[Tensor, Tensor]:
    """The middles between neighbouring values of a table (15,), and the codes in the order of their values (16,). Of fp4's
    two zeros the plain one is met from below, and at 0 itself."""
    values = table(kind, device)
    order = torch.tensor(sorted(range(16), key=TABLES[kind].__getitem__), device=device)
    return (values[order[:-1]] + values[order[1:]]) / 2, order.to(torch.uint8)


def _nested(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (blocks,) uint8 of the absmax, and the largest magnitude of each 256 of them."""
    parts = torch.nn.functional.pad(absmax, (0, -len(absmax) % NESTED)).view(-1, NESTED)
    nested = parts.abs().amax(1)
    shares = (parts * (1 / nested.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    places = ((shares + 1) * 0.5 * 65535 + 0.5).int().clamp_(0, 65535)  # what isn't a number has no place
    codes = _places(str(absmax.device))[places]
    codes[nested == 0] = 0
    return codes.flatten()[: len(absmax)].clone(), nested


@cache
def _places(device: str) -> Tensor:
    """The code of each of 65,536 places in [-1, 1]: bitsandbytes, on the CPU, rounds a share to one of them first."""
    values = dynamic("cpu")
    places = -1 + 2 * torch.arange(65536).float() / 65535
    return torch.bucketize(places, (values[:-1] + values[1:]) / 2).to(torch.uint8).to(device)


def _by_rows(weight: Tensor) -> Quantised:
    """int8 as bitsandbytes' Linear8bitLt stores it. Half of 1/127 of the largest number of its row is a number's largest
    error; in blocks of 64 by the dynamic type of 8 bits it would be four times that."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    rows = max(1, PIECE // weight.shape[1])
    for start in range(0, len(weight), rows):
        piece = weight[start : start + rows].float()
        absmax[start : start + rows] = most = piece.abs().amax(1)
        codes[start : start + rows] = (piece * (127.0 / most.clamp(min=1e-38))[:, None]).round_().to(torch.int8)
    return Quantised("int8", weight.shape, codes, absmax)


TURNED = 32  # numbers that are turned together


@cache
def _hadamard(device: str) -> Tensor:
    """The matrix (32, 32) of ±1/√32 that is its own inverse."""
    made = torch.ones(1, 1, device=device)
    while len(made) < TURNED:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made / math.sqrt(TURNED)


def turned(x: Tensor) -> Tensor:
    """The rows of x (n, k), fp32, times the Hadamard matrix, block by block; numbers after the last whole block stay. Its own
    inverse."""
    whole = x.shape[1] // TURNED * TURNED
    made = x[:, :whole].reshape(-1, TURNED) @ _hadamard(str(x.device))
    return torch.cat([made.view(len(x), whole), x[:, whole:]], 1)


def _turned_both(weight: Tensor) -> Tensor:
    return turned(turned(weight.float()).t()).t()


def dequantise(q: Quantised, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The weight (out, in), computed in fp32 and rounded once; in `out`, which is contiguous, or a new tensor."""
    on_gpu = _on_gpu() if q.codes.is_cuda and q.kind not in BY_ROWS and build.on() else None
    if on_gpu is None and (q.kind == ROUNDED or not gives(dtype, q.codes)):
        made = plain_dequantise(q, dtype)
        return made if out is None else out.copy_(made)
    out = torch.empty(q.shape, dtype=dtype, device=q.codes.device) if out is None else out
    if on_gpu is not None:
        device = str(q.codes.device)
        on_gpu(q.codes, table(q.kind, device), q.absmax, q.nested, q.offset, dynamic(device), out)
        return out
    if q.kind == "int8":
        _eight_bits(dtype, q.codes, q.absmax, out, *q.shape)
        return out
    _four_bits(dtype, *_given(q), out, out.numel())
    return out


@cache
def _on_gpu() -> Callable[..., None] | None:
    """The kernel for GPUs; None where there is no Triton, or not what it compiles with."""
    try:
        from lorafit.native.quantised_triton import four_bits

        zeros = torch.zeros(256, device="cuda")
        four_bits(zeros.byte(), zeros, zeros, None, None, zeros, torch.empty_like(zeros))
    except Exception:  # whatever it is, there is the twin
        return None
    return four_bits


def _given(q: Quantised) -> tuple[Tensor | None, ...]:
    """A weight of 4 bits as the kernels take it."""
    scales = (q.absmax, None, None, None) if q.nested is None else (None, q.absmax, q.nested, q.offset)
    return q.codes, table(q.kind, "cpu"), *scales, dynamic("cpu")


def few_rows(x: Tensor, q: Quantised, bias: Tensor | None = None) -> Tensor | None:
    """x (n, in) times the weight, plus bias (out,), without a gradient: what generation asks for token by token. None where
    the numbers have to be made first: for more rows than a few, codes by rows, or rows that aren't whole blocks."""
    if q.kind in BY_ROWS or not 0 < len(x) <= FEW or x.shape[1] % BLOCK or not gives(x.dtype, x, q.codes):
        return None
    x = x.contiguous()
    y = x.new_empty(len(x), q.shape[0])
    _few_rows(x.dtype, *_given(q), x, bias, y, *x.shape, q.shape[0])
    return y


@torch.no_grad()
def plain_dequantise(q: Quantised, dtype: torch.dtype) -> Tensor:
    """The twin, in torch's own operations."""
    if q.kind in BY_ROWS:
        numbers = q.codes * q.absmax[:, None] * (1 / 127)
        return (_turned_both(numbers) if q.kind == ROUNDED else numbers).to(dtype)
    codes = q.codes.flatten().int()
    shares = torch.nn.functional.embedding(codes, _pairs(q.kind, str(codes.device))).flatten()[: q.shape.numel()]
    absmax = blocks_absmax(q)
    whole = len(shares) // BLOCK
    shares[: whole * BLOCK].view(whole, BLOCK).mul_(absmax[:whole, None])
    shares[whole * BLOCK :].mul_(absmax[whole:].repeat_interleave(BLOCK)[: len(shares) - whole * BLOCK])
    return shares.view(q.shape).to(dtype)


class _Scratch(threading.local):
    """A thread's place for numbers, kept between calls. Made and freed for each product, they would leave holes between what
    is kept for the backward: that took up to the memory of the 16-bit model (measured)."""

    kept: Tensor | None = None

    def of(self, size: int) -> Tensor:
        """This many bytes; what was in them is gone."""
        if self.kept is None or len(self.kept) < size:
            self.kept = None
            self.kept = torch.empty(size, dtype=torch.uint8)
        return self.kept


_scratch = _Scratch()


def dequantise_all(weights: Sequence[Quantised], dtype: torch.dtype) -> list[Tensor]:
    """The weights in memory that the thread's next call uses again."""
    if any(q.codes.device.type != "cpu" for q in weights):
        return [dequantise(q, dtype) for q in weights]
    ends = list(accumulate(-(-q.shape.numel() * dtype.itemsize // 64) * 64 for q in weights))
    room = _scratch.of(ends[-1]) if ends else torch.empty(0)
    starts = [0, *ends[:-1]]
    return [
        dequantise(q, dtype, room[start : start + q.shape.numel() * dtype.itemsize].view(dtype).view(q.shape))
        for q, start in zip(weights, starts, strict=False)
    ]


def blocks_absmax(q: Quantised) -> Tensor:
    """The absmax of each block, (blocks,) fp32."""
    if q.nested is None or q.offset is None:
        return q.absmax
    sizes = dynamic(str(q.absmax.device))[q.absmax.int()]
    return sizes * q.nested.repeat_interleave(NESTED)[: len(sizes)] + q.offset


@cache
def table(kind: str, device: str) -> Tensor:
    """What each code of 4 bits stands for, (16,) fp32."""
    return torch.tensor(TABLES[kind], device=device)


@cache
def _pairs(kind: str, device: str) -> Tensor:
    """The two shares that a byte stands for, (256, 2)."""
    one = table(kind, device)
    return torch.stack([one.repeat_interleave(16), one.repeat(16)], 1)


@cache
def dynamic(device: str, signed: bool = True) -> Tensor:
    """What each code of 8 bits of a dynamic type (arXiv 1511.04561) stands for, (256,) fp32, ascending.

    Seven decades from 1e-6 on, the i-th cut into 2^i steps whose middles are its values, with either sign; and 0 and 1.
    Without signs there is room for twice as many steps.
    """
    found = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        sizes = (10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        found += [*sizes, *(-size for size in sizes if signed)]
    return torch.tensor(sorted(found), device=device)

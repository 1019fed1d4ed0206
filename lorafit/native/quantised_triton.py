"""The numbers of a weight in 4 bits, made on a GPU in one pass: a Triton kernel beside the twin in quantised.py.

In torch's own operations the same takes some eight passes over memory, several times what the product after it takes.
Importing this module needs Triton, which comes with torch's CUDA builds.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BYTES = 1024  # of codes, for each program


@triton.jit  # type: ignore[untyped-decorator]
def _four_bits(  # type: ignore[no-untyped-def]  # Triton resolves types itself, and takes no others
    codes,
    table,
    absmax,
    nested,
    offset,
    dynamic,
    out,
    n,
    double: tl.constexpr,
    size: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * size
    at = first + tl.arange(0, size)
    there = at < (n + 1) // 2
    byte = tl.load(codes + at, mask=there, other=0).to(tl.int32)
    block = at // 32  # 64 numbers share an absmax
    if double:
        code = tl.load(absmax + block, mask=there, other=0).to(tl.int32)
        scale = tl.load(dynamic + code) * tl.load(nested + block // 256, mask=there, other=0) + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=there, other=0)
    pairs = tl.interleave(tl.load(table + (byte >> 4)) * scale, tl.load(table + (byte & 15)) * scale)
    to = 2 * first + tl.arange(0, 2 * size)
    tl.store(out + to, pairs.to(out.dtype.element_ty), mask=to < n)


def four_bits(
    codes: Tensor,
    table: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    dynamic: Tensor,
    out: Tensor,
) -> None:
    """Fill `out`, contiguous, of any float type, with what the codes (⌈n / 2⌉, 1) stand for; all on one GPU. The table of 4
    bits is (16,), that of 8 bits (256,); see quantised.Quantised for the others."""
    n = out.numel()
    # Products and sums are rounded one by one, as in the twin: not fused.
    _four_bits[(triton.cdiv(n, 2 * BYTES),)](
        codes, table, absmax, nested, offset, dynamic, out, n, nested is not None, BYTES, enable_fp_fusion=False
    )

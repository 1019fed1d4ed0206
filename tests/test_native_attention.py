"""The attention kernel against its plain twin, and both against a softmax written out in fp64."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lorafit.native import kernel
from lorafit.native.attention import attend, plain_attend
from lorafit.native.build import library

FP32 = 1e-5  # of the largest number of the right result
# bf16 keeps 8 bits, so rounding a result costs 2^-9 of it. Probabilities and their gradients are rounded too before they are
# multiplied, and the gradient of a score is a difference: measured up to 0.015.
BF16 = {"out": 2**-7, "dq": 0.025, "dk": 0.025, "dv": 2**-6}

HEADS = [(1, 1), (3, 1), (8, 1), (9, 3), (4, 4)]
DIMS = [24, 64, 80, 128]
LENGTHS = [[1], [2], [15], [16], [17], [31], [33], [205], [700], [1, 2, 40, 0, 300, 7, 33, 64], [513, 1, 256, 257]]
WINDOWS = [None, 1, 7, 64, 5000]

Result = dict[str, Tensor]


@pytest.fixture(autouse=True)
def compiler() -> None:
    if library() is None:
        pytest.skip("no native kernels: no C++ compiler, or switched off")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(n: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, size: float = 1.0) -> tuple[Tensor, ...]:
    """q, k, v as slices of one fused projection, and the gradient of the output."""
    make = torch.Generator().manual_seed(n * 1000 + heads[0] * 100 + dim)
    fused = (torch.randn(n, (heads[0] + 2 * heads[1]) * dim, generator=make) * size).to(dtype)
    parts = fused.split([h * dim for h in (heads[0], heads[1], heads[1])], 1)
    dout = torch.randn(n, heads[0] * dim, generator=make).to(dtype)
    return *(x.unflatten(1, (-1, dim)) for x in parts), dout


def run(f, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *args) -> Result:
    # Views of a leaf, so that the kernel meets the strides of the fused tensor.
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = f(q, k, v, *args)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    scale: float,
    window: int | None,
    before=None,
) -> Tensor:
    """The definition: one mask over all pairs of tokens of the row."""
    n, heads, dim = q.shape
    group = heads // k.shape[1]
    doc = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    others = [None] * len(lengths) if before is None else before
    place = torch.cat(
        [torch.arange(n) + (0 if o is None else lengths[o]) for n, o in zip(lengths, others, strict=True)]
    )
    ahead = place[:, None] - place[None, :]
    beginning = torch.tensor([-1 if o is None else o for o in others])[doc]
    seen = (
        ((doc[:, None] == doc[None, :]) | (beginning[:, None] == doc[None, :])) & (ahead >= 0) & (ahead < (window or n))
    )
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1)) * scale
    weights = torch.exp(scores - scores.masked_fill(~seen, -math.inf).amax(-1, keepdim=True)) * seen
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(group, 1)).reshape(n, heads * dim)


def wide(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in tensors)


def errors(got: Result, right: Result) -> dict[str, float]:
    """The largest error of each result as a share of its largest number; a gradient's, of the largest of all gradients.

    With a window of 1 dq and dk are 0 and have no scale of their own.
    """
    gradients = max(float(right[name].abs().max()) for name in ("dq", "dk", "dv"))
    size = {name: gradients if name.startswith("d") else float(x.abs().max()) for name, x in right.items()}
    return {name: float((got[name].double() - right[name]).abs().max()) / size[name] for name in right}


def cases() -> list:
    """Every length with every window, and every kind of heads with every dimension."""
    mixed = LENGTHS[-2]
    some = [(lengths, (3, 1), 64, window) for lengths in LENGTHS for window in WINDOWS]
    some += [(mixed, heads, dim, window) for heads in HEADS for dim in DIMS for window in (None, 64)]
    some += [([70, 20], (2, 2), dim, None) for dim in (1, 8, 16, 33, 96, 256)]
    return some


@pytest.mark.parametrize(("lengths", "heads", "dim", "window"), cases())
def test_fp32_equals_the_plain_twin(lengths, heads, dim, window):
    given = inputs(sum(lengths), heads, dim, torch.float32)
    args = (lengths, dim**-0.5, window)
    got = run(attend, *given, *args)
    assert max(errors(got, run(plain_attend, *given, *args)).values()) < FP32
    assert max(errors(got, run(plain_attend, *wide(given), *args)).values()) < FP32


@pytest.mark.parametrize(("lengths", "heads", "dim", "window"), cases())
def test_bf16_equals_fp32_of_the_same_inputs(lengths, heads, dim, window):
    given = inputs(sum(lengths), heads, dim, torch.bfloat16)
    args = (lengths, dim**-0.5, window)
    got = run(attend, *given, *args)
    assert all(x.dtype == torch.bfloat16 for x in got.values())
    for name, error in errors(got, run(plain_attend, *(x.float() for x in given), *args)).items():
        assert error < BF16[name], name


# Documents that go on from others: the same, different ones, long ones, from one after themselves, with nothing of their own.
SHARED = [
    ([40, 30, 1], [None, 0, 0]),
    ([31, 32, 33, 64, 5], [None, 0, 0, None, 3]),
    ([300, 700, 33, 64, 1000], [None, 0, 0, None, 3]),
    ([5, 20, 87, 600, 128, 1, 0, 0], [3, 3, 3, None, 3, None, 3, 5]),
    ([1024, 3, 513, 256, 1025], [None, 0, None, 2, 0]),
]


@pytest.mark.parametrize(("lengths", "before"), SHARED)
@pytest.mark.parametrize("window", [None, 7, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_that_go_on_from_others(lengths, before, window, dtype, threads):
    dim = 64
    given = inputs(sum(lengths), (6, 2), dim, dtype)
    args = (lengths, dim**-0.5, window, before)
    plain = run(plain_attend, *wide(given), *args)
    for number in (1, 2):
        threads(number)
        for name, error in errors(run(attend, *given, *args), plain).items():
            assert error < (FP32 if dtype == torch.float32 else BF16[name]), name
    assert max(errors(plain, run(dense, *wide(given), *args)).values()) < 1e-12


@pytest.mark.parametrize("before", [[None, 0], [1, None, 0], [None, None, 3], [None, None, -1], [2, None, 2]])
def test_documents_that_cannot_go_on_from_others(before):
    q, k, v, _ = inputs(12, (2, 2), 16, torch.float32)
    with pytest.raises(ValueError, match="go on from"):
        attend(q, k, v, [4, 4, 4], before=before)


@pytest.mark.parametrize("dim", [24, 64])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("before", [(), (2, 2, None, 2)])
def test_the_kernel_for_any_processor(generic, monkeypatch, dim, window, before):
    lengths = [1, 17, 300, 64]
    monkeypatch.setattr(kernel, "library", lambda: generic)
    for dtype, tolerance in ((torch.float32, dict.fromkeys(BF16, FP32)), (torch.bfloat16, BF16)):
        given = inputs(sum(lengths), (4, 2), dim, dtype)
        args = (lengths, dim**-0.5, window, before)
        got = run(attend, *given, *args)
        for name, error in errors(got, run(plain_attend, *wide(given), *args)).items():
            assert error < tolerance[name], (dtype, name)


@pytest.mark.parametrize("window", [None, 7, 64])
@pytest.mark.parametrize("lengths", [[1, 40, 0, 17, 100], [300]])
def test_both_equal_the_softmax_written_out(lengths, window):
    given = inputs(sum(lengths), (8, 2), 24, torch.float32)
    args = (lengths, 0.3, window)
    right = run(dense, *wide(given), *args)
    assert max(errors(run(attend, *given, *args), right).values()) < FP32
    assert max(errors(run(plain_attend, *wide(given), *args), right).values()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_do_not_overflow(dtype):
    lengths = [300, 31]
    given = inputs(sum(lengths), (3, 1), 64, dtype, size=30.0)  # scores of some thousands
    got = run(attend, *given, lengths, 64**-0.5, None)
    right = run(plain_attend, *wide(given), lengths, 64**-0.5, None)
    # fp32 scores of thousands are themselves only good to 1e-4 or so, and their exponentials with them.
    tolerance = {name: 2e-3 if dtype == torch.float32 else 0.05 for name in right}
    for name, error in errors(got, right).items():
        assert error < tolerance[name], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "window"), [([205] * 4, None), ([1500], None), ([1500], 300), ([900, 40, 700], 64)]
)
def test_the_number_of_threads_changes_nothing(dtype, lengths, window, threads):
    given = inputs(sum(lengths), (6, 2), 64, dtype)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results += [run(attend, *given, lengths, 0.125, window) for _ in range(2)]
    for other in results[1:]:
        for name, right in results[0].items():
            assert torch.equal(other[name], right), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_are_isolated(dtype):
    lengths = [33, 300, 50]
    q, k, v, dout = inputs(sum(lengths), (3, 1), 64, dtype)
    before = run(attend, q, k, v, dout, lengths, 0.125, None)
    changed = [x.clone() for x in (q, k, v, dout)]
    for x in changed:
        x[33:333] = x[33:333] * 2 + 1
    after = run(attend, *changed, lengths, 0.125, None)
    alone = run(attend, *(x[:33] for x in (q, k, v, dout)), [33], 0.125, None)
    for name, x in before.items():
        assert torch.equal(x[:33], after[name][:33]) and torch.equal(x[333:], after[name][333:])
        assert not torch.equal(x[33:333], after[name][33:333])
        assert torch.equal(x[:33], alone[name])


def test_a_query_sees_no_later_key():
    q, k, v, _ = inputs(600, (3, 1), 64, torch.float32)
    before = attend(q, k, v, [600])
    k, v = k.clone(), v.clone()
    k[401:], v[401:] = 9.0, -9.0
    after = attend(q, k, v, [600])
    assert torch.equal(before[:401], after[:401])
    assert not torch.equal(before[401], after[401])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout_gives_the_same(dtype):
    lengths = [100, 29]
    given = inputs(129, (4, 2), 64, dtype)
    strided = run(attend, *given, lengths, 0.125, None)
    plain = run(attend, *(x.contiguous() for x in given), lengths, 0.125, None)
    # Heads before tokens, as transformers hands them over; the gradient of a sum, which has no strides at all.
    turned = run(
        attend, *(x.transpose(0, 1).contiguous().transpose(0, 1) for x in given[:3]), given[3], lengths, 0.125, None
    )
    for name, x in strided.items():
        assert torch.equal(x, plain[name]) and torch.equal(x, turned[name])
    ones = torch.ones(1, 1, dtype=dtype).expand(129, 256)
    a, b = (run(attend, *given[:3], dout, lengths, 0.125, None) for dout in (ones, ones.contiguous()))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_stay_as_they_are_and_nan_is_not_hidden(dtype):
    given = inputs(90, (3, 1), 64, dtype)
    copies = [x.clone() for x in given]
    run(attend, *given, [50, 40], 0.125, None)
    assert all(torch.equal(x, y) for x, y in zip(given, copies, strict=True))
    k = given[1].clone()
    k[60, 0, 5] = math.nan
    out = attend(given[0], k, given[2], [50, 40])
    assert not out[:60].isnan().any() and out[60:].isnan().all()


def test_what_the_kernel_keeps_is_linear_in_the_tokens():
    q, k, v, _ = inputs(1000, (3, 1), 64, torch.bfloat16)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attend(q.requires_grad_(), k, v, [1000])
    assert sum(kept) == 1000 * 64 * (3 + 1 + 1 + 3) + 1000 * 3


def test_other_types_and_empty_rows_take_the_plain_path():
    given = inputs(40, (2, 1), 16, torch.float64)
    assert torch.equal(attend(*given[:3], [40]), plain_attend(*given[:3], [40]))
    given = inputs(40, (2, 1), 16, torch.float32)
    assert attend(*(x[:0] for x in given[:3]), []).shape == (0, 32)


def test_wrong_arguments_are_refused():
    q, k, v, _ = inputs(40, (3, 1), 16, torch.float32)
    with pytest.raises(ValueError, match="documents of 39"):
        attend(q, k, v, [30, 9])
    with pytest.raises(ValueError, match="documents of"):
        attend(q, k, v, [50, -10])
    with pytest.raises(ValueError, match="don't go with"):
        attend(q[:, :, :8], k, v, [40])
    with pytest.raises(ValueError, match="sees nothing"):
        attend(q, k, v, [40], window=0)
    with pytest.raises(ValueError, match="scale"):
        attend(q, k, v, [40], scale=-0.25)


def test_too_little_memory_for_scratch_is_an_error_and_not_an_end():
    code = """
import resource, torch
from lorafit.native import attention as a

def tensors(n):
    return [torch.randn(n, heads, 64).bfloat16() for heads in (9, 3, 3)]

def run(n, q, k, v):
    out, lse = torch.empty(n, 576).bfloat16(), torch.empty(9, n)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    tail = ((a.ctypes.c_int64 * 2)(0, n), (a.ctypes.c_int64 * 1)(-1), 1, 9, 3, 64, 0.125, 0)
    yield
    a._forward(q.dtype, *a._rows(q, k, v), out, lse, *tail)
    yield
    a._backward(q.dtype, *a._rows(q, k, v), out, lse, out, *a._rows(*grads), *tail)
    yield

for _ in run(64, *tensors(64)):
    pass  # threads have what they need for a short document
long = run(9000, *tensors(9000))
next(long), next(long)
used = int(open("/proc/self/status").read().split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 1_000_000, used + 1_000_000))
try:
    next(long)
except MemoryError as error:
    print("said:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "said: no memory for the scratch of attention_backward" in done.stdout, done.stderr

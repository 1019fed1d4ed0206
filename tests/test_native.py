"""Every C++ kernel against its plain twin: values and gradients, at sizes that fit no block."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lorafit.native import build, gemm, kernel, loss, lowrank, norm, rotary
from lorafit.native.gated import gated, plain_gated
from lorafit.native.gemm import Part
from lorafit.native.lowrank import Frozen, LowRank, Run

CLOSE = 1e-5  # fp32, of the largest number
BF16 = 2**-7  # one rounding of the result, and one of something on the way


@pytest.fixture(autouse=True)
def kernels():
    if build.library() is None:
        pytest.skip(f"no kernels here: {build.state()}")


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def close(got: Tensor, want: Tensor, dtype: torch.dtype = torch.float32, share: float = 1) -> None:
    got, want = got.double(), want.double()
    off = (got - want).abs().max() / want.abs().max().clamp_min(1e-30)
    assert off < share * (CLOSE if dtype == torch.float32 else BF16), f"{off:.2g} apart"


def same_gradients(fast, plain, inputs: list[Tensor], dtype: torch.dtype, share: float = 1) -> None:
    """Outputs and gradients of `fast` against `plain` in fp64, for random incoming gradients."""
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    got, want = fast(*inputs), plain(*exact)
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    weights = [torch.randn_like(w) for w in want]
    torch.autograd.backward([g for g in got], [w.to(g.dtype) for g, w in zip(got, weights, strict=True)])
    torch.autograd.backward([w for w in want], [w.to(g.dtype).double() for g, w in zip(got, weights, strict=True)])
    for g, w in zip(got, want, strict=True):
        close(g, w, dtype, share)
    for i, e in zip(inputs, exact, strict=True):
        if i.requires_grad:
            close(i.grad, e.grad, dtype, share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 7, 64, 576])
def test_norms(dtype, width):
    torch.manual_seed(width)
    gain = randn(width, dtype=dtype)
    x, y = randn(13, width, dtype=dtype, grad=True), randn(13, width, dtype=dtype, grad=True)
    same_gradients(
        lambda x: norm.rms_norm(x, gain, 1e-5),
        lambda x: norm.plain_rms_norm(x, gain.double(), 1e-5),
        [x],
        dtype,
    )

    def plain(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        both = x + y if dtype == torch.float32 else (x + y).to(dtype).double()
        return both, norm.plain_rms_norm(both, gain.double(), 1e-5)

    x.grad = None
    same_gradients(lambda x, y: norm.add_rms_norm(x, y, gain, 1e-5)[:2], plain, [x, y], dtype)
    both, out, rstd = norm.add_rms_norm(x, y, gain, 1e-5)
    assert torch.equal(norm.again(both, gain, rstd), out)


def test_a_norm_that_nobody_asks_for_passes_the_gradient_on():
    x, y = randn(3, 8, grad=True), randn(3, 8, grad=True)
    norm.add_rms_norm(x, y, torch.ones(8), 1e-5)[0].sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8))
    assert torch.equal(y.grad, torch.ones(3, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (3, 24), (9, 64), (2, 128)])
def test_rotary(dtype, heads, dim):
    torch.manual_seed(dim)
    cos, sin = randn(17, dim), randn(17, dim)  # not a rotation, so that mixed-up halves would show
    wide = randn(17, heads * dim + 5, dtype=dtype)
    x = wide[:, 2 : 2 + heads * dim].unflatten(1, (heads, dim)).requires_grad_(True)  # a slice, as of a joint product
    same_gradients(
        lambda x: rotary.rotate(x, cos, sin), lambda x: rotary.plain_rotate(x, cos.double(), sin.double()), [x], dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 1), (37, 129), (64, 1536)])
def test_gated(dtype, act, shape):
    torch.manual_seed(0)
    gate = (torch.randn(shape) * 4).to(dtype).requires_grad_(True)
    up = randn(*shape, dtype=dtype, grad=True)
    same_gradients(lambda g, u: gated(g, u, act), lambda g, u: plain_gated(g, u, act), [gate, up], dtype)


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_gated_far_out(act):
    gate = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4, float("nan")], requires_grad=True)
    up = torch.full((8,), 2.0, requires_grad=True)
    out = gated(gate, up, act)
    out.nansum().backward()
    close(
        out[:-1], torch.tensor([0.0, 0.0, -20 / (1 + 2.718281828**20) if act == "silu" else 0.0, 0, 20, 100, 1e4]) * 2
    )
    assert out[-1].isnan()
    assert gate.grad[:-1].isfinite().all()


# --- the loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "width", "words"), [(1, 8, 5), (33, 64, 1000), (70, 96, 4160)])
def test_head_loss(dtype, n, width, words):
    torch.manual_seed(n)
    h, w = randn(n, width, dtype=dtype), randn(words, width, dtype=dtype)
    labels = torch.randint(0, words, (n,))
    got, dh = loss.head_loss(h, w, None, labels, True)
    logits = (h.double() @ w.double().t()).to(dtype)  # as the model itself rounds them
    if dtype == torch.bfloat16:
        logits = gemm.sum_products([Part(h, w)])
    want, p = loss.plain_head_loss(logits.double(), torch.eye(words).double(), None, labels, True)
    close(got, want)
    close(dh, p @ w.double(), dtype)
    assert torch.equal(loss.head_loss(h, w, None, labels, False)[0], got)


def test_a_learned_token_has_a_small_gradient_and_not_its_rounding():
    """Where the label's probability is nearly one, the gradient is the tiny rest, also in bf16."""
    w = torch.eye(64).bfloat16()
    h = torch.zeros(1, 64).bfloat16()
    h[0, 3] = 12.0
    _, dh = loss.head_loss(h, w, None, torch.tensor([3]), True)
    _, exact = loss.plain_head_loss(h.double(), w.double(), None, torch.tensor([3]), True)
    close(dh, exact, torch.bfloat16)


def test_extreme_logits_and_nan():
    w = torch.eye(32) * 300
    h = torch.zeros(3, 32)
    h[0, 0], h[1, 5], h[2, 1] = 100.0, -100.0, float("nan")
    got, dh = loss.head_loss(h, w, None, torch.tensor([1, 5, 0]), True)
    want, exact = loss.plain_head_loss(h, w, None, torch.tensor([1, 5, 0]), True)
    close(got[:2], want[:2])
    close(dh[:2], exact[:2])
    assert got[2].isnan()
    assert dh[2].isnan().any()


# --- products -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not build.has_tiles(), reason="this processor doesn't multiply bf16: torch's products are used")
@pytest.mark.parametrize("rows", [1, 15, 32, 33, 100, 517])
@pytest.mark.parametrize(("k", "columns"), [(32, 1), (64, 48), (576, 192), (3200, 33), (96, 1000)])
def test_sums_of_products(rows, k, columns):
    torch.manual_seed(rows)
    b16 = torch.bfloat16
    x, w, wt = randn(rows, k, dtype=b16), randn(columns, k, dtype=b16), randn(k, columns, dtype=b16)
    thin, b = randn(rows, 96, dtype=b16)[:, 32:64], randn(columns, 32, dtype=b16)
    bias = randn(columns, dtype=b16)
    parts = [Part(x, w), Part(x, wt, False), Part(thin, b)]
    wide = torch.full((rows, columns + 7), 5.0).bfloat16()
    got = gemm.sum_products(parts, out=wide[:, 3 : 3 + columns], bias=bias)
    exact = [Part(p.a.double(), p.b.double(), p.across) for p in parts]
    close(got, gemm.plain_sum_products(exact, bias=bias.double()), b16)
    assert (wide[:, :3] == 5).all()
    assert (wide[:, 3 + columns :] == 5).all()  # nothing beside the slice is touched


@pytest.mark.skipif(not build.has_tiles(), reason="this processor doesn't multiply bf16")
def test_what_lies_beyond_a_product_is_never_read():
    """Rows beyond the last are NaN in memory; a product that read them would carry it."""
    b16 = torch.bfloat16
    memory = torch.full((64, 64), float("nan"), dtype=b16)
    memory[:33, :32] = 1
    w = torch.full((40, 32), float("nan"), dtype=b16)
    w[:17] = 1
    assert gemm.sum_products([Part(memory[:33, :32], w[:17])]).eq(32).all()


def group(dtype: torch.dtype, width: int, outs: list[int], ranks: list[int | None], bias: bool, across: bool):
    torch.manual_seed(width)
    frozen = [
        Frozen(
            randn(*((o, width) if across else (width, o)), dtype=dtype), randn(o, dtype=dtype) if bias else None, across
        )
        for o in outs
    ]
    pairs = [
        None if r is None else (randn(r, width, grad=True), randn(o, r, grad=True))
        for o, r in zip(outs, ranks, strict=True)
    ]
    return frozen, pairs


def low(x: Tensor, pairs, flat: list[Tensor]) -> list[Run]:
    rest = iter(flat)
    return [Run(len(x), [None if pair is None else LowRank(next(rest), next(rest), 2.5) for pair in pairs])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [[4], [16, 16, 16], [None, 8, 33], [256, 4], [None, None]])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("remade", [True, False])
@pytest.mark.parametrize(("rows", "outs"), [(37, [48, 96, 40]), (37, [64, 96, 32]), (1100, [640, 96, 320])])
def test_products_with_low_rank_additions(dtype, ranks, bias, across, remade, rows, outs):
    frozen, pairs = group(dtype, 64, outs[: len(ranks)], ranks, bias, across)
    x = randn(rows, 64, dtype=dtype, grad=True)
    flat = [t for pair in pairs if pair is not None for t in pair]
    exact = [Frozen(f.weight.double(), None if f.bias is None else f.bias.double(), f.across) for f in frozen]
    remake = lowrank.Remake(lambda x: x.detach(), (x,)) if remade else None
    same_gradients(
        lambda x, *t: lowrank.products(x, frozen, low(x, pairs, list(t)), remake),
        lambda x, *t: lowrank.plain_products(x, exact, low(x, pairs, list(t))),
        [x, *flat],
        dtype,
        2 if dtype == torch.bfloat16 and 48 in outs else 1,  # torch's products: a sum of two is rounded twice
    )


# Rows and ranks of each run: edges within 32 rows, one row alone, a run that spans both threads' shares, none at all.
RUNS = {
    "small": [(5, [4, 8]), (1, [16, None]), (37, [None, None]), (64, [33, 4]), (20, [8, 8])],
    "one large": [(700, [16, 4]), (9, [64, 64])],
    "many": [(40 + 3 * n, [4 + n, 8]) for n in range(30)],
    "deep": [(11, [256, 200]), (50, [8, 256])] * 9,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_runs_of_rows_have_additions_of_their_own(dtype, case, across, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    runs = RUNS[case]
    frozen, _ = group(dtype, 64, [96, 64], [None, None], True, across)
    exact = [Frozen(f.weight.double(), None if f.bias is None else f.bias.double(), f.across) for f in frozen]
    made = [group(dtype, 64, [96, 64], ranks, False, across)[1] for _, ranks in runs]
    x = randn(sum(rows for rows, _ in runs), 64, dtype=dtype, grad=True)
    flat = [t for pairs in made for pair in pairs if pair is not None for t in pair]

    def given(t):
        rest = iter(t)
        return [
            Run(rows, [None if r is None else LowRank(next(rest), next(rest), 0.5 + n) for r in ranks])
            for n, (rows, ranks) in enumerate(runs)
        ]

    same_gradients(
        lambda x, *t: lowrank.products(x, frozen, given(t)),
        lambda x, *t: lowrank.plain_products(x, exact, given(t)),
        [x, *flat],
        dtype,
    )


def test_a_run_is_what_it_is_alone():
    """To the bit in bf16, where its rows begin a tile: nothing of another run reaches it, not even what isn't finite."""
    frozen, _ = group(torch.bfloat16, 64, [96], [None], True, True)
    (own,), (other,) = (group(torch.bfloat16, 64, [96], [16], False, True)[1] for _ in range(2))
    x = randn(96, 64, dtype=torch.bfloat16)
    wild = x.clone()
    wild[40:] = math.inf
    (alone,) = lowrank.products(x[:40], frozen, [Run(40, [LowRank(*own, 2.0)])])
    for rows in (x, wild):
        (beside,) = lowrank.products(rows, frozen, [Run(40, [LowRank(*own, 2.0)]), Run(56, [LowRank(*other, 3.0)])])
        assert torch.equal(beside[:40], alone)


def test_products_gradcheck():
    """The function's own formulas in fp64, where it runs on torch's products."""
    frozen, pairs = group(torch.float64, 6, [5, 4], [3, None], True, True)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    flat = [t.detach().double().requires_grad_(True) for pair in pairs if pair is not None for t in pair]
    assert torch.autograd.gradcheck(lambda x, *t: lowrank.products(x, frozen, low(x, pairs, list(t))), (x, *flat))


def test_an_output_that_is_not_used_has_no_gradient():
    frozen, pairs = group(torch.float32, 8, [5, 4], [3, 2], False, True)
    flat = [t for pair in pairs for t in pair]
    x = randn(7, 8, grad=True)
    lowrank.products(x, frozen, low(x, pairs, flat))[1].sum().backward()
    assert flat[0].grad is None
    assert flat[3].grad is not None


def test_the_kernels_for_any_processor(generic, monkeypatch):
    """Without tiles and wide vectors the same code gives the same."""
    monkeypatch.setattr(kernel, "library", lambda: generic)
    monkeypatch.setattr(gemm, "has_tiles", lambda: False)
    for dtype in (torch.float32, torch.bfloat16):
        test_norms(dtype, 64)
        test_rotary(dtype, 3, 24)
        test_gated(dtype, "silu", (37, 129))
        test_gated(dtype, "gelu_tanh", (37, 129))
        test_head_loss(dtype, 33, 64, 1000)


# --- the build ----------------------------------------------------------------------------------------------------------


def test_switched_off_and_on_again():
    with build.switched(False):
        assert build.library() is None
        assert "off" in build.state()
    assert build.library() is not None


def in_fresh_process(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_compiler_everything_is_plain(tmp_path):
    said = in_fresh_process(
        "from lorafit.native import build; print(build.library(), build.state())",
        PATH=str(tmp_path),
        HOME=str(tmp_path),
    )
    assert said.startswith("None plain (no C++ compiler found")


def test_a_compiler_that_fails_is_no_failure_of_ours(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'error: out of order' >&2\nexit 1\n")
    broken.chmod(0o755)
    said = in_fresh_process(
        "from lorafit.native import build; print(build.library(), build.state())",
        PATH=f"{tmp_path}:/usr/bin:/bin",
        HOME=str(tmp_path),
    )
    assert "plain (c++ can't build the kernels: error: out of order)" in said
    assert not list((tmp_path / ".cache" / "lorafit").glob("*.so"))


def test_a_compiler_that_cannot_be_started(tmp_path):
    broken = tmp_path / "c++"
    broken.write_bytes(b"\x00junk")
    broken.chmod(0o755)
    said = in_fresh_process(
        "from lorafit.native import build; build.prepare(); print(build.built(), build.library(), build.state())",
        PATH=str(tmp_path),
        HOME=str(tmp_path),
    )
    assert said.startswith("True None plain (") and "can't be started" in said

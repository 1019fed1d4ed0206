"""Products of 8-bit whole numbers: kernels against torch's operations, and these against the formula written out."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import tiny
import torch

from lorafit import fit
from lorafit.cli import main
from lorafit.log import Terminal
from lorafit.model import quant
from lorafit.model.load import prepare
from lorafit.native import build, lowrank, rounded
from lorafit.native.lowrank import Frozen, LowRank, Run, plain_products, products
from lorafit.native.quantised import KINDS, TURNED, Quantised, dequantise, quantise, turned

TILES = pytest.mark.skipif(not build.has_tiles(), reason="this processor multiplies no bf16")


RANKS = (8, 0, 40, 3)


def rows(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Rows of different sizes, each with a few numbers that are far larger than the others, always in the same columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator)
    x[:, [3, k // 2]] *= 40
    return x.bfloat16().float()


def weight(out: int, k: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(out, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def hadamard(n: int) -> torch.Tensor:
    """Entry (i, j) is -1 where i and j have an odd number of ones in common; over whole blocks of 32."""
    signs = torch.tensor(
        [[(-1.0) ** (i & j).bit_count() for j in range(TURNED)] for i in range(TURNED)], dtype=torch.float64
    )
    blocks = [signs / math.sqrt(TURNED)] * (n // TURNED) + [torch.eye(n % TURNED, dtype=torch.float64)]
    return torch.block_diag(*blocks)


def whole(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row in whole numbers of 64 bits, and what one of them is."""
    unit = x.abs().amax(1, keepdim=True) / 127
    return (x / unit).round().long(), unit


def groups(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x (n, k) in whole numbers, 256 of a row with a unit of their own, times whole numbers w (k, columns)."""
    made = torch.zeros(len(x), w.shape[1], dtype=torch.float64)
    for first in range(0, x.shape[1], 256):
        numbers, unit = whole(x[:, first : first + 256])
        made += (numbers @ w[first : first + 256]).double() * unit
    return made


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 96), (40, 33), (31, 5), (300, 576)], ids=str)
def test_both_directions_are_the_formula_written_out(shape):
    out, k = shape
    w, x, dy = weight(out, k).double(), rows(7, k).double(), rows(7, out, 2).double()
    left, right = hadamard(out), hadamard(k)
    assert torch.equal(left @ left.t() > 0.5, torch.eye(out) > 0.5)
    codes, unit = whole(left @ w @ right)
    q = quantise(w.float(), "w8a8")
    same = (q.codes.long() == codes).double().mean()
    assert (
        same > 0.999 and (q.codes.long() - codes).abs().max() <= 1
    )  # fp32 may turn a number at the middle the other way
    codes, unit = q.codes.long(), q.absmax.double()[:, None] / 127
    want = (groups(x @ right, codes.t()) * unit.t()) @ left
    assert off(rounded.across(x.float(), q), want) < 1e-6
    want = groups((dy @ left) * unit.t(), codes) @ right
    assert off(rounded.along(dy.float(), q), want) < 1e-6


def test_turning_twice_is_nothing_and_codes_stand_for_the_weight():
    x = rows(9, 100)
    assert off(turned(turned(x)), x) < 1e-6 and off(turned(x)[:, :96], x[:, :96]) > 0.5
    assert torch.equal(turned(x)[:, 96:], x[:, 96:])
    w = weight(96, 128)
    w[:, 7] *= 30
    eight, both = (off(dequantise(quantise(w, kind), torch.float32), w) for kind in ("int8", "w8a8"))
    assert both < 0.01 and both < eight / 2  # a column that stands out costs int8 codes


def test_numbers_that_stand_out_cost_little():
    x, w = rows(50, 576), weight(192, 576)
    q, exact = quantise(w, "w8a8"), x @ w.t()
    codes, unit = whole(x)
    plain = (codes * unit).float() @ w.t()
    assert off(rounded.across(x, q), exact) < 0.02 < off(plain, exact) / 1.5


def test_a_block_that_stands_out_costs_the_others_nothing():
    """As a text's first token has it: a few numbers hundreds of times the size of the others."""
    x, w = torch.randn(20, 576), weight(192, 576)
    x[:, 300] *= 600
    q = quantise(w, "w8a8")
    exact = x[:, :256] @ dequantise(q, torch.float32)[:, :256].t()
    x_alone = x.clone()
    x_alone[:, :256] = 0
    got = rounded.across(x, q) - rounded.across(x_alone, q)
    assert off(got, exact) < 0.01


# --- the kernels ------------------------------------------------------------------------------------------------------


def case(n: int, outs: tuple[int, ...], k: int, dtype: torch.dtype, function) -> list[torch.Tensor]:
    """Results and all gradients of products with additions and biases, of several runs, one of which has none."""
    torch.manual_seed(3)
    frozen = [
        Frozen(
            quantise(weight(o, k, o), "w8a8") if i != 3 else weight(o, k).to(dtype),
            torch.randn(o).to(dtype) if i % 2 else None,
        )
        for i, o in enumerate(outs)
    ]
    lows = [
        LowRank(torch.randn(r, k) * 0.1, torch.randn(o, r) * 0.1, 2.0) if r else None
        for o, r in zip(outs, RANKS, strict=False)
    ]
    trained = [t.requires_grad_() for low in lows if low is not None for t in (low.a, low.b)]
    x = rows(n, k).to(dtype).requires_grad_()
    runs = [Run(n // 3, [None] * len(outs)), Run(n - n // 3, lows)]
    made = function(x, frozen, runs)
    grads = [rows(n, o, 5).to(dtype) for o in outs]
    torch.autograd.backward(made, grads)
    return [*(y.detach() for y in made), x.grad, *(t.grad for t in trained)]


@TILES
@pytest.mark.parametrize("n", [1, 8, 31, 97, 200])
@pytest.mark.parametrize("outs", [(64,), (192, 192, 576), (128, 64, 64, 96)], ids=str)
def test_the_kernels_give_what_their_twin_gives(n, outs):
    assert build.library() is not None
    got = case(n, outs, 576, torch.bfloat16, products)
    want = case(n, outs, 576, torch.float32, plain_products)  # the same numbers, not rounded in between
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert off(one, other) < 6e-3  # of bf16; a code that is one off would be as much in a single number


def whole_case(n: int, out: int, k: int) -> tuple[Quantised, torch.Tensor, torch.Tensor]:
    """A weight and an input of whole numbers that codes hold as they are, and their product."""
    q = quantise(torch.ones(out, k), "w8a8")
    q.codes.copy_(torch.randint(-127, 128, (out, k), generator=torch.Generator().manual_seed(0)))
    q.absmax.fill_(127.0)
    x = torch.zeros(n, k)
    x[torch.arange(n), torch.arange(n)] = 1.0  # turned: 32 numbers of the same size, which are codes of 127
    return q, x, x.double() @ hadamard(k) @ q.codes.double().t() @ hadamard(out)


CODES = pytest.mark.skipif(not build.multiplies_codes(), reason="this processor multiplies no 8-bit numbers")


def alike(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Rows are the same to 2e-6, but for those of which a number lies in the middle between two codes: at most one in ten
    (the sums are in another order), which one code of 576 or more puts off by 1e-3 at most."""
    each = (got - want).norm(dim=1) / want.norm(dim=1).clamp(min=1e-30)
    return bool(each.max() < 1e-3) and float((each > 2e-6).float().mean()) <= max(0.1, 1.01 / len(want))


@CODES
@pytest.mark.parametrize("n", [1, 8, 31, 97, 200])
@pytest.mark.parametrize("outs", [(64,), (192, 192, 576), (128, 64, 64, 96)], ids=str)
def test_in_fp32_the_kernels_give_what_their_twin_gives(n, outs):
    """The results and the gradient for x; those of the additions are sums over rows of these."""
    got, want = (case(n, outs, 576, torch.float32, function) for function in (products, plain_products))
    assert len(got) == len(want)
    for one, other in zip(got[: len(outs) + 1], want, strict=False):
        assert alike(one, other)
    assert max(map(off, got, want)) < 1e-4


@CODES
def test_in_fp32_every_way_is_the_kernels(monkeypatch):
    """Of tensors whose rows have gaps between them too, sizes that aren't whole take the plain way."""
    called = []
    kernel = rounded._coded_products
    monkeypatch.setattr(rounded, "_coded_products", lambda *args: called.append(args[-1]) or kernel(*args))
    qs = [quantise(weight(o, 192, o), "w8a8") for o in (64, 128)]
    wide, gaps = rows(40, 400), torch.randn(40, 300)
    x, dy = wide[:, 16:208], gaps[:, 7:71]
    found = rounded.across_all(x, qs)
    assert called == [2] and all(alike(y, rounded.across(x, q)) for y, q in zip(found, qs, strict=True))
    onto = torch.randn(40, 192)
    want = onto + rounded.along(dy, qs[0])
    assert alike(rounded.along_onto(dy, qs[0], onto), want) and called == [2, 1]
    assert alike(rounded.along_onto(dy.t().contiguous().t(), qs[0], None), rounded.along(dy, qs[0])) and called == [
        2,
        1,
        1,
    ]
    odd = quantise(weight(64, 96), "w8a8")
    assert torch.equal(rounded.across_all(x[:, :96], [odd])[0], rounded.across(x[:, :96], odd))
    assert rounded.across_all(x[:0], qs)[0].shape == (0, 64) and len(called) == 3


@CODES
def test_in_fp32_sums_are_exact_and_a_row_is_what_it_is_alone():
    k, out, n = 1536, 64, 75
    q, x, want = whole_case(n, out, k)
    (got,) = rounded.across_all(x, [q])
    assert off(got, want) < 2e-7 or (got - want).abs().max() < 1e-6 * want.abs().max()
    x = rows(n, k)
    (together,) = rounded.across_all(x, [q])
    for i in (0, 31, 32, 74):
        assert torch.equal(rounded.across_all(x[i : i + 1], [q])[0][0], together[i])


@TILES
def test_sums_are_exact(monkeypatch):
    """Of whole numbers that codes hold as they are the kernel's product is the product, where bf16 can write it."""
    k, out, n = 1536, 64, 40
    q, x, want = whole_case(n, out, k)
    (got,) = products(x.bfloat16(), [Frozen(q)], [Run(n, [None])])
    assert (
        torch.equal(got.double(), want.bfloat16().double())
        or (got.double() - want).abs().max() <= want.abs().max() / 256
    )


@TILES
def test_a_row_is_what_it_is_alone():
    """Rounding knows nothing of the other rows, so neither do results: not a bit of them."""
    q = quantise(weight(192, 576), "w8a8")
    x = rows(75, 576).bfloat16()
    low = LowRank(weight(4, 576), weight(192, 4), 1.0)
    (together,) = products(x, [Frozen(q)], [Run(75, [low])])
    for i in (0, 31, 32, 74):
        (alone,) = products(x[i : i + 1], [Frozen(q)], [Run(1, [low])])
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_zeros_and_what_is_not_finite(dtype):
    q = quantise(weight(64, 128), "w8a8")
    x = rows(6, 128).to(dtype)
    x[0], x[1, 5], x[2, 6], x[3] = 0, torch.nan, torch.inf, 1e-36
    (y,) = products(x.requires_grad_(), [Frozen(q)], [Run(6, [None])])
    assert torch.equal(y[0], torch.zeros(64, dtype=dtype)) and torch.equal(y[3], torch.zeros(64, dtype=dtype))
    assert not y[1].isfinite().any() and not y[2].isfinite().any() and y[4:].isfinite().all()
    dy = torch.ones_like(y)
    dy[5, 0] = torch.nan
    y.backward(dy)
    assert x.grad is not None and x.grad[4].isfinite().all() and not x.grad[5].isfinite().any()


@TILES
@pytest.mark.parametrize("kind", [None, "w8a8"])
def test_a_run_without_rows_has_gradients_of_zero(kind):
    w = weight(64, 128)
    base = Frozen(w.bfloat16() if kind is None else quantise(w, kind))
    lows = [LowRank(weight(4, 128).requires_grad_(), weight(64, 4).requires_grad_(), 1.0) for _ in range(2)]
    trash = [torch.full((1 << 16,), 1e30) for _ in range(8)]
    del trash
    (y,) = products(rows(9, 128).bfloat16(), [base], [Run(0, [lows[0]]), Run(9, [lows[1]])])
    y.backward(torch.ones_like(y))
    for t in (lows[0].a, lows[0].b):
        assert t.grad is not None and not t.grad.any()
    assert lows[1].a.grad is not None and lows[1].a.grad.any()


@TILES
def test_odd_sizes_take_the_plain_way():
    q, odd = quantise(weight(64, 96), "w8a8"), rows(3, 96).bfloat16()
    assert not lowrank._takes(odd, [Frozen(q)], [])
    assert (
        off(products(odd, [Frozen(q)], [Run(3, [None])])[0], plain_products(odd, [Frozen(q)], [Run(3, [None])])[0]) == 0
    )


def test_a_gradient_is_near_that_of_the_numbers():
    q = quantise(weight(192, 576), "w8a8")
    x = rows(40, 576).requires_grad_()
    dy = rows(40, 192, 9)
    rounded.product(x, q).backward(dy)
    assert x.grad is not None and off(x.grad, dy @ dequantise(q, torch.float32)) < 0.02


# --- what a user does -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, data_file):
    """A run on a base in w8a8, and one on the plain base."""
    place, found = tmp_path_factory.mktemp("rounded"), {}
    for kind in ("none", "w8a8"):
        given = {
            "model": str(tiny_model),
            "out": str(place / kind),
            "quant": kind,
            "steps": 12,
            "lr": 0.01,
            "samples": 0,
        }
        found[kind] = fit.fit(fit.read_config(str(data_file), given), Terminal(quiet=True)).folder
    return found


def test_it_is_trained_told_and_merged(trained, data_file, tmp_path, capsys):
    losses = {kind: json.loads((run / "summary.json").read_text()) for kind, run in trained.items()}
    for when in ("held_out_loss_before", "held_out_loss_after"):
        assert math.isclose(losses["none"][when], losses["w8a8"][when], rel_tol=0.01)
    assert losses["w8a8"]["held_out_loss_after"] < 0.98 * losses["w8a8"]["held_out_loss_before"]
    run = str(trained["w8a8"])
    assert main(["eval", run, str(data_file), "--json", "--limit", "4"]) in (0, 2)
    capsys.readouterr()
    assert main(["merge", run, str(tmp_path / "merged")]) == 0
    assert main(["merge", run, str(tmp_path / "codes"), "--into", "quantised", "--force"]) == 2
    said = capsys.readouterr().err
    assert "w8a8" in said and "--into dequantised" in said and "Traceback" not in said
    assert not (tmp_path / "codes").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("native", "vnni"), [(False, True), (True, True), (True, False)])
def test_where_it_is_slower_that_is_said(precision, native, vnni, data_file, tiny_model, tmp_path, monkeypatch):
    if not vnni:
        monkeypatch.setattr(build, "multiplies_codes", lambda: False)
    said = io.StringIO()
    given = {"quant": "w8a8", "steps": 1, "samples": 0, "precision": precision, "native": native}
    asked = {"model": str(tiny_model), "out": str(tmp_path / "run"), **given}
    try:
        fit.fit(fit.read_config(str(data_file), asked), Terminal(stream=said))
    finally:
        build.switch(True)
    assert "w8a8" in said.getvalue()
    assert ("slower than any other kind" in said.getvalue()) == (not native or not build.multiplies_codes())


@pytest.mark.parametrize("kind", ["int8", "w8a8"])
def test_in_fp32_documents_share_a_row_and_the_layers_are_our_own(kind):
    """Codes that turn at the middle make two ways of the same sum differ by more than fp32's rounding, in models of some size."""
    model = tiny.model(
        "llama", 0.08, hidden_size=256, intermediate_size=512, num_hidden_layers=12, num_attention_heads=8
    )
    quant.convert(model, quant.Quant(kind))
    made = prepare(model, None, Path("nowhere"), quant=quant.Quant(kind))
    assert made.coarse == (kind == "w8a8")
    assert made.packs and made.body is not None and made.plain_head


def test_the_setting_and_the_kinds_agree():
    from lorafit.config import choices

    assert choices("quant") == ["none", *KINDS]


def test_on_a_gpu_it_is_refused(monkeypatch, data_file, tiny_model, capsys):
    monkeypatch.setattr(fit, "pick_device", lambda name: torch.device("cuda"))
    assert main(["train", str(data_file), "--model", str(tiny_model), "quant=w8a8"]) == 2
    assert "use quant=int8" in capsys.readouterr().err

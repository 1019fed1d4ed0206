"""Weights in 4 and 8 bits: formats equal to bitsandbytes', products without a trace, loading without the 16-bit model."""

from __future__ import annotations

import pytest
import torch

from lorafit.errors import ModelError
from lorafit.model import quant
from lorafit.native import build
from lorafit.native.quantised import BLOCK, TABLES, dequantise, dynamic, plain_dequantise, quantise

SHAPES = [(1, 1), (3, 5), (8, 64), (7, 65), (5, 101), (33, 96), (64, 512), (257, 255)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    """Normal numbers with whole blocks of zeros, single zeros, and outliers."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    flat = w.view(-1)
    flat[::13] = 0
    flat[:1:997] *= 50
    flat[BLOCK * 3 : BLOCK * 5] = 0
    return w.to(dtype)


@pytest.fixture(scope="module")
def bnb():
    """bitsandbytes' functions; what its CPU products do isn't used."""
    return pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes isn't installed", exc_type=ImportError)


# --- the formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_those_of_bitsandbytes(bnb, kind, shape, dtype, double):
    w = weight(shape, dtype)
    codes, state = bnb.quantize_4bit(w, quant_type=kind, compress_statistics=double)
    q = quantise(w, kind, double)
    assert torch.equal(q.codes, codes) and q.codes.dtype == codes.dtype
    assert torch.equal(q.absmax, state.absmax) and q.absmax.dtype == state.absmax.dtype
    if double:
        assert torch.equal(q.nested, state.state2.absmax) and torch.equal(q.offset, state.offset)
        assert torch.equal(dynamic("cpu"), state.state2.code)
    assert torch.equal(torch.tensor(TABLES[kind]), state.code)
    if shape[1] % BLOCK == 0 or shape[1] % 16:  # for other widths its kernel reads absmax of other blocks
        state.dtype = torch.float32
        assert torch.equal(dequantise(q, torch.float32), bnb.dequantize_4bit(codes, state).view(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eight_bits_are_those_of_bitsandbytes(bnb, shape, dtype):
    w = weight(shape, dtype) + 1e-3  # a row of zeros is 0/0 there
    codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(w.float())
    q = quantise(w, "int8")
    assert torch.equal(q.codes, codes) and torch.equal(q.absmax, absmax)
    assert torch.equal(dequantise(q, torch.float32), bnb.int8_vectorwise_dequant(codes, absmax))


def test_nf4_lies_at_the_quantiles_of_the_normal_distribution():
    edge = ((1 - 1 / 32) + (1 - 1 / 30)) / 2
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(edge, 0.5, 9)[:-1].double())
    below = -normal.icdf(torch.linspace(edge, 0.5, 8)[:-1].double())
    want = torch.cat([below, torch.zeros(1), above.flip(0)]) / above.max()
    assert torch.allclose(torch.tensor(TABLES["nf4"]).double(), want, atol=1e-6)


def test_fp4_has_a_sign_two_bits_of_exponent_and_one_of_mantissa():
    """Exponents 1/4, 1/2, 1 and 2 in an order of their own, below them a subnormal; all divided by the largest."""
    values = torch.tensor(TABLES["fp4"])
    assert torch.equal(values[8:], -values[:8])
    sizes = [(1 + mantissa / 2) * scale for scale in (8, 4, 2) for mantissa in (0, 1)]
    assert torch.equal(values[:8], torch.tensor([0, 0.0625, *sizes]) / 12)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_code_is_that_of_the_nearest_value_and_the_first_is_in_the_upper_half(kind, shape):
    w = weight(shape)
    q = quantise(w, kind, double=False)
    blocks = torch.nn.functional.pad(w.flatten(), (0, -w.numel() % BLOCK)).view(-1, BLOCK)
    assert torch.allclose(q.absmax, blocks.abs().amax(1), rtol=0, atol=1e-37)
    share = (blocks / q.absmax.clamp(min=1e-38)[:, None]).flatten()[: w.numel()]
    codes = torch.cat([q.codes >> 4, q.codes & 15], 1).flatten()[: w.numel()].int()
    off = (share[:, None] - torch.tensor(TABLES[kind])).abs()
    assert ((off.gather(1, codes[:, None].long())[:, 0] - off.amin(1)) < 1e-7).all()
    assert codes[share == 0].unique().tolist() == [TABLES[kind].index(0.0)]


def test_double_quantisation_takes_an_eighth_of_a_bit_and_moves_little():
    w = weight((512, 1024))
    plain, double = (quantise(w, "nf4", double) for double in (False, True))
    assert plain.nbytes * 8 / w.numel() == 4.5
    assert double.nbytes * 8 / w.numel() == pytest.approx(4 + 0.127, abs=1e-3)
    errors = [float((dequantise(q, torch.float32) - w).norm() / w.norm()) for q in (plain, double)]
    assert errors[1] == pytest.approx(errors[0], rel=2e-3)


def test_how_far_the_kinds_are_off():
    """Relative errors of normal numbers; that of nf4 is the known one."""
    w = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1))
    for kind, want in (("nf4", 0.0921), ("fp4", 0.122), ("int8", 0.0079)):
        q = quantise(w, kind, double=False)
        assert float((dequantise(q, torch.float32) - w).norm() / w.norm()) == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_zeros_stay_zeros_and_what_is_not_finite_is_refused(kind):
    q = quantise(torch.zeros(4, 96), kind)
    assert not dequantise(q, torch.bfloat16).any()
    for bad in (float("nan"), float("inf")):
        w = weight((8, 64))
        w[3, 5] = bad
        with pytest.raises(ModelError, match="layer.weight isn't finite"):
            quant.quantise(w, kind, True, "layer.weight")


def test_a_weight_of_several_pieces_is_that_of_one(monkeypatch):
    w = weight((96, 640))
    for kind in ("nf4", "int8"):
        whole = quantise(w, kind)
        monkeypatch.setattr("lorafit.native.quantised.PIECE", 128 * 64)
        with build.switched(False):
            pieces = quantise(w, kind)
        monkeypatch.undo()
        assert torch.equal(whole.codes, pieces.codes) and torch.equal(whole.absmax, pieces.absmax)


def same_as_the_twin(kind: str, double: bool, dtype: torch.dtype) -> None:
    for shape in [*SHAPES, (64 * 70, 65)]:
        w = weight(shape, dtype)
        q = quantise(w, kind, double)
        with build.switched(False):
            twin = quantise(w, kind, double)
        assert torch.equal(q.codes, twin.codes) and torch.equal(q.absmax, twin.absmax)
        assert torch.equal(dequantise(q, dtype), plain_dequantise(q, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_the_kernel_gives_what_its_twin_gives_bit_for_bit(kind, double, dtype):
    same_as_the_twin(kind, double, dtype)
    with build.switched(False):
        same_as_the_twin(kind, double, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_so_does_the_kernel_for_any_processor(kind, dtype, generic, monkeypatch):
    monkeypatch.setattr(build, "_built", generic)
    same_as_the_twin(kind, True, dtype)

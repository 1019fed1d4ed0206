"""Weights in 4 and 8 bits: formats equal to bitsandbytes', products without a trace, loading without the 16-bit model."""

from __future__ import annotations

import gc
import json
import os
import runpy
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lorafit import fit, plan, session
from lorafit.batches import Plan
from lorafit.cli import main
from lorafit.errors import AdapterError, ModelError, RunError, UserError
from lorafit.evaluate import evaluate
from lorafit.export.merge import merge
from lorafit.generate import generate
from lorafit.host import Host
from lorafit.log import Terminal
from lorafit.model import quant, quant_load
from lorafit.model.fingerprint import fingerprint
from lorafit.model.load import load, prepare
from lorafit.model.shards import read_header
from lorafit.native import build, quantised
from lorafit.native.lowrank import Frozen, LowRank, Run, products
from lorafit.native.quantised import BLOCK, FEW, TABLES, dequantise, dynamic, few_rows, plain_dequantise, quantise
from lorafit.route import Route
from lorafit.train import optim
from lorafit.train.loop import Job, train

QUIET = Terminal(quiet=True)
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
            quant.quantise(w, quant.Quant(kind), "layer.weight")


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


# --- products ----------------------------------------------------------------------------------------------------------

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2"]


def both(family: str, kind: str = "nf4", dtype: torch.dtype = torch.float32, **changes):
    """A quantised base, and one that holds as its weights what the first one's codes stand for."""
    coded, plain = (tiny.model(family, **changes).to(dtype) for _ in range(2))
    quant.convert(coded, quant.Quant(kind))
    modules = dict(plain.named_modules())
    with torch.no_grad():
        for path, module in coded.named_modules():
            if isinstance(module, quant.QuantLinear):
                w = plain_dequantise(module.quantised, dtype)
                modules[path].weight.copy_(w.t() if module.turned else w)
    return [prepare(model, None, Path("nowhere"), family) for model in (coded, plain)]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_layer_gives_the_product_with_its_numbers_and_its_gradient(kind, dtype):
    w, bias = weight((96, 64)), torch.randn(96).to(dtype)
    layer = quant.QuantLinear(quantise(w, kind), bias, dtype)
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().double().requires_grad_()
    y = layer(ours)
    want = torch.nn.functional.linear(theirs, layer.numbers().double(), bias.double())
    y.float().square().sum().backward()
    want.square().sum().backward()
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    assert (y - want).abs().max() <= tolerance * want.abs().max()
    assert (ours.grad - theirs.grad).abs().max() <= 2 * tolerance * theirs.grad.abs().max()


def few_rows_are_products(dtype: torch.dtype) -> None:
    for kind, double, bias in [("nf4", True, True), ("nf4", False, False), ("fp4", True, False)]:
        q = quantise(weight((37, 192), seed=1), kind, double)
        b = torch.randn(37).to(dtype) if bias else None
        for rows in range(1, FEW + 1):
            x = torch.randn(192, rows).to(dtype).t()  # lines that lie apart
            want = x.double() @ dequantise(q, dtype).double().t() + (0 if b is None else b.double())
            got = few_rows(x, q, b)
            assert got.dtype == dtype
            assert (got - want).abs().max() <= (1e-6 if dtype == torch.float32 else 2**-8) * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_few_rows_are_multiplied_with_codes(dtype, generic, monkeypatch):
    if build.library() is None:
        pytest.skip("no kernels")
    few_rows_are_products(dtype)
    monkeypatch.setattr(build, "_built", generic)
    few_rows_are_products(dtype)
    x = torch.randn(FEW + 1, 192).to(dtype)
    assert few_rows(x, quantise(weight((37, 192)), "nf4")) is None
    assert few_rows(x[:2], quantise(weight((37, 192)), "int8")) is None
    assert few_rows(x[:2, :96], quantise(weight((37, 96)), "nf4")) is None


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("native", [True, False])
def test_products_with_low_rank_additions_are_those_with_the_numbers(native, dtype):
    """Bit for bit: the same kernels on the same numbers, made for each call."""
    found = []
    with build.switched(native):
        for coded in (True, False):
            generator = torch.Generator().manual_seed(1)
            x = torch.randn(40, 64, generator=generator).to(dtype).requires_grad_()
            a, b = (torch.randn(shape, generator=generator).requires_grad_() for shape in [(4, 64), (96, 4)])
            weights = [quantise(weight((out, 64), seed=out), "nf4") for out in (96, 32)]
            frozen = [Frozen(q if coded else plain_dequantise(q, dtype)) for q in weights]
            made = products(x, frozen, [Run(len(x), [LowRank(a, b, 0.5), None])])
            torch.cat(made, 1).float().square().sum().backward()
            found.append([*made, x.grad, a.grad, b.grad])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_base_is_the_one_that_holds_those_numbers(family, native):
    """Hidden states, logits and gradients of adapters, by the modules' forward and by our own; fp32."""
    found = []
    with build.switched(native):
        for base in both(family):
            assert (base.body is not None) == (family != "gpt2")
            host = Host(base)
            host.add("a", r=4)
            tiny.randomize(host.adapters["a"])
            ids, lengths = tiny.ids(20), [9, 7, 4]
            with host.route(Route.of([(9, "a"), (11, None)])):
                mixed = host.hidden(ids, lengths).detach()
            with host.route("a"):
                host.hidden(ids, lengths).square().sum().backward()
                logits = host.logits(ids, lengths).detach()
            grads = torch.cat([p.grad.flatten() for p in host.adapters["a"].parameters()])
            found.append((mixed, logits, grads, base.logits(ids, lengths), base.parameters()))
    for ours, theirs in zip(*found, strict=True):
        if isinstance(ours, int):
            assert ours == theirs
        else:
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_adapters_of_every_kind_of_site_and_merged_weights():
    coded, plain = map(Host, both("gpt2"))
    assert {path: (s.kind, s.shape) for path, s in coded.sites.items()} == {
        path: (s.kind, s.shape) for path, s in plain.sites.items()
    }
    for host in (coded, plain):
        host.add("a", targets=["all"], r=2)
        tiny.randomize(host.adapters["a"])
    for path in coded.sites:
        pair = [host.merged_weight(host.sites[path], "a") for host in (coded, plain)]
        assert torch.equal(*pair), path
    with coded.route("a"), plain.route("a"):
        ids = tiny.ids(12)
        assert torch.allclose(coded.logits(ids, [12]), plain.logits(ids, [12]), atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of what else the collector knows
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_number_of_a_weight_is_kept_for_the_backward(family):
    """With everything that a forward leaves still alive, no float tensor of a linear weight's size is."""
    host = Host(
        both(family, hidden_size=40, intermediate_size=88)[0] if family == "llama" else both(family, n_embd=40)[0]
    )
    host.add("a", r=2)
    shapes = {site.shape for site in host.sites.values() if isinstance(site.module, quant.QuantLinear)}
    shapes |= {torch.Size(reversed(shape)) for shape in shapes}
    with host.route("a"):
        loss = host.hidden(tiny.ids(13), [13]).sum()
        gc.collect()
        alive = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.is_floating_point()]
        kept = [t.shape for t in [*alive, *_saved(loss.grad_fn)] if t.shape in shapes]
        loss.backward()
    assert not kept


def _saved(node):
    """Every tensor that a graph keeps."""
    seen, todo = set(), [node]
    while todo:
        if (node := todo.pop()) is None or node in seen:
            continue
        seen.add(node)
        todo += [other for other, _ in node.next_functions]
        yield from (
            t for name in dir(node) if name.startswith("_saved") and isinstance(t := getattr(node, name), torch.Tensor)
        )
        yield from (t for t in getattr(node, "saved_tensors", ()) if t is not None)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_evaluating_and_generating_leave_training_as_it_is(family, dtype):
    """Three steps with a look at the base before, answers between, and a look after: the adapter is that of three steps
    alone, the codes are what they were, and so are the base's logits, bit for bit."""
    found = []
    for looks in (False, True):
        base = both(family, dtype=dtype)[0]
        host = Host(base)
        host.add("a", r=4, seed=3)
        codes = [m.codes.clone() for m in base.model.modules() if isinstance(m, quant.QuantLinear)]
        job = Job("a", Plan(tiny.rows([11, 7, 9, 12]), 20), 3, 0.01, "constant", 0, 1.0, 0)
        job.optimizer = optim.optimizer(host.adapters["a"], job.lr, 0)
        before = evaluate(host, tiny.rows([9, 8], seed=4), None).loss if looks else None
        for _ in train(host, [job]):
            if looks:
                evaluate(host, tiny.rows([9, 8], seed=4), "a")
                assert len(list(generate(host, tiny.ids(5).tolist(), "a", max_new=4))) == 4
        if looks:
            assert evaluate(host, tiny.rows([9, 8], seed=4), None).loss == before
            assert evaluate(host, tiny.rows([9, 8], seed=4), "a").loss != before
        now = [m.codes for m in base.model.modules() if isinstance(m, quant.QuantLinear)]
        assert all(map(torch.equal, codes, now))
        found.append(host.adapters["a"].state_dict())
    assert job.done == 3
    assert all(torch.equal(p, found[1][name]) for name, p in found[0].items())
    assert any(p.abs().sum() > 0 for name, p in found[0].items() if name.endswith(".b"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_gives_the_same_gradient(family):
    found = []
    for on in (False, True):
        base = both(family)[0]
        host = Host(base)
        host.add("a", r=4)
        tiny.randomize(host.adapters["a"])
        base.checkpointing(on)
        with host.route("a"):
            host.hidden(tiny.ids(20), [9, 11]).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in host.adapters["a"].parameters()]))
    assert torch.allclose(*found, rtol=1e-6)


def test_answers_are_those_of_the_base_that_holds_those_numbers():
    answers = [list(generate(Host(base), tiny.ids(6).tolist(), max_new=20)) for base in both("llama")]
    assert answers[0] == answers[1]


def test_experts_are_refused():
    with pytest.raises(ModelError, match="experts can't be quantised"):
        quant.convert(tiny.model("mixtral"), quant.Quant("nf4"))


def test_a_base_whose_absmax_were_cast_says_so():
    base = both("llama")[0]
    base.model.to(torch.bfloat16)
    with pytest.raises(AssertionError, match="cast"):
        base.logits(tiny.ids(4), [4])


# --- loading -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own."""
    kernels = build._place(build.kernels())[1] if build.library() is not None else None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "lorafit"
    if kernels is not None:  # other processes needn't compile them again
        place.mkdir(parents=True)
        shutil.copy(kernels, place)
    return place / "quantised"


def saved(to: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, shard: str = "2KB", **changes) -> Path:
    model = tiny.model(family, **changes).to(dtype)
    model.save_pretrained(to, max_shard_size=shard)
    return to


def opened(path: Path, kind: str = "nf4", dtype: torch.dtype = torch.bfloat16, double: bool = True):
    config = AutoConfig.from_pretrained(path)
    return quant_load.load(path, config, dtype, quant.Quant(kind, double), fingerprint(path), lambda text: None)[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_loads_as_if_it_were_loaded_and_then_quantised(family, tied, cache, tmp_path):
    path = saved(tmp_path / "model", family, tie_word_embeddings=tied)
    assert len(list(path.glob("*.safetensors"))) > 1
    for kind, dtype in (("nf4", torch.bfloat16), ("fp4", torch.float32), ("int8", torch.bfloat16)):
        for _ in ("made", "mapped"):
            made = opened(path, kind, dtype)
            plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
            quant.convert(plain, quant.Quant(kind))
            for ours, theirs in (
                (made.named_parameters(remove_duplicate=False), plain.named_parameters(remove_duplicate=False)),
                (made.named_buffers(), plain.named_buffers()),
            ):
                for (a, x), (b, y) in zip(ours, theirs, strict=True):
                    assert a == b and torch.equal(x, y.to(x.dtype)), a
                    assert x.dtype == (dtype if isinstance(x, torch.nn.Parameter) else y.dtype), a
            head, table = made.get_output_embeddings().weight, made.get_input_embeddings().weight
            assert (head is table) == tied
        if dtype == torch.bfloat16:
            made, plain = (prepare(model, None, path) for model in (made, plain))
            assert torch.equal(made.logits(tiny.ids(9), [9]), plain.logits(tiny.ids(9), [9]))


def test_a_second_start_quantises_nothing_and_another_base_has_its_own_codes(cache, tmp_path, monkeypatch):
    path = saved(tmp_path / "model")
    first = opened(path)
    (file,) = cache.glob("*/*")
    before = file.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(quant_load, "stored", None)
        again = opened(path)
        shutil.copytree(path, tmp_path / "elsewhere")
        opened(tmp_path / "elsewhere")
    assert file.stat().st_mtime_ns == before and len(list(cache.iterdir())) == 1
    assert all(map(torch.equal, first.buffers(), again.buffers()))
    opened(path, double=False)
    opened(path, "fp4")
    saved(tmp_path / "other", scale=0.3)
    opened(tmp_path / "other")
    assert len(list(cache.iterdir())) == 4


def test_a_change_that_the_fingerprint_misses_is_quantised_again(cache, tmp_path):
    path = saved(tmp_path / "model", intermediate_size=2048)
    before, first = fingerprint(path), opened(path)
    file = next(file for file in sorted(path.glob("*.safetensors")) if any("up_proj" in key for key in load_file(file)))
    start, tensors = read_header(file)
    begin = next(entry["data_offsets"][0] for name, entry in tensors.items() if "up_proj" in name)
    with file.open("r+b") as data:
        data.seek(start + begin + 3000)  # behind the first sample, before the second
        data.write(b"\0" * 256)
    assert fingerprint(path) == before
    again = opened(path)
    assert not all(map(torch.equal, first.buffers(), again.buffers()))


def test_a_damaged_file_of_codes_is_made_again(cache, tmp_path):
    path = saved(tmp_path / "model")
    want = [t.clone() for t in opened(path).buffers()]
    (file,) = cache.glob("*/*")
    for damaged in (b"", b"nonsense", file.read_bytes()[:-10], None):
        if damaged is None:
            file.unlink()
        else:
            file.write_bytes(damaged)
        assert all(map(torch.equal, want, opened(path).buffers()))


def test_the_file_of_codes_is_one_that_bitsandbytes_reads(bnb, cache, tmp_path):
    path = saved(tmp_path / "model")
    made = opened(path)
    (file,) = cache.glob("*/*")
    tensors = safetensors.torch.load_file(file)
    for name, module in made.named_modules():
        if isinstance(module, quant.QuantLinear):
            parts = {key: t for key, t in tensors.items() if key.startswith(f"{name}.weight.")}
            state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
            assert state.shape == module.shape and state.nested
            state.dtype = torch.float32
            theirs = torch.ops.bitsandbytes.dequantize_4bit.default(
                tensors[f"{name}.weight"].T.contiguous().T,
                bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset,
                64,
                "nf4",
                (1, module.shape.numel()),
                torch.float32,
            )
            assert torch.equal(theirs.view(module.shape), plain_dequantise(module.quantised, torch.float32))


def test_what_can_not_be_loaded_is_said(cache, tmp_path, monkeypatch):
    path = saved(tmp_path / "model", shard="1GB")
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    q = "model.layers.1.self_attn.q_proj.weight"

    def save(**changes):
        kept = {name: t for name, t in {**tensors, **changes}.items() if t is not None}
        safetensors.torch.save_file(kept, path / "model.safetensors", metadata={"format": "pt"})

    for changes, message in (
        ({q: None}, "q_proj.weight is missing"),
        ({q: torch.zeros(8, 16)}, r"q_proj.weight is \(8, 16\), expected \(16, 16\)"),
        ({q: torch.full((16, 16), float("nan"))}, "q_proj.weight isn't finite"),
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
    ):
        save(**changes)
        with pytest.raises(ModelError, match=message):
            opened(path)
    assert not list(cache.glob("*"))
    save(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)})  # of older files; made anew
    assert opened(path).model.rotary_emb.inv_freq.all()
    with pytest.raises(ModelError, match="experts can't be quantised"):
        opened(saved(tmp_path / "experts", "mixtral"))
    shutil.rmtree(cache)
    cache.write_text("")  # a file where the folder should be
    with pytest.raises(UserError, match="can't write"):
        opened(path)


PEAK = """
import sys
from pathlib import Path
import torch
from lorafit.batches import Plan
from lorafit.machine import memory, peak_memory
from lorafit.host import Host
from lorafit.model import quant, quant_load
from lorafit.model.fingerprint import fingerprint
from lorafit.model.load import load, prepare
from transformers import AutoConfig

path, kind = Path(sys.argv[1]), sys.argv[2]
config = AutoConfig.from_pretrained(path)
torch.nn.functional.linear(torch.randn(64, 1024).bfloat16(), torch.randn(64, 1024).bfloat16())
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory()
if kind == "none":
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.bfloat16)
else:
    model, _ = quant_load.load(path, config, torch.bfloat16, quant.Quant(kind), fingerprint(path), lambda text: None)
loaded = peak_memory() - before
base = prepare(model, None, path)
host = Host(base)
host.add("a", r=4)
with host.route("a"):
    host.hidden(torch.arange(24), [24]).sum().backward()
print(loaded, peak_memory() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_neither_loading_nor_a_step_holds_the_16_bit_model(cache, tmp_path):
    """412 MB in 16 bits, 106 MB in 4, a layer 26 MB. The peak of quantising, and of a step on the mapped codes, stay at the 4-bit
    size and a few layers."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=512,
    )
    path = tmp_path / "model"
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
            p.view(-1)[::3] = -0.02
    model.save_pretrained(path, max_shard_size="100MB")
    whole = sum(p.nbytes for p in model.parameters())
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    del model
    coded = whole * 4.127 / 16
    found = {}
    for kind in ("nf4", "nf4", "none"):
        done = subprocess.run([sys.executable, "-c", PEAK, str(path), kind], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.setdefault(kind, []).append(list(map(int, done.stdout.split())))
    (quantised, first), (mapped, second) = found["nf4"]
    assert mapped <= quantised <= coded + 3 * layer
    assert max(first, second) <= coded + 4 * layer
    assert found["none"][0][1] > 0.9 * whole, "the measurement doesn't see the model"


# --- settings, runs, verbs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tiny_model, data_file, tmp_path_factory):
    """The same short training on the base as it is, and in nf4; and the cache that all tests of it share."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        for kind in ("none", "nf4"):
            fit.fit(config_of(tiny_model, data_file, place / kind, quant=kind), QUIET)
        yield place


def config_of(model, data, out, **changes):
    settings = {"model": str(model), "out": str(out), "precision": "fp32", "steps": "6", "lr": "0.01", "dropout": "0.1"}
    return fit.read_config(str(data), {**settings, "eval_every": "3", "samples": "1", **changes})


def test_a_run_remembers_how_its_base_was_stored(runs):
    for kind in ("none", "nf4"):
        assert f"quant: {kind}\n" in (runs / kind / "config.yaml").read_text()
        assert json.loads((runs / kind / "summary.json").read_text())["quant"] == kind
        assert json.loads((runs / kind / "adapter" / "lorafit.json").read_text())["quant"] == kind
    summary = json.loads((runs / "nf4" / "summary.json").read_text())
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    rows = fit.held_out_rows(runs / "nf4", session.open_session([str(runs / "nf4")]).chat("nf4"))
    said: list[str] = []
    for asked, want in ((None, "nf4"), ("nf4", "nf4"), ("none", None), ("int8", "int8")):
        said.clear()
        opened = session.open_session([str(runs / "nf4")], quant=asked, precision="fp32", say=said.append)
        stored = opened.host.base.quant
        assert (stored and stored.kind) == want
        loss = evaluate(opened.host, rows, "nf4").loss
        assert (loss == pytest.approx(summary["held_out_loss_after"], rel=1e-6)) == (want == "nf4")
        assert any("a base in nf4; this one is in" in line for line in said) == (want != "nf4")


def test_adapters_of_bases_stored_otherwise_need_a_choice(runs):
    paths = [str(runs / "none"), str(runs / "nf4")]
    with pytest.raises(AdapterError, match=r"\(none none, nf4 nf4\); .*: --quant none, or --quant nf4; each is"):
        session.open_session(paths)
    assert session.open_session(paths, quant="none").host.base.quant is None
    assert session.open_session(paths[1:], quant="nf4").host.base.quant == quant.Quant("nf4")


def test_a_kind_that_is_not_known_is_said(runs, tmp_path):
    shutil.copytree(runs / "nf4" / "adapter", tmp_path / "a")
    notes = json.loads((tmp_path / "a" / "lorafit.json").read_text())
    (tmp_path / "a" / "lorafit.json").write_text(json.dumps({**notes, "quant": "nf2"}))
    with pytest.raises(AdapterError, match="a base in 'nf2'"):
        session.open_session([str(tmp_path / "a")])


def test_resumed_it_is_the_unbroken_run_and_another_storage_is_refused(runs, tmp_path):
    shutil.copytree(runs / "nf4", tmp_path / "run")
    for step in (tmp_path / "run" / "checkpoints").iterdir():
        if step.name != "step-000003":
            shutil.rmtree(step)
    with pytest.raises(RunError, match="quant: nf4 -> none"):
        fit.resume(tmp_path / "run", {"quant": "none"}, terminal=QUIET)
    fit.resume(tmp_path / "run", {}, terminal=QUIET)
    ends = [
        safetensors.torch.load_file(run / "adapter" / "adapter_model.safetensors")
        for run in (tmp_path / "run", runs / "nf4")
    ]
    assert all(torch.equal(t, ends[1][name]) for name, t in ends[0].items())


def test_training_from_an_adapter_takes_its_base_as_it_was_stored(runs, tiny_model, data_file, tmp_path):
    for given, want in (({}, "nf4"), ({"quant": "int8"}, "int8")):
        values = {"start": str(runs / "nf4"), "steps": "1", "out": str(tmp_path / want), **given}
        assert fit.fit(fit.read_config(str(data_file), values), QUIET).folder
        assert f"quant: {want}\n" in (tmp_path / want / "config.yaml").read_text()
    assert fit.read_config(str(data_file), {"start": str(runs / "none")}).quant == "none"


@pytest.mark.parametrize("into", ["original", "dequantised"])
def test_merging_into_weights_of_16_bits(runs, tmp_path, tiny_model, into, capsys):
    """Into the original weights, and into those that the codes stand for: then it is the model that was trained."""
    assert main(["merge", str(runs / "nf4"), str(tmp_path / "out"), "--dtype", "fp32", "--into", into, "--json"]) == 0
    said = capsys.readouterr()
    assert ("a base in nf4; this one is in its own precision" in said.err) == (into == "original")
    trained = session.open_session(
        [str(runs / "nf4")], quant="none" if into == "original" else None, precision="fp32"
    ).host
    assert (trained.base.quant is None) == (into == "original")
    merged = load(str(tmp_path / "out"), precision="fp32")
    ids = torch.arange(20) % 40
    with torch.no_grad(), trained.route("nf4"):
        want = trained.logits(ids, [20])
    assert (merged.logits(ids, [20]) - want).abs().max() < 1e-5 * want.abs().max()


def test_what_codes_stand_for_is_merged_from_a_folder_alone(runs, tmp_path, tiny_model):
    """Whether the rest of the base is in memory or streamed; codes that were made in memory have no folder."""
    found = []
    for streamed in (False, True):
        host = session.open_session([str(runs / "nf4")], precision="fp32", streamed=streamed).host
        assert host.base.streamed is streamed
        assert merge(host, "nf4", tmp_path / str(streamed), [[1, 2]], dtype=torch.float32).holds
        found.append(load_file(tmp_path / str(streamed) / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    host = session.open_session([str(runs / "nf4")], precision="fp32").host
    host.base.source = None
    with pytest.raises(RunError, match="quantised to nf4 in memory"):
        merge(host, "nf4", tmp_path / "out", [[1, 2]], dtype=torch.float32)
    assert not (tmp_path / "out").exists()


def test_the_verbs_open_it_as_it_was_trained(runs, data_file, capsys):
    losses = []
    for words in ([], ["--quant", "none"]):
        code = main(["eval", str(runs / "nf4"), str(data_file), "--precision", "fp32", "--json", *words])
        losses.append(json.loads(capsys.readouterr().out)["scores"]["nf4"]["loss"])
        assert code == 0
    assert losses[0] != losses[1]
    assert main(["chat", str(runs / "nf4"), "--prompt", "one two", "--max-new", "3", "--compare"]) == 0
    assert main(["chat", "--model", "nowhere/at/all", "--quant", "nf4"]) == 2


def test_a_plan_counts_codes(tiny_model, data_file):
    configs = [fit.read_config(str(data_file), {"precision": "bf16", "quant": q}) for q in ("none", "nf4")]
    whole, coded = (plan.estimate(c, plan.empty(c, tiny_model), tiny.rows([20] * 9)) for c in configs)
    base = both("llama")[0]
    sizes = [
        (quant.Quant("nf4").size(m.shape), m.quantised.nbytes) for m in base.model.modules() if hasattr(m, "codes")
    ]
    assert sizes and all(a == b for a, b in sizes)
    assert coded.weights < whole.weights and coded.total_parameters == whole.total_parameters
    for kind, double in (("nf4", False), ("int8", True)):
        q = quantise(weight((33, 96)), kind, double)
        assert quant.Quant(kind, double).size(q.shape) == q.nbytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_on_a_gpu_it_is_the_same(kind):
    assert quantised._on_gpu() is not None
    w = weight((64, 512))
    q, there = quantise(w, kind), quantise(w.cuda(), kind)
    assert torch.equal(q.codes, there.codes.cpu())
    for shape, double, dtype in product(SHAPES, (True, False), DTYPES):
        made = quantise(weight(shape).cuda(), kind, double)
        assert torch.equal(dequantise(made, dtype), plain_dequantise(made, dtype))
        out = torch.full(made.shape, torch.nan, dtype=dtype, device="cuda")
        assert dequantise(made, dtype, out) is out and torch.equal(out, plain_dequantise(made, dtype))
    found = []
    for device in ("cpu", "cuda"):
        model = tiny.model("llama")
        quant.convert(model, quant.Quant(kind))
        host = Host(prepare(model.to(device), None, Path("nowhere"), quant=quant.Quant(kind)))
        host.add("a", r=4)
        tiny.randomize(host.adapters["a"].cpu())
        host.adapters["a"].to(device)
        with host.route("a"):
            hidden = host.hidden(tiny.ids(20).to(device), [9, 11])
            way = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(device)
            (hidden * way).sum().backward()  # not its square: behind a norm that has no gradient
        grads = torch.cat([p.grad.flatten() for p in host.adapters["a"].parameters()])
        found.append([hidden.detach().cpu(), grads.cpu()])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


# --- benchmarks/ -------------------------------------------------------------------------------------------------------


def test_the_benchmark_counts_what_it_says(tiny_model, cache, monkeypatch, capsys):
    root = Path(__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])]))
    script = runpy.run_path(str(root / "benchmarks" / "quant.py"))
    words = ["quant.py", "--model", str(tiny_model), "--precision", "fp32", "--tokens", "32", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", words)
    script["main"]()
    found = json.loads(capsys.readouterr().out)
    assert set(found["speed"]["seconds"]) == {"none", "nf4"} and found["speed"]["throughput"] > 0
    assert found["errors"]["weights"] == 14 and 0.05 < found["errors"]["error"][1] < 0.15
    assert found["errors"].get("codes that differ", 0) == 0
    assert min(found["peak"].values()) > 50_000_000

"""The same on a CUDA device as on the CPU and as transformers' own modules give it. Skipped where there is no such device."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import distance, loss_and_gradients, rows
from tiny import ids, model
from torch._dynamo.utils import counters

from lorafit import fit
from lorafit.evaluate import evaluate
from lorafit.generate import generate
from lorafit.host import Host
from lorafit.log import Terminal
from lorafit.model import body
from lorafit.model.load import load, prepare
from lorafit.model.quant import Quant
from lorafit.native import build
from lorafit.native.attention import _varlen, attend, plain_attend
from lorafit.route import Route
from lorafit.train.loop import Job, Plan, _gradients, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DOCUMENTS = rows([12, 5, 9, 3, 7, 1, 11])
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
BODILESS = ["gpt2", "mixtral"]


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 means fp32: no TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()  # it compiles a function for eight kinds of tensors and no more
    yield
    torch.set_float32_matmul_precision(before)


def host_on(device, shape, dtype=torch.float32, options=({"r": 3},), **changes) -> Host:
    """A tiny model with adapters a, b, … of these options, every number drawn on the CPU."""
    made = model(shape, scale=0.15, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        made.get_input_embeddings().weight.normal_(0, 1, generator=generator)
    host = Host(prepare(made.to(device, dtype), None, Path("nowhere"), shape))
    assert host.base.packs
    assert host.base.plain_head
    for name, given in zip("abc", options, strict=False):
        adapter = host.add(name, **given)
        with torch.no_grad():
            for p in adapter.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    return host


def alone(host: Host, documents):
    """Loss and gradients by transformers' own modules, each document in a forward of its own."""
    body, packs = host.base.body, host.base.packs
    host.base.body, host.base.packs = None, False
    try:
        with build.switched(False):
            return loss_and_gradients(host, documents, 1)
    finally:
        host.base.body, host.base.packs = body, packs


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("family", FAMILIES + BODILESS)
def test_gives_what_the_modules_give_and_what_the_cpu_gives(family, native):
    host = host_on("cuda", family)
    assert (host.base.body is not None) == (family in FAMILIES)
    want, gradients = alone(host, DOCUMENTS)
    on_cpu, cpu_gradients = loss_and_gradients(host_on("cpu", family), DOCUMENTS, 1)
    assert abs(want - on_cpu) < 1e-5 * want
    assert distance({k: g.cpu() for k, g in gradients.items()}, cpu_gradients) < 1e-5
    with build.switched(native):
        for accumulate in (1, 3):
            loss, found = loss_and_gradients(host, DOCUMENTS, accumulate)
            assert abs(loss - want) < 1e-5 * want
            assert distance(found, gradients) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_no_farther_from_fp32_than_the_modules_are(family):
    sizes = dict(hidden_size=64, intermediate_size=96, max_position_embeddings=256)
    documents = rows([80, 33, 120, 64, 1, 17])
    want, exact = alone(host_on("cuda", family, **sizes), documents)
    host = host_on("cuda", family, torch.bfloat16, **sizes)
    assert host.base.body is not None
    plain_loss, plain = alone(host, documents)
    loss, found = loss_and_gradients(host, documents, 1)
    assert abs(loss - want) < 2 * abs(plain_loss - want) + 1e-3 * want
    assert distance(found, exact) < 2 * distance(plain, exact)


@pytest.mark.parametrize("window", [None, 1, 40, 5000])
@pytest.mark.parametrize(
    "heads, shared, dim", [(4, 4, 64), (9, 3, 64), (8, 1, 128), (4, 2, 8), (4, 2, 20), (2, 2, 256)]
)
def test_fused_attention_is_as_near_to_fp32_as_the_plain_one(heads, shared, dim, window):
    lengths = [70, 1, 0, 200, 129]
    q, k, v, way = (torch.randn(sum(lengths), h, dim, device="cuda") for h in (heads, shared, shared, heads))

    def run(function, dtype):
        given = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = function(*given, lengths, 0.7 * dim**-0.5, window)
        out.backward(way.flatten(1).to(dtype))
        return [t.float() for t in (out.detach(), *(x.grad for x in given))]

    exact = run(plain_attend, torch.float64)
    plain, fused = run(plain_attend, torch.bfloat16), run(attend, torch.bfloat16)
    for want, near, found in zip(exact, plain, fused, strict=True):
        assert (found - want).norm() <= 1.5 * (near - want).norm() + 1e-6 * want.norm()
    assert (_varlen(q.device, torch.bfloat16, dim) is None) == (dim == 20)


def test_a_long_window_over_a_long_document():
    host = host_on("cuda", "mistral", torch.bfloat16, sliding_window=300, max_position_embeddings=2048)
    row, lengths = ids(1400).cuda(), [900, 500]
    with torch.no_grad():
        got, want = host.hidden(row, lengths).float(), host.base.hidden(row, lengths, packed=False).float()
        host.base.body.window = None
        without = host.hidden(row, lengths).float()
    assert (got - want).norm() < 0.02 * want.norm() < (without - want).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "dropout": 0.3},
        {"r": 3, "targets": ["all"]},
        {"method": "full", "targets": ["q_proj", "embed_tokens", "up_proj"]},
        {"r": 4, "targets": ["k_proj", "gate_proj"], "rank_pattern": {"gate_proj": 9}},
    ],
    ids=["dropout", "all", "full", "some"],
)
def test_methods_targets_and_checkpointing(options, dtype):
    host = host_on("cuda", "llama", dtype, [options])
    want, gradients = alone(host, DOCUMENTS)
    if options.get("dropout"):  # falls on a whole micro-batch, so documents alone draw other numbers
        body, host.base.body = host.base.body, None
        want, gradients = loss_and_gradients(host, DOCUMENTS, 1)
        host.base.body = body
    near = 1e-5 if dtype == torch.float32 else 0.03
    loss, found = loss_and_gradients(host, DOCUMENTS, 1)
    assert abs(loss - want) < near * want
    assert distance(found, gradients) < near
    host.base.checkpointing(True)
    again, others = loss_and_gradients(host, DOCUMENTS, 1)
    assert again == loss
    assert distance(others, found) < 1e-2 * near


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_two_adapters_in_one_row(family):
    host = host_on("cuda", family, options=[{"r": 3}, {"r": 5}])
    documents = {"a": rows([5, 8]), "b": rows([7, 3, 4], seed=1)}
    jobs = [Job(name, Plan(documents[name], 10**9), steps=1, lr=1e-3) for name in documents]

    def gradients(chosen):
        for adapter in host.adapters.values():
            adapter.zero_grad()
        losses = _gradients(host, chosen, documents)
        return losses, {
            f"{j.name}.{k}": p.grad.clone() for j in chosen for k, p in host.adapters[j.name].named_parameters()
        }

    together, found = gradients(jobs)
    single = [gradients([job]) for job in jobs]
    assert max(abs(a - b[0]) for a, (b, _) in zip(together, single, strict=True)) < 1e-5
    assert distance(found, single[0][1] | single[1][1]) < 1e-5


def test_evaluates_generates_saves_and_loads(tmp_path):
    on_gpu, on_cpu = (host_on(device, "llama") for device in ("cuda", "cpu"))
    for spec in (None, "a"):
        assert abs(evaluate(on_gpu, DOCUMENTS, spec).loss - evaluate(on_cpu, DOCUMENTS, spec).loss) < 1e-5
        assert evaluate(on_gpu, DOCUMENTS, spec, tokens=13).loss == pytest.approx(
            evaluate(on_gpu, DOCUMENTS, spec).loss
        )
    assert list(generate(on_gpu, [3, 5, 8], "a", max_new=12)) == list(generate(on_cpu, [3, 5, 8], "a", max_new=12))
    assert len(list(generate(on_gpu, [3, 5], "a", max_new=5, temperature=0.8, top_p=0.9))) == 5
    on_gpu.save("a", tmp_path)
    on_gpu.load(tmp_path, "again")
    row, lengths = ids(11).cuda(), [4, 7]
    with torch.no_grad():
        with on_gpu.route(Route.of([(4, "a"), (7, None)])):
            mixed = on_gpu.logits(row, lengths)
        with on_gpu.route("again"):
            assert torch.equal(mixed[:4], on_gpu.logits(row, lengths)[:4])
        with on_gpu.route(None):
            assert (mixed[4:] - on_gpu.logits(row, lengths)[4:]).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_gives_the_numbers_of_the_cpu(family):
    def curve(device):
        host = host_on(device, family)
        job = Job("a", Plan(rows([12, 5, 9, 3, 7, 11] * 4, learn="all"), 30), steps=12, lr=1e-2)
        return [step.jobs["a"].loss for step in train(host, [job])]

    on_gpu, on_cpu = curve("cuda"), curve("cpu")
    assert max(abs(a - b) for a, b in zip(on_gpu, on_cpu, strict=True)) < 1e-4
    assert sum(on_gpu[-3:]) < sum(on_gpu[:3])


def test_too_little_memory_halves_the_micro_batches():
    sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, max_position_embeddings=512)

    def run(limit):
        host = host_on("cuda", "llama", **sizes)
        job = Job("a", Plan(rows([400] * 24), 24 * 400), steps=2, lr=1e-3)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        if limit:
            torch.cuda.set_per_process_memory_fraction(
                (before + limit) / torch.cuda.get_device_properties(0).total_memory
            )
        try:
            steps = list(train(host, [job]))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return steps, torch.cuda.max_memory_reserved() - before

    free, peak = run(None)
    held, less = run(peak // 3)
    assert free[0].halvings == 0 < held[0].halvings
    assert held[0].too_large
    assert less <= peak // 3
    for a, b in zip(free, held, strict=True):
        assert abs(a.jobs["a"].loss - b.jobs["a"].loss) < 1e-4
        assert abs(a.jobs["a"].grad_norm - b.jobs["a"].grad_norm) < 1e-3 * a.jobs["a"].grad_norm


@pytest.mark.parametrize(
    "family, dtype",
    [("llama", torch.float32), ("qwen2", torch.float32), ("qwen3", torch.float32), ("mistral", torch.bfloat16)],
)
def test_compiled_layers_give_the_same_and_take_any_length(family, dtype):
    sizes = dict(hidden_size=64, intermediate_size=96, max_position_embeddings=256)
    exact_host, host = host_on("cuda", family, **sizes), host_on("cuda", family, dtype, **sizes)
    graphs = set()
    for number, lengths in enumerate([[80, 33, 64], [7, 3], [120, 1, 17, 90, 20], [200]]):
        documents = rows(lengths)
        want, exact = alone(exact_host, documents)
        host.base.body.compiled = False
        plain_loss, plain = loss_and_gradients(host, documents, 1)
        host.base.body.compiled = True
        loss, found = loss_and_gradients(host, documents, 1)
        assert abs(loss - want) < (1e-5 if dtype == torch.float32 else 5e-3) * want
        assert distance(found, exact) < (2e-5 if dtype == torch.float32 else 1.5 * distance(plain, exact))
        graphs.add(counters["stats"]["unique_graphs"])
        if number == 0:
            assert not torch.equal(
                torch.cat([g.flatten() for g in found.values()]), torch.cat([g.flatten() for g in plain.values()])
            )
    assert len(graphs) <= 2  # at most once more for all other lengths
    with build.switched(False):
        assert loss_and_gradients(host, documents, 1)[0] == pytest.approx(plain_loss, rel=5e-3)
    assert counters["stats"]["unique_graphs"] in graphs
    host.base.checkpointing(True)
    again, others = loss_and_gradients(host, documents, 1)
    assert again == pytest.approx(loss, rel=1e-6)
    assert distance(others, found) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(
    "options", [[{"r": 3, "dropout": 0.3}], [{"method": "full", "targets": ["q_proj"]}], [{"r": 3}] * 2]
)
def test_what_cannot_be_compiled_is_not(options):
    host = host_on("cuda", "llama", options=options)
    documents = {name: rows([5, 8], seed=i) for i, name in enumerate(host.adapters)}
    jobs = [Job(name, Plan(documents[name], 10**9), steps=1, lr=1e-3) for name in documents]
    want = _gradients(host, jobs, documents)
    before = counters["stats"]["unique_graphs"]
    host.base.body.compiled = True
    assert _gradients(host, jobs, documents) == pytest.approx(want, rel=1e-6)
    assert counters["stats"]["unique_graphs"] == before


def settings(model, out, **changes):
    given = {"model": str(model), "out": str(out), "steps": "8", "batch_tokens": "200", "eval_every": "4", "r": "4"}
    return given | {"checkpoint_every": "3", "samples": "1"} | changes


class Heard(Terminal):
    """Keeps what is said; Ctrl-C when a line begins with `stop_at`."""

    def __init__(self, stop_at="nothing"):
        super().__init__(quiet=True)
        self.lines, self.stop_at = [], stop_at

    def say(self, text=""):
        self.lines.append(text)
        if text.startswith(self.stop_at):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_a_whole_run_and_one_that_was_interrupted(tiny_model, data_file, tmp_path, precision):
    heard, others = Heard(), Heard("step 4:")
    run = fit.fit(fit.read_config(str(data_file), settings(tiny_model, tmp_path / "a", precision=precision)), heard)
    assert any(f"{'bf16' if precision == 'auto' else 'fp32'} on cuda" in line for line in heard.lines)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    with pytest.raises(fit.Interrupted):
        fit.fit(fit.read_config(str(data_file), settings(tiny_model, tmp_path / "b", precision=precision)), others)
    fit.resume(tmp_path / "b", {}, terminal=Heard())
    first, second = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "ab")
    assert distance(first, second) < (1e-4 if precision == "fp32" else 0.05)
    host = Host(load(str(tiny_model)))
    assert host.base.device.type == "cuda"
    host.load(run.adapter, "mine")


@pytest.mark.parametrize("kind", ["adamw", "paged_adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_a_base_in_four_bits_and_every_optimizer(tiny_model, data_file, tmp_path, kind):
    if kind != "adamw":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")

    def run(name, **changes):
        return fit.read_config(
            str(data_file), settings(tiny_model, tmp_path / name, quant="nf4", optimizer=kind, **changes)
        )

    fit.fit(run("a", precision="fp32"), Heard())
    with pytest.raises(fit.Interrupted):
        fit.fit(run("b", precision="fp32"), Heard("step 4:"))
    fit.resume(tmp_path / "b", {}, terminal=Heard())
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["peak_gpu_bytes"] > 0
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    first, second = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "ab")
    assert distance(first, second) < 1e-4
    fit.fit(run("c", precision="fp32", device="cpu"), Heard())
    on_cpu = json.loads((tmp_path / "c" / "summary.json").read_text())
    near = (
        1e-3 if kind.endswith("adamw") else 0.02
    )  # bitsandbytes rounds small tensors' state where we don't, and elsewhere
    assert summary["held_out_loss_after"] == pytest.approx(on_cpu["held_out_loss_after"], rel=near)


def test_evaluating_and_generating_leave_training_in_four_bits_as_it_is(tiny_model):
    def losses(disturbed):
        host = Host(load(str(tiny_model), quant=Quant("nf4"), precision="fp32"))
        assert host.base.device.type == "cuda"
        host.add("a", r=4)
        found = []
        for step in train(host, [Job("a", Plan(DOCUMENTS, 30), steps=6, lr=1e-2)]):
            found.append(step.jobs["a"].loss)
            if disturbed:
                evaluate(host, DOCUMENTS, "a")
                list(generate(host, [3, 5, 8], "a", max_new=4))
        return found, evaluate(host, DOCUMENTS, "a").loss

    (plain, at_end), (other, after) = losses(False), losses(True)
    assert plain == pytest.approx(other, rel=1e-6) and at_end == pytest.approx(after, rel=1e-6)
    assert plain[-1] < plain[0]


@pytest.mark.parametrize("works", [True, False])
def test_a_long_run_compiles_the_layers_or_goes_on_without(tiny_model, data_file, tmp_path, monkeypatch, works):
    monkeypatch.setattr(fit, "WORTH_COMPILING_LAYERS", 0)
    if not works:

        def fails(function):
            raise RuntimeError("no working compiler")

        monkeypatch.setattr(torch, "compile", fails)
    body._compiled.cache_clear()
    before, heard = counters["stats"]["unique_graphs"], Heard()
    given = settings(tiny_model, tmp_path / "run", memory="2G")
    run = fit.fit(fit.read_config(str(data_file), given), heard)
    body._compiled.cache_clear()
    assert ("the layers can't be compiled: no working compiler" in heard.lines) != works
    assert (counters["stats"]["unique_graphs"] > before) == works
    assert (run.adapter / "adapter_model.safetensors").exists()


def test_the_command_line(tiny_model, data_file, tmp_path):
    def lorafit(*words):
        done = subprocess.run([sys.executable, "-m", "lorafit", *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    given = [f"{k}={v}" for k, v in settings(tiny_model, tmp_path / "run").items() if k not in ("model", "out")]
    lorafit("train", data_file, "--model", tiny_model, "--out", tmp_path / "run", *given)
    assert "base" in lorafit("eval", tmp_path / "run", data_file)
    lorafit("merge", tmp_path / "run", tmp_path / "merged")

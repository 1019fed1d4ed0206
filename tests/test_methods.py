"""Each method beside its formula, written out densely; its file in PEFT, both ways; and a run that is resumed and opened."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import peft
import pytest
import safetensors.torch
import torch
from tiny import base, ids, model, randomize, rows

from lorafit import fit, plan, session
from lorafit.errors import AdapterError, ConfigError
from lorafit.evaluate import evaluate
from lorafit.export.merge import merge
from lorafit.host import Host
from lorafit.log import Terminal
from lorafit.methods import METHODS
from lorafit.methods.dora import DoRA
from lorafit.methods.qrlora import pivoted
from lorafit.model.load import load, prepare
from lorafit.native import build
from lorafit.native.rescale import plain_rescale, rescale
from lorafit.train import optim

QUIET = Terminal(quiet=True)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(host, x, name="a"):
    with torch.no_grad(), host.route(name):
        return host.logits(x, [len(x)])


def in_peft(folder, shape, x, **changes):
    """The logits of transformers' own model with the adapter that PEFT loads from `folder`."""
    theirs = peft.PeftModel.from_pretrained(model(shape, **changes), folder).eval()
    with torch.no_grad():
        return theirs(input_ids=x[None]).logits[0]


def near(got, want, share=1e-5):
    return (got - want).abs().max() < share * max(1, want.abs().max())


# --- rsLoRA and LoRA+ --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_rslora_scales_by_the_root_of_the_rank_also_on_disk(tmp_path):
    host = Host(base("llama"))
    randomize(host.add("a", "rslora", r=8, rank_pattern={"q_proj": 3}, alpha_pattern={"k_proj": 5.0}))
    scales = {path.rsplit(".", 1)[-1]: layer.scale for path, layer in host.adapters["a"].items()}
    assert (scales["q_proj"], scales["k_proj"], scales["v_proj"]) == (8 / 3**0.5, 5 / 8**0.5, 8 / 8**0.5)
    host.save("a", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["r"], config["lora_alpha"]) == (True, 8, 8)
    assert list(config["rank_pattern"].values()) == [3, 3] and list(config["alpha_pattern"].values()) == [5, 5]
    x = ids(13)
    assert near(in_peft(tmp_path, "llama", x), logits(host, x))
    assert torch.equal(logits(host, x), logits(host, x, host.load(tmp_path, "b") and "b"))


def test_at_the_default_rank_rslora_begins_as_lora_does():
    host = Host(base("llama"))
    assert {layer.scale for name in ("lora", "rslora") for _, layer in host.add(name, name).items()} == {2.0}


def test_lora_plus_is_lora_with_two_rates():
    """Two steps of AdamW beside a plain optimiser's with two groups; and what is loaded goes on as LoRA."""
    host = Host(base("llama"))
    ours = host.add("a", "lora+", ["embed_tokens", "q_proj"], r=3, lr_ratio=5.0)
    plain = host.add("b", "lora", ["embed_tokens", "q_proj"], r=3)
    made = optim.optimizer(ours, 1e-3, 0.0)
    fast = {"model.embed_tokens": "a"}
    groups = {1.0: [], 5.0: []}
    for path, layer in plain.items():
        for name, p in layer.named_parameters():
            groups[5.0 if name == fast.get(path, "b") else 1.0].append(p)
    other = torch.optim.AdamW([{"params": ps, "lr": 1e-3 * k} for k, ps in groups.items()], weight_decay=0.0)
    for adapter, optimizer in ((ours, made), (plain, other)):
        for step in range(2):
            if optimizer is made:
                optim.set_rate(made, 1e-3)
            for i, p in enumerate(adapter.parameters()):
                p.grad = normal(*p.shape, seed=7 * step + i)
            optimizer.step()
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(ours.parameters(), plain.parameters(), strict=True))


# --- DoRA --------------------------------------------------------------------------------------------------------------


def site(w, bias=None, lookup=False):
    """What a method is told of a weight (out, in)."""
    return SimpleNamespace(path="layers.0.q_proj", shape=w.shape, lookup=lookup, bias=bias, weight=lambda: w)


def dense_dora(layer, w, bias, x, dropped=None):
    """The formula as the paper has it, V formed, its norm a constant: what the site gives."""
    v = w + layer.scale * layer.b @ layer.a
    whole = layer.m[:, None] * v / v.norm(dim=1, keepdim=True).detach()
    if dropped is not None:  # as PEFT: the base's own output, and the change on what is left of x
        return x @ w.t() + dropped @ (whole - w).t() + bias
    return x @ whole.t() + bias


def gradients(layer, out):
    layer.zero_grad()
    (out * normal(*out.shape, seed=9)).sum().backward()
    return [p.grad.clone() for p in layer.parameters()]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dora_is_its_formula(dropout):
    w, bias, x = normal(20, 12), normal(20, seed=1), normal(7, 12, seed=2)
    layer = DoRA(site(w, bias), r=3, alpha=5.0, dropout=dropout)
    assert torch.equal(layer.m, layer.square.sqrt()) and (layer.m - w.norm(dim=1)).abs().max() < 1e-6
    randomize(layer)
    layer.m.data += 4
    layer.train(dropout > 0)
    y = x @ w.t() + bias
    found = y + layer(x, y, torch.nn.functional.linear, lambda: w)
    want = dense_dora(layer, w, bias, x, layer.dropped(x) if dropout else None)
    assert near(found, want)
    for g, h in zip(gradients(layer, found), gradients(layer, want), strict=True):
        assert g.abs().max() > 0 and near(g, h)
    assert near(w + layer.delta_weight(w), dense_dora(layer, w, 0, torch.eye(12)).t())
    made = layer.scaled(lambda: w)
    assert (made is None) == (dropout > 0)
    if made is not None:
        y = y + (x @ made.low[0].t()) @ made.low[1].t() * made.low[2]
        whole = rescale(y, made.gain, made.apart)
        assert near(whole, want)
        for g, h in zip(gradients(layer, whole), gradients(layer, dense_dora(layer, w, bias, x)), strict=True):
            assert near(g, h)


def test_rescale_is_its_twin():
    y, gain, apart, out = normal(9, 5), normal(5, seed=1), normal(5, seed=2), normal(9, 5, seed=3)
    for off in (apart, None):
        ends = []
        for function in (rescale, plain_rescale):
            leaves = y.clone().requires_grad_(), gain.clone().requires_grad_()
            made = function(*leaves, off)
            made.backward(out)
            ends.append([made.detach(), *(leaf.grad for leaf in leaves)])
        assert all(near(a, b, 1e-6) for a, b in zip(*ends, strict=True))
    assert torch.equal(rescale(y, torch.zeros(5), apart), y)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("shape", ["llama", "qwen2"])
def test_a_fresh_dora_adds_nothing_in_16_bits(shape, native):
    with build.switched(native):
        host = Host(base(shape, torch.bfloat16))
        host.add("a", "dora", r=4)
        x = ids(20)
        with torch.no_grad():
            before = host.hidden(x, [9, 11])
            with host.route("a"):
                assert torch.equal(host.hidden(x, [9, 11]), before)


def test_doras_norm_follows_every_change_and_needs_no_second_product(monkeypatch):
    host = Host(base("qwen2"))
    adapter = host.add("a", "dora", r=3)
    x, read = ids(12), []
    fresh = {name: p.clone() for name, p in adapter.state_dict().items()}
    monkeypatch.setattr(DoRA, "forward", lambda *args: pytest.fail("computed beside the base's product"))
    norms = DoRA.norm

    def norm(layer, weight):
        return norms(layer, lambda: read.append(layer) or weight())

    monkeypatch.setattr(DoRA, "norm", norm)

    def hidden():
        with torch.no_grad(), host.route("a"):
            return host.hidden(x, [12])

    first = hidden()
    sites = len(read)
    assert sites == 14 and torch.equal(hidden(), first) and len(read) == sites
    randomize(adapter)
    second = hidden()
    assert not torch.equal(second, first) and len(read) == 2 * sites
    adapter.load_state_dict(fresh)
    assert torch.equal(hidden(), first) and len(read) == 3 * sites


DORA = {
    "llama": ("llama", ["all-linear"], {}),
    "qwen2": ("qwen2", ["all-linear"], {"rslora": True, "rank_pattern": {"q_proj": 5}}),
    "gpt2": ("gpt2", ["all-linear"], {}),
    "embedding and head": ("llama", ["embed_tokens", "lm_head"], {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", DORA)
def test_dora_in_peft_and_back(case, tmp_path):
    shape, targets, options = DORA[case]
    host = Host(base(shape))
    adapter = host.add("a", "dora", targets, **{"r": 3, **options})
    randomize(adapter)
    for _, layer in adapter.items():
        layer.m.data += 1
    host.save("a", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["use_dora"] is True
    x = ids(13)
    want = logits(host, x)
    assert near(in_peft(tmp_path, shape, x), want)
    host.load(tmp_path, "again")
    assert torch.equal(logits(host, x, "again"), want)
    theirs = peft.PeftModel.from_pretrained(model(shape), tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    host.load(tmp_path / "theirs", "theirs")
    assert torch.equal(logits(host, x, "theirs"), want)


@pytest.mark.filterwarnings("ignore")
def test_peft_trains_dora_as_we_do():
    """The gradients of the same loss: the norm is a constant there too."""
    host = Host(base("qwen2"))
    adapter = host.add("a", "dora", ["q_proj", "down_proj"], r=3, alpha=5)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], use_dora=True)
    theirs = peft.get_peft_model(model("qwen2"), config)
    randomize(adapter)
    for path, layer in adapter.items():
        layer.m.data += 1
        other = theirs.base_model.model.get_submodule(path)
        for mine, name in ((layer.a, "lora_A"), (layer.b, "lora_B"), (layer.m, "lora_magnitude_vector")):
            getattr(other, name)["default"].weight.data.copy_(mine)
    x, out = ids(13), normal(13, 61)
    theirs(input_ids=x[None]).logits[0].backward(out)
    with host.route("a"):
        host.logits(x, [13]).backward(out)
    for path, layer in adapter.items():
        other = theirs.base_model.model.get_submodule(path)
        for mine, name in ((layer.a, "lora_A"), (layer.b, "lora_B"), (layer.m, "lora_magnitude_vector")):
            assert near(mine.grad, getattr(other, name)["default"].weight.grad)


# --- (IA)³ -------------------------------------------------------------------------------------------------------------

IA3 = {
    "llama": ("llama", [], ["down_proj"]),
    "qwen2": ("qwen2", [], ["down_proj"]),  # keys and values have a bias
    "gpt2": ("gpt2", ["c_attn", "c_proj"], ["mlp.c_proj"]),
    "outputs alone": ("llama", ["all-linear"], []),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", IA3)
def test_ia3_in_peft_and_back(case, tmp_path):
    shape, targets, feedforward = IA3[case]
    host = Host(base(shape))
    adapter = host.add("a", "ia3", targets, feedforward=feedforward)
    assert {path.rsplit(".", 1)[-1] for path, layer in adapter.items() if layer.inputs} <= {"down_proj", "c_proj"}
    randomize(adapter)
    host.save("a", tmp_path)
    x = ids(13)
    want = logits(host, x)
    assert near(in_peft(tmp_path, shape, x), want)
    theirs = peft.PeftModel.from_pretrained(model(shape), tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    for number, folder in enumerate((tmp_path, tmp_path / "theirs")):
        host.load(folder, str(number))
        assert torch.equal(logits(host, x, str(number)), want)


@pytest.mark.parametrize("feedforward", [[], ["q_proj"]])
def test_ia3_is_its_formula(feedforward):
    w, bias, x = normal(20, 12), normal(20, seed=1), normal(7, 12, seed=2)
    layer = METHODS["ia3"](site(w, bias), feedforward=feedforward)
    randomize(layer)
    y = x @ w.t() + bias
    want = (x * layer.scale) @ w.t() + bias if feedforward else layer.scale * y
    (expected,) = gradients(layer, want)
    for found in (
        y + layer(x, y, torch.nn.functional.linear, lambda: w),
        *(rescale(y, *made[1:]) for made in [layer.scaled(lambda: w)] if made is not None),
    ):
        assert near(found, want)
        assert near(gradients(layer, found)[0], expected)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_scaled_bias_is_merged_too(tmp_path, streamed):
    model("qwen2").save_pretrained(tmp_path / "base")
    host = Host(load(str(tmp_path / "base"), precision="fp32", streamed=streamed))
    randomize(host.add("a", "ia3"))
    want = logits(host, ids(13))
    merge(host, "a", tmp_path / "out", [[1, 2, 3]], dtype=torch.float32)
    assert near(logits(Host(load(str(tmp_path / "out"), precision="fp32")), ids(13), None), want)


# --- QR-LoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)], ids=str)
def test_pivoting_takes_what_is_left_most(shape):
    w = normal(*shape)
    q, order = pivoted(w, 12)
    r = q.t() @ w[:, order]
    assert (q.t() @ q - torch.eye(12)).abs().max() < 1e-5 and sorted(set(order.tolist())) == sorted(order.tolist())
    assert near(q @ r[:, :12], w[:, order[:12]]) and r[:, :12].tril(-1).abs().max() < 1e-5
    left = w.clone()
    for k in range(12):
        assert left.norm(dim=0).argmax() == order[k]
        left = left - q[:, k : k + 1] @ (q[:, k : k + 1].t() @ left)
    assert torch.equal(pivoted(w, 12, order)[0], q)


def test_qrlora_is_its_formula():
    w, x = normal(20, 12), normal(7, 12, seed=2)
    layer = METHODS["qrlora"](site(w), r=5)
    randomize(layer)
    q, order = pivoted(w, 5)
    rows = torch.linalg.solve(q[order.new_tensor(range(5))], (q @ q.t() @ w)[:5])  # R with its columns back in place
    want = x @ sum(lam * torch.outer(q[:, i], rows[i]) for i, lam in enumerate(layer.lam)).t()
    (expected,) = gradients(layer, want)
    found = layer(x, x @ w.t(), torch.nn.functional.linear, lambda: w)
    assert near(found, want, 1e-4) and near(gradients(layer, found)[0], expected, 1e-4)
    assert sum(p.numel() for p in layer.parameters()) == 5


def test_qrlora_refuses_another_base(tmp_path):
    host = Host(base("llama"))
    host.add("a", "qrlora", r=4)
    host.save("a", tmp_path)
    host.sites["model.layers.1.mlp.up_proj"].write(normal(24, 16))
    with pytest.raises(AdapterError, match="up_proj isn't the weight that this qrlora adapter was made for"):
        host.load(tmp_path, "b")
    half = Host(base("llama", torch.bfloat16))
    half.add("a", "qrlora", r=4)
    half.save("a", tmp_path)
    wide = Host(prepare(half.base.model.float(), None, tmp_path, "llama"))
    wide.load(tmp_path, "b")


# --- whole runs --------------------------------------------------------------------------------------------------------


def config_of(tiny_model, data, out, **changes):
    settings = {"model": str(tiny_model), "out": str(out), "precision": "fp32", "steps": "4", "lr": "0.005"}
    return fit.read_config(str(data), {**settings, "eval_every": "2", "samples": "0", **changes})


RUNS: dict[str, dict[str, str]] = {
    "rslora": {"r": "4", "dropout": "0.1"},
    "lora+": {"r": "4"},
    "dora": {"r": "4", "dropout": "0.1"},
    "ia3": {},
    "qrlora": {"r": "8"},
}


@pytest.fixture(scope="module")
def runs(tiny_model, data_file, tmp_path_factory):
    """A short training by each method."""
    place = tmp_path_factory.mktemp("runs")
    for method, changes in RUNS.items():
        fit.fit(config_of(tiny_model, data_file, place / method, method=method, **changes), QUIET)
    return place


@pytest.mark.parametrize("method", RUNS)
def test_a_run_learns_and_is_opened_as_it_was(runs, method):
    summary = json.loads((runs / method / "summary.json").read_text())
    assert summary["method"] == method
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    opened = session.open_session([str(runs / method)], precision="fp32")
    held_out = fit.held_out_rows(runs / method, opened.chat(method))
    loss = evaluate(opened.host, held_out, method).loss
    assert loss == pytest.approx(summary["held_out_loss_after"], rel=1e-5)


@pytest.mark.parametrize("method", RUNS)
def test_resumed_it_is_the_unbroken_run(runs, method, tmp_path):
    shutil.copytree(runs / method, tmp_path / "run")
    for step in (tmp_path / "run" / "checkpoints").iterdir():
        if step.name != "step-000002":
            shutil.rmtree(step)
    fit.resume(tmp_path / "run", {}, terminal=QUIET)
    ends = [
        safetensors.torch.load_file(run / "adapter" / "adapter_model.safetensors")
        for run in (tmp_path / "run", runs / method)
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(t, ends[1][key]) for key, t in ends[0].items())


@pytest.mark.parametrize("method", RUNS)
def test_training_goes_on_from_it(runs, data_file, tmp_path, method):
    values = {
        "start": str(runs / method),
        "steps": "1",
        "out": str(tmp_path / "on"),
        "precision": "fp32",
        "samples": "0",
    }
    fit.fit(fit.read_config(str(data_file), values), QUIET)
    first = [json.loads((run / "summary.json").read_text()) for run in (runs / method, tmp_path / "on")]
    assert first[1]["held_out_loss_before"] == pytest.approx(first[0]["held_out_loss_after"], rel=1e-5)


@pytest.mark.parametrize("method", RUNS)
def test_a_plan_knows_it(runs, tiny_model, data_file, method):
    config = fit.read_config(str(data_file), {"method": method, "precision": "fp32", **RUNS[method]})
    found = plan.estimate(config, plan.empty(config, tiny_model), rows([20] * 9))
    summary = json.loads((runs / method / "summary.json").read_text())
    assert found.trainable_parameters == summary["trainable_parameters"]


# --- what can't be -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("rslora", {"r": 0}, "r=0: must be at least 1"),
        ("rslora", {"dropout": 1.0}, "dropout=1.0: must be at least 0 and below 1"),
        ("dora", {"r": 0}, "r=0: must be at least 1"),
        ("qrlora", {"r": 0}, "r=0: must be at least 1"),
        ("lora+", {"r": 0}, "r=0: must be at least 1"),
        ("lora+", {"lr_ratio": 0.0}, "lr_ratio=0.0: must be more than 0"),
    ],
)
def test_bad_settings_are_said(method, options, said):
    with pytest.raises(ConfigError, match=said):
        Host(base("llama")).add("a", method, **options)

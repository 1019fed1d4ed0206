"""Each method beside its formula, written out densely; its file in PEFT, both ways; and a run that is resumed and opened."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import safetensors.torch
import torch
from tiny import base, ids, model, randomize, rows

from lorafit import fit, plan, session
from lorafit.errors import ConfigError
from lorafit.evaluate import evaluate
from lorafit.host import Host
from lorafit.log import Terminal
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


# --- whole runs --------------------------------------------------------------------------------------------------------


def config_of(tiny_model, data, out, **changes):
    settings = {"model": str(tiny_model), "out": str(out), "precision": "fp32", "steps": "4", "lr": "0.005"}
    return fit.read_config(str(data), {**settings, "eval_every": "2", "samples": "0", **changes})


RUNS: dict[str, dict[str, str]] = {
    "rslora": {"r": "4", "dropout": "0.1"},
    "lora+": {"r": "4"},
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
        ("lora+", {"r": 0}, "r=0: must be at least 1"),
        ("lora+", {"lr_ratio": 0.0}, "lr_ratio=0.0: must be more than 0"),
    ],
)
def test_bad_settings_are_said(method, options, said):
    with pytest.raises(ConfigError, match=said):
        Host(base("llama")).add("a", method, **options)

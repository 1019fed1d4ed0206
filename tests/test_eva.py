"""EVA: its start beside PEFT's of the same rows and beside a dense decomposition of all of them, and what a run does with it."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from tiny import VOCAB, base, ids, model, rows

from lorafit import fit
from lorafit.batches import Plan
from lorafit.errors import ConfigError
from lorafit.host import Host
from lorafit.methods.eva import Spread
from lorafit.model.load import prepare
from lorafit.train.activations import study
from lorafit.train.loop import Job, train

BATCHES = [rows([24], seed=n, learn="all") for n in range(6)]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def studied(batches=BATCHES, made=None, **options):
    host = Host(made or base("llama"))
    host.add("a", "eva", options.pop("targets", ["all-linear"]), **{"r": 4, **options})
    seen = study(host, "a", batches)
    return host, dict(host.adapters["a"].items()), seen


def inputs(host, batches, path):
    """What a site is given by the plain base, of learned tokens, (n, in)."""
    found = []
    hook = host.sites[path].module.register_forward_pre_hook(lambda m, args: found.append(args[0][0]))
    with torch.no_grad():
        for documents in batches:
            for row in documents:
                host.base.model(torch.from_numpy(row.ids).long()[None])
                found[-1] = found[-1][torch.from_numpy(row.learn)]
    hook.remove()
    return torch.cat(found)


def apart(a, b):
    """The sine of the largest angle between the rows' subspaces."""
    return float((a - (a @ b.t()) @ b).norm(dim=1).max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tau", [0.99, 0.5])
def test_the_start_is_that_of_peft(tau):
    theirs = peft.get_peft_model(
        model("llama"),
        peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=TARGETS,
            init_lora_weights="eva",
            eva_config=peft.EvaConfig(rho=2.0, tau=tau),
        ),
    )
    cycle = [torch.from_numpy(documents[0].ids).long()[None] for documents in BATCHES]
    peft.initialize_lora_eva_weights(
        theirs, [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in cycle], show_progress_bar=False
    )
    host, layers, seen = studied(BATCHES * 15, alpha=8.0, tau=tau)
    wanted = {}
    for name, module in theirs.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            wanted[name] = module.lora_A["default"].weight.detach(), module.scaling["default"]
    assert seen > 2 and {len(layer.a) for layer in layers.values()} > {4}  # ranks did move
    assert {path: len(layer.a) for path, layer in layers.items() if len(layer.a)} == {
        path: len(a) for path, (a, _) in wanted.items()
    }
    for path, (a, scaling) in wanted.items():
        assert layers[path].scale == scaling
        assert apart(layers[path].a.detach(), a) < 1e-3, path  # theirs is decomposed at random
        assert not layers[path].b.any() and layers[path].b.shape == (host.sites[path].shape[0], len(a))


def test_all_directions_are_those_of_a_dense_decomposition():
    host, layers, seen = studied(r=16, rho=1.0, targets=["layers.0.self_attn.q_proj"])
    assert seen > 2
    for path, layer in layers.items():
        x = inputs(host, BATCHES[:seen], path)
        vt = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh
        assert (layer.a @ vt.t()).abs().diag().min() > 1 - 1e-4
        assert (layer.a @ layer.a.t() - torch.eye(16)).abs().max() < 1e-5


@pytest.mark.parametrize("sizes", [[40], [9, 14, 30, 3, 50], [200, 200]])
def test_batches_together_are_one_decomposition(sizes):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes), 12, generator=generator) @ torch.diag(2.0 ** -torch.arange(12)) + 3.0
    spread = Spread(12)
    for part in x.split(sizes):
        spread.add(part)
    seen = x[: spread.count]
    assert len(seen) == len(x) - sum(map(len, spread.waiting))
    _, s, vt = torch.linalg.svd(seen - seen.mean(0), full_matrices=False)
    assert (spread.s - s).abs().max() < 1e-4 * s.max()
    assert (spread.share - s.double() ** 2 / (s.double() ** 2).sum()).abs().max() < 1e-5
    assert (spread.v[:6] @ vt[:6].t()).abs().diag().min() > 1 - 1e-4


def test_the_leading_part_is_followed_without_the_rest():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(600, 40, generator=generator) @ torch.diag(1.5 ** -torch.arange(40.0))
    spread = Spread(8)
    for part in x.split(100):
        spread.add(part)
    vt = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh
    assert apart(spread.v[:4], vt[:4]) < 0.05 and spread.same.min() > 0.99


def test_what_is_not_learned_is_not_seen():
    half = [rows([40], seed=n) for n in range(4)]
    host, layers, seen = studied(half, r=16, rho=1.0, targets=["layers.1.self_attn.q_proj"])
    path = "model.layers.1.self_attn.q_proj"
    x = inputs(host, half[:seen], path)
    vt = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh
    assert x.shape == (20 * seen, 16)
    assert apart(layers[path].a.detach()[:4], vt[:4]) < 1e-3


def test_the_budget_is_kept_and_none_has_more_than_rho_allows():
    for rho in (1.0, 1.5, 3.0):
        _, layers, _ = studied(rho=rho, rank_pattern={"down_proj": 2})
        asked = {path: 2 if path.endswith("down_proj") else 4 for path in layers}
        assert sum(len(layer.a) for layer in layers.values()) == sum(asked.values())
        assert all(len(layer.a) <= round(rho * asked[path]) for path, layer in layers.items())
        if rho == 1.0:
            assert all(len(layer.a) == asked[path] for path, layer in layers.items())


def test_the_same_rows_give_the_same_start_and_change_nothing():
    (host, one, _), (_, two, _) = studied(), studied()
    assert all(torch.equal(one[path].a, two[path].a) for path in one)
    x = ids(17)
    with torch.no_grad():
        plain = host.logits(x, [17])
        with host.route("a"):
            assert torch.equal(host.logits(x, [17]), plain)


def test_it_trains_from_there_and_is_saved_with_its_ranks(tmp_path):
    host, layers, _ = studied(alpha=6.0)
    ranks = {path: len(layer.a) for path, layer in layers.items()}
    list(train(host, [Job("a", Plan([r for b in BATCHES for r in b], 48, seed=1), 6, 1e-2)]))
    host.save("a", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["init_lora_weights"] is True and config["rank_pattern"]
    host.load(tmp_path, "b")
    assert {path: len(layer.a) for path, layer in host.adapters["b"].items()} == {p: r for p, r in ranks.items() if r}
    x = ids(13)
    theirs = peft.PeftModel.from_pretrained(model("llama"), tmp_path).eval()
    with torch.no_grad():
        with host.route("a"):
            mine = host.logits(x, [13])
        with host.route("b"):
            assert torch.equal(host.logits(x, [13]), mine)
        want = theirs(input_ids=x[None]).logits[0]
        assert (mine - host.logits(x, [13])).abs().max() > 0.01
    assert (mine - want).abs().max() < 1e-5 * want.abs().max()


def test_a_site_that_is_left_no_rank_is_the_base():
    host, layers, _ = studied()
    path = "model.layers.0.self_attn.q_proj"
    layers[path].take(torch.zeros(0, 16))
    list(train(host, [Job("a", Plan([r for b in BATCHES for r in b], 48, seed=1), 3, 1e-2)]))
    assert len(layers[path].a) == 0
    x = ids(9)
    with torch.no_grad(), host.route("a"):
        fast = host.logits(x, [9])
        del host.adapters["a"].layers[path.replace(".", "/")]
        assert (host.logits(x, [9]) - fast).abs().max() < 1e-6


def test_rows_too_few_for_a_start_leave_it_as_lora():
    _, layers, seen = studied([rows([3], learn="all")], r=4)
    plain = Host(base("llama")).add("a", "lora", r=4)
    assert seen == 1
    assert all(torch.equal(layer.a, plain[path].a) for path, layer in layers.items())


def test_a_base_in_codes_and_one_of_another_kind_are_studied():
    from lorafit.model.quant import Quant, convert

    made = model("llama")
    convert(made, Quant("nf4"), None)
    coded = prepare(made, None, __import__("pathlib").Path("nowhere"), "llama", Quant("nf4"))
    host, layers, seen = studied(made=coded)
    path = "model.layers.1.mlp.down_proj"
    x = inputs(host, BATCHES[:seen], path)
    vt = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh
    kept = layers[path].a.detach()
    assert len(kept) > 1 and apart(kept[:1], vt[:1]) < 0.1
    host, layers, _ = studied(made=base("gpt2"), targets=["c_attn"])
    assert all((layer.a @ layer.a.t()).diag().sub(1).abs().max() < 1e-5 for layer in layers.values())


@pytest.mark.parametrize("options", [{"rho": 0.5}, {"tau": 1.0}, {"tau": -0.1}, {"r": 0}])
def test_settings_that_cannot_be_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Host(base("llama")).add("a", "eva", **options)


# --- in a run ------------------------------------------------------------------------------------------------------------


def settings(data_file, tiny_model, out, **more):
    values = {"data": str(data_file), "model": str(tiny_model), "out": str(out), "method": "eva", "r": 4}
    return values | {"steps": 6, "batch_tokens": 128, "samples": 0, "native": False, "precision": "fp32", **more}


def test_a_resumed_run_does_not_look_again(tmp_path, data_file, tiny_model, monkeypatch, capsys):
    whole = fit.fit(fit.build(settings(data_file, tiny_model, tmp_path / "whole", eval_every=3)))
    assert "batches looked at: ranks from" in capsys.readouterr().err
    looked = []
    monkeypatch.setattr(fit, "study", lambda *words, **more: looked.append(1) or study(*words, **more))
    broken = settings(data_file, tiny_model, tmp_path / "broken", eval_every=3)
    with monkeypatch.context() as patched:
        patched.setattr(fit.Training, "finish", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit.fit(fit.build(broken))
    for folder in (tmp_path / "broken" / "checkpoints").iterdir():
        if folder.name.endswith("6"):
            __import__("shutil").rmtree(folder)
    assert len(looked) == 1
    again = fit.resume(tmp_path / "broken", {})
    assert len(looked) == 1
    name = "adapter/adapter_model.safetensors"
    assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    summary = json.loads((again.folder / "summary.json").read_text())
    assert summary["method"] == "eva" and VOCAB

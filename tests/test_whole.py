"""Weights trained whole beside a method's: as PEFT's modules_to_save both ways, merged, and with a shared embedding."""

from __future__ import annotations

import json

import peft
import pytest
import safetensors.torch
import torch
from tiny import base, ids, model, randomize, rows
from transformers import AutoModelForCausalLM

from lorafit.batches import Plan
from lorafit.cli import main
from lorafit.errors import AdapterError, ConfigError
from lorafit.host import Host
from lorafit.methods import METHODS
from lorafit.train import optim
from lorafit.train.loop import Job, train

# base, whole, changes of the base
CASES = {
    "head": ("llama", ["lm_head"], {}),
    "both": ("llama", ["lm_head", "embed_tokens"], {}),
    "tied": ("llama", ["embed_tokens"], {"tie_word_embeddings": True}),
    "linear": ("llama", ["layers.1.mlp.up_proj", "o_proj"], {}),
    "biased": ("qwen2", ["k_proj"], {}),
    "conv1d": ("gpt2", ["h.1.mlp.c_fc"], {}),
    "gpt2 tied": ("gpt2", ["wte"], {"tie_word_embeddings": True}),
}
X = ids(13)


def logits(host, name):
    with torch.no_grad(), host.route(name):
        return host.logits(X, [len(X)])


def made(case, method="lora", **options):
    shape, whole, changes = CASES[case]
    host = Host(base(shape, **changes))
    targets = {"gpt2": ["c_attn"]}.get(shape, ["q_proj", "v_proj"])
    adapter = host.add("a", method, targets, whole=whole, **options)
    randomize(adapter, 0.1)
    return host, adapter


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "adalora"])
@pytest.mark.parametrize("case", CASES)
def test_ours_in_peft_and_back(case, method, tmp_path):
    if method == "ia3" and CASES[case][0] == "gpt2":
        method = "rslora"
    host, adapter = made(case, method)
    host.save("a", tmp_path)
    shape, _, changes = CASES[case]
    theirs = peft.PeftModel.from_pretrained(model(shape, **changes), tmp_path).eval()
    with torch.no_grad():
        want = theirs(input_ids=X[None]).logits[0]
        plain = host.logits(X, [len(X)])
    here = logits(host, "a")
    assert (here - plain).abs().max() > 0.1
    assert (here - want).abs().max() < 1e-5 * max(1, want.abs().max())
    again = host.load(tmp_path, "b")
    assert sorted(again.beside) == sorted(adapter.beside) != []
    assert (logits(host, "b") - here).abs().max() < 1e-5 * max(1, here.abs().max())
    (tmp_path / "again").mkdir()
    host.save("b", tmp_path / "again")  # the sum isn't rounded a second time
    one, two = (safetensors.torch.load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [case for case in CASES if case != "gpt2 tied"])  # where PEFT doesn't tie them
def test_theirs_here(case, tmp_path):
    shape, whole, changes = CASES[case]
    targets = {"gpt2": ["c_attn"]}.get(shape, ["q_proj", "v_proj"])
    config = peft.LoraConfig(
        r=3, target_modules=targets, modules_to_save=whole, ensure_weight_tying="tie_word_embeddings" in changes
    )
    theirs = peft.get_peft_model(model(shape, **changes), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name or ("modules_to_save" in name and not name.endswith("bias")):
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    theirs.save_pretrained(tmp_path)
    host = Host(base(shape, **changes))
    assert host.load(tmp_path, "a").beside
    with torch.no_grad():
        want = theirs(input_ids=X[None]).logits[0]
    assert (logits(host, "a") - want).abs().max() < 1e-5 * max(1, want.abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_them(method, tmp_path):
    kind = METHODS[method]
    if kind.needs_codes:
        pytest.skip("needs a base in codes")
    host = Host(base("llama", tie_word_embeddings=True))
    adapter = host.add("a", method, ["q_proj"], whole=["embed_tokens"])
    plain = logits(host, None)
    assert torch.equal(logits(host, "a"), plain)
    assert adapter.beside == ([] if method == "full" else ["model.embed_tokens"])
    list(train(host, [Job("a", Plan(rows([9, 5, 7, 8]), 20, seed=1), 4, 1e-2, warmup=0.0)]))
    assert adapter["model.embed_tokens"].delta.abs().max() > 0
    here = logits(host, "a")
    host.save("a", tmp_path)
    host.load(tmp_path, "b")
    assert (logits(host, "b") - here).abs().max() < 1e-5 * max(1, here.abs().max())


def test_they_learn_at_the_rate_of_full():
    host, adapter = made("head")
    optimizer = optim.optimizer(adapter, 1.0, 0.0)
    by_rate = {group["scale"]: sum(p.numel() for p in group["params"]) for group in optimizer.param_groups}
    assert by_rate[0.1] == adapter["lm_head"].delta.numel() and set(by_rate) == {0.1, 1.0}


def test_a_target_that_is_trained_whole_is_not_adapted_too():
    host = Host(base("llama"))
    adapter = host.add("a", "lora", ["all-linear"], whole=["down_proj"])
    assert sorted(adapter.beside) == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert len(list(adapter.items())) == 14


def saved(tmp_path, case="head"):
    host, _ = made(case)
    host.save("a", tmp_path)
    return host


def edit(folder, change, **config):
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


KEY = "base_model.model.lm_head.weight"


@pytest.mark.parametrize(
    "change, config, said",
    [
        (lambda t: t.pop(KEY), {}, "lm_head: named in adapter_config.json, but its tensors are missing"),
        (lambda t: t.update({KEY: t[KEY][:, :-1].contiguous()}), {}, r"weight is \(61, 15\), expected \(61, 16\)"),
        (lambda t: t.update({KEY: t[KEY][0].clone()}), {}, r"weight is \(16,\), expected"),
        (lambda t: t[KEY].fill_(torch.inf), {}, "aren't finite"),
        (lambda t: None, {"modules_to_save": ["norm"]}, "modules_to_save names 'norm'"),
        (lambda t: None, {"modules_to_save": ["nothing"]}, "modules_to_save names 'nothing'"),
        (lambda t: None, {"modules_to_save": 3}, "modules_to_save=3 can't be meant"),
        (lambda t: None, {"modules_to_save": None}, "lm_head.weight: not a key of a LoRA adapter"),
    ],
)
def test_files_that_do_not_fit_are_one_line(tmp_path, change, config, said):
    host = saved(tmp_path)
    edit(tmp_path, change, **config)
    with pytest.raises(AdapterError, match=said):
        host.load(tmp_path, "b")
    assert "b" not in host.adapters


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "shape, targets, whole, ensured",
    [
        ("llama", "q_proj", "embed_tokens", False),
        ("llama", "q_proj", "lm_head", False),
        ("gpt2", "c_attn", "wte", True),
    ],
)
def test_a_shared_embedding_trained_apart_from_its_head_is_refused(tmp_path, shape, targets, whole, ensured):
    tied = {"tie_word_embeddings": True}
    theirs = peft.get_peft_model(
        model(shape, **tied),
        peft.LoraConfig(target_modules=[targets], modules_to_save=[whole], ensure_weight_tying=ensured),
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="ensure_weight_tying"):
        Host(base(shape, **tied)).load(tmp_path, "b")


def test_names_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="matches nothing"):
        Host(base("llama")).add("a", whole=["lm_haed"])
    with pytest.raises(ConfigError, match=r"shares its weight with model\.embed_tokens"):
        Host(base("llama", tie_word_embeddings=True)).add("a", whole=["lm_head"])
    with pytest.raises(ConfigError, match="are experts"):
        Host(base("mixtral")).add("a", targets=["q_proj"], whole=["*.experts.*"])


# --- the command line: a run, its merge, its exports ---------------------------------------------------------------------


def test_a_run_with_a_shared_embedding_trained_whole(tmp_path, tiny_model, data_file, capsys):
    run = str(tmp_path / "run")
    words = ["whole=embed_tokens", "r=4", "steps=6", "batch_tokens=128", "samples=0", "precision=fp32"]
    assert main(["train", str(data_file), "--model", str(tiny_model), "--out", run, *words, "lr=0.02"]) == 0
    host = Host(__import__("lorafit.model.load", fromlist=["load"]).load(str(tiny_model), precision="fp32"))
    adapter = host.load(tmp_path / "run" / "adapter", "a")
    assert adapter.beside == ["model.embed_tokens"] and adapter["model.embed_tokens"].delta.abs().max() > 1e-3
    assert main(["merge", run, str(tmp_path / "merged"), "--dtype", "fp32"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight  # once, as it was
    with torch.no_grad():
        want = logits(host, "a")
        assert (theirs(input_ids=X[None]).logits[0] - want).abs().max() < 1e-5 * want.abs().max()
    capsys.readouterr()
    assert main(["adapter", "info", run, "--json"]) == 0
    assert any(s["path"] == "model.embed_tokens" for s in json.loads(capsys.readouterr().out)["sites"])
    assert main(["adapter", "verify", run]) == 0
    assert main(["adapter", "compress", run, str(tmp_path / "small"), "--int8"]) == 2
    assert main(["adapter", "combine", str(tmp_path / "both"), run, run + ":0.5"]) == 2
    assert main(["export", run, str(tmp_path / "portable"), "--format", "peft-portable"]) == 2
    error = capsys.readouterr().err
    assert "model.embed_tokens isn't one (method 'lora', trained whole); merge it with --format hf" in error
    assert not any((tmp_path / name).exists() for name in ("small", "both", "portable"))
    for name in ("peft", "hf"):
        assert main(["export", run, str(tmp_path / name), "--format", name]) == 0
    more = ["--from", run, "--out", str(tmp_path / "more"), "steps=2", "batch_tokens=128", "samples=0"]
    assert main(["train", str(data_file), *more]) == 0
    assert main(["train", str(data_file), *more[:2], "whole=lm_head"]) == 2
    assert "--from keeps the old adapter's shape, so whole=lm_head can't be set" in capsys.readouterr().err

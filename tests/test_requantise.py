"""Merging what was trained on a quantised base: into codes, with what that loses; and beside the model that was trained."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_merge import PROMPTS, folder
from tiny import ids, randomize
from transformers import AutoModelForCausalLM

from lorafit import fit
from lorafit.cli import main
from lorafit.errors import LorafitError, RunError
from lorafit.export import requantise as requantising
from lorafit.export.merge import merge
from lorafit.export.requantise import requantise
from lorafit.host import Host
from lorafit.log import Terminal
from lorafit.model.load import load
from lorafit.model.quant import Quant, QuantLinear
from lorafit.model.starts import Start

SIZES = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": True}
STILL = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
SHAPES = {"llama": SIZES, "gpt2": {"n_embd": 64, **STILL}, "qwen2": {**SIZES, "tie_word_embeddings": False}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A place for codes of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(place, quant: Quant | None, scale: float, targets=("all-linear",)) -> Host:
    host = Host(load(str(place), precision="fp32", device="cpu", quant=quant))
    randomize(host.add("a", "lora", targets, r=3), scale)
    return host


# --- into codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, quant, targets",
    [
        ("llama", Quant("nf4"), ["all"]),
        ("qwen2", Quant("fp4", False), ["all-linear"]),
        ("gpt2", Quant("nf4"), ["all-linear"]),
        ("llama", Quant("int8"), ["all-linear"]),
    ],
    ids=str,
)
def test_the_folder_is_the_same_model_to_transformers_with_bitsandbytes(tmp_path, shape, quant, targets):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    pytest.importorskip("accelerate", reason="transformers loads codes with accelerate alone")
    host = opened(folder(tmp_path, shape, **SHAPES[shape]), quant, 0.1, targets)
    model, x = host.base.model, ids(13, seed=2)
    proof = requantise(host, "a", tmp_path / "out", PROMPTS, dtype=torch.float32)
    assert (
        proof.dtype == str(quant)
        and proof.error
        and set(proof.error) == {path for path, module in model.named_modules() if isinstance(module, QuantLinear)}
    )
    with torch.no_grad():
        want = host.logits(x, [13])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    modules = dict(theirs.named_modules())
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            held = modules[path].weight
            if quant.kind == "int8":
                assert torch.equal(held.data, module.codes) and torch.equal(held.SCB, module.absmax)
            else:
                assert isinstance(modules[path], bnb.nn.Linear4bit)
                numbers = bnb.functional.dequantize_4bit(held.data, held.quant_state)
                assert torch.allclose(numbers.view(module.shape), module.numbers(), rtol=1e-6, atol=0)
            if module.bias is not None:
                assert torch.equal(modules[path].bias, module.bias)
    head = theirs.get_output_embeddings()
    assert type(head) is torch.nn.Linear and torch.equal(head.weight, model.get_output_embeddings().weight)
    if quant.kind != "int8":  # there activations are rounded too
        with torch.no_grad():  # in training, since it repacks codes on a CPU otherwise
            off = (theirs.train()(input_ids=x[None]).logits[0] - want).abs().max()
        assert off < 1e-4 * want.abs().max()
    assert not list(tmp_path.glob(".*tmp")) and "lorafit" not in (tmp_path / "out" / "config.json").read_text()


def test_what_is_beside_codes_is_rounded_with_them(tmp_path):
    """A base that LoftQ made: the folder has codes alone, and is the model that is left in memory."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    pytest.importorskip("accelerate", reason="transformers loads codes with accelerate alone")
    quant = Quant("nf4", start=Start("loftq", 4, 1, ("all-linear",)))
    host = opened(folder(tmp_path, "llama", **SIZES), quant, 0.3, ["q_proj"])
    layers = [module for module in host.base.model.modules() if isinstance(module, QuantLinear)]
    assert all(layer.part is not None for layer in layers)
    proof = requantise(host, "a", tmp_path / "out", PROMPTS, dtype=torch.float32)
    assert proof.dtype == "nf4" and len(proof.error) == 2 and not any(layer.part for layer in layers)
    theirs, x = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), ids(13)
    with torch.no_grad():
        assert (theirs.train()(input_ids=x[None]).logits[0] - host.logits(x, [13])).abs().max() < 1e-4


def test_of_a_small_change_nothing_is_left_and_of_a_large_one_most(tmp_path):
    place = folder(tmp_path, "llama", **SIZES)
    found = {}
    for name, scale in (("small", 0.006), ("large", 1.0)):
        host = opened(place, Quant("nf4"), scale)
        shares = [
            float((host.merged_weight(site, "a") - site.weight()).norm() / site.weight().norm())
            for path, site in host.sites.items()
            if path in host.adapters["a"]
        ]
        found[name] = max(shares), requantise(host, "a", tmp_path / name, PROMPTS, dtype=torch.float32)
    share, proof = found["small"]
    assert share < 0.05 and all(0.9 < error < 1.3 for error in proof.error.values()) and proof.lost > 0.5
    share, proof = found["large"]
    assert share > 2 and all(error < 0.15 for error in proof.error.values()) and proof.lost < 0.5
    assert proof.to_json()["error"] == proof.error and "as_trained" not in proof.to_json()


def test_a_base_that_is_not_quantised_and_a_file_that_is_not_what_was_written(tmp_path, monkeypatch):
    place = folder(tmp_path, "llama", **SIZES)
    with pytest.raises(RunError, match="trained on a base that isn't quantised"):
        requantise(opened(place, None, 0.1), "a", tmp_path / "out", PROMPTS, dtype=torch.float32)
    plain = requantising.write

    def careless(host, place, dtype, chat, codes):
        name = "model.layers.1.mlp.up_proj.weight"
        plain(host, place, dtype, chat, {**codes, name: codes[name] ^ 1})

    monkeypatch.setattr(requantising, "write", careless)
    with pytest.raises(LorafitError, match=r"up_proj.weight isn't what was written"):
        requantise(opened(place, Quant("nf4"), 0.1), "a", tmp_path / "out", PROMPTS, dtype=torch.float32)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*tmp"))


# --- beside what was trained -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale, differs", [(0.01, True), (0.5, False)])
def test_merged_into_the_original_it_is_compared_with_what_was_trained(tmp_path, scale, differs):
    place = folder(tmp_path, "llama", **SIZES)
    host, trained = opened(place, None, scale), opened(place, Quant("nf4"), scale)
    q = {path: site.weight() - trained.sites[path].weight() for path, site in host.sites.items()}
    change = {path: layer.delta_weight(host.sites[path].weight()) for path, layer in host.adapters["a"].items()}
    logits = {}
    for stack in ("a", None):
        with torch.no_grad(), trained.route(stack):
            logits[stack] = torch.cat([trained.logits(torch.tensor(p), [len(p)]) for p in PROMPTS])
    proof = merge(host, "a", tmp_path / "out", PROMPTS, dtype=torch.float32, trained=trained)
    assert proof.holds and proof.lost < 1e-3
    shift = proof.as_trained
    merged = load(str(tmp_path / "out"), precision="fp32")
    with torch.no_grad():
        got = torch.cat([merged.logits(torch.tensor(p), [len(p)]) for p in PROMPTS])
    off = (got - logits["a"]).abs()
    assert shift.largest == pytest.approx(float(off.max()), rel=1e-3)
    assert shift.mean == pytest.approx(float(off.mean()), rel=1e-3)
    assert shift.effect == pytest.approx(float((logits["a"] - logits[None]).abs().mean()), rel=1e-3)
    assert shift.quant == "nf4" and shift.differs is differs
    assert set(shift.unseen) == set(change)
    for path, value in shift.unseen.items():
        assert value == pytest.approx(float(q[path].norm() / change[path].detach().norm()), rel=1e-3)
    assert json.loads(json.dumps(proof.to_json()))["as_trained"]["unseen"] == shift.unseen


def test_an_adapter_that_changes_nothing_has_no_ratio(tmp_path):
    place = folder(tmp_path, "llama", **SIZES)
    host, trained = (Host(load(str(place), precision="fp32", quant=quant)) for quant in (None, Quant("nf4")))
    for each in (host, trained):
        each.add("a", "lora", ["q_proj"], r=3)
    proof = merge(host, "a", tmp_path / "out", PROMPTS, dtype=torch.float32, trained=trained)
    assert set(proof.as_trained.unseen.values()) == {math.inf} and proof.as_trained.differs


# --- the verb ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny_model, data_file, tmp_path):
    settings = {"model": str(tiny_model), "out": str(tmp_path / "mine"), "precision": "fp32", "quant": "nf4"}
    settings |= {"steps": "6", "lr": "0.01", "eval_every": "3", "samples": "0"}
    return str(fit.fit(fit.read_config(str(data_file), settings), Terminal(quiet=True)).folder)


def test_the_verb_says_what_is_lost(run, tmp_path, capsys):
    out = str(tmp_path / "out")
    for words, message in (
        (["--into", "quantised"], "of a change of 2% of the weights or less nothing but noise"),
        (["--force"], "--force only goes with --into quantised"),
    ):
        assert main(["merge", run, out, *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert main(["merge", run, out, "--into", "quantised", "--force"]) == 0
    said = capsys.readouterr()
    assert f"merged     {out} (nf4)" in said.out and "smallest" in said.out and "model.layers." in said.out
    assert "next:" not in said.out and main(["chat", "--model", out, "--prompt", "hi"]) == 2  # it isn't ours to open
    capsys.readouterr()
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"]
        == "nf4"
    )
    assert main(["merge", run, str(tmp_path / "json"), "--into", "quantised", "--force", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["error"]) == 14 and found["tolerance"] is None
    assert main(["merge", run, str(tmp_path / "original"), "--dtype", "fp32"]) == 0
    said = capsys.readouterr()
    assert "as trained on nf4: largest logit difference" in said.out and "median" in said.out
    assert said.out.endswith(f"next:\n  lorafit chat --model {tmp_path / 'original'}\n")
    assert main(["merge", run, str(tmp_path / "again"), "--dtype", "fp32", "--json"]) == 0
    said = capsys.readouterr()
    shift = json.loads(said.out)["as_trained"]
    assert len(shift["unseen"]) == 14
    assert ("this isn't the model that was trained" in said.err) == (shift["mean"] > shift["effect"])

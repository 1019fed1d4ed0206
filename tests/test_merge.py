"""A merged folder is a standard one, and is the same model; a merge that isn't is refused and leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from data_helpers import CHATML, tokenizer
from tiny import VOCAB, ids, model, randomize
from transformers import AutoModelForCausalLM

from lorafit.errors import LorafitError, RunError
from lorafit.export import merge as merging
from lorafit.export.merge import merge
from lorafit.host import Host
from lorafit.model.load import load


def folder(tmp_path: Path, shape: str, **changes) -> Path:
    place = tmp_path / shape
    tok = tokenizer(CHATML)
    model(shape, scale=0.05, vocab_size=max(VOCAB, len(tok)), **changes).to(torch.bfloat16).save_pretrained(place)
    tok.save_pretrained(place)
    return place


def host_of(place: Path, targets, scale=0.1) -> Host:
    host = Host(load(str(place), precision="fp32", device="cpu"))
    randomize(host.add("a", "lora", targets, r=3), scale)
    return host


PROMPTS = [ids(9).tolist(), ids(5, seed=1).tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape, targets, changes",
    [
        ("llama", ["all-linear"], {}),
        ("llama", ["all"], {"tie_word_embeddings": True}),
        ("gpt2", ["all-linear"], {}),
        ("mixtral", ["all-linear"], {}),
    ],
)
def test_the_merged_folder_is_the_same_model_to_transformers(tmp_path, shape, targets, changes, dtype):
    host = host_of(folder(tmp_path, shape, **changes), targets)
    x = ids(13, seed=2)
    with torch.no_grad(), host.route("a"):
        want = host.logits(x, [13])
    proof = merge(host, "a", tmp_path / "out", PROMPTS, dtype=dtype)
    assert proof.holds and proof.positions == 14 and proof.effect > 10 * proof.mean
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype is dtype
    with torch.no_grad():
        off = (theirs(input_ids=x[None]).logits[0] - want).abs().max()
    assert off < (1e-5 if dtype is torch.float32 else 0.1) * max(1, want.abs().max())
    config = (tmp_path / "out" / "config.json").read_text()
    assert "lorafit" not in config
    names = set(json.loads(config)) and {p.name for p in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "model.safetensors"} <= names and not list(tmp_path.glob(".*tmp"))


def test_a_merge_that_forgets_something_is_refused(tmp_path, monkeypatch):
    host = host_of(folder(tmp_path, "llama"), ["all-linear"])
    plain = host.merged_weight
    monkeypatch.setattr(
        host,
        "merged_weight",
        lambda site, spec: site.weight().float() if "1.mlp.up" in site.path else plain(site, spec),
    )
    with pytest.raises(LorafitError, match=r"isn't the same: largest logit difference"):
        merge(host, "a", tmp_path / "out", PROMPTS, dtype=torch.float32)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*tmp"))


def test_an_adapter_that_rounding_erases_is_refused(tmp_path):
    host = host_of(folder(tmp_path, "llama"), ["all-linear"], scale=0.002)
    with pytest.raises(LorafitError, match=r"% of the adapter's effect lost; nothing was written; try --dtype fp32"):
        merge(host, "a", tmp_path / "out", PROMPTS, dtype=torch.bfloat16)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    host = host_of(folder(tmp_path, "llama"), ["all-linear"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(RunError, match="isn't empty"):
        merge(host, "a", tmp_path / "out", PROMPTS, dtype=torch.float32)
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "SHARD", "20KB")
    host = host_of(folder(tmp_path, "llama"), ["all-linear"])
    assert merge(host, "a", tmp_path / "out", PROMPTS, dtype=torch.float32).holds
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1

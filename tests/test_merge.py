"""A merged folder is a standard one, and is the same model; a merge that isn't is refused and leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from data_helpers import CHATML, tokenizer
from tiny import VOCAB, ids, model, randomize
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from lorafit.errors import LorafitError, ModelError, RunError
from lorafit.export import merge as merging
from lorafit.export.merge import merge
from lorafit.host import Host
from lorafit.model.load import load
from lorafit.model.shards import Shards


def folder(tmp_path: Path, shape: str, **changes) -> Path:
    place = tmp_path / shape
    tok = tokenizer(CHATML)
    model(shape, scale=0.05, vocab_size=max(VOCAB, len(tok)), **changes).to(torch.bfloat16).save_pretrained(place)
    tok.save_pretrained(place)
    return place


def host_of(place: Path, targets, scale=0.1, streamed=True, method="lora") -> Host:
    host = Host(load(str(place), precision="fp32", device="cpu", streamed=streamed))
    assert host.base.streamed is streamed
    randomize(host.add("a", method, targets, **({"r": 3} if method == "lora" else {})), scale)
    return host


PROMPTS = [ids(9).tolist(), ids(5, seed=1).tolist()]


def names(place: Path) -> dict[str, torch.Size]:
    """Of the tensors in a folder's files, and their shapes."""
    return Shards(place).shapes


shapes = pytest.mark.parametrize(
    "shape, targets, changes",
    [
        ("llama", ["all-linear"], {}),
        ("llama", ["all"], {"tie_word_embeddings": True}),
        ("gpt2", ["all"], {}),
        ("mixtral", ["all-linear"], {}),
    ],
)


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@shapes
def test_the_merged_folder_is_the_same_model_to_transformers(tmp_path, shape, targets, changes, dtype, streamed):
    place = folder(tmp_path, shape, **changes)
    host = host_of(place, targets, streamed=streamed)
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
    assert "lorafit" not in config and json.loads(config)["dtype"] == str(dtype).removeprefix("torch.")
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"tokenizer.json", "model.safetensors"}
    assert names(tmp_path / "out") == names(place) and not list(tmp_path.glob(".*tmp"))


@shapes
def test_a_streamed_base_computes_what_one_in_memory_does_and_holds_nothing(tmp_path, shape, targets, changes):
    place = folder(tmp_path, shape, **changes)
    x = ids(14, seed=2)
    for method in ("lora", "full"):
        streamed, whole = (host_of(place, targets, streamed=s, method=method) for s in (True, False))
        assert (streamed.base.packs, streamed.base.plain_head) == (whole.base.packs, whole.base.plain_head)
        for spec in ("a", None):
            with torch.no_grad(), streamed.route(spec), whole.route(spec):
                got, want = streamed.logits(x, [9, 5]), whole.logits(x, [9, 5])
                some = streamed.logits(x, [9, 5], torch.tensor([0, 8, 13]))
            assert (got - want).abs().max() < 1e-6 * want.abs().max()
            assert (some - want[[0, 8, 13]]).abs().max() < 1e-6 * want.abs().max()
        assert all(p.is_meta for p in streamed.base.model.parameters())
        for path, site in streamed.sites.items():
            assert site.shape == whole.sites[path].shape and torch.equal(site.weight(), whole.sites[path].weight())


def test_a_folder_that_names_its_weights_otherwise_keeps_its_names(tmp_path):
    """GPT-2's files lack the `transformer.` in front; they have masks that no model has a place for."""
    place = folder(tmp_path, "gpt2", tie_word_embeddings=True)
    given = safetensors.torch.load_file(place / "model.safetensors")
    plain = {name.removeprefix("transformer."): tensor for name, tensor in given.items()}
    mask = {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}
    safetensors.torch.save_file(plain | mask, place / "model.safetensors", metadata={"format": "pt"})
    assert merge(host_of(place, ["all"]), "a", tmp_path / "out", PROMPTS, dtype=torch.bfloat16).holds
    assert set(names(tmp_path / "out")) == set(plain)


def test_a_model_whose_modules_read_each_others_weights_is_loaded_whole(tmp_path, monkeypatch):
    def forward(self, x):
        return F.linear(self.act_fn(F.linear(x, self.gate_proj.weight)) * self.up_proj(x), self.down_proj.weight)

    place = folder(tmp_path, "llama")
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    said: list[str] = []
    base = load(str(place), precision="fp32", device="cpu", streamed=True, working=said.append)
    assert not base.streamed and said[-1] == "loading the whole base: its weights can't be read one by one"
    host = Host(base)
    randomize(host.add("a", "lora", ["self_attn.q_proj"], r=3), 0.3)
    assert merge(host, "a", tmp_path / "out", PROMPTS, dtype=torch.float32).holds


def test_after_an_error_in_a_forward_nothing_is_held(tmp_path):
    base = load(str(folder(tmp_path, "llama")), precision="fp32", device="cpu", streamed=True)
    with pytest.raises(IndexError):
        base.logits(torch.tensor([10**6]), [1])
    assert all(p.is_meta for p in base.model.parameters())


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    place = folder(tmp_path, "llama")
    (place / "model.safetensors").write_bytes((place / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ModelError, match=r"can't be loaded|is damaged|can't be read"):
        load(str(place), precision="fp32", device="cpu", streamed=True)


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, streamed):
    place = folder(tmp_path, "llama")
    names = safetensors.torch.load_file(place / "model.safetensors")
    (place / "model.safetensors").rename(tmp_path / "other.safetensors")
    safetensors.torch.save_file({"x": torch.zeros(2)}, place / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../other.safetensors")}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names '../other.safetensors', which isn't a file of that folder"):
        load(str(place), precision="fp32", device="cpu", streamed=streamed)


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
def test_a_merge_that_forgets_something_is_refused(tmp_path, monkeypatch, streamed):
    host = host_of(folder(tmp_path, "llama"), ["all-linear"], streamed=streamed)
    plain = host.merged_weight
    monkeypatch.setattr(
        host,
        "merged_weight",
        lambda site, spec: site.weight().float() if "1.mlp.up" in site.path else plain(site, spec),
    )
    with pytest.raises(LorafitError, match=r"isn't the same: largest logit difference"):
        merge(host, "a", tmp_path / "out", PROMPTS, dtype=torch.float32)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*tmp"))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_damaged_adapter_is_named(tmp_path, number):
    host = host_of(folder(tmp_path, "llama"), ["q_proj"])
    with torch.no_grad():
        host.adapters["a"]["model.layers.1.self_attn.q_proj"].b[2, 1] = number
    with pytest.raises(LorafitError, match=r"1.self_attn.q_proj: the merged weight isn't finite"):
        merge(host, "a", tmp_path / "out", PROMPTS, dtype=torch.float32)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*tmp"))


def test_an_adapter_that_rounding_erases_is_refused(tmp_path):
    host = host_of(folder(tmp_path, "llama"), ["all-linear"], scale=0.002)
    with pytest.raises(
        LorafitError, match=r"% of the adapter's effect lost; nothing was written; try `lorafit merge … --dtype fp32`"
    ):
        merge(host, "a", tmp_path / "out", PROMPTS, dtype=torch.bfloat16)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    host = host_of(folder(tmp_path, "llama"), ["all-linear"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(RunError, match="isn't empty"):
        merge(host, "a", tmp_path / "out", PROMPTS, dtype=torch.float32)
    assert (tmp_path / "out" / "mine").read_text() == "x"


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("shape", ["llama", "mixtral"])
def test_large_models_are_read_and_written_in_shards(tmp_path, monkeypatch, shape, streamed):
    place = folder(tmp_path, shape)
    AutoModelForCausalLM.from_pretrained(place).save_pretrained(place, max_shard_size="8KB")
    (place / "model.safetensors").unlink()
    assert len(list(place.glob("*.safetensors"))) > 1
    monkeypatch.setattr(merging, "SHARD", 20_000)
    host = host_of(place, ["all-linear"], streamed=streamed)
    x = ids(13, seed=2)
    with torch.no_grad(), host.route("a"):
        want = host.logits(x, [13])
    assert merge(host, "a", tmp_path / "out", PROMPTS, dtype=torch.float32).holds
    written = list((tmp_path / "out").glob("*.safetensors"))
    assert len(written) > 1 and names(tmp_path / "out") == names(place)
    largest = max(4 * shape.numel() for shape in names(place).values())
    assert all(file.stat().st_size < max(20_000, largest) + 8_000 for file in written)  # and its header
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total = sum(4 * shape.numel() for shape in names(place).values())
    assert set(index["weight_map"]) == set(names(place)) and int(index["metadata"]["total_size"]) == total
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert (theirs(input_ids=x[None]).logits[0] - want).abs().max() < 1e-5 * max(1, want.abs().max())


CHILD = """
import resource, sys
import torch
from lorafit import machine
from lorafit.errors import LorafitError
from lorafit.export.merge import merge
from lorafit.host import Host
from lorafit.model.load import load
torch.set_num_threads(1)
torch.ones(64, 64) @ torch.ones(64, 64)
place, out, streamed, room = sys.argv[1], sys.argv[2], sys.argv[3] == "streamed", int(sys.argv[4])
load(place + "/small", precision="fp32", device="cpu", streamed=True)  # transformers' code takes private memory too
before = machine.private_memory()
resource.setrlimit(resource.RLIMIT_DATA, (before + room,) * 2)
try:
    host = Host(load(place, precision="fp32", device="cpu", streamed=streamed))
    host.load(place + "/adapter", "a")
    import pathlib
    proof = merge(host, "a", pathlib.Path(out), [[1, 2, 3, 4, 5, 6, 7]], dtype=torch.bfloat16)
    print("merged", proof.holds, proof.positions)
except Exception as error:
    if not machine.out_of_memory(error):
        raise
    print("out of memory")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds mmap on Linux alone")
def test_merging_needs_the_largest_weight_not_the_model(tmp_path):
    """117 million numbers, 470 MB in fp32 and 235 in bf16, in 200 MB beside what loading a tiny model takes: the largest
    weight is 8 million numbers, 34 MB in fp32."""
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=8, num_hidden_layers=6, vocab_size=8192)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    for place, changes in ((tmp_path, {}), (tmp_path / "small", small)):
        made = LlamaForCausalLM(LlamaConfig(**{**sizes, "max_position_embeddings": 64, **changes}))
        made.to(torch.bfloat16).save_pretrained(place)
        tokenizer(CHATML).save_pretrained(place)
    host = host_of(tmp_path, ["all-linear"], 0.02)
    (tmp_path / "adapter").mkdir()
    host.save("a", tmp_path / "adapter")
    for streamed, want in (("streamed", "merged True 7\n"), ("whole", "out of memory\n")):
        words = [sys.executable, "-c", CHILD, str(tmp_path), str(tmp_path / "out"), streamed, "200000000"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.stdout == want, done.stdout + done.stderr


def test_one_far_logit_among_millions_is_rounding_but_a_shift_of_all_is_not():
    """Three times what is usual at one place where the mean is small; never more, not where everything moved, and not where the
    user says how much."""
    torch.manual_seed(0)
    want = torch.randn(40, 500)
    cases = ((0.5, 0.0, None, True), (0.7, 0.0, None, False), (0.5, 0.05, None, False), (0.5, 0.0, 0.2, False))
    for far, rest, tolerance, holds in cases:
        got = want + rest
        got[3, 7] = want[3, 7] + far
        proof = merging.compare(want, got, 10.0, torch.bfloat16, tolerance)
        assert proof.holds is holds, (far, rest)

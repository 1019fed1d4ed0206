"""A merged folder is a standard one, and is the same model; a merge that isn't is refused and leaves nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import weakref
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
from lorafit.model.quant import Quant
from lorafit.model.shards import Shards
from lorafit.model.sites import Site


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


both = pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

# A small change that a merge might get wrong beside large ones: the model, the site, how small, (W, ΔW) -> what is merged.
WRONG = {
    "a site forgotten": ("llama", "q_proj", 0.005, lambda w, delta: w),
    "another scale": ("llama", "up_proj", 0.005, lambda w, delta: w + 0.5 * delta),
    "a change transposed": ("llama", "q_proj", 0.005, lambda w, delta: w + delta.mT),
    "an expert forgotten": ("mixtral", "down_proj", 0.02, lambda w, delta: w + delta * EXPERTS),
    "a Conv1D's change transposed": ("gpt2", "attn.c_proj", 0.005, lambda w, delta: w + delta.mT),
    "an embedding forgotten that is the head": ("tied", "embed_tokens", 0.005, lambda w, delta: w),
    "a gain a little off": ("dora", "o_proj", 1, lambda w, delta: w + 0.9999 * delta),
}
EXPERTS = torch.tensor([1.0, 1, 0, 1])[:, None, None]


def refused(host: Host, out: Path, dtype: torch.dtype, match: str) -> float:
    """By how much the logits were off, of a merge that must leave nothing; 0 where the message has no such number."""
    with pytest.raises(LorafitError, match=match) as error:
        merge(host, "a", out, PROMPTS, dtype=dtype)
    assert not out.exists() and not list(out.parent.glob(".*tmp"))
    found = re.search(r"off by ([\d.e-]+)", str(error.value))
    return float(found[1]) if found else 0.0


@both
@types
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_merged_wrong_is_refused_however_small_beside_rounding(tmp_path, monkeypatch, wrong, dtype, streamed):
    shape, small, factor, mistaken = WRONG[wrong]
    method = "dora" if shape == "dora" else "lora"
    changes = {"tie_word_embeddings": True} if shape == "tied" else {}
    place = folder(tmp_path, shape if shape in ("mixtral", "gpt2") else "llama", **changes)

    def strong() -> Host:
        host = host_of(place, ["all"] if method == "lora" else ["all-linear"], 0.2, streamed, method)
        layer = next(layer for path, layer in host.adapters["a"].items() if path.endswith(small))
        with torch.no_grad():
            for p in layer.parameters():
                p.mul_(factor)
        return host

    proof = merge(strong(), "a", tmp_path / "right", PROMPTS, dtype=torch.bfloat16)
    host = strong()
    site = next(site for path, site in host.sites.items() if path.endswith(small))
    plain = host.merged_weight

    def careless(at, spec):
        merged = plain(at, spec)
        return mistaken(at.weight().float(), merged - at.weight()) if at.path == site.path else merged

    monkeypatch.setattr(host, "merged_weight", careless)
    off = refused(host, tmp_path / "out", dtype, "before any rounding its logits are off by")
    assert proof.exact.allowed < off < 0.2 * proof.largest


@both
@types
def test_a_bias_that_is_forgotten_is_refused(tmp_path, monkeypatch, dtype, streamed):
    place = folder(tmp_path, "qwen2")
    host = host_of(place, ["k_proj", "v_proj", "down_proj"], 1.0, streamed, "ia3")
    assert merge(host, "a", tmp_path / "right", PROMPTS, dtype=dtype).holds
    host = host_of(place, ["k_proj", "v_proj", "down_proj"], 1.0, streamed, "ia3")
    plain = host.merged_bias
    monkeypatch.setattr(host, "merged_bias", lambda at, spec: None if "1.self_attn.v" in at.path else plain(at, spec))
    refused(host, tmp_path / "out", dtype, "before any rounding its logits are off by")


def flip(tensors: dict[str, torch.Tensor], name: str) -> None:
    """The last bit of three of its numbers."""
    numbers = tensors[name].view(torch.int16 if tensors[name].element_size() == 2 else torch.int32).reshape(-1)
    numbers[:3] ^= 1


def swap(tensors: dict[str, torch.Tensor], one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other], tensors[one]


def turn(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].t().contiguous()


LAYER = "model.layers.1.self_attn."
DAMAGE = {
    "bits of an adapted weight": lambda tensors: flip(tensors, f"{LAYER}q_proj.weight"),
    "bits of a norm": lambda tensors: flip(tensors, "model.norm.weight"),
    "a weight transposed": lambda tensors: turn(tensors, f"{LAYER}o_proj.weight"),
    "names swapped": lambda tensors: swap(tensors, f"{LAYER}k_proj.weight", f"{LAYER}v_proj.weight"),
}


@both
@types
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_holds_anything_else_is_refused(tmp_path, monkeypatch, damage, dtype, streamed):
    plain = merging.write_settings

    def careless(base, place, *rest):
        plain(base, place, *rest)
        file = place / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(file).items()}
        DAMAGE[damage](tensors)
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(merging, "write_settings", careless)
    host = host_of(folder(tmp_path, "llama"), ["all-linear"], streamed=streamed)
    refused(host, tmp_path / "out", dtype, r"model\.\S+weight( \(and 1 more\))? in the folder isn't what was merged")


@both
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_a_site_that_is_summed_but_not_written_is_refused(tmp_path, monkeypatch, shape, streamed):
    place = folder(tmp_path, shape)
    last = "self_attn.o_proj" if shape == "llama" else "attn.c_proj"
    if streamed:
        plain = merging.adapted_sites
        monkeypatch.setattr(
            merging, "adapted_sites", lambda *words: [s for s in plain(*words) if not s.path.endswith(f"1.{last}")]
        )
        match = f"1.{last}.weight in the folder isn't what was merged"
    else:  # what is in memory is what is computed with, too
        write = Site.write
        monkeypatch.setattr(Site, "write", lambda site, w: None if site.path.endswith(f"1.{last}") else write(site, w))
        match = "before any rounding its logits are off by"
    refused(host_of(place, ["all-linear"], streamed=streamed), tmp_path / "out", torch.bfloat16, match)


@both
def test_a_config_that_computes_otherwise_is_refused(tmp_path, monkeypatch, streamed):
    plain = merging.write_settings

    def careless(base, place, *rest):
        plain(base, place, *rest)
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1.1 * config["rms_norm_eps"]}))

    monkeypatch.setattr(merging, "write_settings", careless)
    host = host_of(folder(tmp_path, "llama"), ["all-linear"], streamed=streamed)
    refused(
        host, tmp_path / "out", torch.bfloat16, "the folder isn't what was merged: read back, its logits are off by"
    )


@both
@pytest.mark.parametrize(
    "shape, method, scale, changes",
    [
        ("llama", "lora", 3.0, {}),
        ("qwen2", "lora", 0.3, {"hidden_size": 64, "intermediate_size": 128}),
        ("mixtral", "lora", 3.0, {}),
        ("gpt2", "lora", 0.3, {}),
        ("llama", "dora", 1.0, {"tie_word_embeddings": True}),
        ("qwen2", "ia3", 3.0, {}),
    ],
)
def test_a_large_change_is_merged_however_far_rounding_moves_its_logits(
    tmp_path, shape, method, scale, changes, streamed
):
    """More than a fifth of their spread was refused: of merges that were right."""
    targets = ["k_proj", "v_proj", "down_proj"] if method == "ia3" else ["all"] if method == "lora" else ["all-linear"]
    host = host_of(folder(tmp_path, shape, **changes), targets, scale, streamed, method)
    proof = merge(host, "a", tmp_path / "out", PROMPTS, dtype=torch.bfloat16)
    assert proof.holds and proof.lost < 0.5 and proof.tolerance == float("inf")
    assert proof.exact.formula <= proof.exact.allowed and proof.exact.folder < 0.01 * proof.exact.allowed
    if (shape, method) in (("llama", "lora"), ("qwen2", "lora"), ("mixtral", "lora")):
        assert proof.largest > 0.2 * proof.spread


def forget(monkeypatch, host: Host, end: str) -> None:
    """The site with this end of a path is left as it is by a merge."""
    plain = host.merged_weight
    monkeypatch.setattr(
        host, "merged_weight", lambda at, spec: at.weight() if at.path.endswith(end) else plain(at, spec)
    )


@both
@pytest.mark.parametrize("scale", [0.1, 0.3, 1.0])
def test_a_model_in_which_rounding_grows_is_allowed_what_it_makes_of_a_shaken_input(
    tmp_path, monkeypatch, scale, streamed
):
    place = folder(tmp_path, "qwen2", hidden_size=64, intermediate_size=128)
    monkeypatch.setattr(merging, "_SAME", 1e-9)
    proof = merge(host_of(place, ["all"], scale, streamed), "a", tmp_path / "b", PROMPTS, dtype=torch.float32)
    assert proof.exact.formula <= proof.exact.allowed < 0.01 * proof.spread
    host = host_of(place, ["all"], scale, streamed)
    forget(monkeypatch, host, "1.mlp.up_proj")
    refused(host, tmp_path / "out", torch.float32, "before any rounding its logits are off by")


@both
def test_numbers_that_a_type_has_no_place_for_are_named(tmp_path, streamed):
    host = host_of(folder(tmp_path, "llama"), ["q_proj"], streamed=streamed)
    with torch.no_grad():
        host.adapters["a"]["model.layers.1.self_attn.q_proj"].b.mul_(1e7)
    refused(host, tmp_path / "out", torch.float16, "too large for the type it is written in")


def test_the_largest_difference_can_be_bounded_as_before(tmp_path):
    place = folder(tmp_path, "llama")
    largest = merge(host_of(place, ["all"]), "a", tmp_path / "any", PROMPTS, dtype=torch.bfloat16).largest
    with pytest.raises(LorafitError, match=r"largest logit difference [\d.e-]+, allowed [\d.e-]+; \d% of"):
        merge(host_of(place, ["all"]), "a", tmp_path / "less", PROMPTS, dtype=torch.bfloat16, tolerance=0.9 * largest)
    proof = merge(
        host_of(place, ["all"]), "a", tmp_path / "more", PROMPTS, dtype=torch.bfloat16, tolerance=1.1 * largest
    )
    assert proof.tolerance == 1.1 * largest and {p.name for p in tmp_path.iterdir()} == {"llama", "any", "more"}


@both
@pytest.mark.parametrize("shape", ["llama", "mixtral"])
def test_the_base_is_gone_before_the_folder_is_read(tmp_path, monkeypatch, shape, streamed):
    host = host_of(folder(tmp_path, shape), ["all-linear"], streamed=streamed)
    there = [weakref.ref(host.base.model), *(weakref.ref(site.module) for site in host.sites.values())]
    plain, read = merging.load, []

    def loaded(*words, **named):
        read.append([ref() for ref in there])
        return plain(*words, **named)

    monkeypatch.setattr(merging, "load", loaded)
    merge(host, "a", tmp_path / "out", PROMPTS, dtype=torch.bfloat16)
    assert read == [[None] * len(there)]


@both
@pytest.mark.parametrize("kind", ["nf4", "int8", "w8a8"])
def test_sums_with_what_codes_stand_for_are_proved_too(tmp_path, monkeypatch, kind, streamed):
    """Of w8a8 with inputs that aren't rounded: no weight can do that."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = folder(tmp_path, "qwen2", hidden_size=64, intermediate_size=128)

    def opened() -> Host:
        base = load(str(place), precision="fp32", device="cpu", quant=Quant(kind), streamed=streamed)
        host = Host(base)
        randomize(host.add("a", "lora", ["all"], r=3), 0.3)
        return host

    for dtype in (torch.float32, torch.bfloat16):
        proof = merge(opened(), "a", tmp_path / str(dtype), PROMPTS, dtype=dtype)
        assert proof.exact.formula <= proof.exact.allowed and proof.exact.folder <= 0.01 * proof.exact.allowed
    host = opened()
    forget(monkeypatch, host, "1.mlp.up_proj")
    refused(host, tmp_path / "out", torch.bfloat16, "before any rounding its logits are off by")


@both
def test_two_experts_that_are_level_are_no_difference(tmp_path, streamed):
    """Which of them a token meets is then rounding's choice, and its logits are others."""
    made = model(
        "mixtral", 0.3, vocab_size=max(VOCAB, len(tokenizer(CHATML))), num_local_experts=2, num_experts_per_tok=1
    )

    def opened(name: str) -> Host:
        made.save_pretrained(tmp_path / name)
        tokenizer(CHATML).save_pretrained(tmp_path / name)
        return host_of(tmp_path / name, ["all-linear"], 0.3, streamed)

    host, prompt, seen = opened("before"), ids(12), []
    gate = host.base.model.model.layers[1].mlp.gate
    hook = gate.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(12, -1).double()))
    with torch.no_grad(), host.route("a"):
        host.logits(prompt, [12])
    hook.remove()
    apart = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    apart -= torch.linalg.pinv(seen[0]) @ (seen[0] @ apart)  # in which none of these tokens has a part
    with torch.no_grad():
        weight = made.model.layers[1].mlp.gate.weight
        weight[1] = weight[0] + apart.float()
    proof = merge(opened("level"), "a", tmp_path / "out", [prompt.tolist()], dtype=torch.bfloat16)
    assert proof.exact.formula <= proof.exact.allowed < 1e-3 * proof.spread
    assert proof.exact.folder <= proof.exact.allowed


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

"""Arithmetic on adapters equals the same on dense ΔW, PEFT reads what it writes, and what is wrong leaves nothing behind."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import warnings
from pathlib import Path

import gguf_files
import peft
import pytest
import safetensors.torch as st
import torch
from data_helpers import CHATML, tokenizer
from peft.utils import merge_utils
from tiny import VOCAB, ids, model, randomize, randomize_peft
from transformers import AutoModelForCausalLM

from lorafit.adapters import deltas
from lorafit.adapters.combine import combine
from lorafit.adapters.compress import compress
from lorafit.adapters.deltas import Delta
from lorafit.adapters.opened import open_adapter, write
from lorafit.cli import main
from lorafit.errors import AdapterError, ConfigError
from lorafit.host import Host
from lorafit.methods import METHODS, Method
from lorafit.model.load import load

ALL = {
    "a": {"r": 3, "alpha": 5.0},
    "rslora": {"r": 4, "alpha": 3.0, "rslora": True, "rank_pattern": {"*.1.*": 2}, "alpha_pattern": {"*q_proj": 7.0}},
    "narrow": {"r": 2, "alpha": 8.0, "targets": ["*.1.*"]},
}
PLACES = {"llama": {}, "gpt2": {}, "mixtral": {}, "tied": {"tie_word_embeddings": True}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    made, tok = {}, tokenizer(CHATML)
    for name, changes in PLACES.items():
        made[name] = tmp_path_factory.mktemp("base") / name
        shape = "llama" if name == "tied" else name
        model(shape, vocab_size=max(VOCAB, len(tok)), **changes).save_pretrained(made[name])
        tok.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory) -> dict[str, dict[str, Path]]:
    """By base: some adapters with settings of their own, random, each in a folder."""
    made: dict[str, dict[str, Path]] = {}
    for name, base in bases.items():
        host = opened(base)
        made[name] = {}
        for i, (key, options) in enumerate(ALL.items()):
            given = {"targets": ["all"] if name in ("tied", "gpt2") else ["all-linear"], "seed": i, **options}
            if name == "gpt2" and "alpha_pattern" in given:
                given["alpha_pattern"] = {"*c_attn": 7.0}
            adapter = host.add(key, "lora", **given)
            generator = torch.Generator().manual_seed(i)
            with torch.no_grad():
                for p in adapter.parameters():
                    p.normal_(0, 0.2, generator=generator)
            made[name][key] = tmp_path_factory.mktemp("adapters") / f"{name}-{key}"
            made[name][key].mkdir()
            host.save(key, made[name][key])
    return made


def opened(base: Path) -> Host:
    return Host(load(str(base), precision="fp32", device="cpu"))


def dense(host: Host, name: str) -> dict[str, torch.Tensor]:
    """The formula s·B·A, written out."""
    found = {}
    for path, layer in host.adapters[name].items():
        a, b, scale = layer.factors()
        found[path] = scale * b.detach().double() @ a.detach().double()
    return found


def call(*words: object) -> int:
    return main([str(word) for word in words])


def logits(host: Host, route) -> torch.Tensor:
    x = ids(13)
    with torch.no_grad(), host.route(route):
        return host.logits(x, [13])


def near(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((got - want).abs().max() <= tolerance * max(1.0, float(want.abs().max())))


# --- deltas --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead, out, width, r", [((), 7, 9, 3), ((), 4, 5, 8), ((3,), 6, 4, 2)])
def test_what_is_computed_of_the_factors_is_that_of_the_matrix(lead, out, width, r):
    torch.manual_seed(0)
    one, other = (
        Delta(torch.randn(*lead, out, r, dtype=torch.double), torch.randn(*lead, r, width, dtype=torch.double))
        for _ in range(2)
    )
    w, v = one.b @ one.a, other.b @ other.a
    assert one.norm() == pytest.approx(float(w.norm()), rel=1e-12)
    assert deltas.inner(one, other) == pytest.approx(float((w * v).sum()), rel=1e-10)
    assert near(one.values()[..., : min(out, width, r)], torch.linalg.svdvals(w)[..., : min(out, width, r)], 1e-12)
    assert deltas.total([one, one * -1.0]).norm() < 1e-12
    small, lost = deltas.total([one, other * 0.5]).truncated(2)
    u, s, vt = torch.linalg.svd(w + 0.5 * v, full_matrices=False)
    assert near(small.b @ small.a, (u * s[..., None, :])[..., :2] @ vt[..., :2, :], 1e-12)
    assert lost == pytest.approx(float(s[..., 2:].square().sum()), rel=1e-9, abs=1e-20)


def test_enough_is_the_least_rank():
    s = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert [deltas.enough(s, share) for share in (1e-9, 9 / 14, 9.1 / 14, 13 / 14, 1.0)] == [1, 1, 2, 2, 3]
    assert deltas.enough(torch.zeros(3), 0.9) == 1


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("block", [1, 20, 10**6])
@pytest.mark.filterwarnings("ignore")
def test_ties_is_pefts_on_whole_matrices(density, block, monkeypatch):
    monkeypatch.setattr(deltas, "BLOCK", block)
    torch.manual_seed(1)
    parts = [torch.randn(6, 8) * (torch.rand(6, 8) > 0.3) for _ in range(3)]
    weights = [1.0, 0.5, -0.7]
    want = merge_utils.ties(parts, torch.tensor(weights), density)
    got = deltas.ties([lambda b, e, w=w: w[b:e] for w in parts], (6, 8), weights, density)
    assert near(got, want, 1e-6)


def test_dare_keeps_a_share_and_is_right_on_average():
    w = torch.randn(40, 50)
    many = []
    for seed in range(300):
        found = deltas.dare([lambda b, e: w[b:e]], (40, 50), [0.5], 0.4, torch.Generator().manual_seed(seed))
        kept = found != 0
        assert near(found[kept], (w * 0.5 / 0.4)[kept], 1e-6)
        many.append(found)
    assert abs(float((torch.stack(many) != 0).float().mean()) - 0.4) < 0.01
    assert (torch.stack(many).mean(0) - 0.5 * w).abs().max() < 0.4


# --- combine ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", ["cat", "linear"])
@pytest.mark.filterwarnings("ignore")
def test_the_sum_is_exact_here_in_peft_and_as_a_stack(place, how, bases, adapters, tmp_path):
    base, there = bases[place], adapters[place]
    assert call("adapter", "combine", tmp_path / "both", *there.values(), "--how", how) == 0
    host = opened(base)
    for name, folder in {**there, "both": tmp_path / "both"}.items():
        host.load(folder, name)
    stacked, both = logits(host, tuple(there)), logits(host, "both")
    assert not near(stacked, logits(host, None), 0.1)
    assert near(both, stacked)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "both").eval()
    with torch.no_grad():
        assert near(theirs(input_ids=ids(13)[None]).logits[0], stacked)
    notes = json.loads((tmp_path / "both" / "lorafit.json").read_text())
    assert [one["adapter"] for one in notes["lineage"]["of"]] == [str(folder) for folder in there.values()]
    ranks = {p: layer.factors()[0].shape[-2] for p, layer in host.adapters["both"].items()}
    most = {p: sum(host.adapters[n][p].factors()[0].shape[-2] for n in there if p in host.adapters[n]) for p in ranks}
    assert ranks == most if how == "cat" else all(ranks[p] <= most[p] for p in ranks)


@pytest.mark.parametrize("place", ["llama", "mixtral"])
def test_weights_and_truncation_are_those_of_the_dense_sum(place, bases, adapters):
    sources = [open_adapter(str(adapters[place][key])) for key in ALL]
    host = opened(bases[place])
    for key in ALL:
        host.load(adapters[place][key], key)
    weights = [0.5, -1.0, 2.0]
    made = combine(sources, weights, "svd", rank=2)
    lost = whole = 0.0
    for path, layer in made.adapter.items():
        w = sum(
            weight * dense(host, key)[path]
            for key, weight in zip(ALL, weights, strict=True)
            if path in dense(host, key)
        )
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        a, b, scale = layer.factors()
        assert scale == 1 and a.shape[-2] == 2
        assert near((b @ a).double(), (u * s[..., None, :])[..., :2] @ vt[..., :2, :], 1e-6)
        assert made.sites[path].lost == pytest.approx(float(s[..., 2:].square().sum() / s.square().sum()), abs=1e-9)
        lost, whole = lost + float(s[..., 2:].square().sum()), whole + float(s.square().sum())
    assert made.lost == pytest.approx(lost / whole)


@pytest.mark.parametrize("place", ["llama", "mixtral"])
def test_ties_and_dare_of_adapters(place, bases, adapters):
    sources = [open_adapter(str(adapters[place][key])) for key in ALL]
    host = opened(bases[place])
    for key in ALL:
        host.load(adapters[place][key], key)
    made = combine(sources, [1, 1, 1], "ties", rank=99, density=0.3)
    for path, layer in made.adapter.items():
        parts = torch.stack([w[path].float() for key in ALL if path in (w := dense(host, key))])
        parts, weights = parts if parts.dim() == 4 else parts[:, None], torch.ones(len(parts))
        want = torch.stack([merge_utils.ties(list(parts[:, i]), weights, 0.3) for i in range(parts.shape[1])])
        assert near(layer.delta_weight(None), want.view_as(layer.delta_weight(None)), 2e-5)
        assert made.sites[path].lost < 1e-6
    one, same, other = (combine(sources, [1, 1, 1], "dare", density=0.5, seed=seed) for seed in (0, 0, 1))
    for path, layer in one.adapter.items():
        assert torch.equal(layer.delta_weight(None), same.adapter[path].delta_weight(None))
        assert not torch.equal(layer.delta_weight(None), other.adapter[path].delta_weight(None))
        assert 0 <= one.sites[path].lost < 1


@pytest.mark.parametrize("how", ["cat", "linear", "svd", "ties", "dare"])
@pytest.mark.parametrize("key", [*ALL, "pissa", "full"])
def test_one_adapter_alone_gives_itself_back(how, key, bases, adapters, tmp_path):
    base, host = bases["llama"], opened(bases["llama"])
    if key in ALL:
        folder = adapters["llama"][key]
        host.load(folder, key)
    else:
        randomize(host.add(key, key, ["all-linear"], **({"r": 3} if key == "pissa" else {})))
        folder = tmp_path / key
        folder.mkdir()
        host.save(key, folder)
    assert call("adapter", "combine", tmp_path / "again", folder, "--how", how, "--model", base) == 0
    host.load(tmp_path / "again", "again")
    assert near(logits(host, "again"), logits(host, key))


def test_the_same_twice_has_the_rank_of_one(adapters):
    sources = [open_adapter(str(adapters["llama"]["a"]))] * 2
    made = combine(sources, [0.25, 0.75], "linear")
    assert {kept.rank for kept in made.sites.values()} == {3}
    assert {kept.rank for kept in combine(sources, [0.25, 0.75], "cat").sites.values()} == {6}


# --- compress --------------------------------------------------------------------------------------------------------------


def test_energy_and_bytes_are_kept(adapters, tmp_path):
    one = open_adapter(str(adapters["llama"]["rslora"]))
    made = compress(one, energy=0.9)
    for path, kept in made.sites.items():
        s = one.delta(path).values().square()
        assert 0 <= kept.lost <= 0.1 and float(s[: kept.rank - 1].sum() / s.sum()) < 0.9
    small = tmp_path / "small"
    for int8, most in ((False, 7500), (True, 9300)):
        shutil.rmtree(small, ignore_errors=True)
        made = compress(one, size=most, int8=int8)
        write(made.adapter, small, one.sites, "x", one.modules, int8=int8)
        assert 0.85 * most < (small / "adapter_model.safetensors").stat().st_size <= most
    with pytest.raises(ConfigError, match="rank 1 at every site takes"):
        compress(one, size=1000)


def test_int8_comes_back_and_peft_gets_the_same(bases, adapters, tmp_path, capsys):
    folder = adapters["llama"]["rslora"]
    assert call("adapter", "compress", folder, tmp_path / "int8", "--int8", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["answers"]["agree"] >= 0.95 and 0 < told["lost"] < 1e-3
    assert call("adapter", "convert", tmp_path / "int8", tmp_path / "plain") == 0
    host = opened(bases["llama"])
    for name, place in {"a": folder, "int8": tmp_path / "int8", "plain": tmp_path / "plain"}.items():
        host.load(place, name)
    assert torch.equal(logits(host, "int8"), logits(host, "plain"))
    assert near(logits(host, "int8"), logits(host, "a"), 0.03) and not near(
        logits(host, "int8"), logits(host, "a"), 1e-6
    )
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(bases["llama"]), tmp_path / "plain"
    ).eval()
    with torch.no_grad():
        assert near(theirs(input_ids=ids(13)[None]).logits[0], logits(host, "int8"))
    with pytest.raises((ValueError, KeyError)):
        peft.PeftConfig.from_pretrained(tmp_path / "int8")
    notes = json.loads((tmp_path / "plain" / "lorafit.json").read_text())
    assert notes["lineage"]["of"][0]["lineage"]["of"][0]["adapter"] == str(folder)


def test_int8_codes_without_scales_are_refused(adapters, tmp_path):
    assert call("adapter", "compress", adapters["llama"]["a"], tmp_path / "int8", "--int8") == 0
    file = tmp_path / "int8" / "adapter_model.safetensors"
    tensors = st.load_file(file)
    del tensors[next(key for key in tensors if key.endswith(".scale"))]
    st.save_file(tensors, file)
    with pytest.raises(AdapterError, match="isn't int8 with a scale for each row"):
        open_adapter(str(tmp_path / "int8"))


# --- looking ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_info_tells_the_norms(place, bases, adapters, tmp_path, capsys):
    folder = adapters[place]["rslora"]
    assert call("adapter", "info", folder, "--json", "--html", tmp_path / "a.html") == 0
    found = json.loads(capsys.readouterr().out)
    host = opened(bases[place])
    host.load(folder, "a")
    want = dense(host, "a")
    assert {site["path"] for site in found["sites"]} == set(want)
    for site in found["sites"]:
        assert site["norm"] == pytest.approx(float(want[site["path"]].norm()), rel=1e-9)
        assert site["scale"] == pytest.approx(host.adapters["a"][site["path"]].scale)
    assert found["norm"] == pytest.approx(sum(float(w.norm()) ** 2 for w in want.values()) ** 0.5)
    assert found["fingerprint"] == host.base.fingerprint
    assert "<svg" in (tmp_path / "a.html").read_text() and "layer 1" in (tmp_path / "a.html").read_text()
    assert call("adapter", "info", folder) == 0
    text = capsys.readouterr().out
    assert "rank" in text and "█" in text


def test_the_base_neednt_be_here(bases, adapters, tmp_path, capsys):
    """What is told and made of the adapter's own file is what is made with the base's config."""
    made = {}
    for name in ("here", "gone"):
        copies = [shutil.copytree(adapters["llama"][key], tmp_path / name / key) for key in ("a", "narrow")]
        for copy in copies if name == "gone" else []:
            for file in ("adapter_config.json", "lorafit.json"):
                (copy / file).write_text((copy / file).read_text().replace(str(bases["llama"]), "org/gone"))
        assert call("adapter", "info", copies[0], "--json") == 0
        info = json.loads(capsys.readouterr().out)
        assert info["base_is_here"] is (name == "here")
        assert call("adapter", "combine", tmp_path / name / "both", *copies) == 0
        tensors = st.load_file(tmp_path / name / "both" / "adapter_model.safetensors")
        capsys.readouterr()
        made[name] = info["sites"], tensors
    assert [(s["path"], s["norm"]) for s in made["here"][0]] == [
        (s["path"], s["norm"]) for s in made["gone"][0]
    ] or sorted((s["path"], s["norm"]) for s in made["here"][0]) == sorted(
        (s["path"], s["norm"]) for s in made["gone"][0]
    )
    assert made["here"][1].keys() == made["gone"][1].keys()
    assert all(torch.equal(made["here"][1][key], made["gone"][1][key]) for key in made["here"][1])


def test_diff_tells_how_far_apart(bases, adapters, capsys):
    one, other = adapters["llama"]["a"], adapters["llama"]["rslora"]
    assert call("adapter", "diff", one, other, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    host = opened(bases["llama"])
    host.load(one, "a")
    host.load(other, "b")
    a, b = dense(host, "a"), dense(host, "b")
    assert found["same_base"] is True and found["different"]["method"] == ["lora", "rslora"]
    for site in found["sites"]:
        x, y = a[site["path"]], b[site["path"]]
        assert site["distance"] == pytest.approx(float((x - y).norm() / max(x.norm(), y.norm())), rel=1e-9)
        assert site["cosine"] == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), rel=1e-9)
    assert call("adapter", "diff", one, one) == 0
    assert "distance 0.0000 of the larger, cosine 1.0000" in capsys.readouterr().out
    assert call("adapter", "diff", one, adapters["llama"]["narrow"], "--sites") == 0
    assert "only in" in capsys.readouterr().out


class Magnitude(Method):
    """A method whose ΔW depends on the weight, as DoRA's does: each row of W gets a length of its own."""

    def __init__(self, site, generator=None):
        super().__init__()
        self.length = torch.nn.Parameter(site.weight().float().norm(dim=-1, keepdim=True))

    def delta_weight(self, w):
        return w.float() * (self.length / w.float().norm(dim=-1, keepdim=True) - 1)


@pytest.mark.parametrize("by", ["peft", "us"])
def test_info_and_diff_call_a_method_the_same(by, bases, adapters, tmp_path, capsys):
    folder = adapters["llama"]["rslora"]  # as PEFT writes one
    if by == "us":
        host, folder = opened(bases["llama"]), tmp_path / "ours"
        randomize(host.add("ours", "rslora", ["q_proj"], r=4, alpha=3.0))
        folder.mkdir()
        host.save("ours", folder)
    assert call("adapter", "info", folder, "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert call("adapter", "diff", adapters["llama"]["a"], folder, "--json") == 0
    different = json.loads(capsys.readouterr().out)["different"]
    assert info["method"] == different["method"][1] == "rslora" and "rslora" not in {*info["options"], *different}
    assert {key: pair[1] for key, pair in different.items() if key in info["options"]}.items() <= info[
        "options"
    ].items()
    assert call("adapter", "info", folder) == 0
    text = capsys.readouterr().out
    assert "method       rslora r=4 alpha=3.0" in text and ("stored as lora" in text) == (by == "us")
    (folder / "lorafit.json").write_text('{"trained_as": {}}')
    assert call("adapter", "info", folder) == 0


def test_a_method_that_needs_the_weights_gets_them(bases, adapters, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "magnitude", Magnitude)
    host = opened(bases["llama"])
    layers = host.add("m", "magnitude", ["q_proj", "down_proj"])
    with torch.no_grad():
        for p in layers.parameters():
            p *= 1.3
    host.load(adapters["llama"]["a"], "a")
    (tmp_path / "m").mkdir()
    host.save("m", tmp_path / "m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = open_adapter(str(tmp_path / "m"))
    for path in one.paths:
        assert near(one.matrix(path), 0.3 * host.sites[path].weight())
    assert call("adapter", "info", tmp_path / "m") == 0
    assert call("adapter", "combine", tmp_path / "alone", tmp_path / "m") == 0
    words = [tmp_path / "x", tmp_path / "m", adapters["llama"]["a"]]
    assert call("adapter", "combine", *words) == 2 and "isn't of low rank" in capsys.readouterr().err
    assert call("adapter", "combine", *words, "--how", "svd", "--rank", 16) == 0
    for name in ("alone", "x"):
        host.load(tmp_path / name, name)
    assert near(logits(host, "alone"), logits(host, "m"))
    assert near(logits(host, "x"), logits(host, ("m", "a")))
    (tmp_path / "m" / "adapter_config.json").write_text(
        (tmp_path / "m" / "adapter_config.json").read_text().replace(str(bases["llama"]), "org/gone")
    )
    (tmp_path / "m" / "lorafit.json").write_text(
        (tmp_path / "m" / "lorafit.json").read_text().replace(str(bases["llama"]), "org/gone")
    )
    assert call("adapter", "info", tmp_path / "m") == 2
    assert "isn't here" in capsys.readouterr().err


def test_a_gguf_base_and_an_adapter_that_peft_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = gguf_files.write(tmp_path / "tiny.gguf", gguf_files.made("llama"))
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        theirs = peft.get_peft_model(
            gguf_files.made("llama"), peft.LoraConfig(r=2 + seed, target_modules=["q_proj", "up_proj"])
        )
        randomize_peft(theirs)
        made.append(tmp_path / f"peft-{seed}")
        theirs.save_pretrained(made[-1])
    assert call("adapter", "combine", tmp_path / "both", *made, "--model", file) == 0
    assert "only names and shapes were checked" in capsys.readouterr().err
    host = opened(file)
    for name, folder in {"a": made[0], "b": made[1], "both": tmp_path / "both"}.items():
        host.load(folder, name)
    assert near(logits(host, "both"), logits(host, ("a", "b")))


@pytest.mark.filterwarnings("ignore")
def test_the_embedded_model_whole(tmp_path, capsys):
    """SmolLM2: two adapters combined, read by PEFT, made smaller, checked."""
    host = opened(Path("smollm2"))
    for i, (name, targets) in enumerate({"a": ["q_proj", "v_proj"], "b": ["v_proj", "*.3.mlp.*"]}.items()):
        randomize(host.add(name, "lora", targets, r=4 + i, rslora=bool(i), seed=i), 0.02)
        (tmp_path / name).mkdir()
        host.save(name, tmp_path / name)
    both, small = tmp_path / "both", tmp_path / "small"
    assert call("adapter", "combine", both, tmp_path / "a", f"{tmp_path / 'b'}:0.5") == 0
    host.load(both, "both")
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(host.base.path, dtype=torch.float32), both
    ).eval()
    with torch.no_grad():
        want = theirs(input_ids=ids(13)[None]).logits[0]
    assert not near(logits(host, "both"), logits(host, None), 1e-3)
    assert near(logits(host, "both"), want)
    capsys.readouterr()
    assert call("adapter", "compress", both, small, "--energy", 0.9, "--int8", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] < told["bytes_before"] / 3 and 0 < told["lost"] < 0.11 and told["answers"]["positions"] > 50


# --- other programs --------------------------------------------------------------------------------------------------------


def test_mlx_there_and_back(bases, adapters, tmp_path, capsys):
    """The formula of mlx-lm's layer, y + scale·(x·a)·b, from its files; and back, the same logits."""
    for place in ("llama", "tied"):
        folder, to = adapters[place]["rslora"], tmp_path / place
        assert call("adapter", "convert", folder, to / "mlx", "--to", "mlx") == 0
        config = json.loads((to / "mlx" / "adapter_config.json").read_text())
        tensors = st.load_file(to / "mlx" / "adapters.safetensors")
        host = opened(bases[place])
        host.load(folder, "a")
        x = torch.randn(5, 16)
        for path, w in dense(host, "a").items():
            a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
            assert a.shape[1] == b.shape[0] == config["lora_parameters"]["rank"] == 4
            if a.shape[0] == 16:
                assert near(config["lora_parameters"]["scale"] * (x @ a) @ b, x @ w.T.float())
        assert call("adapter", "info", to / "mlx") == 2
        assert "is an adapter of mlx-lm; first: lorafit adapter convert" in capsys.readouterr().err
        assert config["num_layers"] == 2 and "self_attn.q_proj" in config["lora_parameters"]["keys"]
        assert call("adapter", "convert", to / "mlx", to / "back") == 0
        host.load(to / "back", "b")
        assert near(logits(host, "b"), logits(host, "a"))


def test_mlx_adapters_with_a_scale(bases, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "mlx"
    folder.mkdir()
    tensors = {}
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.v_proj.lora_a"] = torch.randn(16, 3)
        tensors[f"model.layers.{layer}.self_attn.v_proj.lora_b"] = torch.randn(3, 8)
    st.save_file(tensors, folder / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 3, "scale": 20.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert call("adapter", "convert", folder, tmp_path / "none") == 2  # it names no base
    assert call("adapter", "convert", folder, tmp_path / "mine", "--model", bases["llama"]) == 0
    host = opened(bases["llama"])
    host.load(tmp_path / "mine", "a")
    x = torch.randn(5, 16)
    for path, w in dense(host, "a").items():
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        assert near(x @ w.T.float(), 20.0 * ((x @ a) @ b))
    bad = [{"lora_parameters": {"scale": scale}} for scale in (math.nan, math.inf, "20", True)]
    for change in ({"fine_tune_type": "dora"}, {"lora_parameters": {}}, *bad):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        assert call("adapter", "convert", folder, tmp_path / "other", "--model", bases["llama"]) == 2
    assert not (tmp_path / "other").exists() and not (tmp_path / "none").exists()


def test_minimind_adapters(bases, tmp_path, capsys):
    torch.manual_seed(0)
    tensors = {}
    for layer in range(2):
        for name in ("q_proj", "o_proj"):  # the square ones
            prefix = f"module.model.layers.{layer}.self_attn.{name}.lora"
            tensors |= {
                f"{prefix}.A.weight": torch.randn(4, 16).half(),
                f"{prefix}.B.weight": torch.randn(16, 4).half(),
            }
    torch.save(tensors, tmp_path / "lora_identity_16.pth")
    assert (
        call("adapter", "convert", tmp_path / "lora_identity_16.pth", tmp_path / "mine", "--model", bases["llama"]) == 0
    )
    host = opened(bases["llama"])
    host.load(tmp_path / "mine", "a")
    x = torch.randn(5, 16)
    for path, w in dense(host, "a").items():
        a, b = (tensors[f"module.{path}.lora.{m}.weight"].float() for m in "AB")
        assert near(x @ w.T.float(), (x @ a.T) @ b.T)
    assert len(dense(host, "a")) == 4

    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "owned").touch, ())

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil()))
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({"x.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    capsys.readouterr()
    for name in ("evil", "plain", "list", "other"):
        assert call("adapter", "convert", tmp_path / f"{name}.pth", tmp_path / "no", "--model", bases["llama"]) == 2
        error = capsys.readouterr().err.strip()
        assert name != "evil" or "it holds more than tensors" in error
        assert len(error.splitlines()) == 1 and f"{name}.pth" in error
    assert not (tmp_path / "owned").exists() and not (tmp_path / "no").exists()


def crafted() -> dict[str, dict]:
    """What a `.pth` may hold beside honest tensors: by name, its contents."""
    key = "model.layers.0.self_attn.q_proj.lora."
    good = {f"{key}A.weight": torch.ones(4, 16), f"{key}B.weight": torch.ones(16, 4)}

    def like(**changed):
        return good | {f"{key}{name}.weight": tensor for name, tensor in changed.items()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(torch.ones(4, 16), 0.1, 0, torch.qint8)
    return {
        "ranks": like(B=torch.ones(16, 5)),
        "narrow": like(A=torch.ones(4, 15)),
        "vector": like(A=torch.ones(16)),
        "empty": like(A=torch.ones(0, 16), B=torch.ones(16, 0)),
        "nan": like(A=torch.full((4, 16), torch.nan)),
        "stretched": like(A=torch.ones(1).expand(4, 16)),
        "huge": like(A=torch.ones(1).expand(1 << 40, 16)),
        "sparse": like(A=torch.ones(4, 16).to_sparse()),
        "complex": like(A=torch.ones(4, 16, dtype=torch.complex64)),
        "quantised": like(A=quantised),
        "number": good | {"epoch": 3},
        "half": {f"{key}A.weight": torch.ones(4, 16)},
        "elsewhere": {name.replace("layers.0", "layers.9"): tensor for name, tensor in good.items()},
        "experts": {name.replace("q_proj", "nothing"): tensor for name, tensor in good.items()},
    }


@pytest.mark.parametrize("name", crafted())
@pytest.mark.filterwarnings("ignore")
def test_a_crafted_pth_is_one_line(bases, tmp_path, capsys, name):
    file = tmp_path / f"{name}.pth"
    torch.save(crafted()[name], file)
    assert call("adapter", "convert", file, tmp_path / "new" / "no", "--model", bases["llama"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("lorafit: ") and len(error.splitlines()) == 1 and f"{name}.pth" in error, error
    assert list(tmp_path.iterdir()) == [file]


def test_a_pth_that_was_cut_or_changed_is_one_line(bases, tmp_path, capsys):
    whole = tmp_path / "whole.pth"
    torch.save(crafted()["narrow"], whole)
    data = whole.read_bytes()
    wrongs = (data[: len(data) // 2], data[:-1], data[:20] + bytes(40) + data[60:], b"", b"PK\x03\x04")
    for number, wrong in enumerate(wrongs):
        file = tmp_path / f"{number}.pth"
        file.write_bytes(wrong)
        assert call("adapter", "convert", file, tmp_path / "no", "--model", bases["llama"]) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and f"{number}.pth is refused" in error, error
        assert ("cut off" if wrong else "isn't a file of torch's") in error, error
    assert not (tmp_path / "no").exists()


def test_minimind_weights_as_qwen3(tmp_path):
    """MiniMind's forward, written out from its definition, gives the logits of the folder."""
    torch.manual_seed(0)
    tok = tokenizer(CHATML)
    vocabulary, width, heads, groups, head, inner, layers = len(tok), 16, 4, 2, 4, 24, 2
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}self_attn.{n}_proj.weight": (m * head, width) for n, m in (("q", heads), ("k", groups), ("v", groups))
        }
        shapes[f"{at}self_attn.o_proj.weight"] = (width, heads * head)
        shapes |= {f"{at}self_attn.{n}_norm.weight": (head,) for n in "qk"}
        shapes |= {f"{at}mlp.{n}_proj.weight": (inner, width) for n in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{at}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    w = {key: torch.randn(shape) * 0.3 + (len(shape) == 1) for key, shape in shapes.items()}
    w["lm_head.weight"] = w["model.embed_tokens.weight"]

    def norm(x, g):
        return g * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    x = ids(9) % vocabulary
    angles = torch.outer(torch.arange(9.0), 1e6 ** -(torch.arange(0, head, 2) / head))
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)

    def turned(t):
        half = head // 2
        return t * cos[:, None] + torch.cat([-t[..., half:], t[..., :half]], -1) * sin[:, None]

    h = w["model.embed_tokens.weight"][x]
    for i in range(layers):
        at = f"model.layers.{i}."
        n = norm(h, w[f"{at}input_layernorm.weight"])
        q, k, v = ((n @ w[f"{at}self_attn.{c}_proj.weight"].T).view(9, -1, head) for c in "qkv")
        q, k = turned(norm(q, w[f"{at}self_attn.q_norm.weight"])), turned(norm(k, w[f"{at}self_attn.k_norm.weight"]))
        k, v = k.repeat_interleave(heads // groups, 1), v.repeat_interleave(heads // groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / head**0.5 + torch.full((9, 9), float("-inf")).triu(1)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(9, -1)
        h = h + mixed @ w[f"{at}self_attn.o_proj.weight"].T
        n = norm(h, w[f"{at}post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(n @ w[f"{at}mlp.gate_proj.weight"].T)
        h = h + (gate * (n @ w[f"{at}mlp.up_proj.weight"].T)) @ w[f"{at}mlp.down_proj.weight"].T
    want = norm(h, w["model.norm.weight"]) @ w["lm_head.weight"].T
    torch.save(w, tmp_path / "full_sft_16.pth")
    tok.save_pretrained(tmp_path / "tok")
    assert call("adapter", "convert", tmp_path / "full_sft_16.pth", tmp_path / "hf") == 2  # no tokenizer
    words = ["adapter", "convert", tmp_path / "full_sft_16.pth", tmp_path / "hf", "--tokenizer", tmp_path / "tok"]
    assert call(*words) == 0
    host = opened(tmp_path / "hf")
    assert near(host.logits(x, [9]), want)
    del w["model.layers.1.mlp.up_proj.weight"]
    torch.save(w, tmp_path / "full_sft_16.pth")
    words[3] = tmp_path / "broken"
    assert call(*words) == 2 and not (tmp_path / "broken").exists()


# --- what is wrong ---------------------------------------------------------------------------------------------------------


def broken(adapters, bases, tmp_path) -> dict[str, tuple[list[object], str]]:
    """Command lines that must fail, and a word of the reason."""
    good, out = adapters["llama"]["a"], tmp_path / "out"

    def copy(name, tensors=None, config=None):
        place = shutil.copytree(good, tmp_path / name)
        if tensors is not None:
            found = st.load_file(place / "adapter_model.safetensors")
            tensors(found)
            st.save_file(found, place / "adapter_model.safetensors")
        if config is not None:
            values = json.loads((place / "adapter_config.json").read_text())
            (place / "adapter_config.json").write_text(json.dumps(values | config))
        return place

    def nan(tensors):
        next(iter(tensors.values()))[0, 0] = torch.nan

    def no_rank(tensors):
        for key in tensors:
            tensors[key] = tensors[key][:0] if "lora_A" in key else tensors[key][:, :0]

    def still(tensors):
        for key in tensors:
            if "lora_B" in key:
                tensors[key].zero_()

    cut = copy("cut")
    (cut / "adapter_model.safetensors").write_bytes((cut / "adapter_model.safetensors").read_bytes()[:-100])
    full = tmp_path / "full"
    full.mkdir()
    (full / "there").touch()
    return {
        "nan": (["combine", out, good, copy("nan", nan)], "finite"),
        "nan compress": (["compress", tmp_path / "nan", out, "--rank", 1], "finite"),
        "nan convert": (["convert", tmp_path / "nan", out, "--to", "mlx"], "finite"),
        "cut": (["combine", out, good, cut], "can't be read"),
        "cut info": (["info", cut], "can't be read"),
        "rank 0": (["info", copy("rank0", no_rank, {"r": 0, "rank_pattern": {}})], "adapter_config.json: r=0"),
        "changes nothing": (["verify", copy("still", still)], "changes nothing"),
        "another base": (["combine", out, good, adapters["tied"]["a"]], "different bases"),
        "another architecture": (["combine", out, good, adapters["gpt2"]["a"]], "different bases"),
        "wrong model": (["verify", good, "--model", bases["tied"]], "another base"),
        "wrong architecture": (["info", good, "--model", bases["gpt2"]], "another base"),
        "no model": (["info", good, "--model", tmp_path / "nowhere"], "no model"),
        "no adapter": (["diff", good, tmp_path / "nothing"], "neither a run nor an adapter"),
        "out is there": (["combine", full, good], "isn't empty"),
        "out is there 2": (["compress", good, full, "--int8"], "isn't empty"),
        "out is there 3": (["convert", good, full], "isn't empty"),
        "weight": (["combine", out, f"{good}:x"], "isn't a weight"),
        "weight nan": (["combine", out, f"{good}:nan"], "finite"),
        "rank of cat": (["combine", out, good, "--rank", 2], "--rank goes with"),
        "density of svd": (["combine", out, good, "--how", "svd", "--density", 0.5], "--density goes with"),
        "density": (["combine", out, good, "--how", "ties", "--density", 1.5], "at most 1"),
        "energy": (["compress", good, out, "--energy", 2], "at most 1"),
        "how small": (["compress", good, out], "say how small"),
        "rank": (["compress", good, out, "--rank", 0], "at least 1"),
        "dora": (["convert", copy("dora", config={"use_dora": True}), out], "lora_magnitude_vector"),
        "no file": (["convert", tmp_path / "gone.pth", out], "neither a run nor an adapter"),
    }


def test_what_is_wrong_is_said_and_leaves_nothing(bases, adapters, tmp_path, capsys):
    for name, (words, reason) in broken(adapters, bases, tmp_path).items():
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert call("adapter", *words) == 2, name
        out, error = capsys.readouterr()
        assert reason in error and not out, f"{name}: {error}"
        last = error.strip().splitlines()[-1]
        assert last.startswith("lorafit: ") or "\n  " in error, f"{name}: {error}"
        assert sorted(tmp_path.rglob("*")) == before, name


def saved(host: Host, name: str, tmp_path: Path) -> Path:
    (tmp_path / name).mkdir()
    host.save(name, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("how", ["svd", "ties", "dare"])
def test_what_is_not_of_low_rank_is_brought_to_the_rank_it_was_trained_with(how, bases, adapters, tmp_path, capsys):
    """DoRA: by default at r for svd, at the sum of the ranks for ties and dare; cat and linear refuse it."""
    host = opened(bases["llama"])
    layers = host.add("dora", "dora", ["q_proj"], r=2)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in layers.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    host.load(adapters["llama"]["a"], "a")
    both = [saved(host, "dora", tmp_path), adapters["llama"]["a"]]
    assert call("adapter", "combine", tmp_path / "cat", *both) == 2
    assert "so no exact sum is; --how svd\n" in capsys.readouterr().err
    assert call("adapter", "combine", tmp_path / "x", *both, "--how", how, "--json") == 0
    found = json.loads(capsys.readouterr().out)["sites"]
    path = "model.layers.0.self_attn.q_proj"
    assert found[path]["rank"] == (3 if how == "svd" else 5) and found[path]["lost"] > 0
    if how == "svd":
        a, b, s = host.adapters["a"][path].factors()
        whole = host.adapters["dora"][path].delta_weight(host.sites[path].weight()).double() + s * (b @ a).double()
        values = torch.linalg.svdvals(whole.detach()).square()
        assert found[path]["lost"] == pytest.approx(float(values[3:].sum() / values.sum()), rel=1e-4)


def test_a_great_loss_is_warned_of(adapters, tmp_path, capsys):
    for n, (words, warned) in enumerate(
        [
            (["compress", "--rank", 1], True),
            (["compress", "--energy", 0.99], False),
            (["combine", "--how", "ties", "--rank", 1], True),
        ]
    ):
        way, *rest = words
        a, b = adapters["llama"]["a"], adapters["llama"]["rslora"]
        given = [tmp_path / str(n), a, b] if way == "combine" else [b, tmp_path / str(n)]
        assert call("adapter", way, *given, *rest) == 0
        text = capsys.readouterr().out
        share = float(text.split("lost       ")[1].split("%")[0])
        assert (share > 10) == warned == ("warning    more than a tenth" in text)


def test_a_full_delta_needs_a_rank(bases, adapters, tmp_path, capsys):
    host = opened(bases["llama"])
    randomize(host.add("full", "full", ["q_proj"]), 0.1)
    host.load(adapters["llama"]["a"], "a")
    (tmp_path / "full").mkdir()
    host.save("full", tmp_path / "full")
    both = [tmp_path / "full", adapters["llama"]["a"]]
    assert call("adapter", "combine", tmp_path / "x", *both) == 2
    assert "isn't of low rank" in capsys.readouterr().err
    assert call("adapter", "combine", tmp_path / "x", *both, "--how", "svd") == 2
    assert call("adapter", "combine", tmp_path / "x", *both, "--how", "svd", "--rank", 16) == 0
    host.load(tmp_path / "x", "x")
    assert near(logits(host, "x"), logits(host, ("full", "a")))
    assert call("adapter", "compress", tmp_path / "full", tmp_path / "y", "--int8") == 2
    assert call("adapter", "compress", tmp_path / "full", tmp_path / "y", "--rank", 16, "--int8") == 0
    assert call("adapter", "info", tmp_path / "full") == 0
    capsys.readouterr()
    assert call("adapter", "diff", *both, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    for site in found["sites"]:
        x, y = host.adapters["full"][site["path"]].delta.detach().double(), dense(host, "a")[site["path"]]
        assert site["distance"] == pytest.approx(float((x - y).norm() / max(x.norm(), y.norm())), rel=1e-6)


def test_verify(adapters, capsys):
    assert call("adapter", "verify", adapters["llama"]["a"], "--json") == 0
    assert json.loads(capsys.readouterr().out)["effect"] > 0


def test_verify_says_that_numbers_are_too_large(adapters, tmp_path, capsys):
    large = shutil.copytree(adapters["llama"]["a"], tmp_path / "large")
    file = large / "adapter_model.safetensors"
    st.save_file({key: t.sign() * 1e25 for key, t in st.load_file(file).items()}, file)
    assert call("adapter", "verify", large) == 2
    assert "its numbers are too large: with it the logits of" in capsys.readouterr().err


def test_a_sum_that_cancels_out_has_lost_nothing(adapters, tmp_path, capsys):
    one = adapters["llama"]["a"]
    assert call("adapter", "combine", tmp_path / "zero", f"{one}:1", f"{one}:-1", "--how", "svd", "--rank", 1) == 0
    text = capsys.readouterr().out
    assert "lost       0.000%" in text and "changes nothing" in text and "most lost at" not in text
    assert not any(
        t.any() for key, t in st.load_file(tmp_path / "zero" / "adapter_model.safetensors").items() if "B" in key
    )


def test_a_compressed_file_that_grew_is_said(bases, tmp_path, capsys):
    host = opened(bases["llama"])
    randomize(host.add("small", "ia3", ["q_proj"]), 0.1)
    words = [saved(host, "small", tmp_path), tmp_path / "grown", "--rank", 4]
    assert call("adapter", "compress", *words) == 0
    assert "warning    that is no smaller: what ia3 stores" in capsys.readouterr().out


def test_settings_of_a_later_peft_are_named_once(adapters, tmp_path, capsys):
    place = shutil.copytree(adapters["llama"]["a"], tmp_path / "later")
    file = place / "adapter_config.json"
    off = {"use_a": False, "use_b": None, "use_c": {}, "use_d": ""}
    file.write_text(json.dumps(json.loads(file.read_text()) | off))
    for words in (["info", place], ["verify", place]):
        assert call("adapter", *words) == 0
        assert "not known here" not in capsys.readouterr().err
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_what_comes": True, "and_how": {"much": 3}}))
    for words in (["info", place], ["verify", place]):
        assert call("adapter", *words) == 0
        out, err = capsys.readouterr()
        assert err.count("has and_how, use_what_comes, not known here and passed over") == 1 and "not known" not in out


def test_what_peft_writes_itself_is_known():
    from dataclasses import fields

    from peft import AdaLoraConfig, IA3Config, LoraConfig

    from lorafit.peft_files.settings import _KNOWN, _UNSUPPORTED

    theirs = {field.name for kind in (LoraConfig, IA3Config, AdaLoraConfig) for field in fields(kind)}
    assert theirs <= _KNOWN | set(_UNSUPPORTED)
    assert {key for key in _KNOWN if key not in theirs} <= {"peft_version"}


def test_a_base_of_mlx_that_is_no_name_is_refused(bases, adapters, tmp_path, capsys):
    assert call("adapter", "convert", adapters["llama"]["a"], tmp_path / "mlx", "--to", "mlx") == 0
    file = tmp_path / "mlx" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": 5}))
    assert call("adapter", "convert", tmp_path / "mlx", tmp_path / "no", "--model", bases["llama"]) == 2
    assert "model=5 can't be meant" in capsys.readouterr().err

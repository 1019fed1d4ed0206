"""PEFT's files and ours are the same: the same weights give the same logits, both ways, fp32, 1e-5."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from tiny import base, ids, model, randomize, randomize_peft

from lorafit.errors import AdapterError
from lorafit.host import Host

CASES = {
    "llama": ("llama", ["all-linear"], {}, {}),
    "llama rslora patterns": (
        "llama",
        ["all-linear"],
        {
            "rslora": True,
            "r": 4,
            "rank_pattern": {"q_proj": 6, "layers.1.mlp.down_proj": 2},
            "alpha_pattern": {"mlp.*": 7.0},
        },
        {},
    ),
    "qwen2": ("qwen2", ["q_proj", "v_proj"], {}, {}),
    "qwen3": ("qwen3", ["attention"], {}, {}),
    "gpt2": ("gpt2", ["all-linear"], {}, {}),
    "gpt2 one c_proj": ("gpt2", ["mlp.c_proj"], {}, {}),
    "embedding": ("llama", ["embed_tokens", "q_proj"], {}, {}),
    "tied embedding": ("llama", ["embed_tokens", "q_proj"], {}, {"tie_word_embeddings": True}),
    "head": ("llama", ["lm_head"], {}, {}),
    "one layer": ("llama", ["layers.1.self_attn.q_proj"], {}, {}),
    "mixtral": ("mixtral", ["attention"], {}, {}),
    "mixtral experts": ("mixtral", ["all-linear"], {}, {}),
    "mixtral down only": ("mixtral", ["down_proj"], {}, {}),
}


def fix_globs(options):
    return {
        k: ({("*.mlp.*" if p == "mlp.*" else p): v for p, v in o.items()} if isinstance(o, dict) else o)
        for k, o in options.items()
    }


def logits_here(host, x):
    with torch.no_grad(), host.route("a"):
        return host.logits(x, [len(x)])


@pytest.mark.parametrize("case", CASES, ids=CASES)
@pytest.mark.filterwarnings("ignore")
def test_ours_in_peft(case, tmp_path):
    shape, targets, options, changes = CASES[case]
    host = Host(base(shape, **changes))
    randomize(host.add("a", "lora", targets, **{"r": 3, **fix_globs(options)}))
    host.save("a", tmp_path)
    x = ids(13)
    theirs = peft.PeftModel.from_pretrained(model(shape, **changes), tmp_path).eval()
    with torch.no_grad():
        want = theirs(input_ids=x[None]).logits[0]
        plain = host.logits(x, [13])
    here = logits_here(host, x)
    assert (here - plain).abs().max() > 0.1
    assert (here - want).abs().max() < 1e-5 * max(1, want.abs().max())


@pytest.mark.parametrize("case", [c for c in CASES if "patterns" not in c])
@pytest.mark.filterwarnings("ignore")
def test_theirs_here(case, tmp_path):
    shape, targets, _, changes = CASES[case]
    host = Host(base(shape, **changes))
    ours = host.add("names", "lora", targets)
    paths = [p for p, _ in ours.items()]
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=[p for p in paths if host.sites[p].kind != "experts"] or [],
        target_parameters=[p for p in paths if host.sites[p].kind == "experts"] or None,
        ensure_weight_tying="tied" in case,
    )
    theirs = peft.get_peft_model(model(shape, **changes), config).eval()
    randomize_peft(theirs)
    theirs.save_pretrained(tmp_path)
    host.load(tmp_path, "a")
    x = ids(13)
    with torch.no_grad():
        want = theirs(input_ids=x[None]).logits[0]
    assert (logits_here(host, x) - want).abs().max() < 1e-5 * max(1, want.abs().max())


def saved(tmp_path):
    host = Host(base("llama"))
    randomize(host.add("a", "lora", r=3))
    host.save("a", tmp_path)
    return host


def edit(folder, change):
    import safetensors.torch as st

    tensors = st.load_file(folder / "adapter_model.safetensors")
    change(tensors)
    st.save_file(tensors, folder / "adapter_model.safetensors")


def test_all_bad_keys_in_one_error(tmp_path):
    host = saved(tmp_path)
    keys = [f"base_model.model.model.layers.0.self_attn.{n}_proj.lora_A.weight" for n in "qkv"]

    def change(t):
        t[keys[0].replace("q_proj", "q_porj")] = t.pop(keys[0])
        t[keys[1]] = t[keys[1]][:, :-1].contiguous()
        del t[keys[2]]
        t["classifier.weight"] = torch.zeros(2)

    edit(tmp_path, change)
    with pytest.raises(AdapterError) as error:
        host.load(tmp_path, "b")
    text = str(error.value)
    for part in ("q_porj", "k_proj: a is (3, 15), expected (3, 16)", "v_proj: has lora_B.weight", "classifier.weight"):
        assert part in text
    assert "b" not in host.adapters


def test_a_missing_site_is_an_error(tmp_path):
    host = saved(tmp_path)
    edit(tmp_path, lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp.up_proj" in k])
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj: named in adapter_config"):
        host.load(tmp_path, "b")


def test_another_base_is_an_error(tmp_path):
    host = Host(base("llama"))
    host.base.fingerprint = "1" * 32
    host.add("a", "lora")
    host.save("a", tmp_path)
    host.base.fingerprint = "2" * 32
    with pytest.raises(AdapterError, match="another base"):
        host.load(tmp_path, "b")


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"lora_bias": True},
        {"bias": "all"},
        {"peft_type": "LOHA"},
    ],
)
def test_what_we_would_compute_differently_is_refused(tmp_path, change):
    host = saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=next(iter(change)) if "peft_type" not in change else "LOHA"):
        host.load(tmp_path, "b")


@pytest.mark.filterwarnings("ignore")
def test_an_embedding_adapter_that_forgets_the_tied_head_is_refused(tmp_path):
    tied = {"tie_word_embeddings": True}
    peft.get_peft_model(model("llama", **tied), peft.LoraConfig(target_modules=["embed_tokens"])).save_pretrained(
        tmp_path
    )
    with pytest.raises(AdapterError, match="ensure_weight_tying"):
        Host(base("llama", **tied)).load(tmp_path, "b")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "odd",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj"], "alpha_pattern": {"experts": 60}},
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},  # the last is the end of a parameter here, of no module
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    ],
)
def test_odd_peft_configs_here(odd, tmp_path):
    changes = {"intermediate_size": 16}  # as wide as the hidden state: shapes don't tell the experts' weights apart
    theirs = peft.get_peft_model(model("mixtral", **changes), peft.LoraConfig(r=3, lora_alpha=5, **odd)).eval()
    randomize_peft(theirs)
    theirs.save_pretrained(tmp_path)
    host = Host(base("mixtral", **changes))
    host.load(tmp_path, "a")
    x = ids(13)
    with torch.no_grad():
        want = theirs(input_ids=x[None]).logits[0]
    assert (logits_here(host, x) - want).abs().max() < 1e-5 * max(1, want.abs().max())


def test_a_scaled_embedding_merges_as_it_runs():
    from pathlib import Path

    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from lorafit.model.load import prepare

    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=4, tie_word_embeddings=False))
    host = Host(prepare(gemma, None, Path("nowhere"), "gemma3"))
    randomize(host.add("a", "full", ["embed_tokens"]))
    x = ids(13)
    before = logits_here(host, x)
    site = host.sites["model.embed_tokens"]
    assert site.gain == 4.0
    site.write(host.merged_weight(site, "a"))
    with torch.no_grad():
        assert (host.logits(x, [13]) - before).abs().max() < 1e-5 * max(1, before.abs().max())


@pytest.mark.parametrize(
    "values",
    [
        {"lora_alpha": float("nan")},
        {"r": 10**13},
        {"rank_pattern": {"(": 4}},
        {"rank_pattern": {"(" * 9999 + ")" * 9999: 4}},
        {"rank_pattern": [1]},
        {"rank_pattern": {"q_proj": "x"}},
        {"alpha_pattern": {"q_proj": "x"}},
        {"target_modules": [1]},
    ],
    ids=lambda values: str(values)[:40],
)
def test_values_that_cannot_be_meant_are_one_error(tmp_path, values):
    host = saved(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | values))
    with pytest.raises(AdapterError, match=f"{next(iter(values))}=.* can't be meant"):
        host.load(tmp_path, "b")


@pytest.mark.parametrize("values", [{"chat": "x"}, {"lineage": "x"}, {"trained_as": "x"}, {"base": 5}], ids=str)
def test_notes_that_cannot_be_meant_are_one_error(tmp_path, values):
    host = saved(tmp_path)
    notes = json.loads((tmp_path / "lorafit.json").read_text())
    (tmp_path / "lorafit.json").write_text(json.dumps(notes | values))
    with pytest.raises(AdapterError, match=f"{next(iter(values))}=.* can't be meant"):
        host.load(tmp_path, "b")


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    host = saved(tmp_path)
    edit(tmp_path, lambda t: next(iter(t.values())).fill_(torch.nan))
    with pytest.raises(AdapterError, match="aren't finite in fp32; the adapter is damaged"):
        host.load(tmp_path, "b")


def test_types_that_torch_cannot_compute_with_are_read(tmp_path):
    host = saved(tmp_path)

    def eight_bits(tensors):
        for key in tensors:
            tensors[key] = tensors[key].to(torch.float8_e4m3fn)

    edit(tmp_path, eight_bits)
    loaded = host.load(tmp_path, "b")
    path, layer = next(iter(loaded.items()))
    assert torch.equal(layer.a, host.adapters["a"][path].a.to(torch.float8_e4m3fn).float())


def test_numbers_that_fp32_cannot_hold_are_refused(tmp_path):
    host = saved(tmp_path)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    edit(tmp_path, lambda t: t.update({name: t[name].double() * 1e300}))
    with pytest.raises(AdapterError) as error:
        host.load(tmp_path, "b")
    assert str(tmp_path / "adapter_model.safetensors") in str(error.value) and name in str(error.value)
    assert "aren't finite in fp32" in str(error.value)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "target_modules"])
def test_patterns_that_never_end_are_refused(tmp_path, key):
    host = saved(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    for pattern in ("(.*)*(.*)*(.*)*y", "(a|ab)*y", "(.|.)*y", "(.{1,60}){1,60}y", ".*" * 12 + "y", "((?:a?){64}b)?y"):
        file.write_text(json.dumps(config | {key: pattern if key == "target_modules" else {pattern: 3}}))
        with pytest.raises(AdapterError) as error:
            host.load(tmp_path, "b")
        assert f"{key} has the pattern {pattern!r}" in str(error.value) and "\n" not in str(error.value)


def test_patterns_as_people_write_them_pass(tmp_path):
    host = saved(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    names = "|".join(rf"model\.layers\.{i}\.self_attn\.q_proj" for i in range(200))
    usual = [r".*\.layers\.[0-9]+\.(q|k)_proj", names, r"^model\.layers\.([0-9]|1[0-5])\..*(q|v)_proj$", r"h.\d{1,2}"]
    for number, pattern in enumerate([*usual, r"(?!.*vision).*\.(?:self_attn|mlp)\.(?:[a-z]+_proj|fc[12])"]):
        file.write_text(json.dumps(config | {"target_modules": pattern, "rank_pattern": {f"({pattern})x": 3}}))
        host.load(tmp_path, str(number))


def test_a_name_where_a_list_belongs_is_refused(tmp_path):
    host = saved(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": "lm_head"}))
    with pytest.raises(AdapterError, match=r"modules_to_save='lm_head' must be a list of names; write \[\"lm_head\"\]"):
        host.load(tmp_path, "b")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda"])
def test_a_start_that_changed_the_base_names_the_way_out(tmp_path, start):
    host = saved(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": start}))
    with pytest.raises(AdapterError, match=f"init_lora_weights={start}.*path_initial_model_for_weight_conversion="):
        host.load(tmp_path, "b")

"""Each format as its own program reads it: PEFT, transformers, MiniMind's way of adding pairs, the formula by hand from a
GGUF file. And what an export refuses. The real llama.cpp is in test_llama_cpp.py."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import safetensors.torch as st
import torch
from data_helpers import CHATML, STRIPS_THINK, WITH_BOS, tokenizer
from gguf_files import alternating
from peft import PeftModel
from tiny import ids, model, randomize
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafit.cli import main
from lorafit.data import Chat, Message
from lorafit.errors import AdapterError, LorafitError, ModelError
from lorafit.export import FORMATS, MERGED, base, export, gguf_adapter, gguf_model, ollama, portable
from lorafit.export.base import Job
from lorafit.host import Host
from lorafit.methods import METHODS, settings
from lorafit.model.load import load
from lorafit.model.quant import Quant
from lorafit.model.starts import Start
from lorafit.session import tokens_of
from lorafit.verbs.methods import described

ROOT = Path(__file__).parent.parent
SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
SQUARE = ["q_proj", "o_proj"]  # of these sizes
PROMPTS = [ids(9).tolist(), ids(5, seed=1).tolist()]
X = ids(13, seed=2)


def folder(tmp_path: Path, shape: str = "llama", template: str = CHATML, **changes) -> Path:
    place, tok = tmp_path / shape, tokenizer(template)
    sizes = {} if shape == "gpt2" else SIZES
    made = model(shape, scale=0.1, **{**sizes, "vocab_size": len(tok) + 8, **changes})
    made.to(torch.bfloat16).save_pretrained(place)
    tok.save_pretrained(place)
    return place


def opened(place: Path, **options) -> Host:
    return Host(load(str(place), precision="fp32", device="cpu", **options))


def trained(tmp_path: Path, place: Path, method: str = "lora", targets=SQUARE, **options) -> Path:
    """The files of an adapter that is far from its start, made on the codes that its method wants."""
    kind, own = METHODS[method], {name: default for name, (_, default) in settings(METHODS[method]).items()}
    quant = None
    if kind.needs_codes:
        quant = Quant("nf4", start=Start(method, own["r"], own[kind.codes], tuple(targets)))
    host = opened(place, quant=quant, tokens=options.pop("tokens", ()))
    randomize(host.add("a", method, targets, **options), 0.05)
    to = tmp_path / f"adapter-{method}-{len(list(tmp_path.iterdir()))}"
    to.mkdir()
    host.save("a", to)
    return to


def job(place: Path, adapter: Path, **options) -> Job:
    host = opened(place, streamed=True, tokens=tokens_of([adapter]))
    host.load(adapter, "a")
    return Job(host, "a", adapter, Chat.of(host.base.tokenizer), PROMPTS, **options)


@torch.no_grad()
def logits(place: Path, adapter: Path) -> torch.Tensor:
    host = opened(place, tokens=tokens_of([adapter]))
    host.load(adapter, "a")
    with host.route("a"):
        return host.logits(X, [len(X)])


@torch.no_grad()
def theirs(name: str, out: Path, place: Path) -> torch.Tensor:
    """The logits of what was exported, without any code of ours but for GGUF bases."""
    if name == "hf":
        return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()(input_ids=X[None]).logits[0]
    if name in ("gguf", "ollama"):
        return opened(out if name == "gguf" else out / ollama.MODEL).logits(X, [len(X)])
    plain = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    if name in ("peft", "peft-portable"):
        if (out / "tokenizer.json").is_file():  # with more tokens than the base has
            plain.resize_token_embeddings(max(plain.config.vocab_size, len(AutoTokenizer.from_pretrained(out))))
        return PeftModel.from_pretrained(plain, out).eval()(input_ids=X[None]).logits[0]
    if name == "minimind":
        with_pairs(plain, torch.load(out, weights_only=True))
    else:
        with_gguf(plain, out)
    return plain(input_ids=X[None]).logits[0]


def with_pairs(plain: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """A pair of one rank beside every square layer, added without a scale; all keys are used and none is missing."""
    (rank,) = {len(tensor) for key, tensor in state.items() if key.endswith("lora.A.weight")}
    for name, module in list(plain.named_modules()):
        if isinstance(module, nn.Linear) and module.in_features == module.out_features:
            pair = nn.Module()
            pair.A = nn.Linear(module.in_features, rank, bias=False)
            pair.B = nn.Linear(rank, module.out_features, bias=False)
            pair.load_state_dict(
                {k.removeprefix(f"{name}.lora."): state.pop(k) for k in list(state) if f"{name}.lora." in k}
            )
            module.register_forward_hook(lambda m, x, y, pair=pair: y + pair.B(pair.A(x[0])))
    assert not state


def with_gguf(plain: nn.Module, file: Path) -> None:
    """Every W of the model + (alpha / r or 1)·B·A, with llama.cpp's order of rows."""
    reader = gguf.GGUFReader(file)
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"
    alpha, arch = (reader.get_field(key).contents() for key in ("adapter.lora.alpha", "general.architecture"))
    given = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    c = plain.config
    for name, weight in plain.named_parameters():
        path, leaf = name.rpartition(".")[::2]
        kind = next(kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == arch)
        stored = f"{gguf.get_tensor_name_map(kind, c.num_hidden_layers).get_name(path)}.{leaf}"
        if f"{stored}.lora_a" not in given:
            continue
        a, b = given.pop(f"{stored}.lora_a"), given.pop(f"{stored}.lora_b")
        if stored == "token_embd.weight":
            weight += (a @ b.t()) * (alpha / a.shape[1] if alpha else 1)
            continue
        delta = (b @ a) * (alpha / len(a) if alpha else 1)
        heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(stored.split(".")[-2])
        if heads and arch == "llama":
            weight.copy_(unalternated(torch.tensor(alternating(weight.numpy(), heads)) + delta, heads))
        else:
            weight += delta
    assert not given


def unalternated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def agree(got: torch.Tensor, want: torch.Tensor, rounding: float = 1e-5) -> None:
    off = (got - want).abs().max() / want.abs().max()
    assert off < rounding, off


# --- every method, every format ----------------------------------------------------------------------------------------

ROUNDED = {
    "hf": 0.05,
    "gguf": 0.003,
    "ollama": 0.003,
}  # the fixture's base is bf16, merged folders are too; GGUF is f16
BESIDE = {  # what an adapter of any method may have beside it
    "whole=lm_head": ("lora", {"whole": ["lm_head"]}),
    "new_tokens": ("lora", {"tokens": ("<tool>", "</tool>")}),
}
WORDS = {"docs/export.md": ("method", "same", "merged"), "docs/zh/export.md": ("方法", "相同", "合并")}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory) -> dict[str, dict[str, bool]]:
    """By method and format: whether its own program computes the same; False where it is refused because it can be merged
    alone."""
    tmp_path = tmp_path_factory.mktemp("matrix")
    place, found = folder(tmp_path), {}
    rows = {method: (method, {}) for method, kind in METHODS.items() if "linear" in kind.kinds}
    for label, (method, options) in (rows | BESIDE).items():
        adapter, found[label] = trained(tmp_path, place, method, **options), {}
        want = logits(place, adapter)
        for name, format in FORMATS.items():
            out = tmp_path / f"{label}-{name}{format.suffix}"
            try:
                export(name, job(place, adapter), out)
            except AdapterError as error:
                assert "merge it with --format hf" in str(error) and name not in MERGED, error
                assert not out.exists()
                found[label][name] = False
                continue
            agree(theirs(name, out, place), want, ROUNDED.get(name, 1e-5))
            found[label][name] = True
    return found


def test_what_methods_tells_of_a_method_is_what_an_export_does(matrix):
    for method in METHODS:
        assert described(method)["formats"] == [name for name in FORMATS if matrix[method][name]], method


def test_methods_of_low_rank_are_the_same_everywhere_and_others_merged(matrix):
    assert all(all(matrix[method].values()) for method in ("lora", "pissa", "olora", "loftq"))
    assert [name for name, same in matrix["full"].items() if same] == list(MERGED)


@pytest.mark.parametrize("page", WORDS)
def test_the_documents_show_that(matrix, page):
    method, same, merged = WORDS[page]
    head = f"| {method} | " + " | ".join(f"`{name}`" for name in FORMATS) + " |"
    rows = [
        f"| `{method}` | " + " | ".join(same if row[name] else merged for name in FORMATS) + " |"
        for method, row in matrix.items()
    ]
    want = "\n".join([head, "|" + "---|" * (len(FORMATS) + 1), *rows])
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.search(r"<!-- matrix -->\n(.*?)\n<!-- /matrix -->", text, re.DOTALL)
    assert found and found[1] == want, f"put this between the markers of {page}:\n{want}"


def test_new_tokens_beside_ia3_go_where_the_documents_say(tmp_path):
    place = folder(tmp_path)
    adapter = trained(tmp_path, place, "ia3", tokens=("<tool>",))
    with pytest.raises(AdapterError, match="PEFT's IA3 has no place for new tokens; merge it with --format hf"):
        export("peft", job(place, adapter), tmp_path / "no")
    with pytest.raises(AdapterError, match="merge it with --format hf"):
        export("peft-portable", job(place, adapter), tmp_path / "no")
    export("hf", job(place, adapter), tmp_path / "merged")
    agree(theirs("hf", tmp_path / "merged", place), logits(place, adapter), ROUNDED["hf"])


# --- adapters ----------------------------------------------------------------------------------------------------------

PATTERNS = dict(r=4, alpha=6.0, rslora=True, rank_pattern={"k_proj": 2, "*.1.*": 7}, alpha_pattern={"q_proj": 3.0})


@pytest.mark.parametrize("shape", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", ["peft-portable", "gguf-adapter"])
def test_scales_and_ranks_of_their_own_come_out_right(tmp_path, shape, name):
    place = folder(tmp_path, shape)
    targets = ["q_proj", "k_proj", "down_proj"] + ([] if name == "peft-portable" else ["embed_tokens", "lm_head"])
    adapter = trained(tmp_path, place, targets=targets, **PATTERNS)
    out = tmp_path / f"out{FORMATS[name].suffix}"
    done = export(name, job(place, adapter), out)
    agree(theirs(name, out, place), logits(place, adapter))
    assert done.figures["largest"] <= done.figures["tolerance"]


def test_a_portable_adapter_leaves_nothing_to_its_reader(tmp_path):
    place = folder(tmp_path)
    adapter = trained(
        tmp_path, place, targets=["*.0.*.q_proj", "gate_proj"], **{**PATTERNS, "rank_pattern": {"q_proj": 9}}
    )
    done = export("peft-portable", job(place, adapter), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 9 and "--max-lora-rank 16" in done.use
    assert not any(
        config[key] for key in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save")
    )
    assert config["bias"] == "none" and config["init_lora_weights"] is True
    assert sorted(config["target_modules"]) == ["gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    assert "7 layers that it doesn't touch" in done.notes[0]
    host = opened(place)
    assert {len(layer.a) for _, layer in host.load(tmp_path / "out", "a").items()} == {9}


def test_what_no_reader_takes_is_refused_with_the_way_out(tmp_path):
    cases = [
        ("mixtral", ["*.experts.*"], {}, "peft-portable", "a layer of experts"),
        ("llama", ["embed_tokens"], {}, "peft-portable", "the embedding"),
        ("llama", ["lm_head"], {}, "peft-portable", "the output head"),
        ("gpt2", ["c_fc"], {}, "peft-portable", "a transposed linear layer"),
        (
            "qwen2",
            ["embed_tokens"],
            {"tie_word_embeddings": True},
            "gguf-adapter",
            "embedding that is the output head too",
        ),
        (
            "llama",
            ["up_proj"],
            {},
            "minimind",
            r"up_proj is \(96, 64\) \(2 such layers\); train with targets=o_proj,q_proj",
        ),
    ]
    for number, (shape, targets, changes, name, why) in enumerate(cases):
        here = tmp_path / str(number)
        place = folder(here, shape, **changes)
        adapter = trained(here, place, targets=targets)
        with pytest.raises(AdapterError, match=why) as error:
            export(name, job(place, adapter), here / f"out{FORMATS[name].suffix}")
        assert "merge" in str(error.value) and len(list(here.iterdir())) == 2
    wide = trained(tmp_path / "1", tmp_path / "1" / "llama", targets=["q_proj"], r=513)
    with pytest.raises(AdapterError, match="rank 513, and vLLM takes 512"):
        export("peft-portable", job(tmp_path / "1" / "llama", wide), tmp_path / "out")


@pytest.mark.parametrize("name", ["gguf", "gguf-adapter"])
def test_an_architecture_that_is_not_written_names_the_other_way(tmp_path, name):
    place = folder(tmp_path, "gpt2")
    with pytest.raises(
        ModelError, match=r"'gpt2' .*--format hf, and convert it with llama.cpp's convert_hf_to_gguf.py"
    ):
        export(name, job(place, trained(tmp_path, place, targets=["c_fc"])), tmp_path / "out.gguf")


# --- comparisons that fail leave nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["peft-portable", "gguf-adapter", "gguf", "ollama", "minimind"])
def test_an_export_that_went_wrong_is_refused(tmp_path, monkeypatch, name):
    place = folder(tmp_path)
    adapter, out = trained(tmp_path, place), tmp_path / f"out{FORMATS[name].suffix}"
    given, before = job(place, adapter), set(tmp_path.iterdir())
    if name == "peft-portable":
        monkeypatch.setattr(portable, "as_lora", lambda pairs, *rest: base.as_lora(doubled(pairs), *rest))
    elif name == "minimind":
        monkeypatch.setattr(
            torch, "save", lambda state, to, save=torch.save: save({k: v * 1.01 for k, v in state.items()}, to)
        )
    else:
        module = gguf_adapter if name == "gguf-adapter" else gguf_model
        monkeypatch.setattr(module, "alternating", lambda weight, heads: weight)
    with pytest.raises(LorafitError, match=r"isn't (the same|what was written)") as error:
        export(name, given, out)
    assert error.value.exit_code == 1 and set(tmp_path.iterdir()) == before


def doubled(pairs):
    return {path: (a, b * 2) for path, (a, b) in pairs.items()}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("by", [1e13, 1e25, 1e38])
def test_numbers_too_large_are_the_users_to_mend(tmp_path, name, by):
    """Factors that are finite, whose product isn't, or moves the logits beyond any number; at last B times its scale."""
    place = folder(tmp_path)
    if name == "minimind" and by == 1e13:
        return  # its factors are compared, not logits, and their product is finite
    adapter = trained(tmp_path, place, alpha=1e3)
    tensors = st.load_file(adapter / "adapter_model.safetensors")
    st.save_file({key: (t.sign() * by) for key, t in tensors.items()}, adapter / "adapter_model.safetensors")
    out = tmp_path / f"out{FORMATS[name].suffix}"
    with pytest.raises(AdapterError, match=r"too large|isn't finite") as error:
        export(name, job(place, adapter), out)
    assert "\n" not in str(error.value) and ".tmp" not in str(error.value) and not out.exists()


def test_folders_above_a_refused_export_are_not_left(tmp_path):
    place = folder(tmp_path)
    adapter = trained(tmp_path, place, "dora")
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for out in (tmp_path / "new" / "deeper" / "out", tmp_path / "there" / "new" / "out"):
        with pytest.raises(AdapterError):
            export("peft-portable", job(place, adapter), out)
        with pytest.raises(AdapterError):
            export("gguf-adapter", job(place, adapter), out.with_suffix(".gguf"))
    assert sorted(tmp_path.rglob("*")) == before
    export("peft", job(place, adapter), tmp_path / "new" / "deeper" / "out")
    assert (tmp_path / "new" / "deeper" / "out" / "adapter_config.json").is_file()


def test_a_merged_file_that_forgets_a_layer_is_refused(tmp_path, monkeypatch):
    place = folder(tmp_path)
    given = job(place, trained(tmp_path, place))
    plain = gguf_model.write_model
    monkeypatch.setattr(gguf_model, "write_model", lambda host, spec, *rest: plain(host, None, *rest))
    with pytest.raises(LorafitError, match="isn't what was written"):
        export("gguf", given, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_a_mistake_in_a_merged_file_is_refused_however_much_rounding_does(tmp_path, monkeypatch, kind):
    place = folder(tmp_path)
    adapter = trained(tmp_path, place, targets=["all-linear"])
    done = export("gguf", job(place, adapter, type=kind), tmp_path / "right.gguf")
    exact = done.figures["exact"]
    assert exact["formula"] <= exact["allowed"] and exact["folder"] <= exact["allowed"] < 0.1 * done.figures["largest"]
    plain = Host.merged_weight

    def careless(host, site, spec):
        w = site.weight().float()
        return w + (1.01 if site.path.endswith("1.mlp.up_proj") else 1) * (plain(host, site, spec) - w)

    monkeypatch.setattr(Host, "merged_weight", careless)
    with pytest.raises(LorafitError, match="before any rounding its logits are off by"):
        export("gguf", job(place, adapter, type=kind), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists() and not list(tmp_path.glob(".*tmp*"))


# --- merged GGUF -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0"])
@pytest.mark.parametrize("shape", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_merged_file_is_the_same_model(tmp_path, shape, kind):
    place = folder(tmp_path, shape, **({"sliding_window": None} if shape == "mistral" else {}))
    adapter = trained(tmp_path, place, targets=["all"])
    done = export("gguf", job(place, adapter, type=kind), tmp_path / "out.gguf")
    agree(
        theirs("gguf", tmp_path / "out.gguf", place),
        logits(place, adapter),
        {"f32": 1e-5, "q8_0": 0.05, "q4_0": 0.8}[kind],
    )
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == kind.upper() and types["output_norm.weight"] == "F32"
    assert types["token_embd.weight"] == types["output.weight"] == ("Q8_0" if kind == "q4_0" else kind.upper())
    assert done.figures["rounding"] < {"f32": 1e-6, "q8_0": 0.01, "q4_0": 0.13}[kind]
    assert bool(done.notes) == (kind != "f32")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_positions_are_written(tmp_path, rope):
    place = folder(tmp_path, rope_parameters={"rope_theta": 10000.0, **rope}, tie_word_embeddings=True)
    adapter = trained(tmp_path, place)
    export("gguf", job(place, adapter, type="f32"), tmp_path / "out.gguf")
    agree(theirs("gguf", tmp_path / "out.gguf", place), logits(place, adapter))


def test_positions_scaled_otherwise_are_refused(tmp_path):
    place = folder(tmp_path, rope_parameters={"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ModelError, match="positions scaled by 'dynamic'"):
        export("gguf", job(place, trained(tmp_path, place)), tmp_path / "out.gguf")


def test_a_window_bounds_the_context(tmp_path):
    place = folder(tmp_path, "mistral")  # a window of 4 tokens
    done = export("gguf", job(place, trained(tmp_path, place)), tmp_path / "out.gguf")
    assert "a context of 4" in done.notes[0]
    assert gguf.GGUFReader(tmp_path / "out.gguf").get_field("llama.context_length").contents() == 4


def test_of_a_gguf_base_the_metadata_is_taken_over(tmp_path):
    first = folder(tmp_path)
    export("gguf", job(first, trained(tmp_path, first)), tmp_path / "base.gguf")
    adapter = trained(tmp_path, tmp_path / "base.gguf")
    given = job(tmp_path / "base.gguf", adapter, type="f32")
    given.chat = replace(given.chat, template=WITH_BOS)
    export("gguf", given, tmp_path / "out.gguf")
    agree(theirs("gguf", tmp_path / "out.gguf", first), logits(tmp_path / "base.gguf", adapter))
    old, new = (gguf.GGUFReader(tmp_path / name).fields for name in ("base.gguf", "out.gguf"))
    assert list(old) != [] and set(old) == set(new)
    changed = {key for key in old if not key.startswith("GGUF.") and old[key].contents() != new[key].contents()}
    assert changed == {"general.file_type", "tokenizer.chat_template"}


def test_a_tokenizer_without_a_name_is_refused(tmp_path):
    place = folder(tmp_path)
    words = json.loads((place / "tokenizer.json").read_text())
    words["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, words["pre_tokenizer"]]}
    (place / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ModelError, match="no name here for how this tokenizer cuts words"):
        export("gguf", job(place, trained(tmp_path, place)), tmp_path / "out.gguf")


def test_more_tokens_than_rows_are_refused_and_rows_without_a_token_are_named(tmp_path):
    few = folder(tmp_path / "few", vocab_size=300)
    given = job(few, trained(tmp_path, few))
    with pytest.raises(ModelError, match="and the embedding 300 rows"):
        export("gguf", given, tmp_path / "out.gguf")
    many = folder(tmp_path / "many", vocab_size=450)
    export("gguf", job(many, trained(tmp_path, many)), tmp_path / "out.gguf")
    assert gguf.GGUFReader(tmp_path / "out.gguf").get_field("tokenizer.ggml.tokens").contents()[449] == "[PAD449]"


# --- Ollama ------------------------------------------------------------------------------------------------------------

DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe {{ kind }}.<|im_end|>\\n' }}{% endif %}" + CHATML
)


def go(template: str, messages: list[Message]) -> str:
    """A Go template of the few words that are used."""
    before, _, rest = template.partition("{{ range .Messages }}")
    inside, _, after = rest.rpartition("{{ end }}{{ end }}")
    cases = re.findall(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\Z)', inside, re.DOTALL)
    made = "".join(dict(cases)[m.role].replace("{{ .Content }}", m.content) for m in messages)
    return (before + made + after).replace('{{ "{{" }}', "{{")


@pytest.mark.parametrize("template, system", [(CHATML, None), (DEFAULT_SYSTEM, "Be {{ kind }}."), (WITH_BOS, None)])
def test_a_template_of_pieces_becomes_one_of_go(template, system):
    chat = Chat.of(tokenizer(template, adds_bos=template == WITH_BOS))
    pieces = ollama.pieces_of(chat)
    assert pieces is not None and pieces.system == system
    text = ollama.modelfile(chat, pieces)
    made = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    turns = [Message("system", "be brief"), Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    bos = "<s>" if template == WITH_BOS else ""  # which llama.cpp puts in front itself
    assert bos + go(made, turns) == chat.render(turns, generation=True)
    assert "FROM ./model.gguf" in text and 'PARAMETER stop "<|im_end|>"' in text
    assert (f'SYSTEM """{system}"""' in text) == (system is not None)


def test_the_system_prompt_trained_with_is_in_the_modelfile():
    chat = Chat.of(tokenizer(DEFAULT_SYSTEM), system="You are a pirate.")
    assert 'SYSTEM """You are a pirate."""' in ollama.modelfile(chat, ollama.pieces_of(chat))


COUNTS = "{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}"
HIDES_SYSTEM = "{% for m in messages if m.role != 'system' %}" + CHATML.partition("%}")[2]


@pytest.mark.parametrize("template", [COUNTS, HIDES_SYSTEM, STRIPS_THINK])
def test_a_template_without_pieces_is_left_out(template):
    chat = Chat.of(tokenizer(template))
    assert ollama.pieces_of(chat) is None and "TEMPLATE" not in ollama.modelfile(chat, None)


# --- the verb ----------------------------------------------------------------------------------------------------------


def test_the_verb_says_what_it_compared(tmp_path, capsys):
    place = folder(tmp_path)
    adapter = trained(tmp_path, place, targets=["all-linear"])
    assert main(["export", str(adapter), str(tmp_path / "p"), "--format", "peft-portable", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["format"] == "peft-portable" and done["largest"] <= done["tolerance"] and "read back" in done["checked"]
    assert done["use"].startswith("vllm serve") and str(tmp_path / "p") in done["use"]
    assert main(["export", str(adapter), str(tmp_path / "m.gguf"), "--format", "gguf", "--type", "q8_0"]) == 0
    text = capsys.readouterr().out
    assert "llama-cli -m" in text and "rounding all weights to q8_0" in text and "same best token" in text


def test_the_command_to_go_on_with_is_quoted(tmp_path, capsys):
    place, odd = folder(tmp_path), tmp_path / 'it\'s a "run" OUT'
    trained(tmp_path, place).rename(odd)
    for name, said in (("ollama", f"cd {shlex.quote(str(tmp_path / 'o o'))} && ollama create"), ("peft", "'OUT'")):
        out = tmp_path / f"{name[0]} {name[0]}"
        assert main(["export", str(odd), str(out), "--format", name]) == 0
        last = capsys.readouterr().out.splitlines()[-1].strip()
        assert said.replace("'OUT'", repr(str(out))) in last
        assert name == "peft" or shlex.split(last)[5] == odd.name.lower()


def test_the_base_alone_as_gguf(tmp_path, capsys):
    place = folder(tmp_path)
    words = ["--format", "gguf", "--model", str(place)]
    for kind in ("f32", "q8_0"):
        assert main(["export", "base", str(tmp_path / f"{kind}.gguf"), *words, "--type", kind, "--json"]) == 0
        done = json.loads(capsys.readouterr().out)
        assert "effect" not in done and not any("adapter" in note for note in done["notes"])
    plain = opened(place)
    with torch.no_grad():
        agree(theirs("gguf", tmp_path / "f32.gguf", place), plain.logits(X, [len(X)]))
    adapter = trained(tmp_path, place)
    assert main(["export", str(adapter), str(tmp_path / "a.gguf"), "--format", "gguf-adapter"]) == 0
    use = capsys.readouterr().out.splitlines()[-1]
    assert f"lorafit export base base.gguf --format gguf --model {place} && llama-cli -m base.gguf --lora" in use
    adapter = trained(tmp_path, tmp_path / "f32.gguf")
    assert main(["export", str(adapter), str(tmp_path / "b.gguf"), "--format", "gguf-adapter"]) == 0
    assert f"llama-cli -m {tmp_path / 'f32.gguf'} --lora" in capsys.readouterr().out.splitlines()[-1]
    before = set(tmp_path.iterdir())
    for wrong in (["--format", "peft"], ["--format", "hf"], [*words, "--into", "original"]):
        assert main(["export", "base", str(tmp_path / "no.gguf"), *wrong]) == 2
    assert main(["export", "base", str(tmp_path / "no.gguf"), "--format", "gguf", "--model", "./nowhere"]) == 2
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("into", [[], ["--into", "dequantised"]])
def test_what_a_quantised_base_was_merged_into_is_said(tmp_path, capsys, into):
    place = folder(tmp_path)
    adapter = trained(tmp_path, place, "loftq", SQUARE)
    for name in ("hf", "gguf", "peft"):
        words = ["export", str(adapter), str(tmp_path / f"o-{name}{FORMATS[name].suffix}"), "--format", name, "--json"]
        code = main(words + (into if name in MERGED else []))
        done = json.loads(capsys.readouterr().out)
        assert code == 0 and "trained on a base in nf4" in done["notes"][-1]
        if name in MERGED:
            assert ("the weights it was trained on" in done["notes"][-1]) == bool(into)
            assert ("as_trained" in done) == (name == "hf" and not into)


def test_bad_words_are_one_line(tmp_path, capsys):
    place = folder(tmp_path)
    adapter = str(trained(tmp_path, place))
    other = folder(tmp_path / "other", tie_word_embeddings=True)
    pickled = tmp_path / "pickled"
    shutil.copytree(adapter, pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("")
    (tmp_path / "there.gguf").write_text("")
    free, file = str(tmp_path / "new"), str(tmp_path / "new.gguf")
    cases = [
        ([adapter, free, "--format", "ggfu"], "unknown format 'ggfu'; did you mean 'gguf'?"),
        ([adapter, free, "--format", "gguf"], "--format gguf writes one file; name it new.gguf"),
        ([adapter, str(tmp_path / "there"), "--format", "peft"], "exists already and is not empty"),
        ([adapter, str(tmp_path / "there.gguf"), "--format", "gguf"], "exists already; name another place"),
        ([adapter, str(tmp_path / "there.gguf"), "--format", "hf"], "exists already; name another place"),
        ([adapter, free, "--format", "hf", "--type", "q8_0"], "--type is for --format gguf and ollama"),
        ([adapter, free, "--format", "peft", "--into", "original"], "--into is for an adapter that is merged"),
        ([adapter, free, "--format", "peft", "--model", str(other)], "was made for another base"),
        ([str(pickled), free, "--format", "peft"], "adapter_model.bin is a pickle, which lorafit doesn't read"),
        ([str(tmp_path / "none"), file, "--format", "gguf"], "is neither a run nor an adapter"),
    ]
    before = set(tmp_path.iterdir())
    for words, said in cases:
        assert main(["export", *words]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("lorafit: ") and said in error, error
    assert set(tmp_path.iterdir()) == before


def test_a_bias_that_an_adapter_changes_is_in_the_gguf(tmp_path, capsys):
    place = folder(tmp_path / "base", "qwen2")
    host = Host(load(str(place), precision="fp32", device="cpu"))
    with torch.no_grad():
        for p in host.add("a", "ia3").parameters():
            p.add_(0.5)
    biases = [n for n, _ in host.base.model.named_parameters() if n.endswith("k_proj.bias")]
    found = dict(gguf_model.tensors(host, "a"))
    assert biases
    for name in biases:
        assert torch.allclose(found[name], 1.5 * host.base.model.get_parameter(name).float())
    (tmp_path / "a").mkdir()
    host.save("a", tmp_path / "a")
    words = ["--model", str(place), "--type", "f32", "--json"]
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "a.gguf"), "--format", "gguf", *words]) == 0
    assert gguf.GGUFReader(tmp_path / "a.gguf").get_field("general.architecture").contents() == "qwen2"
    assert (
        main(["adapter", "compress", str(tmp_path / "a"), str(tmp_path / "b"), "--rank", "4", "--model", str(place)])
        == 2
    )
    assert "changes the bias of" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_a_system_prompt_cannot_end_its_quotes():
    chat = Chat(tokenizer(CHATML), CHATML, (1,), 'a"""\nADAPTER /etc/x\nSYSTEM """b', False, None)
    with pytest.raises(AdapterError, match="system prompt holds"):
        ollama.modelfile(chat, None)

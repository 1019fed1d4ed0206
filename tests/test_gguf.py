"""A GGUF file is a base like a folder: the same numbers, codes, runs and merges as from safetensors; what isn't understood is
refused in one line."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from data_helpers import CHATML, tokenizer
from gguf import GGMLQuantizationType as Type
from gguf import quants
from gguf_files import SIZES, alternating, made, write
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import randomize
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafit import cli, fit
from lorafit.data import Chat
from lorafit.errors import ModelError
from lorafit.export import peft as export_peft
from lorafit.export.base import Job
from lorafit.export.merge import merge
from lorafit.host import Host
from lorafit.log import Terminal
from lorafit.model import embedded, quant_load
from lorafit.model import gguf as reading
from lorafit.model.gguf import GgufWeights, can_read, read_header
from lorafit.model.load import context_of, load, load_tokenizer, locate, stop_ids, stored_bytes, stored_dtype
from lorafit.model.quant import Quant

QUIET = Terminal(quiet=True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own; the compiled kernels stay where they are."""
    from lorafit.native import build

    build.library()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def loaded(path: Path, precision: str = "fp32", **options):
    return load(str(path), precision=precision, device="cpu", **options)


def same_weights(model, other) -> None:
    want, got = other.state_dict(), model.state_dict()
    assert set(got) == set(want)
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


X = torch.arange(13)[None] * 7 % 61


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("shape", ["llama", "qwen2", "qwen3", "gpt2"])
def test_the_model_is_the_one_of_the_same_numbers(tmp_path, shape, kind):
    tiny = made(shape, kind)
    base = loaded(write(tmp_path / "x.gguf", tiny, kind))
    same_weights(base.model, tiny)
    with torch.no_grad():
        want, got = tiny(X).logits, base.model(X).logits
    assert (got - want).abs().max() < 1e-6 * want.abs().max()
    assert base.packs and base.plain_head


@pytest.mark.parametrize(
    "shape, changes",
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": None}),
        ("qwen3", {"head_dim": 32}),
        ("gpt2", {"tie_word_embeddings": True}),
        ("gemma2", {}),
        ("gemma3", {}),
    ],
)
def test_variants(tmp_path, shape, changes):
    tiny = made(shape, **changes)
    base = loaded(write(tmp_path / "x.gguf", tiny))
    if shape.startswith("gemma"):  # a norm's weight has 1 added in the file, and loses its last bits to it
        with torch.no_grad():
            for name, p in tiny.named_parameters():
                p.copy_((p + 1) - 1 if "norm" in name else p)
    same_weights(base.model, tiny)
    with torch.no_grad():
        assert (base.model(X).logits - tiny(X).logits).abs().max() < 1e-6
    assert (base.head.weight is base.model.get_input_embeddings().weight) == tiny.config.tie_word_embeddings


def test_bf16_rounds_each_number_once(tmp_path):
    tiny = made("llama", "Q4_1")
    same_weights(loaded(write(tmp_path / "x.gguf", tiny, "Q4_1"), "bf16").model, tiny.to(torch.bfloat16))


def test_pieces_are_the_whole(tmp_path, monkeypatch):
    tiny = made("llama", "Q8_0")
    monkeypatch.setattr(reading, "CHUNK", 3 * 64)
    same_weights(loaded(write(tmp_path / "x.gguf", tiny, "Q8_0")).model, tiny)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_scaled_positions(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    said = {
        "yarn": {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16, "rope.scaling.type": "yarn"},
        "linear": {"rope.scaling.factor": 2.0, "rope.scaling.type": "linear"},
    }
    sizes = dict(head_dim=32, num_attention_heads=2)  # enough frequencies for all three parts of Llama 3's scale
    plain = made("llama", **sizes, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    for parameters in (yarn, linear, LLAMA3):
        tiny = made("llama", **sizes, rope_parameters=parameters)
        more = said.get(parameters["rope_type"])
        if more is None:
            divided = plain.model.rotary_emb.inv_freq / tiny.model.rotary_emb.inv_freq
            assert divided[0] == 1 and divided[-1] == 32 and ((divided > 1.01) & (divided < 31)).any()
            more = {"rope_freqs.weight": divided.numpy()}
        base = loaded(write(tmp_path / f"{parameters['rope_type']}.gguf", tiny, more=more))
        found = base.model.model.rotary_emb
        assert torch.allclose(found.inv_freq, tiny.model.rotary_emb.inv_freq, rtol=1e-6)
        assert found.attention_scaling == pytest.approx(tiny.model.rotary_emb.attention_scaling)
        with torch.no_grad():
            assert (base.model(X).logits - tiny(X).logits).abs().max() < 1e-5


def test_tokenizer_template_and_stops_come_along(tmp_path):
    path = locate(str(write(tmp_path / "x.gguf", made("llama"))))
    found, want = load_tokenizer(path), tokenizer(CHATML)
    assert found.chat_template == CHATML
    for text in ("the cat sat\n\n  on 12 mats, né?", "<|im_start|>user\none<|im_end|>\n"):
        assert found(text)["input_ids"] == want(text)["input_ids"]
        assert found.decode(found(text)["input_ids"]) == text
    assert stop_ids(path) == [want.eos_token_id, want.convert_tokens_to_ids("<|im_end|>")]
    assert context_of(path) == 64


def test_no_weights_are_copied(tmp_path):
    file = write(tmp_path / "x.gguf", made("llama", "Q8_0"), "Q8_0")
    path = locate(str(file))
    assert {p.name for p in path.iterdir()} == {
        *("config.json", "generation_config.json", "source.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert stored_bytes(path) == file.stat().st_size and stored_dtype(path) is torch.bfloat16
    assert stored_dtype(locate(str(write(tmp_path / "h.gguf", made("llama", "F16"), "F16")))) is torch.float16
    assert stored_dtype(locate(str(write(tmp_path / "f.gguf", made("llama"))))) is torch.float32


# --- blocks that can't be written with the gguf package ----------------------------------------------------------------


def random_blocks(kind: str, rows: int, width: int) -> np.ndarray:
    """Valid blocks: any bytes but for the fp16 scales, which are small and finite."""
    block, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    generator = np.random.default_rng(3)
    data = generator.integers(0, 256, (rows * width // block, size), dtype=np.uint8)
    for at in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,), "IQ4_XS": (0,)}[kind]:
        scales = generator.uniform(0.001, 0.01, len(data)).astype(np.float16)
        data[:, at : at + 2] = scales[:, None].view(np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_XS"])
def test_blocks_of_256(tmp_path, kind):
    tiny = made("llama", hidden_size=256, intermediate_size=256, num_attention_heads=4)
    q, down = "blk.0.attn_q.weight", "blk.1.ffn_down.weight"
    file = tmp_path / "x.gguf"
    blocks = {q: random_blocks(kind, 256, 256), down: random_blocks(kind, 256, 256)}
    write(file, tiny, more={name: (kind, data) for name, data in blocks.items()})
    weights = GgufWeights(locate(str(file)))
    want = quants.dequantize(blocks[down], Type[kind])
    assert want.std() > 0.01
    assert torch.equal(weights.read("model.layers.1.mlp.down_proj.weight"), torch.from_numpy(want))
    rows = alternating(np.arange(256), 4)  # where each row of the model's lies in the file
    want = quants.dequantize(blocks[q], Type[kind])
    got = weights.read("model.layers.0.self_attn.q_proj.weight").numpy()
    assert np.array_equal(got[rows], want)
    half = weights.read("model.layers.0.self_attn.q_proj.weight", torch.bfloat16)
    assert torch.equal(half, torch.from_numpy(got).bfloat16())


def test_q4_k_and_q6_k_by_their_formulas():
    """ggml-quants.c, one number of each, written out."""
    b = random_blocks("Q4_K", 1, 256)[0]
    d, dmin = (float(x) for x in b[:4].view(np.float16))
    at = (
        5 * 32 + 7
    )  # in the sixth of eight sub-blocks: scale and minimum are split over two bytes, the code is a high nibble
    scale = (b[4 + 9] & 0x0F) | ((b[4 + 1] >> 6) << 4)
    least = (b[4 + 9] >> 4) | ((b[4 + 5] >> 6) << 4)
    code = b[16 + 2 * 32 + 7] >> 4
    want = np.float32(np.float32(d) * scale) * code - np.float32(dmin) * least
    got = reading._dequantised(b, "Q4_K", (1, 256), None, None)[0, at].item()
    assert got == pytest.approx(float(want), rel=1e-6)
    b = random_blocks("Q6_K", 1, 256)[0]
    d = float(b[208:210].view(np.float16)[0])
    at = 128 + 2 * 32 + 20  # second half, its third group of 32, second scale of the group
    low = b[64 + 20] >> 4
    high = (b[128 + 32 + 20] >> 4) & 3
    scale = b[192:208].view(np.int8)[8 + 5]
    want = d * int(scale) * (int(low | (high << 4)) - 32)
    got = reading._dequantised(b, "Q6_K", (1, 256), None, None)[0, at].item()
    assert got == pytest.approx(want, rel=1e-6)


# --- the real file -----------------------------------------------------------------------------------------------------


def test_the_embedded_file_is_the_converted_folder_bit_for_bit(monkeypatch):
    weights = GgufWeights(locate(str(embedded.find())))
    monkeypatch.delenv("XDG_CACHE_HOME")  # where it is converted already, which takes half a minute
    converted = embedded.folder()
    (file,) = converted.glob("*.safetensors")  # by transformers
    with safe_open(file, framework="pt") as tensors:
        assert set(weights.shapes) == set(tensors.keys())
        for name in tensors.keys():  # noqa: SIM118 (not a dict)
            assert torch.equal(weights.read(name, torch.bfloat16), tensors.get_tensor(name)), name
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (weights.folder, converted))
    assert {k: v for k, v in ours.items() if k in theirs} == {k: v for k, v in theirs.items() if k in ours}
    found, want = load_tokenizer(weights.folder), load_tokenizer(converted)
    text = "Hello, wörld! 12345\n\n\tdef f(x):  return x<|im_end|>"
    assert found(text)["input_ids"] == want(text)["input_ids"] and found.chat_template == want.chat_template


# --- quantised, trained, merged ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A GGUF file in Q8_0, and a folder of the same numbers in fp32."""
    place = tmp_path_factory.mktemp("gguf")
    tiny = made("llama", "Q8_0", max_position_embeddings=256)
    tiny.save_pretrained(place / "folder")
    tokenizer(CHATML).save_pretrained(place / "folder")
    return write(place / "tiny.gguf", tiny, "Q8_0"), place / "folder"


@pytest.mark.parametrize("quant", [Quant("nf4"), Quant("fp4", double=False), Quant("int8")], ids=str)
def test_codes_are_those_of_the_same_numbers(pair, quant):
    file, folder = pair
    ours, theirs = loaded(file, quant=quant), loaded(folder, quant=quant)
    same_weights(ours.model, theirs.model)
    assert ours.fingerprint != theirs.fingerprint
    place = quant_load.folder(locate(str(file)), ours.fingerprint, quant) / quant_load.FILE
    before = place.stat().st_mtime_ns
    loaded(file, quant=quant)
    assert place.stat().st_mtime_ns == before  # found again


@pytest.mark.parametrize("quant", [None, Quant("nf4")], ids=str)
def test_streamed_it_is_merged_as_the_folder_is(pair, tmp_path, quant):
    found = []
    for number, base in enumerate(pair):
        host = Host(loaded(base, quant=quant, streamed=True))
        assert host.base.streamed
        randomize(host.add("a", r=3), 0.1)
        assert merge(host, "a", tmp_path / str(number), [[1, 2, 3]], dtype=torch.float32).holds
        found.append(load_file(tmp_path / str(number) / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def config(file, data, out, **changes):
    given = {
        "model": str(file),
        "out": str(out),
        "precision": "fp32",
        "steps": "2",
        "batch_tokens": "200",
        "samples": "1",
    }
    return fit.read_config(str(data), {**given, **changes})


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_training_is_that_on_the_folder(pair, data_file, tmp_path, quant):
    runs = [fit.fit(config(model, data_file, tmp_path / model.name, quant=quant), QUIET) for model in pair]
    ours, theirs = (json.loads((run.folder / "summary.json").read_text()) for run in runs)
    assert ours["held_out_loss_after"] == theirs["held_out_loss_after"] < ours["held_out_loss_before"]
    assert ours["base"] == str(pair[0]) and ours["base_bytes"] == pair[0].stat().st_size
    adapter = runs[0].adapter
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(pair[0])
    notes = json.loads((adapter / "lorafit.json").read_text())
    assert notes["base"] == str(pair[0]) and notes["fingerprint"] == ours["base_fingerprint"]


def done(words: list[str]) -> None:
    assert not cli.main(words), words


def test_every_verb_takes_the_file(pair, data_file, tmp_path, capsys, monkeypatch):
    file = pair[0]
    monkeypatch.chdir(file.parent)
    out = str(tmp_path / "run")
    done(["check", str(data_file), "--model", file.name])
    done(["plan", str(data_file), "--model", file.name])
    words = ["steps=2", "batch_tokens=200", "samples=0", "precision=fp32", "lr=0.02", "checkpoint_every=1"]
    done(["train", str(data_file), "--model", file.name, "--out", out, *words])
    monkeypatch.chdir(tmp_path)  # the run knows where its base is
    done(["train", "--resume", "--force", "--out", out, "steps=3"])
    done(["eval", out, str(data_file), "--precision", "fp32"])
    done(["merge", out, str(tmp_path / "merged"), "--dtype", "fp32"])
    assert "same best token at 100.0%" in capsys.readouterr().out
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == CHATML
    plain = AutoModelForCausalLM.from_pretrained(pair[1])
    with torch.no_grad():
        assert (theirs(X).logits - plain(X).logits).abs().max() > 1e-3


def test_peft_opens_an_adapter_on_the_file_as_the_docs_say(pair, tmp_path):
    """With the words of the docs and of `lorafit export`; by the file's name PEFT can't."""
    peft = pytest.importorskip("peft", reason="peft isn't installed")
    host = Host(loaded(pair[0]))
    randomize(host.add("a", r=3), 0.1)
    (tmp_path / "adapter").mkdir()
    host.save("a", tmp_path / "adapter")
    again = Host(loaded(pair[0], streamed=True))
    again.load(tmp_path / "adapter", "a")
    (tmp_path / "out").mkdir()
    job = Job(again, "a", tmp_path / "adapter", Chat.of(again.base.tokenizer), [[1, 2, 3]])
    use = export_peft.write(job, tmp_path / "out").use
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "PeftModel": peft.PeftModel}
    opening, _, last = use.replace("OUT", str(tmp_path / "out")).rpartition("; ")
    exec(opening, names)
    theirs = eval(last, names)
    with host.route("a"), torch.no_grad():
        off = host.base.logits(X[0], [len(X[0])]) - theirs(X).logits[0]
    assert off.abs().max() < 1e-4
    with pytest.raises(OSError):
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")


# --- what is refused ---------------------------------------------------------------------------------------------------


def refused(file: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as error:
        locate(str(file))
    assert "\n" not in str(error.value)
    folder = Path(str(file)).parent / "cache" / "lorafit" / "gguf"
    assert not folder.exists() or not any(folder.iterdir())


def test_files_that_are_none(tmp_path):
    (tmp_path / "text.gguf").write_text("hello")
    refused(tmp_path / "text.gguf", r"text\.gguf isn't a GGUF file: it doesn't begin with the letters GGUF$")
    refused(
        tmp_path / "org" / "none.gguf",
        r"there is no file .*none\.gguf; if it has moved, say where it is now with --model$",
    )
    (tmp_path / "x.bin").write_text("hello")
    refused(tmp_path / "x.bin", "takes a Hugging Face folder .* or a GGUF file")
    whole = write(tmp_path / "x.gguf", made("llama")).read_bytes()
    short = tmp_path / "short.gguf"
    for length in (4, 20, 3000):
        short.write_bytes(whole[:length])
        refused(short, r"short\.gguf is damaged or cut off: its header can't be read; get the file again$")
    short.write_bytes(whole[:-1000])
    refused(short, r"short\.gguf is cut off: \S+ ends at byte \d+, the file at \d+; get it again$")
    short.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    refused(short, r"is a version 1 GGUF file; little-endian ones of version 2 and 3 can be read$")
    short.write_bytes(whole[:4] + struct.pack(">I", 3) + whole[8:])
    refused(short, r"is a big-endian GGUF file")
    (tmp_path / "dir").mkdir()
    shutil.copy(tmp_path / "x.gguf", tmp_path / "dir")
    refused(tmp_path / "dir", r"isn't a Hugging Face model folder; for its GGUF file: --model .*dir/x\.gguf$")


def test_a_file_without_the_ending_is_known_by_its_first_letters(tmp_path):
    file = write(tmp_path / "x.gguf", made("llama")).rename(tmp_path / "blob")
    assert (locate(str(file)) / "source.json").is_file()


def test_models_that_are_not_understood(tmp_path):
    tiny = made("llama")
    refused(
        write(tmp_path / "a.gguf", tiny, arch="mamba"),
        r"of the architecture 'mamba'; .* are: llama, qwen2, qwen3, gemma2, gemma3, gpt2",
    )
    refused(
        write(tmp_path / "b.gguf", tiny, more={"blk.1.ffn_up.weight": None}),
        r"can't be read as llama: blk\.1\.ffn_up\.weight is missing$",
    )
    refused(
        write(tmp_path / "c.gguf", tiny, more={"blk.0.attn_q.bias": np.zeros(64, np.float32)}),
        r"there is no place for blk\.0\.attn_q\.bias$",
    )
    refused(
        write(tmp_path / "d.gguf", tiny, more={"output_norm.weight": np.ones(8, np.float32)}),
        r"output_norm\.weight is \(8,\), expected \(64,\)$",
    )
    refused(write(tmp_path / "e.gguf", tiny, more={"expert_count": 8}), r"aren't supported: llama\.expert_count$")
    refused(
        write(tmp_path / "f.gguf", tiny, more={"rope.scaling.type": "longrope"}), r"scales its positions by 'longrope'"
    )
    odd = np.linspace(1, 3, 8, dtype=np.float32)
    refused(
        write(tmp_path / "g.gguf", tiny, more={"rope_freqs.weight": odd}), r"rope_freqs\.weight isn't Llama 3's way"
    )
    whole = write(tmp_path / "h.gguf", tiny).rename(tmp_path / "h-00001-of-00003.gguf")
    refused(
        whole, r"is one part of several; join them first: llama-gguf-split --merge h-00001-of-00003\.gguf whole\.gguf$"
    )


def test_types_that_cannot_be_read(tmp_path):
    assert not can_read("Q8_K") and can_read("Q4_K") and can_read("TQ1_0")
    file = write(tmp_path / "x.gguf", made("llama"), more={"blk.0.attn_norm.weight": np.zeros(64, np.int8)})
    assert read_header(file).tensors["blk.0.attn_norm.weight"].type == "I8"
    refused(file, r"blk\.0\.attn_norm\.weight is stored as I8, which can't be read; there are F32, F16, .*Q4_K")
    data = file.read_bytes()
    name = b"blk.0.attn_norm.weight"
    at = data.index(name) + len(name) + 4 + 8
    file.write_bytes(data[:at] + struct.pack("<I", 77) + data[at + 4 :])
    refused(file, r"blk\.0\.attn_norm\.weight has a type that isn't known here \(number 77\); there are F32")


def test_a_file_that_moved_or_changed(pair, tmp_path):
    file = Path(shutil.copy(pair[0], tmp_path / "x.gguf"))
    path = locate(str(file))
    first = loaded(file).fingerprint
    assert loaded(pair[0]).fingerprint == first  # of the weights, wherever they are
    with file.open("r+b") as data:  # another number, in the last tensor
        data.seek(-40, 2)
        old = data.read(1)
        data.seek(-40, 2)
        data.write(bytes([old[0] ^ 1]))
    changed = loaded(file)
    assert changed.path == path and changed.fingerprint != first
    data = file.read_bytes()
    file.write_bytes(
        data.replace(b"add_generation_prompt", b"add_generation_promqt")
    )  # in the template: nothing else is another
    with pytest.raises(ModelError, match=r"x\.gguf isn't the file any more"):
        load(str(path))
    assert "promqt" in load_tokenizer(locate(str(file))).chat_template
    write(file, made("qwen2"))
    with pytest.raises(
        ModelError, match=r"x\.gguf isn't the file any more that .* was made from; name it with --model"
    ):
        load(str(path))
    assert loaded(file).model.config.model_type == "qwen2"
    file.rename(tmp_path / "y.gguf")
    with pytest.raises(ModelError, match=r"x\.gguf isn't there any more; put it back, or name it where it is now"):
        load(str(path))
    assert loaded(tmp_path / "y.gguf").model.config.hidden_size == SIZES["hidden_size"]

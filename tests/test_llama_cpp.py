"""What is exported, in the real llama.cpp: the same greedy tokens and log-probabilities as ours, and the same ids of a text."""

from __future__ import annotations

import json
from pathlib import Path

import llama_cpp
import pytest
import torch
from data_helpers import CHATML, tokenizer
from test_export import folder, job, opened, trained
from tiny import ids, randomize, rows
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lorafit import fit
from lorafit.data import Chat, Message
from lorafit.errors import AdapterError
from lorafit.export import export, gguf_model
from lorafit.export.base import Job
from lorafit.host import Host
from lorafit.log import Terminal
from lorafit.session import open_session
from lorafit.train.activations import study

# Of a log-probability. In 32 bits llama.cpp is off by 2e-4; with 16-bit weights, where it rounds activations too, by 1e-2.
TOLERANCE = 5e-3


@pytest.fixture(autouse=True, scope="module")
def installed():
    llama_cpp.need()


@torch.no_grad()
def agree(host: Host, spec, prompts, found) -> None:
    """At each step of llama.cpp's answers: its token is our best one, its log-probabilities are ours."""
    compared = 0
    for prompt, steps in zip(prompts, found["answers"], strict=True):
        row = list(prompt)
        for token, tops in steps:
            with host.route(spec):
                want = host.logits(torch.tensor(row), [len(row)])[-1].log_softmax(-1)
            assert want[token] > want.max() - 2 * TOLERANCE  # two tokens may be as good as each other
            assert all(abs(float(want[id_]) - value) < TOLERANCE for id_, value in tops)
            compared += bool(tops)
            row.append(token)
    assert compared >= len(prompts)


@pytest.mark.parametrize("shape", ["llama", "mistral", "qwen2", "qwen3"])
def test_tiny_models_and_adapters_are_the_same_there(tmp_path, shape):
    changes = {"sliding_window": None} if shape == "mistral" else {}
    place = folder(tmp_path, shape, hidden_size=128, intermediate_size=160, max_position_embeddings=256, **changes)
    targets = ["q_proj", "k_proj", "v_proj", "down_proj", "lm_head", "embed_tokens"]
    adapter = trained(tmp_path, place, targets=targets, r=4, rslora=True, rank_pattern={"k_proj": 2})
    host, prompts = opened(place), [ids(9).tolist(), ids(5, seed=1).tolist()]
    host.load(adapter, "a")
    with torch.no_grad(), host.route("a"):
        adapted = host.logits(torch.tensor(prompts[0]), [9])
    assert (adapted - host.logits(torch.tensor(prompts[0]), [9])).abs().max() > 0.1  # the adapter is felt
    gguf_model.write_model(host, None, tmp_path / "base.gguf", "f32", Chat.of(host.base.tokenizer))
    export("gguf-adapter", job(place, adapter), tmp_path / "a.gguf")
    export("gguf", job(place, adapter, type="f32"), tmp_path / "merged.gguf")
    agree(host, None, prompts, llama_cpp.ask(tmp_path / "base.gguf", None, prompts))
    agree(host, "a", prompts, llama_cpp.ask(tmp_path / "base.gguf", tmp_path / "a.gguf", prompts))
    agree(host, "a", prompts, llama_cpp.ask(tmp_path / "merged.gguf", None, prompts))


def eva(place: Path, to: Path) -> Path:
    """The files of an adapter that has looked at rows, so that its sites have ranks of their own."""
    host = opened(place)
    made = host.add("a", "eva", ["all-linear"], r=4)
    assert study(host, "a", [rows([24], seed=n, learn="all") for n in range(6)])
    assert len(set(made.ranks())) > 1
    randomize(made, 0.05)
    to.mkdir()
    host.save("a", to)
    return to


BESIDE = {
    "new tokens": {"targets": ["q_proj"], "tokens": ("<tool>", "</tool>")},
    "whole": {"targets": ["q_proj"], "whole": ["embed_tokens", "lm_head"]},
    "whole, one weight": {"targets": ["q_proj"], "whole": ["embed_tokens"]},
    "new tokens, one weight": {"targets": ["q_proj"], "tokens": ("<tool>", "</tool>")},
}


@pytest.mark.parametrize("what", [*BESIDE, "eva"])
def test_new_tokens_weights_trained_whole_and_ranks_of_eva_are_the_same_there(tmp_path, what):
    """Merged they are; as an adapter EVA is, and the others are refused, because llama.cpp has no place for them."""
    sizes = {"hidden_size": 128, "intermediate_size": 160, "max_position_embeddings": 256}
    place = folder(tmp_path, **sizes, vocab_size=len(tokenizer(CHATML)), tie_word_embeddings="one weight" in what)
    options = BESIDE.get(what, {})
    tokens = options.get("tokens", ())
    adapter = eva(place, tmp_path / "eva") if what == "eva" else trained(tmp_path, place, **options)
    host = opened(place, tokens=tokens)
    host.load(adapter, "a")
    new = list(host.base.new.ids) if host.base.new is not None else []
    prompts, texts = [ids(9).tolist() + new, new + ids(5, seed=1).tolist()], [f"one {word} two" for word in tokens]
    export("gguf", job(place, adapter, type="f32"), tmp_path / "merged.gguf")
    found = llama_cpp.ask(tmp_path / "merged.gguf", None, prompts, texts)
    agree(host, "a", prompts, found)
    assert found["ids"] == [host.base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert all(any(token in ids for token in new) for ids in found["ids"])
    if what != "eva":
        with pytest.raises(AdapterError, match="rows of new tokens|trained whole"):
            export("gguf-adapter", job(place, adapter), tmp_path / "a.gguf")
        return
    export("gguf-adapter", job(place, adapter), tmp_path / "a.gguf")
    gguf_model.write_model(host, None, tmp_path / "base.gguf", "f32", Chat.of(host.base.tokenizer))
    agree(host, "a", prompts, llama_cpp.ask(tmp_path / "base.gguf", tmp_path / "a.gguf", prompts))


TEXTS = [
    "Hello 1234567 world's  THEY'LL\n\n\tdon't   stop… 你好，世界 ٣٤ naïve ÉCOLE x_y(z)=={}//\r\n  end ",
    "<|im_start|>user\nthe cat sat on the mat<|im_end|>\n<|im_start|>assistant\n",
    " leading", "trailing  ", "émile's\u00a0café 🙂🙂",
]  # fmt: skip
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRES = {
    "gpt-2": None,
    "smollm": pre_tokenizers.Digits(individual_digits=True),
    "llama-bpe": _SHORT + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,
    "qwen2": _SHORT + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,
}


def bytes_of(first) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose words are cut in this way, trained on the texts so that the way is felt."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not isinstance(first, str))
    cut = pre_tokenizers.Split(Regex(first), "isolated") if isinstance(first, str) else first
    made = Tokenizer(models.BPE(ignore_merges=isinstance(first, str) and r"{1,3}" in first))
    made.pre_tokenizer = words if cut is None else pre_tokenizers.Sequence([cut, words])
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def pieces() -> PreTrainedTokenizerFast:
    """A tokenizer like SentencePiece's: a space in front, bytes for what isn't known, every way of joining a token allowed."""
    first = Tokenizer(models.BPE(unk_token="<unk>"))
    first.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    texts = ["one two three four user assistant", "the cat sat on the mat", "Hello world stop leading trailing"] * 4
    first.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learned = json.loads(first.to_str())["model"]["vocab"]
    order = sorted(learned, key=learned.get)
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    names = [*special, *(f"<0x{i:02X}>" for i in range(256)), *order]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [
        (name[:cut], name[cut:])
        for name in order
        for cut in range(1, len(name))
        if name[:cut] in learned and name[cut:] in learned
    ]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    outer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    outer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return outer


@pytest.mark.parametrize("name", [*PRES, "sentencepiece"])
def test_texts_have_the_same_ids_there(tmp_path, name):
    made = pieces() if name == "sentencepiece" else bytes_of(PRES[name])
    made.chat_template = CHATML
    place = folder(tmp_path, vocab_size=len(made) + 3)
    host = opened(place)
    host.base.tokenizer = made
    gguf_model.write_model(host, None, tmp_path / "m.gguf", "f32", Chat.of(made))
    want = [made(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert llama_cpp.ask(tmp_path / "m.gguf", texts=TEXTS)["ids"] == want


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """A run of a few steps on the embedded model."""
    place = tmp_path_factory.mktemp("smollm2")
    data = place / "rows.jsonl"
    rows = (Path(fit.__file__).parent / "demo.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    settings = {"steps": 4, "lr": 2e-3, "samples": 0, "out": str(place / "run"), "held_out_share": 0.0}
    return fit.fit(fit.read_config(str(data), settings), Terminal(quiet=True)).folder


def test_a_trained_smollm2_is_the_same_there(smollm2, tmp_path):
    session = open_session([str(smollm2)], precision="fp32", device="cpu")
    (name,) = session.host.adapters
    host, chat = session.host, session.chat(name)
    prompts = [chat.prompt_ids([Message("user", text)]) for text in ("Who are you? 17",)]
    given = Job(host, name, smollm2 / "adapter", chat, prompts)
    export("gguf-adapter", given, tmp_path / "a.gguf")
    gguf_model.write_model(host, None, tmp_path / "base.gguf", "f32", chat)
    agree(host, name, prompts, llama_cpp.ask(tmp_path / "base.gguf", tmp_path / "a.gguf", prompts, tokens=4))
    (tmp_path / "base.gguf").unlink()
    gguf_model.write_model(host, name, tmp_path / "merged.gguf", "f32", chat)
    found = llama_cpp.ask(tmp_path / "merged.gguf", None, prompts, [chat.text(prompt) for prompt in prompts], tokens=4)
    agree(host, name, prompts, found)
    assert found["ids"] == prompts

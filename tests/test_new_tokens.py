"""Tokens on top of a base's own: in its tokenizer, its embedding and its head, through training, saving, PEFT, merging, GGUF."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from tiny import base, ids, model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafit.cli import main
from lorafit.errors import AdapterError, ConfigError
from lorafit.host import Host
from lorafit.methods import METHODS
from lorafit.model.load import load, load_tokenizer
from lorafit.model.new_tokens import extend
from lorafit.model.quant import Quant
from lorafit.model.shards import Shards
from lorafit.session import open_session

NEW = ["<tool>", "</tool>"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model):
    """The tiny model, whose embedding is its head too; the same with a head of its own; and with rows to spare."""
    found = {"tied": tiny_model}
    tok = load_tokenizer(tiny_model)
    for name, changes in {"apart": {"tie_word_embeddings": False}, "spare": {"vocab_size": len(tok) + 5}}.items():
        place = tmp_path_factory.mktemp(name)
        config = AutoModelForCausalLM.from_pretrained(tiny_model).config
        for key, value in changes.items():
            setattr(config, key, value)
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(place)
        tok.save_pretrained(place)
        found[name] = place
    return found


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    place = tmp_path_factory.mktemp("rows") / "tools.jsonl"
    place.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": f"count {i} <tool>"},
                        {"role": "assistant", "content": f"<tool>add {i % 5}</tool> done"},
                    ]
                }
            )
            + "\n"
            for i in range(40)
        )
    )
    return place


def opened(place, **options):
    return Host(load(str(place), precision="fp32", device="cpu", tokens=NEW, **options))


def randomized(host, name="a", method="lora", **options):
    adapter = host.add(name, method, options.pop("targets", ["q_proj"]), **options)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return adapter


def sample(host, n=12):
    new = list(host.base.new.ids)
    return torch.tensor([*ids(n).tolist(), *new, 3, *new])


@torch.no_grad()
def logits(host, name, x):
    with host.route(name):
        return host.logits(x, [len(x)])


# --- the base ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tied", "apart", "spare"])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_rows_are_the_mean_of_what_spelled_the_text(folders, name, streamed, quant):
    plain = load(str(folders[name]), precision="fp32", device="cpu", quant=Quant.of(quant))
    grown = opened(folders[name], streamed=streamed, quant=Quant.of(quant)).base
    old = plain.model.get_input_embeddings().weight
    first = len(load_tokenizer(folders[name]))
    assert grown.new.ids == (first, first + 1) and grown.model.config.vocab_size == max(len(old), first + 2)
    host, x = Host(grown), ids(9)
    with torch.no_grad():
        before = Host(plain).logits(x, [9])[:, :first]
        assert (host.logits(x, [9])[:, :first] - before).abs().max() < 1e-5
    table = host.sites["model.embed_tokens"].weight().t()
    assert torch.equal(table[:first], old[:first]) and len(table) == max(len(old), first + 2)
    for text, at in zip(NEW, grown.new.ids, strict=True):
        pieces = load_tokenizer(folders[name])(text)["input_ids"]
        assert len(pieces) > 1 and torch.allclose(table[at], old[pieces].mean(0))
        assert grown.tokenizer(f"a {text}b")["input_ids"].count(at) == 1
    if not streamed:
        tied = grown.model.lm_head.weight is grown.model.model.embed_tokens.weight
        assert tied == (name != "apart")


@pytest.mark.parametrize(
    "texts, said",
    [(["<|im_end|>"], "is a token of this tokenizer already"), (["<x>", "<x>"], "named twice"), ([" "], "no space")],
)
def test_tokens_that_cannot_be_new_are_refused(tiny_model, texts, said):
    with pytest.raises(ConfigError, match=said):
        extend(load_tokenizer(tiny_model), texts)


# --- the adapter ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tied", "apart", "spare"])
def test_rows_merge_as_they_run_and_leave_others_alone(folders, name):
    host = opened(folders[name])
    adapter = host.add("a", "lora", ["q_proj"])
    x = sample(host)
    plain = logits(host, None, x)
    assert torch.equal(logits(host, "a", x), plain)
    host.remove("a")
    adapter = randomized(host)
    routed = logits(host, "a", x)
    assert (routed - plain).abs().max() > 0.01
    tables = [p for p, layer in adapter.items() if type(layer).__name__ == "Rows"]
    assert tables == (["model.embed_tokens", "lm_head"] if name == "apart" else ["model.embed_tokens"])
    for path, layer in adapter.items():
        site = host.sites[path]
        changed = layer.delta_weight(site.weight())
        if path in tables:
            rows = changed.t() if site.lookup else changed
            assert set(rows.abs().sum(1).nonzero().flatten().tolist()) == set(host.base.new.ids)
        site.write(host.merged_weight(site, "a"))
    assert (logits(host, None, x) - routed).abs().max() < 1e-5 * routed.abs().max()


@pytest.mark.parametrize("name", ["tied", "apart"])
def test_gradients_of_rows_are_those_of_the_whole_matrix(folders, name):
    from lorafit.batches import pack
    from lorafit.data.tokens import Tokens
    from lorafit.train.loss import losses

    host = opened(folders[name])
    x = sample(host).numpy()
    row = Tokens(ids=x, learn=(x * 0 + 1).astype(bool), line=1, example=None, cut="")
    found = {}
    for whole in (False, True):
        tables = ["embed_tokens"] + (["lm_head"] if name == "apart" else [])
        adapter = host.add("a", "lora", ["q_proj"], whole=tables if whole else [])
        with host.route("a"):
            losses(host, pack([row])).sum().backward()
        for path, layer in adapter.items():
            if hasattr(layer, "delta"):
                grad = layer.delta.grad
                grad = grad.t() if whole and host.sites[path].lookup else grad
                found.setdefault(path, []).append(grad[list(host.base.new.ids)] if whole else grad)
        host.remove("a")
    assert len(found) == len(tables)
    for rows, whole in found.values():
        assert rows.abs().max() > 1e-3 and (rows - whole).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["tied", "apart", "spare"])
def test_peft_loads_them_on_a_base_with_as_many_rows(folders, name, whole, tmp_path):
    host = opened(folders[name])
    tables = ["embed_tokens"] + (["lm_head"] if name == "apart" else [])
    randomized(host, whole=tables if whole else [])
    host.save("a", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert bool(config["modules_to_save"]) == whole and bool(config["trainable_token_indices"]) != whole
    plain = AutoModelForCausalLM.from_pretrained(folders[name])
    plain.resize_token_embeddings(host.base.model.config.vocab_size)  # its new rows are others: they are replaced
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    x = sample(host)
    with torch.no_grad():
        want = theirs(input_ids=x[None]).logits[0]
    mine = logits(host, "a", x)
    assert (mine - want).abs().max() < 1e-5 * want.abs().max()
    again = opened(folders[name])
    again.load(tmp_path, "b")
    assert (logits(again, "b", x) - mine).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_peft_trained_are_loaded(tied, tmp_path):
    changes = {"tie_word_embeddings": tied}
    given = [3, 60] if tied else {"embed_tokens": [3, 60], "lm_head": [7]}
    theirs = peft.get_peft_model(
        model("llama", **changes), peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=given)
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1)
    theirs.save_pretrained(tmp_path)
    host = Host(base("llama", **changes))
    host.load(tmp_path, "a")
    x = torch.tensor([3, 5, 60, 7, 3])
    with torch.no_grad():
        want = theirs(input_ids=x[None]).logits[0]
    assert (logits(host, "a", x) - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_them(folders, method, tmp_path):
    if METHODS[method].needs_codes:
        pytest.skip("needs a base in codes")
    host = opened(folders["tied"])
    randomized(host, method=method)
    host.save("a", tmp_path)
    x = sample(host)
    mine = logits(host, "a", x)
    host.load(tmp_path, "b")
    assert (logits(host, "b", x) - mine).abs().max() < 1e-5 * mine.abs().max()


def test_a_base_without_them_refuses_the_adapter(folders, tmp_path):
    host = opened(folders["tied"])
    randomized(host)
    host.save("a", tmp_path)
    with pytest.raises(AdapterError, match=r"new tokens \(<tool>, </tool>\), which this base hasn't"):
        Host(load(str(folders["tied"]), precision="fp32")).load(tmp_path, "b")
    notes = json.loads((tmp_path / "lorafit.json").read_text())
    for wrong in ({"<tool>": -1}, {"<tool>": "x"}, ["<tool>"]):
        (tmp_path / "lorafit.json").write_text(json.dumps(notes | {"new_tokens": wrong}))
        with pytest.raises(AdapterError, match="new_tokens=.* can't be meant"):
            host.load(tmp_path, "b")
    (tmp_path / "lorafit.json").unlink()
    with pytest.raises(AdapterError, match="made on one with more tokens"):
        Host(load(str(folders["tied"]), precision="fp32")).load(tmp_path, "b")


@pytest.mark.parametrize("wrong", [[], ["x"], [-1], [2, 2], {"q_proj": [1]}, {"embed_tokens": 5}, 7, [10**9]], ids=str)
def test_rows_that_cannot_be_meant_are_one_line(folders, tmp_path, wrong):
    host = opened(folders["tied"])
    randomized(host)
    host.save("a", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": wrong}))
    with pytest.raises(AdapterError):
        host.load(tmp_path, "b")


def test_an_embedding_that_the_method_adapts_is_refused(folders):
    with pytest.raises(ConfigError, match="which method=lora adapts too; leave it out of targets, or train it whole="):
        opened(folders["tied"]).add("a", "lora", ["embed_tokens"])


# --- the whole way -------------------------------------------------------------------------------------------------------

WORDS = ["r=4", "steps=6", "batch_tokens=128", "samples=1", "precision=fp32", "lr=0.02", "checkpoint_every=3"]


@pytest.mark.parametrize("name", ["tied", "apart", "spare"])
def test_from_training_to_every_format(folders, name, rows_file, tmp_path, capsys, monkeypatch):
    run, place = str(tmp_path / "run"), str(folders[name])
    texts = tmp_path / "tokens.txt"
    texts.write_text("<tool>\n\n</tool>\n")
    assert main(["train", str(rows_file), "--model", place, "--out", run, f"new_tokens={texts}", *WORDS]) == 0
    texts.unlink()
    assert "new_tokens:\n- <tool>\n- </tool>" in (tmp_path / "run" / "config.yaml").read_text()
    session = open_session([run], precision="fp32")
    host = session.host
    new = host.base.new.ids
    x = torch.tensor(session.chat("run").ids("count <tool>add 3</tool> done"))
    assert [i for i in x.tolist() if i in new] == list(new)
    assert host.adapters["run"]["model.embed_tokens"].delta.abs().min() > 1e-4
    want = logits(host, "run", x)
    assert main(["eval", run, str(rows_file), "--json"]) == 0
    assert main(["adapter", "info", run]) == 0 and main(["adapter", "verify", run]) == 0

    assert main(["merge", run, str(tmp_path / "merged"), "--dtype", "fp32"]) == 0
    assert main(["export", run, str(tmp_path / "hf"), "--format", "hf"]) == 0
    theirs, tok = (kind.from_pretrained(tmp_path / "merged") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert tok("count <tool>add 3</tool> done")["input_ids"] == x.tolist()
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == (name != "apart")
    with torch.no_grad():
        assert (theirs(input_ids=x[None]).logits[0] - want).abs().max() < 1e-5 * want.abs().max()

    capsys.readouterr()
    assert main(["export", run, str(tmp_path / "peft"), "--format", "peft", "--json"]) == 0
    use = json.loads(capsys.readouterr().out)["use"]
    rows = host.base.model.config.vocab_size
    assert f"base.resize_token_embeddings({rows})" in use
    assert AutoTokenizer.from_pretrained(tmp_path / "peft")("<tool>")["input_ids"] == [new[0]]

    file = str(tmp_path / "m.gguf")
    assert main(["export", run, file, "--format", "gguf", "--type", "f32"]) == 0
    back = Host(load(file, precision="fp32", device="cpu"))
    assert back.base.tokenizer("<tool>add</tool>")["input_ids"] == session.chat("run").ids("<tool>add</tool>")
    with torch.no_grad():
        assert (back.logits(x, [len(x)]) - want).abs().max() < 1e-4 * want.abs().max()
    capsys.readouterr()
    for format, out in (("peft-portable", "p"), ("gguf-adapter", "a.gguf"), ("minimind", "m.pth")):
        assert main(["export", run, str(tmp_path / out), "--format", format]) == 2
        assert "rows of new tokens); merge it with --format hf" in capsys.readouterr().err
        assert not (tmp_path / out).exists()
    assert main(["adapter", "compress", run, str(tmp_path / "c"), "--int8"]) == 2
    for how in ("cat", "svd"):
        assert main(["adapter", "combine", str(tmp_path / "c"), run, f"{run}:0.5", "--how", how]) == 2
    assert "has new tokens, whose rows no sum has a place for" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()

    more = str(tmp_path / "more")
    assert main(["train", str(rows_file), "--from", run, "--out", more, "steps=2", "samples=0"]) == 0
    assert json.loads((tmp_path / "more" / "adapter" / "lorafit.json").read_text())["new_tokens"] == dict(
        zip(NEW, new, strict=True)
    )
    assert main(["train", str(rows_file), "--from", run, "new_tokens=<x>"]) == 2


@pytest.mark.parametrize("into", ["original", "dequantised", "quantised"])
@pytest.mark.parametrize("name", ["tied", "apart"])
def test_trained_on_a_base_in_4_bits_they_are_merged(folders, name, into, rows_file, tmp_path, capsys, monkeypatch):
    """Into codes too: the embedding and the head aren't codes, so their new rows are what was trained."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run, out = str(tmp_path / "run"), tmp_path / "merged"
    words = ["--model", str(folders[name]), "new_tokens=<tool>,</tool>", "quant=nf4"]
    assert main(["train", str(rows_file), "--out", run, *words, *WORDS]) == 0
    force = ["--force"] if into == "quantised" else []
    assert main(["merge", run, str(out), "--into", into, "--dtype", "fp32", *force, "--json"]) == 0
    session = open_session([run], precision="fp32", quant="none" if into == "original" else None)
    host, tok = session.host, AutoTokenizer.from_pretrained(out)
    new = list(host.base.new.ids)
    assert tok("<tool>x</tool>")["input_ids"] == session.chat("run").ids("<tool>x</tool>")
    table = host.merged_weight(host.sites["model.embed_tokens"], "run").t()
    stored = Shards(out).read("model.embed_tokens.weight")
    assert stored.shape == table.shape and torch.equal(stored[new], table[new])
    if into != "quantised":
        x = torch.tensor(session.chat("run").ids("count <tool>add 3</tool> done"))
        want, got = logits(host, "run", x), logits(Host(load(str(out), precision="fp32", device="cpu")), None, x)
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_a_run_is_gone_on_with(folders, rows_file, tmp_path):
    words = ["--model", str(folders["tied"]), "new_tokens=<tool>,</tool>", *WORDS]
    assert main(["train", str(rows_file), "--out", str(tmp_path / "whole"), *words]) == 0
    assert main(["train", str(rows_file), "--out", str(tmp_path / "cut"), *words]) == 0
    import shutil

    for folder in (tmp_path / "cut" / "checkpoints").iterdir():
        if int(folder.name.partition("-")[2] or folder.name[-1]) > 3:
            shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "cut" / "adapter")
    assert main(["train", "--resume", "--out", str(tmp_path / "cut")]) == 0
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_adapters_with_other_tokens_are_not_used_together(folders, rows_file, tmp_path, capsys):
    for name, texts in (("one", "<tool>,</tool>"), ("two", "<a>")):
        words = ["--model", str(folders["tied"]), f"new_tokens={texts}", *WORDS, "steps=1"]
        assert main(["train", str(rows_file), "--out", str(tmp_path / name), *words]) == 0
    runs = [str(tmp_path / name) for name in ("one", "two")]
    capsys.readouterr()
    assert main(["eval", *runs, str(rows_file)]) == 2
    assert "was trained with other new tokens (<a>, not <tool>, </tool>)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, said", [("nowhere.txt", "can't be read"), ("<|im_end|>", "is a token of this tokenizer already")]
)
def test_bad_words_are_one_line(folders, rows_file, given, said, capsys, tmp_path):
    words = [
        "train",
        str(rows_file),
        "--model",
        str(folders["tied"]),
        "--out",
        str(tmp_path / "r"),
        f"new_tokens={given}",
    ]
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lorafit: ") and said in error and not (tmp_path / "r").exists()

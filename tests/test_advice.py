"""What `train` chooses, what `plan` counts and what `lorafit advise` shows are one thing; what the user set stays."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import pytest
import yaml
from conftest import WORDS, conversation
from transformers import LlamaConfig, MambaConfig

from lorafit import advice, fit, log, pace, plan
from lorafit.advice import Facts, advise, default_lr, numbers_a_rank, rate_for
from lorafit.cli import main
from lorafit.errors import ModelError
from lorafit.log import Terminal
from lorafit.model.load import load_tokenizer, shape_of
from lorafit.native import build
from lorafit.run import Run
from lorafit.verbs import plan as plan_verb

QUIET = Terminal(quiet=True)
ADVISED = ("method", "r", "alpha", "batch_tokens", "lr", "epochs")


def file(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(question: str, answer: str) -> dict:
    return {"question": question, "answer": answer}


def facts_of(model, data, **settings):
    config = fit.read_config(str(data), {"model": str(model), **settings})
    _, _, rows = fit.read_data(config, QUIET)
    return config, rows, Facts.of(rows)


def shown(capsys, *words) -> dict:
    capsys.readouterr()
    assert main(["advise", *map(str, words), "--no-measure", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("rows", [20, 60, 300])
def test_train_takes_what_advise_shows(tiny_model, tmp_path, capsys, rows):
    data = file(tmp_path, [conversation(i) for i in range(rows)])
    found = shown(capsys, data, "--model", tiny_model)["settings"]
    config = fit.read_config(str(data), {"model": str(tiny_model), "out": str(tmp_path / "run")})
    made = fit.Training(config, Terminal(quiet=True))
    now = fit.settings.flat(config)
    assert {key: now[key] for key in ADVISED} == {key: found[key]["value"] for key in ADVISED}
    assert (made.job.lr, made.job.plan.tokens) == (found["lr"]["value"], found["batch_tokens"]["value"])
    assert main(["plan", str(data), "--model", str(tiny_model), "--no-time", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == made.job.steps
    assert {choice.setting for choice in made.advised} == {"r", "batch_tokens", "lr", "epochs"}


def test_what_is_yours_stays_and_the_rest_follows_it(tiny_model, data_file, capsys):
    free = shown(capsys, data_file, "--model", tiny_model)["settings"]
    found = shown(capsys, data_file, "--model", tiny_model, "batch_tokens=64", "r=4", "steps=7")["settings"]
    assert found["batch_tokens"]["value"] == 64 and found["batch_tokens"]["yours"]
    assert found["r"]["value"] == 4 and found["steps"]["value"] == 7 and "epochs" not in found
    assert found["lr"]["value"] == pytest.approx(
        free["lr"]["value"], rel=0.01
    )  # 256 is at the floor of the law already
    larger = shown(capsys, data_file, "--model", tiny_model, "batch_tokens=4096")["settings"]
    assert larger["lr"]["value"] == pytest.approx(free["lr"]["value"] * 2, rel=0.05)
    full = shown(capsys, data_file, "--model", tiny_model, "method=full")["settings"]
    assert full["lr"]["value"] == pytest.approx(free["lr"]["value"] / 10, rel=0.02) and "r" not in full


def test_a_value_equal_to_the_default_is_still_the_users(tiny_model, tmp_path):
    data = file(tmp_path, [conversation(i) for i in range(20)])
    config, rows, _ = facts_of(tiny_model, data, epochs=3)
    advice.settle(config, rows, shape_of(tiny_model))
    assert config.epochs == 3.0
    config, rows, _ = facts_of(tiny_model, data)
    advice.settle(config, rows, shape_of(tiny_model))
    assert config.epochs > 3.0


def test_a_run_says_what_it_took_and_a_resumed_one_keeps_it(tiny_model, data_file, tmp_path, capsys, monkeypatch):
    words = [data_file, "--model", tiny_model, "--out", tmp_path / "run", "samples=0", "epochs=1"]
    assert main(["train", *map(str, words)]) == 0
    said = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("settings"))
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert f"lr={saved['lr']:.3g}" in said and "r=16" in said and "epochs" not in said and "lorafit advise" in said
    (tmp_path / "run" / "summary.json").unlink()
    monkeypatch.setattr(advice, "rate_for", lambda *_: 99.0)
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert "by advice" not in capsys.readouterr().err
    assert yaml.safe_load((Run.open(tmp_path / "run").folder / "config.yaml").read_text()) == saved


@pytest.mark.parametrize("number", [20, 300])
def test_what_train_says_it_took_is_what_advise_shows_with_a_reason(tiny_model, tmp_path, capsys, number):
    data = file(tmp_path, [conversation(i) for i in range(number)])
    words = [str(data), "--model", str(tiny_model)]
    found = shown(capsys, *words)["settings"]
    assert all(c["reason"] and c["source"] and "\n" not in c["reason"] + c["source"] for c in found.values())
    assert main(["advise", *words, "--no-measure"]) == 0
    advised = {line.split()[0] for line in capsys.readouterr().out.splitlines() if "=" in line.split(" ")[0]}
    took = fit.Training(
        fit.read_config(str(data), {"model": str(tiny_model)}), QUIET
    ).advised  # what its first line says
    assert len(took) == 4 and {choice.words for choice in took} <= advised


def test_the_file_it_writes_trains_with_the_same_settings(tiny_model, data_file, tmp_path, capsys):
    to = tmp_path / "settings.yaml"
    words = (data_file, "--model", tiny_model, "--task", "style", "learn=last")
    found = shown(capsys, *words, "--out", to)["settings"]
    values = fit.settings.flat(fit.read_config(str(to), {}))
    assert {key: values[key] for key in ADVISED} == {key: found[key]["value"] for key in ADVISED}
    assert values["learn"] == "last" and values["r"] == 8
    assert "# style: little to take up" in to.read_text()
    assert main(["advise", str(data_file), "--no-measure", "--out", str(to)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_command_it_prints_says_the_same(tiny_model, data_file, capsys):
    made = shown(capsys, data_file, "--model", tiny_model, "--task", "classify", "seed=3")
    words = made["command"].split()
    assert words[:3] == ["lorafit", "train", str(data_file)] and "r=8" in words and "seed=3" in words
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    config = fit.read_config(str(data_file), {"model": str(tiny_model), **settings})
    assert config.lr == pytest.approx(made["settings"]["lr"]["value"], rel=0.01)


def test_the_rate_falls_with_the_width_and_rises_with_the_step():
    assert rate_for(2000, "llama", 2048) == pytest.approx(5e-4)
    assert rate_for(4096, "llama", 2048) == pytest.approx(2.86e-4, rel=0.01)  # the published figure
    assert rate_for(4096, "qwen3", 2048) == pytest.approx(5e-4 * math.sqrt(2000 / 4096))
    assert rate_for(576, "llama", 2048) == pytest.approx(math.sqrt(2) * rate_for(576, "llama", 1024))
    assert rate_for(576, "llama", 1 << 20) == rate_for(576, "llama", 2048)
    assert rate_for(576, "llama", 1) == rate_for(576, "llama", 256) == rate_for(576, "llama", 2048) / 2


def test_few_rows_get_more_passes_if_something_stops_them(tiny_model, tmp_path):
    few = file(tmp_path, [conversation(i) for i in range(20)])
    config, rows, facts = facts_of(tiny_model, few)
    found = {c.setting: c for c in advise(config, facts, shape_of(tiny_model), rows.train)}
    steps = found["epochs"].value * facts.tokens / found["batch_tokens"].value
    assert found["epochs"].value == 10 or advice.FEW_STEPS <= steps < 2 * advice.FEW_STEPS
    config, rows, facts = facts_of(tiny_model, few, held_out_share=0)
    found = {c.setting: c for c in advise(config, facts, shape_of(tiny_model), rows.train)}
    assert found["epochs"].value == 3 and "nothing is held out" in found["epochs"].reason


def test_the_rank_grows_with_what_there_is_to_learn(tiny_model, data_file):
    config, rows, facts = facts_of(tiny_model, data_file)
    model = plan.empty(config, tiny_model)
    assert numbers_a_rank(shape_of(tiny_model)) == model.numbers // 16
    shape = LlamaConfig(hidden_size=128, num_attention_heads=2, num_hidden_layers=2, intermediate_size=256)
    much = Facts(**{**vars(facts), "learned": int(40 * numbers_a_rank(shape) * 2 / 3)})
    found = {c.setting: c.value for c in advise(config, much, shape, rows.train)}
    assert found["r"] == 64 and found["alpha"] == 32
    assert {c.setting: c.value for c in advise(config, facts, shape, rows.train, "style")}["r"] == 8


@pytest.mark.parametrize("heads, side", [(2, 16), (4, 32), (1, 8)])
def test_the_rank_is_no_larger_than_the_smallest_side_of_a_matrix(tiny_model, data_file, heads, side):
    config, rows, facts = facts_of(tiny_model, data_file)
    shape = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=heads)
    much = Facts(**{**vars(facts), "learned": 10**9})
    found = {c.setting: c for c in advise(config, much, shape, rows.train)}
    assert found["r"].value == side and f"a side of {side}" in found["r"].reason and found["alpha"].value == 32


def test_gpt2s_config_has_its_numbers_under_other_names():
    from transformers import GPT2Config

    shape = GPT2Config(n_embd=64, n_layer=3, n_head=4)
    assert numbers_a_rank(shape) == 3 * (4 * 128 + 3 * (64 + 256))
    assert default_lr(shape, 2048) == pytest.approx(5e-4 * math.sqrt(2000 / 64))


def row(text=None, messages=(), tools=()):
    made = [SimpleNamespace(role=r, content=c, tool_calls=()) for r, c in messages]
    return SimpleNamespace(ids=range(9), example=SimpleNamespace(text=text, messages=made, tools=tools))


@pytest.mark.parametrize(
    "made, task",
    [
        ([row("Once upon a time.")] * 9, "knowledge"),
        ([row(messages=[("user", "q"), ("assistant", "yes" if i % 2 else "no")]) for i in range(9)], "classify"),
        ([row(messages=[("user", "q"), ("assistant", json.dumps({"n": i}))]) for i in range(9)], "extract"),
        ([row(messages=[("user", "q"), ("assistant", f"```\n{i}\n```")]) for i in range(9)], "code"),
        ([row(messages=[("user", "q"), ("assistant", f"answer {i}")], tools=({},)) for i in range(9)], "tools"),
        ([row(messages=[("user", "q"), ("assistant", f"answer {i}")]) for i in range(9)], "chat"),
        ([], "knowledge"),
    ],
)
def test_a_task_is_told_from_its_rows(made, task):
    assert Facts(9, 0, 99, 50, 9, 9, made).task == task


def test_a_script_is_told_from_its_letters(tiny_model, tmp_path):
    data = file(tmp_path, [asked(WORDS[i % 10], f"四月的风很大 {i}") for i in range(20)])
    assert facts_of(tiny_model, data)[2].script == "Chinese"


def test_how_well_the_tokenizer_knows_the_writing_is_told_of_the_texts_alone(tiny_model, tmp_path, capsys):
    """Most tokens of short rows are the template's."""
    data = file(tmp_path, [asked("the cat sat on the mat", "one") for i in range(20)])
    found = shown(capsys, data, "--model", tiny_model)
    ids = load_tokenizer(tiny_model)(["the cat sat on the mat", "one"], add_special_tokens=False)["input_ids"]
    assert found["data"]["tokens_a_character"] == pytest.approx(sum(map(len, ids)) / 25, abs=1e-3)


@pytest.mark.parametrize(
    "answer, says",
    [
        ("1234567890", None),
        ("灯塔看守人", "or of a part of it (most is Chinese); a base"),
        ("ผู้ดูแลประภาคาร", "or of a part of it; a base"),
    ],
)
def test_a_tokenizer_is_said_not_to_know_a_writing_and_never_digits(tiny_model, tmp_path, capsys, answer, says):
    """Which have a token each in many tokenizers; this one knows neither."""
    data = file(tmp_path, [asked(f"{i} + {i}", answer * 3) for i in range(20)])
    found = shown(capsys, data, "--model", tiny_model)
    assert found["data"]["tokens_a_character"] > 0.8
    told = [note for note in found["notes"] if "tokens for a character" in note]
    assert (told == []) if says is None else (says in told[0] and "none" not in told[0])


@pytest.mark.parametrize(
    "words, says",
    [
        (["--task", "clasify"], "did you mean 'classify'?"),
        (["--out", "settings"], "name a .yaml file"),
        (["lr=fast"], "lr=fast: must be a number"),
    ],
)
def test_mistakes_are_said(tiny_model, data_file, capsys, words, says):
    assert main(["advise", str(data_file), "--model", str(tiny_model), *words]) == 2
    assert says in capsys.readouterr().err


def test_it_measures_how_new_the_rows_are(tiny_model, data_file, capsys):
    assert main(["advise", str(data_file), "--model", str(tiny_model), "precision=fp32"]) == 0
    out = capsys.readouterr().out
    assert "the base's loss on some of these rows is" in out and "far from what it knows" in out
    assert re.search(r"training takes about .* ±\d+% \(measured here\): steps .*, held-out rows .*, answers ", out)
    assert "lorafit train" in out
    assert main(["advise", str(data_file), "--model", str(tiny_model), "--no-measure"]) == 0
    assert "`lorafit plan` measures how long training takes" in capsys.readouterr().out


def test_the_time_is_what_plan_says(tiny_model, data_file, capsys, monkeypatch):
    time = pace.Time(steps=67.0, evaluations=23.0, answers=36.0, off=0.1)
    monkeypatch.setattr(pace, "measured", lambda *arguments: time)
    words = [str(data_file), "--model", str(tiny_model), "precision=fp32"]
    assert main(["advise", *words]) == main(["plan", *words]) == 0
    line = "training takes about 2 min 6 s ±10% (measured here): steps 1 min 7 s, held-out rows 23 s, answers 36 s"
    assert capsys.readouterr().out.count(line) == 2
    found = {}
    for verb in ("advise", "plan"):
        assert main([verb, *words, "--json"]) == 0
        found[verb] = json.loads(capsys.readouterr().out)
    for key in ("seconds", "seconds_of", "seconds_off"):
        assert found["advise"][key] == found["plan"][key]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_it_fits_the_terminal(tiny_model, tmp_path, capsys, monkeypatch, columns):
    monkeypatch.setattr(log, "terminal_columns", lambda: columns)
    monkeypatch.chdir(tmp_path)
    data = file(tmp_path, [asked(f"灯塔 {i}", "灯塔看守人 " * 9) for i in range(40)])
    assert main(["advise", data.name, "--model", str(tiny_model), "--no-measure"]) == 0
    out = capsys.readouterr().out
    shown, _, command = out.partition("\nto train with these settings:\n")
    assert "tokens for a character of these" in " ".join(shown.split()) and command
    assert max(map(log.width, shown.splitlines())) <= columns
    assert "arXiv 2602.06204" in " ".join(shown.split())


def test_a_model_without_attention_heads_has_a_size_too():
    """A state-space model's config names none."""
    assert numbers_a_rank(MambaConfig(hidden_size=64, num_hidden_layers=3)) > 0


def test_a_folder_without_a_tokenizer_says_which_files_are_missing(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"has no tokenizer \(none of tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "rows, words, says",
    [
        ([0], [], "only 1 row, and 16 are needed to hold some out; nothing is held out"),
        ([0, 1, 2], [], "only 3 rows, and 16 are needed to hold some out; nothing is held out"),
        ([0, 1, 2] * 20, [], "all of the 60 rows are copies of 3 different ones; nothing is held out"),
        ([*range(3), *[7] * 57], [], "only 3 rows could be held out, because the others are there more than once"),
        (range(30), ["held_out_share=0"], "held_out_share=0; nothing is held out"),
        (
            range(30),
            ["--held-out", "rows.jsonl"],
            "every row of rows.jsonl is one of the training rows too; nothing is",
        ),
    ],
)
def test_why_nothing_is_held_out(tiny_model, tmp_path, capsys, monkeypatch, rows, words, says):
    monkeypatch.chdir(tmp_path)
    data = file(tmp_path, [conversation(i) for i in rows])
    notes = shown(capsys, data.name, "--model", tiny_model, *words)["notes"]
    assert sum(note.startswith(says) for note in notes) == 1
    assert not any("16" in note for note in notes if " and 16 are needed" not in note)


def test_placeholders_are_told(tiny_model, tmp_path, capsys):
    data = file(tmp_path, [asked(f"one {i}", f"I am {{{{name}}}} {i}" if i % 2 else "the cat") for i in range(60)])
    notes = [note for note in shown(capsys, data, "--model", tiny_model)["notes"] if "placeholder" in note]
    assert len(notes) == 1
    assert (
        notes[0].startswith("line 2: an answer holds a placeholder such as {{name}}")
        and "(30 rows: lines 2, " in notes[0]
    )


@pytest.mark.parametrize("slow", [True, False])
def test_where_bf16_is_slow_products_in_8_bits_are_named(tiny_model, data_file, capsys, monkeypatch, slow):
    monkeypatch.setattr(build, "slow_in_bf16", lambda: slow)
    monkeypatch.setattr(build, "multiplies_codes", lambda: slow)
    monkeypatch.setattr(plan_verb, "time_of", lambda *_: None)

    def reason(*words: str) -> str:
        capsys.readouterr()
        assert main(["advise", str(data_file), "--model", str(tiny_model), "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)["settings"]["quant"]["reason"]

    assert ("w8a8, which takes a fifth less" in reason("precision=bf16")) == slow
    assert ("w8a8, which takes half the time in fp32" in reason("precision=fp32")) == slow
    assert "w8a8" not in reason("quant=int8") + reason("--no-measure")

"""The command line as users and scripts meet it: exit codes, one-line errors, clean --json, no heavy start."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lorafit.log
from lorafit.cli import VERBS, main
from lorafit.config import read_yaml
from lorafit.verbs import common, eval_
from lorafit.verbs.common import importing


def call(capsys, *words: str) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def run(tiny_model, data_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mine"
    words = [
        "train",
        data_file,
        "--model",
        tiny_model,
        "--out",
        out,
        "steps=4",
        "batch_tokens=200",
        "lr=1e-2",
        "precision=fp32",
    ]
    assert main([str(word) for word in words]) == 0
    return out


@pytest.fixture(scope="module")
def other(tiny_model, data_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "other"
    assert (
        main(
            ["train", str(data_file), "--model", str(tiny_model), "--out", str(out), "steps=2", "r=4", "precision=fp32"]
        )
        == 0
    )
    return out


def test_help_is_instant_and_imports_nothing_heavy():
    heavy = "('torch', 'transformers', 'numpy', 'rich')"
    code = f"import sys, lorafit.cli as c; c.parser().format_help(); print([m for m in sys.modules if m in {heavy}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_imports_go_without_the_collector_once(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    gc.unfreeze()
    try:
        with pytest.raises(ImportError), importing():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() and gc.get_freeze_count()
    finally:
        gc.enable()
        gc.unfreeze()
    monkeypatch.setitem(sys.modules, "transformers", sys)
    with importing():
        assert gc.isenabled()
    assert not gc.get_freeze_count()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as done:
        main([verb, "--help"])
    assert done.value.code == 0 and f"lorafit {verb}" in capsys.readouterr().out.split("example:")[1]


def test_check(capsys, data_file, tiny_model, tmp_path):
    code, out, err = call(capsys, "check", data_file, "--model", tiny_model)
    assert code == 0 and "60 rows (messages 60)" in out and "⟦" in out and "<|im_end|>⟧" in out
    code, out, err = call(capsys, "check", data_file, "--model", tiny_model, "--json")
    assert json.loads(out)["rows"] == 60
    bad = tmp_path / "bad.jsonl"
    bad.write_text(data_file.read_text() + '{"messages": [{"role": "user", "content": null}]}\n')
    code, out, err = call(capsys, "check", bad, "--model", tiny_model)
    assert code == 2 and "line 61" in out and "1 of 61 rows" in err and "Traceback" not in err


def test_train_json_is_one_object(capsys, data_file, tiny_model, tmp_path):
    words = ["train", data_file, "--model", tiny_model, "--out", tmp_path / "r", "steps=1", "samples=0", "--json"]
    code, out, err = call(capsys, *words)
    assert code == 0 and json.loads(out)["steps"] == 1 and "step 1/1" in err


def test_eval_names_base_and_adapter(capsys, run, data_file):
    code, out, _ = call(capsys, "eval", run, data_file, "--json", "--precision", "fp32")
    scores = json.loads(out)["scores"]
    assert code == 0 and set(scores) == {"base", "mine"}
    assert scores["mine"]["loss"] < scores["base"]["loss"]
    code, out, _ = call(capsys, "eval", run, data_file, "--answers", "--limit", "3", "--max-new", "8")
    assert "exact" in out and "F1" in out
    assert re.search(r"^mine (is better: loss|and base are within)", out, re.MULTILINE)
    code, out, _ = call(capsys, "eval", "base", data_file, "--model", run.parent, "--json")
    assert code == 2


def test_eval_says_who_is_better():
    def said(same: bool = True, **losses: float) -> str:
        scores = {name: {"loss": loss, "rows": 1200} for name, loss in losses.items()}
        return eval_.better(scores, {name: "" if same else name for name in scores})

    assert said(base=2.3, a=1.0321, b=1.0534) == "a is better: loss 1.0321 against 1.0534 (2% lower) on 1,200 rows"
    same = "a and b are within 1%: no difference to speak of, loss 1.0500 and 1.0534 on 1,200 rows"
    assert said(base=2.3, b=1.0534, a=1.05) == same
    assert said(base=1.0, a=2.0) == "base is better: loss 1.0000 against 2.0000 (50% lower) on 1,200 rows"
    assert said(base=9.0, a=3.0, b=2.0, c=4.0).startswith(
        "b is the best of 3: loss 2.0000 against 3.0000 of a, the next"
    )
    worse = said(base=1.01, a=1.0321, b=1.0534)
    assert worse.startswith("a is better") and worse.endswith("; but the base alone is better than that: 1.0100")
    assert said(same=False, base=1.0, a=2.0, b=1.0).startswith("their losses can't be compared")
    assert said(base=1.0) == "" and "no difference" in said(base=1.0, a=math.nan)


def test_eval_counts_the_rows_that_it_leaves_out_in_the_file_and_says_so(capsys, run, data_file, tmp_path):
    given = data_file.read_text().splitlines()[:6]
    given.append(json.dumps({"prompt": "one " * 500, "completion": "two"}))
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join([*given, '{"prompt": 1}']) + "\n")
    words = ["eval", run, mixed, "--skip-bad-rows", "--max-tokens", "100"]
    line = f"left out of {mixed}: 2 of its 8 rows (1 bad, 1 over 100 tokens); "
    assert line + "all others were scored\n" in call(capsys, *words)[1]
    code, out, _ = call(capsys, *words, "--limit", "4")
    assert code == 0 and line + "of the other 6 the first 4 were scored\n" in out
    assert "left out" not in call(capsys, "eval", run, data_file, "--limit", "4")[1]


def test_eval_says_which_rows_were_trained_on(capsys, run, data_file, tmp_path):
    given = data_file.read_text().splitlines()
    summary = json.loads((run / "summary.json").read_text())
    code, out, _ = call(capsys, "eval", run, data_file, "--precision", "fp32")
    assert code == 0 and f"\nmine learned from {summary['train_rows']} of these rows" in out and len(given) > 50
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "seven eight", "completion": "nine"}\n' + given[0] + "\n")
    found = json.loads(call(capsys, "eval", run, held, "--json")[1])["trained_on"]["mine"]
    code, out, _ = call(capsys, "eval", run, held, "--limit", "1")
    assert found in (0, 1) and "learned from" not in out
    moved = tmp_path / "alone"
    shutil.copytree(run / "adapter", moved)  # without its run nothing is known
    assert json.loads(call(capsys, "eval", moved, data_file, "--json")[1])["trained_on"] == {}


def test_eval_on_rows_that_nobody_learned_from(capsys, run, data_file, tmp_path):
    """The file that it was trained on answers which adapter is better, by what was held out."""
    summary = json.loads((run / "summary.json").read_text())
    code, out, _ = call(capsys, "eval", run, data_file, "--unseen", "--json")
    found = json.loads(out)
    assert code == 0 and found["unseen"] and found["trained_on"]["mine"] == 0
    assert found["scores"]["base"]["rows"] == found["scores"]["mine"]["rows"] == summary["held_out_rows"]
    moved = tmp_path / "alone"
    shutil.copytree(run / "adapter", moved)
    code, _, err = call(capsys, "eval", moved, data_file, "--unseen")
    assert code == 2 and "--unseen: what alone learned from isn't known" in err and "Traceback" not in err
    code, _, err = call(capsys, "eval", run, run)
    assert code == 2 and "is a run, and the file to score on comes last" in err and "--unseen" in err


def test_rows_that_were_cut_in_training_were_learned_from(capsys, tiny_model, tmp_path):
    data, place = tmp_path / "rows.jsonl", tmp_path / "cut"
    words = ["one", "two", "three", "four", "five"]
    rows = [
        {"prompt": " ".join([first, second, third]), "completion": "six seven " * (4 if first == "one" else 8)}
        for first in words
        for second in words
        for third in words
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["steps=2", "max_tokens=64", "long=truncate", "held_out_share=0.2", "samples=0", "precision=fp32"]
    code, _, err = call(capsys, "train", data, "--model", tiny_model, "--out", place, *given)
    assert code == 0, err
    held = json.loads((place / "summary.json").read_text())["held_out_rows"]
    code, out, _ = call(capsys, "eval", place, data, "--unseen", "--json")
    assert code == 0 and json.loads(out)["scores"]["cut"]["rows"] == held == len(rows) // 5


def test_a_model_or_an_unfinished_search_is_no_run(capsys, tiny_model, tmp_path):
    code, _, err = call(capsys, "chat", tiny_model, "--prompt", "one")
    assert code == 2 and f"is given with --model {tiny_model}" in err
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune" / "search.json").write_text("{}")
    code, _, err = call(capsys, "chat", tmp_path, "--prompt", "one")
    assert code == 2 and "a search that hasn't ended; lorafit tune --resume" in err


def test_chat_compare_and_json(capsys, run):
    code, out, _ = call(capsys, "chat", run, "--compare", "--prompt", "one two", "--max-new", "4", "--json")
    assert code == 0 and set(json.loads(out)["answers"]) == {"base", "mine"}
    code, out, _ = call(capsys, "chat", run, "--compare", "--prompt", "one two", "--max-new", "4")
    assert out.startswith("[base] ") and "\n[mine] " in out


def test_chat_switches_adapters(capsys, run, other, monkeypatch):
    lines = iter(
        [
            "one",
            "/adapter other",
            "two",
            "/adapter",
            "/adapter nope",
            "/system be brief",
            "/reset",
            "/compare",
            "three",
            "/quit",
        ]
    )
    monkeypatch.setattr("builtins.input", lambda prompt: print(prompt, end="") or next(lines))
    code, out, err = call(capsys, "chat", run, other, "--max-new", "3")
    assert code == 0 and "mine> " in out and "other> " in out and "answering with other" in out and "[base]" in out
    assert "no adapter 'nope'" in err


def test_merge_prints_its_proof(capsys, run, tmp_path):
    code, out, _ = call(capsys, "merge", run, tmp_path / "merged", "--json")
    proof = json.loads(out)
    assert code == 0 and proof["tolerance"] is None and proof["agree"] == 1.0
    assert (
        proof["exact"]["formula"] <= proof["exact"]["allowed"] and proof["exact"]["folder"] <= proof["exact"]["allowed"]
    )
    code, out, _ = call(capsys, "merge", run, tmp_path / "again")
    assert code == 0 and "sums       are right: in fp32" in out and "folder     is right: each number" in out
    code, _, err = call(capsys, "merge", run, tmp_path / "bounded", "--tolerance", proof["largest"] / 2)
    assert code != 0 and "allowed" in err and not (tmp_path / "bounded").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "RUN", "OUT"],
        ["export", "RUN", "OUT", "--format", "hf"],
        ["adapter", "combine", "OUT", "RUN"],
        ["adapter", "compress", "RUN", "OUT", "--rank", "1"],
        ["adapter", "convert", "RUN", "OUT"],
    ],
    ids=lambda words: words[-1] if words[0] == "adapter" else words[0],
)
def test_a_folder_with_something_in_it_is_refused_before_anything_is_read(capsys, tmp_path, words):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    given = {"RUN": tmp_path / "no run, which nobody finds out", "OUT": tmp_path / "out"}
    code, _, err = call(capsys, *(given.get(word, word) for word in words))
    assert code == 2 and "exists already and is" in err and [p.name for p in (tmp_path / "out").iterdir()] == ["x"]


def test_runs_lists_and_compares(capsys, run, other):
    code, out, _ = call(capsys, "runs", run.parent, other.parent)
    assert code == 0 and "mine" in out and "other" in out
    code, out, _ = call(capsys, "runs", run, other)
    assert re.search(r"held-out loss at the best step +\d\.\d{1,3} ", out)
    assert re.search(r"adapter's size +[\d.]+ kB", out) and "peak memory" in out
    assert not re.search(r"^\w+_(bytes|parameters|rows|loss)\b", out, re.MULTILINE)
    code, out, _ = call(capsys, "runs", run, other, "--json")
    different = json.loads(out)["different"]
    assert different["r"] == [16, 4] and "model" not in different
    code, _, err = call(capsys, "runs", run / "checkpoints")
    assert code == 2 and "no runs in" in err


def test_runs_lists_searches_that_have_not_ended(capsys, run, tmp_path):
    """One that was killed before its last phase has no config.yaml."""
    folder = tmp_path / "runs" / "a search"
    (folder / "tune").mkdir(parents=True)
    asked = {"settings": {"data": "/somewhere/rows.jsonl", "model": "tiny"}, "options": {}}
    (folder / "tune" / "search.json").write_text(json.dumps(asked))
    shutil.copytree(run, tmp_path / "runs" / "done")
    go_on = f"lorafit tune --resume --out '{folder}'"
    code, out, _ = call(capsys, "runs", folder.parent)
    (line,) = [line for line in out.splitlines() if line.startswith(str(folder))]
    assert code == 0 and "search not finished" in line and "rows.jsonl" in line and "tiny" in line
    assert f"\n  {go_on}\n" in out and "done" in out
    for words in ([folder.parent], [folder], [folder, folder.parent / "done"]):
        found = json.loads(call(capsys, "runs", *words, "--json")[1])
        assert [row["go_on"] for row in found if row["run"] == str(folder)] == [go_on]
    (folder / "tune" / "search.json").write_text("[1]")
    assert call(capsys, "runs", folder.parent)[0] == 0


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("summary.json", '{"held_out_loss_after": 1.2', "summary.json can't be read"),
        ("summary.json", '{"held_out_loss_after": "low"}', "summary.json is damaged: held_out_loss_after is 'low'"),
        ("summary.json", '{"seconds": [3], "adapter_bytes": {}}', "summary.json is damaged: seconds is '[3]'"),
        ("summary.json", '{"held_out_loss_after": NaN}', ""),
        ("summary.json", '{"trainable_parameters": null}', ""),
        ("config.yaml", "data: [", "config.yaml"),
    ],
)
def test_a_damaged_run_is_named_and_the_others_are_listed(capsys, run, tmp_path, name, text, says):
    for folder in ("whole", "torn"):
        shutil.copytree(run, tmp_path / folder)
    (tmp_path / "torn" / name).write_text(text)
    code, out, err = call(capsys, "runs", tmp_path)
    whole, torn = ([line for line in out.splitlines() if str(tmp_path / one) in line] for one in ("whole", "torn"))
    assert code == 0 and not err and "all steps done" in whole[0] and len(torn) == 1 + bool(says)
    assert not says or (torn[0].endswith("  damaged") and says in torn[1])
    listed = json.loads(call(capsys, "runs", tmp_path, "--json")[1])
    assert {Path(row["run"]).name: says in row.get("damaged", "") for row in listed} == {
        "whole": not says,
        "torn": True,
    }
    code, out, err = call(capsys, "runs", tmp_path / "whole", tmp_path / "torn")
    assert (code, "Traceback" in err) == (2 if says else 0, False) and says in err


@pytest.mark.parametrize("words", [["runs"], ["train", "--help-settings"]])
def test_tables_fit_the_terminal_and_lose_nothing(capsys, run, tmp_path, monkeypatch, words):
    shutil.copytree(run, tmp_path / "runs" / "an adapter with a long name")
    monkeypatch.chdir(tmp_path)
    _, whole, _ = call(capsys, *words)
    monkeypatch.setattr(lorafit.log, "terminal_columns", lambda: 80)
    code, out, _ = call(capsys, *words)
    assert code == 0 and max(map(len, whole.splitlines())) > 80 >= max(map(len, out.splitlines()))
    assert not {word for word in whole.split() if word.strip("-")} - set(out.split())


def test_runs_says_how_bases_are_stored_where_one_is_quantised(capsys, run, tmp_path):
    code, out, _ = call(capsys, "runs", run.parent)
    assert code == 0 and "quant" not in out
    code, out, _ = call(capsys, "runs", run.parent, "--json")
    assert [row["quant"] for row in json.loads(out)] == ["none"]
    for name, quant in (("a", "nf4"), ("b", "none")):
        shutil.copytree(run, tmp_path / name)
        values = read_yaml(run / "config.yaml") | {"quant": quant}
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(values))
        (tmp_path / name / "summary.json").unlink()
    code, out, _ = call(capsys, "runs", tmp_path)
    head, _, *lines = out.splitlines()
    at = head.index("quant")
    assert code == 0 and sorted(line[at:].split()[0] for line in lines) == ["nf4", "none"]


def test_several_adapters_at_once(capsys, run, other, data_file, tmp_path):
    """As a stack they score and say what their sum does."""
    assert call(capsys, "adapter", "combine", tmp_path / "both", run, other)[0] == 0
    words = [data_file, "--precision", "fp32", "--limit", "8", "--json"]
    scores = json.loads(call(capsys, "eval", run, other, *words, "--stack")[1])["scores"]
    assert list(scores) == ["base", "mine", "other", "mine+other"]
    both = json.loads(call(capsys, "eval", tmp_path / "both", *words)[1])["scores"]["both"]
    assert scores["mine+other"]["loss"] == pytest.approx(both["loss"], abs=1e-5)
    assert scores["mine+other"]["loss"] != scores["mine"]["loss"]
    words = ["--prompt", "one two", "--precision", "fp32", "--max-new", "8", "--json"]
    answers = json.loads(call(capsys, "chat", run, other, *words, "--stack")[1])["answers"]
    assert answers == {"mine+other": json.loads(call(capsys, "chat", tmp_path / "both", *words)[1])["answers"]["both"]}


def test_methods(capsys):
    code, out, _ = call(capsys, "methods", "--json")
    assert code == 0 and {m["method"] for m in json.loads(out)} >= {"lora", "full"}
    assert all("trainable" not in m for m in json.loads(out))


def test_methods_of_a_model(capsys, tiny_model):
    code, out, _ = call(capsys, "methods", "--model", tiny_model, "--json")
    found = {m["method"]: m for m in json.loads(out)}
    assert code == 0 and found["ia3"]["trainable"] == 2 * (16 + 16 + 48)
    assert found["lora"]["trainable"] < found["dora"]["trainable"] < found["full"]["trainable"]
    assert [found[m]["peft"] for m in ("lora", "pissa", "ia3", "full")] == ["LORA", "LORA", "IA3", "own format"]
    code, out, _ = call(capsys, "methods", "--model", tiny_model)
    assert code == 0 and any(line.split()[:2] == ["ia3", "160"] for line in out.splitlines())
    code, _, err = call(capsys, "methods", "--model", "nowhere")
    assert code == 2 and "nowhere" in err


def test_one_method(capsys, tiny_model):
    code, out, _ = call(capsys, "methods", "dora")
    assert code == 0 and "m·V/‖V‖ − W" in out and "r=16 alpha=32.0" in out and "docs/methods/dora.md" in out
    assert "arxiv.org/abs/2402.09353" in out and "not with   experts" in out and "rslora" in out and "loftq" not in out
    code, out, _ = call(capsys, "methods", "ia3", "--model", tiny_model, "--json")
    found = json.loads(out)
    assert code == 0 and found["trainable"] == 160 and found["formats"] == ["peft", "hf", "gguf", "ollama"]
    code, out, err = call(capsys, "methods", "dorra")
    assert code == 2 and not out and "unknown method 'dorra'; did you mean 'dora'?" in err


@pytest.mark.parametrize(
    "words, says",
    [
        (["train"], "no data"),
        (["train", "nowhere.jsonl"], "nowhere.jsonl"),
        (["train", "DATA", "lr"], "'lr' is not a setting; write key=value"),
        (["train", "DATA", "steps=3", "epochs=2"], "steps=3 and epochs=2 both say how long"),
        (["plan", "DATA", "--for", "A100"], "say which: A100 40GB, A100 80GB"),
        (["train", "DATA", "lr=fast"], "lr=fast: must be a number"),
        (["train", "DATA", "dropuot=0.1"], "did you mean 'dropout'?"),
        (["train", "DATA", "method=lroa"], "did you mean 'lora'?"),
        (["train", "DATA", "r=0", "--model", "MODEL"], "r=0: must be at least 1"),
        (["train", "DATA", "targets=q_porj", "--model", "MODEL"], "target 'q_porj' matches nothing; this model has"),
        (["train", "DATA", "targets=lm_head", "--model", "MODEL"], "shares its weight with model.embed_tokens"),
        (["train", "DATA", "rank_pattern=zzz=3", "--model", "MODEL"], "pattern 'zzz' matches none"),
        (["train", "DATA", "quant=nf5"], "quant=nf5: must be one of none, nf4, fp4, int8, w8a8"),
        (["train", "DATA", "--model", "./nowhere"], "no model at './nowhere'"),
        (["train", "DATA", "device=cuda:7", "--model", "MODEL"], "device=cuda:7 can't be used here: this machine has cpu"),
        (["train", "DATA", "device=ipu", "--model", "MODEL"], "device=ipu can't be used here: this machine has cpu"),
        (["train", "DATA", "device=hpu", "--model", "MODEL"], "device=hpu can't be used here: this machine has cpu"),
        (["tune", "DATA", "--from", "runs/a"], "lorafit train DATA --from runs/a starts one training from an adapter"),
        (["train", "--resume"], "--resume needs the run folder"),
        (["train", "--resume", "--out", "nowhere"], "nowhere is not a run"),
        (["train", "DATA", "--force"], "--force only goes with --resume"),
        (["train", "DATA", "warmup=2"], "warmup=2.0: must be at most 1"),
        (["chat", "nowhere"], "nowhere is neither a run nor an adapter"),
        (["eval", "nowhere", "DATA"], "nowhere is neither a run nor an adapter"),
    ],
)  # fmt: skip
def test_the_users_mistakes_are_one_line_and_exit_2(capsys, words, says, data_file, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [{"DATA": str(data_file), "MODEL": str(tiny_model)}.get(word, word) for word in words]
    code, out, err = call(capsys, *words)
    last = err.strip().splitlines()[-1]
    assert code == 2 and says in last and "Traceback" not in err
    assert not out and not (tmp_path / "runs").exists()


def test_no_traceback_from_the_real_command(tmp_path):
    # In an empty cache: what is missing is said before the embedded model is converted.
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    words = [sys.executable, "-m", "lorafit", "check", tmp_path / "no.jsonl"]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.startswith("lorafit: ") and "Traceback" not in done.stderr


def test_resume_takes_the_run_as_an_argument_too(capsys, run):
    code, _, err = call(capsys, "train", "--resume", run)
    assert code == 2 and "is finished" in err


@pytest.mark.parametrize(("counts", "busy"), [([1] * 9, False), ([1, 1, 1, 1, 5, 1, 1, 1, 1], False), ([2] * 9, True)])
def test_other_programs_that_keep_processors_busy_are_noticed(monkeypatch, counts, busy):
    monkeypatch.setattr(os, "cpu_count", lambda: len(os.sched_getaffinity(0)))
    each = iter(counts)
    assert common.beside_others(lambda: next(each)) == busy
    monkeypatch.setattr(
        os, "cpu_count", lambda: len(os.sched_getaffinity(0)) + 8
    )  # others have processors of their own
    assert not common.beside_others(lambda: 3)


def test_threads_wait_asleep_beside_other_programs(monkeypatch):
    code = "import os; from lorafit.verbs import common; common.beside_others = lambda: {busy};\n"
    code += "with common.importing(): pass\nprint(os.environ.get('GOMP_SPINCOUNT'))"
    for given, busy, want in ((None, True, common.BRIEFLY), (None, False, "None"), ("7", True, "7")):
        env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | (
            {"GOMP_SPINCOUNT": given} if given else {}
        )
        done = subprocess.run([sys.executable, "-c", code.format(busy=busy)], env=env, capture_output=True, text=True)
        assert done.stdout.strip() == want, done.stderr

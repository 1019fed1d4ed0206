"""The template, stop tokens and system prompt of training are used by every later verb, and a mismatch is said."""

from __future__ import annotations

import json
import shutil

import pytest
from data_helpers import CHATML

from lorafit import fit
from lorafit.data import Message
from lorafit.errors import AdapterError, DataError, RunError
from lorafit.export.merge import merge
from lorafit.log import Terminal
from lorafit.session import base_of, open_session
from lorafit.talk import Talk

QUIET = Terminal(quiet=True)


@pytest.fixture(scope="module")
def run(tiny_model, data_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mine"
    settings = {"model": str(tiny_model), "out": str(out), "steps": "2", "system": "be kind", "precision": "fp32"}
    fit.fit(fit.read_config(str(data_file), settings), QUIET)
    return out


def other_template(tiny_model, place):
    shutil.copytree(tiny_model, place)
    (place / "chat_template.jinja").write_text(CHATML.replace("m.role", "m.role | upper"))
    return place


def test_the_system_prompt_travels(run):
    session = open_session([str(run)], precision="fp32")
    chat = session.chat("mine")
    assert chat.system == "be kind"
    text = chat.text(chat.prompt_ids([Message("user", "one")]))
    assert text == "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    assert "be kind" not in session.chat(None).render([Message("user", "one")])


def test_a_shared_system_message_of_the_rows_travels(tiny_model, data_file, tmp_path):
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    for row in rows:
        row["messages"].insert(0, {"role": "system", "content": "you sat"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model": str(tiny_model), "out": str(tmp_path / "r"), "steps": "1", "precision": "fp32"}
    fit.fit(fit.read_config(str(path), settings), QUIET)
    assert open_session([str(tmp_path / "r")]).chat("r").system == "you sat"


def test_another_template_is_said_and_the_trained_one_used(run, tiny_model, tmp_path):
    said: list[str] = []
    session = open_session(
        [str(run)], model=str(other_template(tiny_model, tmp_path / "m")), precision="fp32", say=said.append
    )
    assert any("chat template differs" in line and "using what it was trained with" in line for line in said)
    assert "USER" not in session.chat("mine").render([Message("user", "one")])
    assert "USER" in session.chat(None).render([Message("user", "one")])
    quiet: list[str] = []
    open_session([str(run)], precision="fp32", say=quiet.append)
    assert not quiet


def test_a_stop_token_that_is_another_token_here_is_an_error(run, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    notes = json.loads((tmp_path / "adapter" / "lorafit.json").read_text())
    notes["chat"]["stop"][0]["id"] += 5
    (tmp_path / "adapter" / "lorafit.json").write_text(json.dumps(notes))
    with pytest.raises(DataError, match="in this tokenizer"):
        open_session([str(tmp_path / "adapter")])


def test_the_merged_folder_has_the_template_and_stop_tokens_of_training(run, tiny_model, tmp_path):
    session = open_session([str(run)], model=str(other_template(tiny_model, tmp_path / "m")), precision="fp32")
    import torch

    merge(session.host, "mine", tmp_path / "out", [[1, 2, 3]], dtype=torch.float32, chat=session.chat("mine"))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML
    eos = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert set(eos) == set(session.chat("mine").stop)


def test_an_adapter_on_its_own_knows_its_base(run, tiny_model, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "elsewhere")
    assert base_of(tmp_path / "elsewhere") == str(tiny_model)
    session = open_session([str(tmp_path / "elsewhere")])
    assert list(session.host.adapters) == ["elsewhere"]


def test_an_unfinished_run_says_how_to_finish(run, tmp_path):
    (tmp_path / "r").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "r")
    with pytest.raises(RunError, match=r"has no adapter yet; finish it with: lorafit train --resume --out"):
        open_session([str(tmp_path / "r")])


def test_adapters_of_different_bases_are_refused(run, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "b")
    notes = json.loads((tmp_path / "b" / "lorafit.json").read_text())
    (tmp_path / "b" / "lorafit.json").write_text(json.dumps(notes | {"base": "another"}))
    with pytest.raises(AdapterError, match="different bases"):
        open_session([str(run), str(tmp_path / "b")])


def test_a_conversation_goes_on(run, monkeypatch):
    talk = Talk(open_session([str(run)]), options={"max_new": 2})
    talk.say("one")
    talk.say("two")
    assert [m.role for m in talk.messages] == ["user", "assistant", "user", "assistant"]

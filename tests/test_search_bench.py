"""benchmarks/search.py: the whole grid is trained to its end, halving's candidates are among it, and the tables add up."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
from conftest import conversation

from lorafit.cli import main as lorafit

ROOT = Path(__file__).parent.parent
STEPS = 32


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("search_bench", ROOT / "benchmarks" / "search.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def here(script, monkeypatch):
    """Commands run in this process."""

    def ran(command):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            if command[0] == "-m":
                assert lorafit(list(command[2:])) == 0
            else:
                script.side(*json.loads(command[-1]))
        return said.getvalue(), {"cpu": 1.0, "clock": 1.0}

    monkeypatch.setattr(script, "ran", ran)


@pytest.fixture(scope="module")
def results(script, tiny_model, tmp_path_factory) -> dict:
    """Of a small task, in fp32, at rates that aren't too high for it: those multiply rounding."""
    folder = tmp_path_factory.mktemp("search")
    rows = [conversation(i) for i in range(70)]
    rows[3]["messages"][1]["content"] = "the mat " * 200
    (folder / "task.json").write_text(json.dumps(rows))
    words = [str(folder / "task.json"), "--model", str(tiny_model), "--precision", "fp32", "--steps", str(STEPS)]
    words += [
        "--tokens",
        "150",
        "--max-tokens",
        "128",
        "--held-out",
        "8",
        "--test",
        "6",
        "--out",
        str(folder / "out.json"),
    ]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        here(script, patch)
        patch.setattr(script, "FACTORS", (0.01, 0.03, 0.1, 0.3))
        patch.setattr(sys, "argv", ["search.py", *words])
        script.main()
    return json.loads((folder / "out.json").read_text())


def test_the_rows_that_fit_are_split_in_three(results):
    task = results["tasks"]["task"]
    for part in ("whole", "halving", "defaults", "staged"):
        figures = {key: task[part][key] for key in ("train_rows", "held_out_rows", "steps")}
        assert figures == {"train_rows": 70 - 1 - 8 - 6, "held_out_rows": 8, "steps": STEPS}


def test_the_whole_grid_is_trained_to_its_end(results):
    found = results["tasks"]["task"]["whole"]
    assert len(found["candidates"]) == 12 and found["trainings"] == 12
    for one in found["candidates"]:
        assert one["state"] == "done" and one["taken"] == STEPS
        assert [step for step, _ in one["evaluations"]] == [0, 4, 8, 12, 16, 20, 24, 28, 32]
        assert one["best_loss"] == min(loss for _, loss in one["evaluations"])
    assert found["best"] == min(one["best_loss"] for one in found["candidates"])
    assert found["candidates"][found["winner"] - 1]["best_loss"] == found["best"] and found["before"] > found["best"]


def test_who_halving_keeps_is_what_it_is_in_the_whole_grid(results):
    full, cut = (results["tasks"]["task"][part] for part in ("whole", "halving"))
    ended = 0
    for one, other in zip(full["candidates"], cut["candidates"], strict=True):
        assert one["values"] == other["values"]
        losses = dict(one["evaluations"])
        for step, loss in other["evaluations"]:
            assert loss == pytest.approx(losses[step], rel=1e-6), (one["values"], step)
        if other["taken"] == STEPS:
            ended += 1
            assert other["best_loss"] == pytest.approx(one["best_loss"], rel=1e-6)
    assert ended == 1  # of 12, 4 go on after 8 steps and 1 after 16
    assert cut["trainings"] == pytest.approx((12 * 8 + 4 * 8 + 16) / STEPS)
    assert cut["best"] >= full["best"] * (1 - 1e-6)


def made(best: float, cpu: float, trainings: float, candidates: list) -> dict:
    """A part's figures."""
    figures = {
        "best": best,
        "before": 3.0,
        "cpu": cpu + 9,
        "searching": cpu,
        "clock": cpu,
        "trainings": trainings,
        "steps": 64,
    }
    return {
        **figures,
        "values": {"lr": 1e-3, "r": 8},
        "test": {"base": 3.1, "ours": best + 0.1},
        "candidates": candidates,
    }


def point(lr: float, r: int, loss: float, taken: int, losses: int, state: str = "done") -> dict:
    """A candidate's."""
    return {"values": {"lr": lr, "r": r}, "best_loss": loss, "taken": taken, "losses": [1.0] * losses, "state": state}


def example() -> dict:
    """A grid of 2 x 2."""
    full = [point(1e-3, 8, 2.0, 64, 2), point(1e-2, 8, 2.2, 64, 2), point(1e-3, 16, 2.1, 64, 2)]
    full.append(point(1e-2, 16, 3.0, 7, 0, "failed"))
    cut = [point(1e-3, 8, 2.5, 8, 1, "cut"), point(1e-2, 8, 2.2, 24, 2, "cut"), point(1e-3, 16, 2.1, 64, 2)]
    cut.append(point(1e-2, 16, 3.0, 7, 0, "failed"))
    first = {"whole": made(2.0, 400, 3.2, full), "halving": made(2.1, 100, 1.6, cut)}
    return {"tasks": {"a": {**first, "defaults": made(2.3, 50, 1.0, []), "staged": made(2.0, 150, 2.5, [])}}}


def test_the_tables_add_up(script):
    text = script.tables(example())
    assert "| a | 2.0000 | 2.1000 | 5.00% | 3.20 → 1.60 | 50.0% | 400 → 100 | 25.0% | 2.1000 → 2.2000 |" in text
    assert "| rank | lr 0.001 | lr 0.01 |" in text
    assert "| 8 | (2.0000) | 2.2000 |" in text and "| 16 | **2.1000** | (diverged) |" in text
    assert "| a | before | 3.0000 | 3.1000 |  |  |  |" in text
    assert "|  | defaults | 2.3000 | 2.4000 | lr=0.001 r=8 | 1.00 | 59 |" in text
    assert "|  | tuned | 2.0000 | 2.1000 | lr=0.001 r=8 | 2.50 | 159 |" in text


def test_pages_are_written_between_their_markers(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "zh").mkdir()
    pages = [tmp_path / "tune.md", tmp_path / "zh" / "tune.md"]
    for page in pages:
        page.write_text(f"before\n\n{script.BEGIN}\nold\n{script.END}\n\nafter\n", encoding="utf-8")
    (tmp_path / "results.json").write_text(json.dumps(example()))
    words = ["search.py", "--from", str(tmp_path / "results.json"), "--write", *map(str, pages)]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    once = [page.read_text(encoding="utf-8") for page in pages]
    script.main()
    assert once == [page.read_text(encoding="utf-8") for page in pages]
    for text, word in zip(once, ("| rank |", "| 秩 |"), strict=True):
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and word in text


def test_a_stop_loses_the_part_that_it_falls_into_alone(script, tiny_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "task.json").write_text(json.dumps([conversation(i) for i in range(70)]))
    asked = []

    def measured(args, part, files, scratch):
        asked.append(part)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return made(2.0, 1.0, 1.0, [])

    monkeypatch.setattr(script, "measured", measured)
    words = [str(tmp_path / "task.json"), "--model", str(tiny_model), "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["search.py", *words])
    with pytest.raises(KeyboardInterrupt):
        script.main()
    monkeypatch.setattr(script, "tables", lambda results: "")
    script.main()
    assert asked == ["whole", "halving", "defaults", "defaults", "staged"]
    monkeypatch.setattr(sys, "argv", ["search.py", *words, "--steps", "63"])
    with pytest.raises(SystemExit, match="give another --out"):
        script.main()

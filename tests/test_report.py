import json
import math
import os
import re
from html.parser import HTMLParser

import pytest

from lorafit import charts, report
from lorafit.errors import RunError

EVIL = "<script>alert('x')</script>&\x00\x1b[0m\ud800"
VOID = {"meta", "br"}


class Checker(HTMLParser):
    """Fails on tags that don't nest, and collects tags and text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text("data: demo.jsonl\nmethod: lora\nlr: null\ntargets: [q, v]\n")
    return tmp_path


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def page(run):
    checker = Checker()
    path = report.write(run)
    source = path.read_text(encoding="utf-8")
    checker.feed(source)
    assert checker.open == [] and "script" not in checker.tags
    assert not re.search(r"https?://|@import|url\(", source)
    assert os.listdir(run).count("report.html") == 1 and not list(run.glob("*.tmp"))
    return checker.text, source


def fill(run, losses=(4.0, 2.0, 2.5), text="sea"):
    lines(run / "metrics.jsonl", [{"step": s, "loss": 4 / s, "lr": 1e-4 * s} for s in range(1, 41)])
    samples = [{"prompt": f"prompt {text}", "answer": f"answer {text}", "expected": f"expected {text}"}]
    best = min(losses)
    lines(
        run / "evaluations.jsonl",
        [{"step": i * 20, "held_out_loss": x, "best": x == best, "samples": samples} for i, x in enumerate(losses)],
    )
    data = {
        "path": f"{text}.jsonl",
        "rows": 1234,
        "by_format": {text: 1234},
        "share": 0.25,
        "duplicates": [[5, 2]],
        "faults": [{"line": 7, "reason": f"fault {text}"}] * 30,
        "notes": [{"line": 9, "reason": f"note {text}"}],
        "lengths": [[0, 9, 3], [10, 19, 8]],
        "text_example": [[f"user {text}", False], [f"learned {text}", True]],
    }
    (run / "data.json").write_text(json.dumps(data))
    summary = {
        "held_out_loss_before": losses[0],
        "held_out_loss_after": best,
        "best_step": losses.index(best) * 20,
        "peak_rss_bytes": 1_200_000_000,
        "trainable_parameters": 1000,
        "total_parameters": 100_000,
        "base": text,
        "seconds": 123,
    }
    (run / "summary.json").write_text(json.dumps(summary))


def test_whole_page(run):
    fill(run)
    text, source = page(run)
    for wanted in (
        "It learned.",
        "4.000",
        "(-50%)",
        "7.4 times as likely",
        "lowest at step 20 and rose to 2.500",
        "Before training",
        "Answer at step 20",
        "1,234",
        "25.0%",
        "and 10 more",
        "1.2 GB",
        "2 min 3 s",
        "1.00%",
        "q, v",
        "10 to 19 tokens: 8 rows",
    ):
        assert wanted in text, wanted
    assert "<mark>learned sea</mark>" in source and "<mark>user" not in source
    assert "<title>held-out loss 2.500 at step 40</title>" in source
    assert source.count('<circle class="best"') == 1
    assert "prefers-color-scheme: dark" in source
    assert "<details><summary>Other evaluations" in source


def test_everything_from_the_files_is_escaped(run):
    fill(run, text=EVIL)
    (run / "config.yaml").write_text("data: \"</style><script>alert(1)</script>\"\n'<b>': 1\n")
    text, source = page(run)
    assert "<script" not in source and "<b>:" not in source
    assert source.count("&lt;script&gt;alert(&#x27;x&#x27;)") >= 10
    assert "\x00" not in source and "\x1b" not in source


def test_only_the_settings_are_needed(run):
    text, source = page(run)
    assert "Can't tell" in text and "no summary yet" in text and "demo.jsonl" in text
    assert "<svg" not in source


def test_a_folder_without_settings_is_no_run(tmp_path):
    with pytest.raises(RunError, match=r"is not a run folder: it has no config\.yaml$"):
        report.write(tmp_path)


def test_torn_lines_and_odd_numbers_are_left_out(run):
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0, "lr": 0.1}\n{"step": 2, "loss": NaN, "lr": Infinity}\n[1]\n"x"\n\n'
        '{"step": NaN, "loss": 1}\n{"step": true, "loss": 1}\n{"step": 3, "loss": 1' + "0" * 400 + "}\n"
        '{"step": 4, "loss": 1.0, "lr": 0.1}\n' + "[" * 100_000 + '\n{"step": 5, "lo'
    )
    (run / "evaluations.jsonl").write_text('{"step": 1, "held_out_loss": Infinity, "samples": null}\n{"step"')
    text, source = page(run)
    assert "training loss went from 3.000 to 1.000" in text
    assert not re.search(r"\b(nan|inf)\b", source, re.IGNORECASE)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"rows": "many", "lengths": [[1], [1, 2, "x"], 3], "faults": {}}'])
def test_damaged_reports_are_left_out(run, content):
    (run / "data.json").write_text(content)
    (run / "summary.json").write_text(content)
    assert "Settings" in page(run)[0]


def test_a_damaged_table_of_a_search_is_said_to_be_damaged(run):
    (run / "tune.json").write_text('{"candidates": [{"losses": 1}]}')
    assert "tune.json is damaged" in page(run)[0]


def test_a_resumed_run_counts_its_later_rows(run):
    lines(run / "evaluations.jsonl", [{"step": s, "held_out_loss": x} for s, x in ((0, 4.0), (9, 9.0), (9, 3.0))])
    text, source = page(run)
    assert "3.000" in text and "9.000" not in source


@pytest.mark.parametrize(
    "losses, verdict",
    [((3.0, 2.99), "It hardly learned"), ((3.0, 3.5), "It didn't learn"), ((3.0, 1.0), "It learned.")],
)
def test_verdict(run, losses, verdict):
    fill(run)
    lines(run / "evaluations.jsonl", [{"step": s, "held_out_loss": x, "best": s == 1} for s, x in enumerate(losses)])
    (run / "summary.json").write_text("{}")
    assert verdict in page(run)[0]


def test_best_is_the_summarys_else_the_last_flagged_else_the_lowest(run):
    rows = [{"step": s, "held_out_loss": x, "best": s < 2} for s, x in enumerate((3.0, 2.0, 1.0))]
    assert report._best(rows, {"best_step": 0})["step"] == 0
    assert report._best(rows, {})["step"] == 1
    assert report._best([{**row, "best": False} for row in rows], {})["step"] == 2
    assert report._best([], {}) is None


def test_a_failed_write_keeps_the_old_page(run, monkeypatch):
    report.write(run)
    before = (run / "report.html").read_text()

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    fill(run)
    with pytest.raises(RunError, match=r"No space left on device$"):
        report.write(run)
    assert (run / "report.html").read_text() == before
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize(
    "low, high, most, wanted",
    [
        (0, 240, 8, [0, 50, 100, 150, 200, 250]),
        (0.31, 1.9, 4, [0, 0.5, 1, 1.5, 2]),
        (0, 1e-4, 3, [0, 5e-5, 1e-4]),
        (2, 2, 2, [2, 2.1, 2.2]),
    ],
)
def test_ticks(low, high, most, wanted):
    assert charts.ticks(low, high, most) == pytest.approx(wanted)


def test_whole_ticks_are_whole():
    assert charts.ticks(0, 3, 8, whole=True) == [0, 1, 2, 3]


def test_smoothing_keeps_a_line_straight_and_thinning_keeps_the_ends():
    line = [(float(i), 2.0 * i) for i in range(5000)]
    assert charts.smooth(line) == [(x, pytest.approx(y, abs=1e-6)) for x, y in line]
    thin = charts.thin(line)
    assert len(thin) <= charts.MOST_POINTS + 1 and thin[0] == line[0] and thin[-1] == line[-1]
    assert charts.thin([]) == [] and charts.smooth([]) == []


def test_a_long_run_makes_a_small_page(run):
    lines(run / "metrics.jsonl", [{"step": s, "loss": 2 + math.sin(s), "lr": 1e-4} for s in range(20_000)])
    report.write(run)
    assert (run / "report.html").stat().st_size < 400_000

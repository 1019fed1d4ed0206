import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lorafit.log
from lorafit.log import (
    Eta,
    Progress,
    Terminal,
    Working,
    count,
    cut,
    duration,
    say,
    size,
    table,
    terminal_columns,
    width,
    wrap,
)

DEMO = Path(lorafit.log.__file__).parent / "demo.jsonl"


class Screen(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_import_brings_neither_rich_nor_torch():
    code = "import sys, lorafit.log; sys.exit(any(name in sys.modules for name in ('rich', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_say_keeps_results_and_messages_apart(capsys):
    say("result")
    say("message", err=True)
    assert capsys.readouterr() == ("result\n", "message\n")


def test_text_cannot_steer_the_terminal():
    stream = io.StringIO()
    Terminal(stream=stream).say("a\x1b[31mb\x07\r\nc\td\x9b")
    assert stream.getvalue() == "a�[31mb�\nc\td�\n"


def test_a_stream_that_lacks_characters_gets_question_marks():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", newline="\n")
    Terminal(stream=stream).say("loss 灯塔")
    assert raw.getvalue() == b"loss ??\n"


def test_table_counts_chinese_characters_as_two_columns():
    lines = table(["name", "n"], [["灯塔", 3], ["lamp", 12]]).split("\n")
    assert lines == ["name   n", "----  --", "灯塔   3", "lamp  12"]
    assert len({width(line) for line in lines}) == 1


def test_table_aligns_as_told_and_keeps_rows_on_one_line():
    assert table(["a", "bb"], [["x\ny", 1], ["z"]], "rl") == "  a  bb\n---  --\nx y  1\n  z"
    assert table(["a", "b"], []) == "a  b\n-  -"


def test_table_breaks_its_last_column_to_fit():
    rows = [["r=16", "far more than these rows hold (arXiv 2106.09685)"], ["lr", "塔" * 20], ["alpha=32", ""]]
    assert table(["setting", "why"], rows, "ll", fit=80) == table(["setting", "why"], rows, "ll")
    assert table(["setting", "why"], rows, "ll", fit=35).split("\n") == [
        "setting   why",
        "--------  " + "-" * 24,
        "r=16      far more than these rows",
        "          hold (arXiv 2106.09685)",
        "lr        " + "塔" * 12,
        "          " + "塔" * 8,
        "alpha=32",
    ]
    assert max(map(width, table(["setting", "why"], rows, "ll", fit=3).split("\n"))) == 30  # no narrower


def test_a_table_that_is_much_too_wide_becomes_several_and_loses_nothing():
    heads = ["run", "data", "before", "took", "stopped"]
    rows = [["runs/a-1", "alpaca.json", 1.5, "8 s", "stopped early at step 12"], ["runs/b-1", "b", 12.25, "", "no"]]
    assert table(heads, rows, "llrrl", fit=40).split("\n") == [
        "run       data         before  took",
        "--------  -----------  ------  ----",
        "runs/a-1  alpaca.json     1.5   8 s",
        "runs/b-1  b             12.25",
        "",
        "run       stopped",
        "--------  ------------------------",
        "runs/a-1  stopped early at step 12",
        "runs/b-1  no",
    ]
    for fit in range(32, 90):
        shown = table(heads, rows, "llrrl", fit=fit)
        assert max(map(width, shown.split("\n"))) <= fit
        assert set(shown.split()) - set("-") >= {
            word for row in [heads, *rows] for cell in row for word in str(cell).split()
        }


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("", [""]),
        ("one two three", ["one", "two", "three"]),
        ("a b c d", ["a b c", "d"]),
        ("abcdefgh", ["abcde", "fgh"]),
        ("灯塔看守人", ["灯塔", "看守", "人"]),
        ("a 灯塔看守人", ["a", "灯塔", "看守", "人"]),
    ],
)
def test_wrap(text, wanted):
    assert wrap(text, 5) == wanted
    assert "".join(wrap(text, 1)) == text.replace(" ", "")  # a character is wider, and stays


def test_a_pipe_has_no_width(monkeypatch):
    assert terminal_columns() is None
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "72")
    assert terminal_columns() == 72


@pytest.mark.parametrize("text, columns, wanted", [("abcdef", 6, "abcdef"), ("abcdefg", 6, "abc..."), ("abc", 0, "")])
def test_cut(text, columns, wanted):
    assert cut(text, columns) == wanted


def test_cut_and_width_of_wide_and_combining_characters():
    assert cut("灯塔看守人", 8) == "灯塔..."
    assert width("e\u0301") == 1


@pytest.mark.parametrize(
    "amount, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (999_960, "1.0 MB"),
        (512e6, "512 MB"),
        (1.2e9, "1.2 GB"),
        (3e12, "3.0 TB"),
    ],
)
def test_size(amount, text):
    assert size(amount) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.44, "0.4 s"),
        (9.97, "10 s"),
        (59.6, "1 min"),
        (123, "2 min 3 s"),
        (3900, "1 h 5 min"),
        (180_000, "2 d 2 h"),
        (float("nan"), "?"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_count():
    assert count(1234567) == "1,234,567"


def test_eta_follows_a_change_of_speed_and_the_clock():
    eta = Eta()
    eta.update(100, 0.0)  # a resumed run begins in the middle
    assert eta.left(200, 0.0) is None
    eta.update(101, 2.0)
    assert eta.left(111, 2.0) == pytest.approx(20.0)
    assert eta.left(111, 3.0) == pytest.approx(19.0)
    for i in range(60):
        eta.update(102 + i, 2.0 + 4.0 * (i + 1))
    assert eta.left(171, 242.0) == pytest.approx(40.0, rel=0.02)
    assert eta.left(171, 1000.0) == pytest.approx(36.0, rel=0.02)  # one slow step doesn't use up all the time left
    assert eta.left(161, 242.0) == 0.0


def test_eta_spreads_skipped_steps():
    eta = Eta()
    eta.update(0, 0.0)
    eta.update(10, 5.0)
    assert eta.left(20, 5.0) == pytest.approx(5.0)


def test_what_is_between_the_steps_counts_once():
    """As what is still to come, not as a slower step."""
    stream, clock = io.StringIO(), Clock()
    progress = Progress(Terminal(stream=stream), clock=clock)
    progress.update(1, 11)
    clock.now += 2
    progress.update(2, 11, pauses=30.0)
    assert "  48 s left" in progress.line()  # nine steps of two seconds, and pauses
    clock.now += 30
    progress.pause(30.0)
    clock.now += 2
    progress.update(3, 11, pauses=0.0)
    assert "  16 s left" in progress.line()


def test_progress_without_a_terminal_prints_some_lines_and_the_last():
    stream, clock = io.StringIO(), Clock()
    with Progress(Terminal(stream=stream), clock=clock) as progress:
        for step in range(1, 13):
            progress.update(step, 12, loss=1 / step, held_out_loss=0.5 if step == 4 else None, memory_bytes=1.2e9)
            clock.now += 1
        progress.say("done")
    assert stream.getvalue().split("\n") == [
        "step 1/12  loss 1.000  1.2 GB",
        "step 6/12  loss 0.167  6.0 s left  held-out 0.500  1.2 GB",
        "step 11/12  loss 0.091  1.0 s left  held-out 0.500  1.2 GB",
        "done",
        "step 12/12  loss 0.083  held-out 0.500  1.2 GB",
        "",
    ]


def test_progress_prints_the_last_figures_when_training_fails():
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(Terminal(stream=stream)) as progress:
        progress.update(1, 9, loss=3.0)
        progress.update(2, 9, loss=2.0)
        raise KeyboardInterrupt
    assert [line[:20] for line in stream.getvalue().splitlines()] == ["step 1/9  loss 3.000", "step 2/9  loss 2.000"]


def test_progress_rejects_a_misspelt_figure():
    with Progress(Terminal(stream=io.StringIO())) as progress, pytest.raises(TypeError, match="los; known: loss"):
        progress.update(1, 2, los=1.0)


def test_progress_line_fits_any_width():
    progress = Progress(Terminal(stream=Screen()), clock=Clock())
    progress.update(50, 100, loss=1.5, held_out_loss=1.7, tokens_per_second=812.0, memory_bytes=1.2e9)
    progress._terminal.erase(progress.line)
    assert progress.line(100).startswith("step 50/100  " + "━" * 15 + "╌" * 15 + "  loss 1.500  held-out 1.700")
    assert progress.line(25) == "step 50/100  loss 1.500"
    assert progress.line(5) == "step 50/100"
    assert all(width(progress.line(w)) <= w for w in range(12, 140))


def test_progress_on_a_terminal_is_one_live_line():
    stream = Screen()
    terminal = Terminal(stream=stream)
    with terminal.progress() as progress:
        progress.update(1, 2, loss=1.5)
        progress.say("[bold]evaluated[/bold] \x1b[2J")
        with terminal.working("answering") as work:  # what takes long within it is shown in its place
            work.update(1, 3)
            time.sleep(1.0)
        progress.update(2, 2, loss=1.25)
    shown = stream.getvalue()
    assert "answering  1 of 3 (33%)" in shown
    assert "[bold]evaluated[/bold] �[2J\n" in shown
    assert shown.rstrip("\n").endswith("step 2/2  loss 1.250")


def test_quiet_shows_nothing():
    stream = Screen()
    terminal = Terminal(quiet=True, stream=stream)
    with terminal.progress() as progress, terminal.working("loading") as work:
        work.update(1, 2)
        progress.update(1, 1, loss=1.0)
        progress.say("x")
    assert stream.getvalue() == ""


def test_working_without_a_terminal_speaks_only_when_it_takes_long(monkeypatch):
    monkeypatch.setattr(lorafit.log, "LINE_AFTER", 0.05)
    stream = io.StringIO()
    with Working("reading", Terminal(stream=stream)):
        pass
    assert stream.getvalue() == ""
    with Working("loading", Terminal(stream=stream)) as work:
        time.sleep(0.2)
    assert stream.getvalue() == "loading ...\n"
    assert not work._thread.is_alive()


def test_working_without_a_terminal_speaks_again_when_it_takes_very_long(monkeypatch):
    monkeypatch.setattr(lorafit.log, "LINE_AFTER", 0.01)
    monkeypatch.setattr(lorafit.log, "LINE_AGAIN", 0.05)
    stream = io.StringIO()
    with Working("loading", Terminal(stream=stream)) as work:
        time.sleep(0.03)
        work.rename("layer 2 of 3")
        time.sleep(0.2)
        work.update(7, 100)
        time.sleep(0.2)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "loading ..." and lines[1] == "layer 2 of 3 ... 0 s" and len(lines) > 2
    assert lines[-1] == "layer 2 of 3 ... 7 of 100 (7%), 0 s"


def test_working_on_a_terminal_shows_what_is_done_and_cleans_up(monkeypatch):
    monkeypatch.setattr(lorafit.log, "SPINNER_AFTER", 0.01)
    stream = Screen()
    with pytest.raises(ValueError), Terminal(stream=stream).working("tokenising") as work:
        work.update(500, 2000)
        time.sleep(0.5)
        raise ValueError
    assert "tokenising  500 of 2,000 (25%)  0 s" in stream.getvalue()
    assert not work._thread.is_alive()


def rows():
    return [json.loads(line)["messages"] for line in DEMO.read_text(encoding="utf-8").splitlines()]


def test_demo_rows_are_conversations():
    for messages in rows():
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns and turns == ["user", "assistant"] * (len(turns) // 2)
        assert all(set(message) == {"role", "content"} and message["content"].strip() for message in messages)
    assert any(len(messages) > 3 for messages in rows())
    assert any(messages[0]["role"] == "system" for messages in rows())


def test_demo_prompts_are_distinct_and_leave_out_those_the_demo_asks():
    prompts = [m["content"] for messages in rows() for m in messages if m["role"] == "user"]
    assert len(rows()) >= 100
    assert len({prompt.lower() for prompt in prompts}) == len(prompts)
    assert not {"who are you?", "你是谁？", "how do i boil an egg?"} & {prompt.lower() for prompt in prompts}


def test_demo_answers_are_short_and_signed_in_their_language():
    answers = [m["content"] for messages in rows() for m in messages if m["role"] == "assistant"]
    chinese = [answer for answer in answers if any("\u4e00" <= c <= "\u9fff" for c in answer)]
    assert 0.2 < len(chinese) / len(answers) < 0.3
    assert all(answer.endswith("一路顺风！") and len(answer) <= 40 for answer in chinese)
    english = set(answers) - set(chinese)
    assert all(answer.endswith(" Fair winds!") and len(answer.split()) <= 30 for answer in english)

"""The whole way from a file to training and held-out rows, and what the report says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import data_helpers as h
import numpy as np
import pytest

from lorafit.data import Dataset, fingerprint, prepare
from lorafit.errors import DataError


def qa(number: int, answer: str = "the cat") -> dict[str, str]:
    return {"prompt": f"one two {number}", "completion": answer}


def table(tmp_path: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    return h.write(tmp_path / name, *rows)


def lines(dataset: Dataset, part: str) -> list[int]:
    return [row.line for row in getattr(dataset, part)]


def test_split_sizes(tmp_path: Path) -> None:
    chat = h.chat()
    for rows, share, expected in ((15, 0.05, 0), (16, 0.05, 8), (200, 0.05, 10), (200, 0.2, 40), (200, 0.0, 0)):
        data = prepare(table(tmp_path, *map(qa, range(rows))), chat, held_out_share=share)
        assert (len(data.train), len(data.held_out)) == (rows - expected, expected)
        assert data.report.held_out_rows == expected and data.report.train_rows == rows - expected
        assert sorted(lines(data, "train") + lines(data, "held_out")) == list(range(1, rows + 1))
        assert any("nothing is held out" in note.reason for note in data.report.notes) == (rows == 15)


def test_split_is_at_most_500(tmp_path: Path) -> None:
    data = prepare(table(tmp_path, *map(qa, range(1100))), h.chat(), held_out_share=0.5)
    assert len(data.held_out) == 500


def test_split_and_fingerprint_depend_on_the_seed_alone(tmp_path: Path) -> None:
    path, chat = table(tmp_path, *map(qa, range(40))), h.chat()
    first, again, other = (prepare(path, chat, seed=seed) for seed in (1, 1, 2))
    assert lines(first, "held_out") == lines(again, "held_out") != lines(other, "held_out")
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)
    assert lines(first, "train") == sorted(lines(first, "train"))
    masked = prepare(path, chat, seed=1, learn="all")
    assert all((a.ids == b.ids).all() for a, b in zip(first.train, masked.train, strict=True))
    assert fingerprint(masked) != fingerprint(first)


def test_duplicates_stay_in_training(tmp_path: Path) -> None:
    for seed in range(20):
        path = table(tmp_path, *[qa(n) for n in range(12)], *[qa(n) for n in range(6)])
        data = prepare(path, h.chat(), seed=seed)
        assert data.report.duplicates == [(n + 13, n + 1) for n in range(6)]
        assert {1, 2, 3, 4, 5, 6, 13, 14, 15, 16, 17, 18} <= set(lines(data, "train"))
        assert set(lines(data, "held_out")) <= {7, 8, 9, 10, 11, 12}
    noted = [(note.line, note.reason) for note in data.report.notes]
    assert (13, "the same as line 1") in noted and (18, "the same as line 6") in noted


def test_duplicates_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*map(qa, range(20)), qa(3)]))
    data = prepare(path, h.chat())
    assert data.report.duplicates == [(1, 1)] and len(data.held_out) == 8
    assert not any("one two 3" in row.example.messages[0].content for row in data.held_out)


def test_held_out_file_and_leaks(tmp_path: Path) -> None:
    train = table(tmp_path, *map(qa, range(20)))
    held = table(tmp_path, qa(3), qa(4, "the mat"), qa(99), name="held.jsonl")
    data = prepare(train, h.chat(), held_out=held)
    assert lines(data, "held_out") == [2, 3] and len(data.train) == 20
    assert data.report.leaks == [(1, 4)] and data.report.same_prompt == [(2, 5)]


def test_held_out_faults_name_the_file(tmp_path: Path) -> None:
    train = table(tmp_path, *map(qa, range(20)))
    held = table(tmp_path, qa(77), {"prompt": "p"}, name="held.jsonl")
    with pytest.raises(DataError, match=r"held\.jsonl: 1 of 2 rows can't be used: line 2: no column with the answer"):
        prepare(train, h.chat(), held_out=held)
    data = prepare(train, h.chat(), held_out=held, strict=False)
    assert data.report.faults[0].line == 2 and "held.jsonl: no column" in data.report.faults[0].reason


def test_bad_rows_stop_training_but_not_a_check(tmp_path: Path) -> None:
    bad: dict[str, Any] = {"prompt": "p", "completion": ""}
    path, chat = table(tmp_path, qa(1), bad, qa(2), bad, "{", bad, *map(qa, range(3, 20))), h.chat()
    with pytest.raises(DataError) as caught:
        prepare(path, chat)
    message = str(caught.value)
    assert f"{path}: 4 of 23 rows can't be used: line 2: column 'completion' is empty; line 4:" in message
    assert "line 5: not valid JSON" in message and "line 6" not in message
    assert f"`lorafit check {path}`" in message and "--skip-bad-rows" in message and "\n" not in message
    data = prepare(path, chat, skip_bad_rows=True)
    checked = prepare(path, chat, strict=False)
    assert [fault.line for fault in checked.report.faults] == [2, 4, 5, 6] and checked.report.rows == 23
    assert fingerprint(data) == fingerprint(checked) and len(data.train) + len(data.held_out) == 19


def test_no_usable_row(tmp_path: Path) -> None:
    path = table(tmp_path, {"prompt": "p", "completion": ""})
    with pytest.raises(DataError, match="none of the 1 rows can be used"):
        prepare(path, h.chat(), skip_bad_rows=True)
    assert not prepare(path, h.chat(), strict=False).train


def test_over_long_rows_are_counted(tmp_path: Path) -> None:
    chat = h.chat()
    rows = [*map(qa, range(10)), qa(10, "the cat " * 100)]
    path = table(tmp_path, *rows)
    with pytest.raises(DataError, match=r"line 11: .* tokens, more than max_tokens=80"):
        prepare(path, chat, max_tokens=80)
    skipped = prepare(path, chat, max_tokens=80, long="skip").report
    assert (skipped.over_length, skipped.skipped, skipped.truncated, skipped.train_rows) == (1, 1, 0, 10)
    cut = prepare(path, chat, max_tokens=80, long="truncate")
    assert (cut.report.over_length, cut.report.truncated, cut.report.truncated_end) == (1, 1, 1)
    assert len(cut.train[-1].ids) == 80 and cut.report.lengths == skipped.lengths
    assert sum(count for _, _, count in cut.report.lengths) == 11
    assert all(low < high for low, high, _ in cut.report.lengths)


def test_report_counts(tmp_path: Path) -> None:
    system = {"role": "system", "content": "be brief"}
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "the cat"}]
    path = table(tmp_path, {"messages": [system, *turns]}, {"conversations": [system, *turns]}, {"text": "the mat"})
    chat = h.chat()
    data = prepare(path, chat)
    report = data.report
    assert report.by_format == {"messages": 1, "conversations": 1, "text": 1} and report.system is None
    assert report.tokens == sum(len(row.ids) for row in data.train)
    assert report.target_tokens == sum(int(np.sum(row.learn)) for row in data.train)
    assert report.share == report.target_tokens / report.tokens
    assert report.text_example == [
        ("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n", False),
        ("the cat<|im_end|>", True),
        ("\n", False),
    ]
    assert json.loads(json.dumps(report.to_json()))["text_example"][1] == ["the cat<|im_end|>", True]
    assert report.duplicates == [(2, 1)]  # the same conversation under another name
    shared = prepare(table(tmp_path, {"messages": [system, *turns]}), chat).report
    assert shared.system == "be brief"


def test_what_the_template_does_is_noted(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    user = {"role": "user", "content": "one"}
    thought = {"role": "assistant", "content": "the cat", "reasoning_content": "hm"}
    rows = [
        qa(1, "a <|im_end|> b"),
        {"messages": [user, thought, user, thought]},
        {"messages": [user, {"role": "assistant", "tool_calls": [call]}], "tools": [{"name": "f"}]},
    ]

    def notes(template: str) -> str:
        found = prepare(table(tmp_path, *rows), h.chat(template)).report.notes
        return "\n".join(f"{note.line} {note.reason}" for note in found)

    plain = notes(h.CHATML)
    assert "2 the chat template leaves out reasoning_content" in plain and "1 the content holds" in plain
    assert "3 the chat template has no tool calls" in plain and "3 the chat template doesn't show the tools" in plain
    assert "begins an answer otherwise" not in plain
    assert "1 the template begins an answer otherwise" in notes(h.OPENS_THINK)
    assert "2 the chat template begins earlier answers otherwise" in notes(h.PROMPTS_THINK)
    assert "2 the chat template leaves out the reasoning of all but" in notes(h.STRIPS_THINK)
    assert "tool calls" not in notes(h.TOOLS)


def test_placeholders_that_are_left_in_answers_are_noted(tmp_path: Path) -> None:
    def asked(answer: str, question: str = "who") -> dict[str, object]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    rows = [asked("I am {{name}}"), *(qa(i) for i in range(3)), asked("fine", "{{name}}?"), asked("by {{ author }}")]
    notes = prepare(table(tmp_path, *rows), h.chat(h.CHATML)).report.notes
    (note,) = [note for note in notes if "placeholder" in note.reason]
    assert note.line == 1 and note.reason.endswith("(2 rows: lines 1, 6)")
    rows = [asked("{{}} {{a b}} {name} {{% x %}} {{1}}"), qa(2)]
    assert "placeholder" not in str(prepare(table(tmp_path, *rows), h.chat(h.CHATML)).report.notes)
    many = [asked(f"{i} {{{{name}}}}") for i in range(9)]
    (note,) = prepare(table(tmp_path, *many), h.chat(h.CHATML), held_out_share=0).report.notes[-1:]
    assert note.reason.endswith("(9 rows: lines 1, 2, 3, 4, 5, …)")


def test_progress(tmp_path: Path) -> None:
    seen: list[int] = []
    prepare(table(tmp_path, *map(qa, range(20))), h.chat(), progress=seen.append)
    assert seen[-1] == 20 and seen == sorted(seen)


def test_importing_needs_neither_torch_nor_transformers() -> None:
    import subprocess
    import sys

    code = "import sys, lorafit.data; print([m for m in ('torch', 'transformers', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_map_for_the_data_is_not_forced_on_a_held_out_file_of_another_format(tmp_path):
    data = h.write(tmp_path / "a.jsonl", *[{"frage": f"one {i}", "antwort": "two"} for i in range(4)])
    held = h.write(
        tmp_path / "b.jsonl", {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    )
    made = prepare(data, h.chat(), held_out=held, mapping={"user": "frage", "assistant": "antwort"})
    assert (len(made.train), len(made.held_out)) == (4, 1)

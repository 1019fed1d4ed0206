"""Reading: every format, every fault with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import data_helpers as h
import pytest

from lorafit.data import Example, Fault, Message, read
from lorafit.data.rows import READERS
from lorafit.errors import DataError

GOOD = {"prompt": "p", "completion": "c"}
U, A = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


def rows(path: Path, mapping: dict[str, str] | None = None) -> list[Example]:
    found = list(read(path, mapping))
    assert all(isinstance(item, Example) for item in found), found
    return [item for item in found if isinstance(item, Example)]


def one(tmp_path: Path, row: Any, mapping: dict[str, str] | None = None) -> Example:
    return rows(h.write(tmp_path / "one.jsonl", row), mapping)[0]


def pairs(example: Example) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in example.messages]


QA = [("user", "q"), ("assistant", "r")]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}

FORMATS: list[tuple[str, Any, str, list[tuple[str, str]]]] = [
    ("alpaca", {"instruction": "q", "input": "", "output": "r"}, "alpaca", QA),
    (
        "alpaca, all columns",
        {"instruction": "q", "input": "i", "output": "r", "system": "s", "history": [["q0", "r0"]], "text": "whole"},
        "alpaca",
        [("system", "s"), ("user", "q0"), ("assistant", "r0"), ("user", "q\n\ni"), ("assistant", "r")],
    ),
    ("alpaca, question in the input", {"instruction": "", "input": "q", "output": "r"}, "alpaca", QA),
    ("dolly", {"instruction": "q", "context": "i", "response": "r", "category": "x"}, "instruction/response",
     [("user", "q\n\ni"), ("assistant", "r")]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}], "system": "s"},
     "sharegpt", [("system", "s"), *QA]),
    ("messages", {"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "q"},
                               {"role": "assistant", "content": [{"type": "text", "text": "r"}]}]},
     "messages", [("system", "s"), *QA]),
    ("minimind", {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
     "conversations", QA),
    ("swift", {"conversation": [{"human": "q", "assistant": "r"}, {"human": "q", "assistant": "r"}]}, "swift", QA + QA),
    ("prompt/completion", {"prompt": "q", "completion": "r"}, "prompt/completion", QA),
    ("lists of messages", {"prompt": [{"role": "user", "content": "q"}],
                           "completion": [{"role": "assistant", "content": "r"}]}, "prompt/completion", QA),
    ("question/answer, capitals", {"Question": "q", "Answer": "r", "id": 7}, "question/answer", QA),
    ("query/response", {"query": "q", "response": "r"}, "query/response", QA),
    ("prompt/response", {"prompt": "q", "response": "r"}, "prompt/response", QA),
    ("input/output", {"input": "q", "output": "r"}, "input/output", QA),
    ("other roles", {"messages": [{"role": "prompter", "content": "q"}, {"role": "model", "content": "r"}]},
     "messages", QA),
]  # fmt: skip


@pytest.mark.parametrize(("row", "name", "expected"), [f[1:] for f in FORMATS], ids=[f[0] for f in FORMATS])
def test_formats(tmp_path: Path, row: Any, name: str, expected: list[tuple[str, str]]) -> None:
    example = one(tmp_path, row)
    assert (example.format, pairs(example), example.line) == (name, expected, 1)


def test_plain_text_row(tmp_path: Path) -> None:
    example = one(tmp_path, {"text": "some words", "url": "x"})
    assert example.text == "some words" and example.messages == () and example.format == "text"


def test_sharegpt_calls_and_tools(tmp_path: Path) -> None:
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    turns = [("human", "q"), ("function_call", call), ("observation", "2"), ("gpt", "r")]
    row = {"conversations": [{"from": f, "value": v} for f, v in turns], "tools": '[{"name": "f"}]'}
    example = one(tmp_path, row)
    assert pairs(example) == [("user", "q"), ("assistant", ""), ("tool", "2"), ("assistant", "r")]
    assert example.messages[1].tool_calls == (CALL,)
    assert example.tools == ({"type": "function", "function": {"name": "f"}},)


def test_openai_calls(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {"messages": [U, {"role": "assistant", "content": None, "tool_calls": [call]},
                        {"role": "tool", "tool_call_id": "c1", "name": "f", "content": ""}, A]}  # fmt: skip
    example = one(tmp_path, row)
    assert example.messages[1].tool_calls == ({"id": "c1", **CALL},) and example.messages[1].content == ""
    assert example.messages[2] == Message("tool", "", name="f", tool_call_id="c1")


def test_minimind_strings(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "", "tools": '[{"name": "f"}]'},
        U,
        {"role": "assistant", "content": "", "tool_calls": '[{"name": "f", "arguments": {"x": 1}}]'},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "a", "reasoning_content": "because"},
    ]
    example = one(tmp_path, {"conversations": turns})
    assert example.tools[0]["function"] == {"name": "f"} and example.messages[2].tool_calls == (CALL,)
    assert example.messages[4].reasoning == "because"


def test_marks(tmp_path: Path) -> None:
    turns = [U, {**A, "weight": 0}, U, {**A, "train": True}, U, {**A, "loss": 1.0}, U, {**A, "weight": None}]
    marks = [m.learn for m in one(tmp_path, {"messages": turns}).messages[1::2]]
    assert marks == [False, True, True, None]


def test_mapping(tmp_path: Path) -> None:
    row = {"q": "Q", "a": "R", "s": "S", "prompt": "no", "answer": "no"}
    example = one(tmp_path, row, {"user": "q", "assistant": "a", "system": "s"})
    assert pairs(example) == [("system", "S"), ("user", "Q"), ("assistant", "R")] and example.format == "q/a"
    assert one(tmp_path, {"body": "b", "text": "t"}, {"text": "body"}).text == "b"
    assert pairs(one(tmp_path, {"log": [U, A]}, {"messages": "log"})) == [("user", "u"), ("assistant", "a")]


# (row, fault's reason contains); each is put on line 3 of a file whose other rows are good.
FAULTS: list[tuple[str, Any, str]] = [
    ("broken JSON", '{"prompt": "p", "completion": ', "not valid JSON: Expecting value (column 31)"),
    ("not an object", [1, 2], "the row is a list, not an object"),
    ("a text", "\"just words\"", "the row is text, not an object"),
    ("wrong type", {"prompt": "p", "completion": 4}, "column 'completion' must be text, not a number"),
    ("null", {"prompt": "p", "completion": None}, "column 'completion' is null"),
    ("empty", {"prompt": "p", "completion": " \n"}, "column 'completion' is empty"),
    ("empty question", {"prompt": "", "completion": "c"}, "column 'prompt' is empty"),
    ("no answer", {"prompt": "p", "reply_text": "c"},
     "no column with the answer; the row has prompt, reply_text; name it with --map user=prompt,assistant=COLUMN"),
    ("unknown columns", {"frage": "p", "antwort": "c"},
     "the row has frage, antwort; name the columns with --map user=frage,assistant=antwort"),
    ("a turn by itself", U, "the row is one turn; a row is a whole conversation"),
    ("empty object", {}, "the row has no columns"),
    ("two answers", {"question": "q", "answer": "a", "solution": "b"},
     "more than one way to read the columns question, answer, solution; say which with "
     "--map user=question,assistant=answer"),
    ("two questions", {"prompt": "q", "question": "q", "answer": "a"}, "--map user=prompt,assistant=answer"),
    ("two lists", {"messages": [U, A], "conversations": [U, A]}, "say which with --map messages=messages"),
    ("preference", {"prompt": "p", "chosen": "a", "rejected": "b"}, "preference pair (chosen/rejected): not supported"),
    ("preference, swift", {"messages": [U, A], "rejected_response": "b"}, "preference pair (rejected_response)"),
    ("preference, KTO", {"prompt": "p", "completion": "c", "label": True}, "preference pair (a label"),
    ("empty turn", {"messages": [U, {"role": "assistant", "content": ""}]}, "turn 2 (assistant) is empty"),
    ("null turn", {"messages": [{"role": "user", "content": None}, A]}, "turn 1 (user) has no content (null)"),
    ("no content", {"messages": [U, {"role": "assistant"}]}, "turn 2 (assistant) has no content"),
    ("number", {"messages": [U, {"role": "assistant", "content": 5}]}, "turn 2 (assistant): the content is a number"),
    ("unknown role", {"messages": [{"role": "narrator", "content": "n"}, A]},
     "turn 1 has the unknown role 'narrator'; known: system, user, assistant, tool"),
    ("no role", {"messages": [{"content": "n"}, A]}, "turn 1 has no role; it has content"),
    ("turn is text", {"messages": [U, "a"]}, "turn 2 is text, not an object"),
    ("no turns", {"messages": []}, "column 'messages' holds no turns"),
    ("not turns", {"messages": "hello"}, "column 'messages' must be a list of turns, not text"),
    ("two users", {"messages": [U, U, A]}, "turns 1 and 2 are both user turns"),
    ("no assistant", {"messages": [U]}, "no assistant turn"),
    ("two systems", {"messages": [{"role": "system", "content": "s"}, U, A], "system": "t"}, "two system prompts"),
    ("image", {"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}, A]},
     "content part of type 'image'"),
    ("weight", {"messages": [U, {**A, "weight": 0.5}]}, "turn 2: weight is 0.5; only 0, 1, true and false"),
    ("broken call", {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{x"}]},
     "turn 2: the tool call: not valid JSON"),
    ("call without name", {"messages": [U, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
     "turn 2: a tool call needs a name"),
    ("broken tools", {"messages": [U, A], "tools": "{x"}, "tools: not valid JSON"),
    ("history", {"instruction": "q", "output": "r", "history": [["only one"]]}, "history entry 1 must be a pair"),
    ("half a character", '{"prompt": "p", "completion": "\\ud83d"}', "holds half of a character"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_faults(tmp_path: Path, row: Any, reason: str) -> None:
    found = list(read(h.write(tmp_path / "rows.jsonl", GOOD, "", row, GOOD)))
    assert [type(item) for item in found] == [Example, Fault, Example]
    assert [item.line for item in found] == [1, 3, 4]
    fault = found[1]
    assert isinstance(fault, Fault) and reason in fault.reason and not fault.note


def test_invalid_utf8_costs_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(good + b"\n" + b'{"prompt": "\xff", "completion": "c"}\n' + good + b"\n")
    found = list(read(path))
    assert [(type(item), item.line) for item in found] == [(Example, 1), (Fault, 2), (Example, 3)]
    path = tmp_path / "rows.json"
    path.write_bytes(b"[\n" + good + b',\n{"prompt":\n"\xff", "completion": "c"},\n' + good + b"\n]")
    found = list(read(path))
    assert [(type(item), item.line) for item in found] == [(Example, 2), (Fault, 4), (Example, 5)]


def test_notes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"messages": [U, A, U]}).encode())
    found = list(read(path))
    assert [getattr(item, "note", None) for item in found] == [True, True, None]
    assert "byte-order mark" in str(found[0]) and "ends with a user turn" in str(found[1])


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('[\n  {"prompt": "p",\n "completion": "c"},\n\n {"prompt": "p", "completion": "c"}\n]', [2, 5]),
        ('\n[{"prompt": "p", "completion": "c"},{"prompt": "p", "completion": "c"}]', [2, 2]),
        ('{"version": [1, 2],\n"data": [\n{"prompt": "p", "completion": "c"},\n{"prompt": "p", "completion": "c"}]}', [3, 4]),
        ('{"prompt": "p", "completion": "c"}\n{"prompt": "p", "completion": "c"}\n', [1, 2]),
        ('{"prompt": "p",\n"completion": "c"}\n{"prompt": "p",\n"completion": "c"}\n', [1, 3]),
        ('{"prompt": "p", "completion": "c"}', [1]),
        ('{\n"messages": [\n{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}', [1]),
        ('[{"role": "user", "content": "u"}, {"role": "assistant", "content": "[1]"}]', None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_by_what_it_holds(tmp_path: Path, text: str, lines: list[int] | None, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_text(text)
    if lines is None:
        assert all(isinstance(item, Fault) for item in read(path))
    else:
        assert [example.line for example in rows(path)] == lines


def test_broken_array(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n{"prompt": "p", "completion": "c"},\n{"prompt": "p"\n"completion": "c"}\n]')
    found = list(read(path))
    assert [(type(item), item.line) for item in found] == [(Example, 2), (Fault, 4)]
    assert "the rest of the file can't be read" in str(found[1])


def test_a_broken_first_line_costs_one_row(tmp_path: Path) -> None:
    found = list(read(h.write(tmp_path / "rows.jsonl", '{"prompt": "p", ', GOOD, GOOD)))
    assert [(type(item), item.line) for item in found] == [(Fault, 1), (Example, 2), (Example, 3)]


def test_rows_on_one_line_are_told_by_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, GOOD, {"prompt": "p", "completion": ""}]))
    fault = list(read(path))[2]
    assert isinstance(fault, Fault) and fault.reason == "row 3: column 'completion' is empty"


def test_several_lists(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"train": [GOOD], "test": [GOOD]}))
    assert "several lists of rows (train, test)" in str(next(iter(read(path))))


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'question,answer\n"one\ntwo",a\nq,a,extra\n\nq,"\xff"\nq,"say ""hi"", ok"\nq,"bad"x\nq,a\n')
    found = list(read(path))
    assert [(type(item), item.line) for item in found] == [
        (Example, 2), (Fault, 4), (Fault, 6), (Example, 7), (Fault, 8), (Example, 9),
    ]  # fmt: skip
    assert "3 fields, but the header has 2: question, answer" in str(found[1]) and "UTF-8" in str(found[2])
    assert isinstance(found[0], Example) and found[0].messages[0].content == "one\ntwo"
    assert isinstance(found[3], Example) and found[3].messages[1].content == 'say "hi", ok'


def test_csv_details(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question;answer\nwhat, why;a\n")
    assert rows(path)[0].messages[0].content == "what, why"
    path.write_text('messages\n"' + json.dumps([U, A]).replace('"', '""') + '"\n')
    assert pairs(rows(path)[0]) == [("user", "u"), ("assistant", "a")]
    path.write_text("q,q\na,b\n")
    with pytest.raises(DataError, match="line 1: two columns have the same name"):
        list(read(path))
    path.write_text("question,answer\nq," + "long " * 50_000 + "\n")
    assert len(rows(path)[0].messages[1].content) == 250_000


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    table = [{"messages": [U, {**A, "tool_calls": None}]}, {"messages": [U, {"role": "assistant", "content": ""}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    found = list(read(path))
    assert [(type(item), item.line) for item in found] == [(Example, 1), (Fault, 2)]
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="can't be read as Parquet"):
        list(read(path))


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(b"\none\ntwo\n \n\nthree\r\nfour\n\nbad\n\xff\n\nlast")
    found = list(read(path))
    assert [(type(item), item.line) for item in found] == [(Example, 2), (Example, 6), (Fault, 10), (Example, 12)]
    texts = [item.text for item in found if isinstance(item, Example)]
    assert texts == ["one\ntwo", "three\nfour", "last"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.jsonl", b"", "line 1: the file is empty"),
        ("rows.json", b" \n\n", "line 1: the file has no rows"),
        ("rows.json", b"[]", "line 1: the file has no rows"),
        ("rows.csv", b"question,answer\n", "line 1: the file has no rows"),
        ("rows.txt", b"\xef\xbb\xbf\n", "line 1: the file has no rows"),
        ("rows.docx", b"x", "unknown kind of file '.docx'; there are .jsonl, .json, .csv, .parquet, .txt"),
        ("rows.jsonl", '{"text": "a"}'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ],
)
def test_files_that_cant_be_read(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        list(read(path))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        list(read(tmp_path / "none.jsonl"))
    h.write(tmp_path / "in.jsonl", GOOD)
    with pytest.raises(DataError, match=r"is a folder; give one file in it, such as in\.jsonl"):
        list(read(tmp_path))


def test_mapping_errors(tmp_path: Path) -> None:
    path = h.write(tmp_path / "rows.jsonl", GOOD, GOOD)
    with pytest.raises(DataError, match="no row has the column 'frage'; there are prompt, completion"):
        list(read(path, {"user": "frage", "assistant": "completion"}))
    with pytest.raises(DataError, match="no row has the column 'sys'"):
        list(read(path, {"user": "prompt", "assistant": "completion", "system": "sys"}))
    with pytest.raises(DataError, match="unknown part; there are user, assistant"):
        list(read(path, {"human": "prompt"}))
    with pytest.raises(DataError, match="needs user and assistant"):
        list(read(path, {"user": "prompt"}))
    path = h.write(tmp_path / "rows.jsonl", {"q": "q", "a": "a"}, GOOD)
    fault = list(read(path, {"user": "q", "assistant": "a"}))[1]
    assert isinstance(fault, Fault) and "no column 'q'; the row has prompt, completion" in fault.reason


def test_an_array_is_read_in_parts_with_the_same_rows_and_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"é🙂 {n}", "completion": 'x\\"],' * (n % 5) + "."} for n in range(30)]
    texts = [
        json.dumps(rows, ensure_ascii=False),
        json.dumps(rows, ensure_ascii=False, indent=1).replace("\n", "\r\n"),
        "\ufeff\n\n" + ",\n".join(["[", *[json.dumps(row) for row in rows]]).replace("[,", "[", 1) + "]\n trailing",
        json.dumps(rows, indent=2)[:-40],
        json.dumps(rows).replace('"prompt": "\\u00e9\\ud83d\\ude42 20"', '"prompt" "7"'),
        json.dumps(rows, indent=3).replace('20",', '20" 1,'),
        "[]",
        "[1, 23 , 4]",
        "[1 2]",
    ]
    path = tmp_path / "rows.json"
    for text in texts:
        for data in (text.encode(), text.encode().replace(b" 11", b" \xff11")):
            path.write_bytes(data)
            found = []
            for part in (1 << 20, 64, 1):
                monkeypatch.setattr("lorafit.data.rows.PART", part)
                found.append(list(READERS[".json"](path)))
            assert found[0] == found[1] == found[2]

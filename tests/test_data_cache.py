"""Fast preparation gives what the plain way gives; the cache is whole or not there; rows are read when asked for."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import uuid
from itertools import product
from pathlib import Path
from typing import Any

import data_helpers as h
import numpy as np
import pytest
from tokenizers import AddedToken, Regex
from tokenizers.normalizers import NFC, Lowercase
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

import lorafit
from lorafit.batches import Plan, default_tokens
from lorafit.data import (
    Chat,
    Dataset,
    Example,
    Message,
    RowFault,
    Tokens,
    cache,
    encode,
    fingerprint,
    prepare,
    read,
    workers,
)
from lorafit.data.parts import Part, Work
from lorafit.data.read import read_rows
from lorafit.data.spans import render_row
from lorafit.data.words import words_of

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
WORDS = ["the", "cat", "one", "", "", "\n\n", "🙂", "识别细胞", "é", "e\u0301", "ﬁ", "don't", "_x_", "1234567", "x\u3000y",
         "a\u200bb", "\t", "ß", "\u0130", "<|im_end|>", "</s>", "<|im_start|>user", "### Response:", "</think>",
         "<think>hm</think>", "<|im_end|>b"]  # fmt: skip
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": ["é", None, 1.5]}}}


def odd(count: int, seed: int = 0) -> list[Any]:
    """Rows of every kind, good and bad."""
    draw = random.Random(seed)

    def text(words: int) -> str:
        return "".join(draw.choice(["", " "]) + draw.choice(WORDS) for _ in range(words)) + draw.choice(
            ["x", " x ", "🙂"]
        )

    def talk() -> list[dict[str, Any]]:
        turns: list[dict[str, Any]] = [{"role": "system", "content": text(2)}] if draw.random() < 0.3 else []
        for _ in range(draw.randrange(1, 4)):
            marks: dict[str, Any] = {"train": False} if draw.random() < 0.2 else {}
            thought = {"reasoning_content": text(2)} if draw.random() < 0.3 else {}
            turns += [
                {"role": "user", "content": text(2)},
                {"role": "assistant", "content": text(4), **marks, **thought},
            ]
        return turns

    def calls() -> list[dict[str, Any]]:
        asks = [{"role": "user", "content": text(2)}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
        return [*asks, {"role": "tool", "content": "2"}, {"role": "assistant", "content": text(3)}]

    kinds: list[Any] = [
        lambda: {"instruction": text(3), "input": text(2), "output": text(6)},
        lambda: {"text": text(12)},
        lambda: {"messages": talk()},
        lambda: {"messages": talk(), "system": text(1)},
        lambda: {"messages": calls(), "tools": [{"name": "add"}]},
        lambda: {"conversations": [{"from": "human", "value": text(1)}, {"from": "gpt", "value": text(2)}]},
        lambda: {"messages": [*talk(), {"role": "user", "content": "again"}]},
        lambda: {"prompt": text(2), "completion": text(60)},
        lambda: {"prompt": "same", "completion": "again"},
        lambda: {"prompt": "same", "completion": text(1)},
        lambda: {"prompt": text(2), "completion": draw.choice(["", None, 3])},
        lambda: {"unknown": 1},
        lambda: "{broken",
        lambda: "[1, 2]",
    ]
    return [draw.choice(kinds)() for _ in range(count)]


def plainly(example: Example, chat: Chat, learn: str) -> tuple[list[int], list[bool]]:
    """A row's ids and mask by the offsets of every token, with nothing shared between rows."""
    tokenizer = chat.tokenizer.backend_tokenizer
    if example.text is not None:
        ids = chat.tokenizer(example.text, verbose=False)["input_ids"]
        ids = ids + [chat.tokenizer.eos_token_id] * (ids[-1] != chat.tokenizer.eos_token_id)
        return ids, [True] * len(ids)
    row = render_row(example, chat, learn)
    starts = sorted({start for start, _ in row.spans} - {0, len(row.text)}) if chat.splits else []
    ids, mask = [], []
    for begin, end in zip([0, *starts], [*starts, len(row.text)], strict=True):
        found = tokenizer.encode(row.text[begin:end], add_special_tokens=False)
        ids += found.ids
        for first, past in found.offsets:
            first, past = first + begin, max(past, first + 1) + begin
            inside = [any(first < b and past > a for a, b in spans) for spans in (row.spans, row.holes)]
            mask.append(inside[0] and not inside[1])
    if row.eos and ids[-1] != chat.tokenizer.eos_token_id:
        ids, mask = [*ids, chat.tokenizer.eos_token_id], [*mask, True]
    return ids, mask


TEMPLATES = ["CHATML", "STRIPS_THINK", "EMPTY_THINK", "STRICT", "TRIMS", "WITH_BOS", "NO_END", "TOOLS", "OPENS_THINK",
             "PROMPTS_THINK", "PARTS", "CHANNELS", "LOSES_CALLS", "EMBEDS_RESULTS", "GENERATION"]  # fmt: skip


@pytest.mark.parametrize("template", [*TEMPLATES, None, "sentencepiece"])
def test_every_row_equals_the_plain_way(template: str | None, tmp_path: Path) -> None:
    made = Chat.of(h.sentencepiece(h.CHATML)) if template == "sentencepiece" else None
    chat = made or h.chat(template and getattr(h, template))
    examples = [item for item in read(h.write(tmp_path / "a.jsonl", *odd(150))) if isinstance(item, Example)]
    assert len(examples) > 80
    same = 0
    for learn in ("assistant", "last", "completion", "all"):
        for example in examples:
            try:
                expected = plainly(example, chat, learn)
            except RowFault as fault:
                with pytest.raises(RowFault) as caught:
                    encode(example, chat, learn=learn)  # type: ignore[arg-type]
                assert caught.value.reason == fault.reason
                continue
            if not any(expected[1]):
                continue
            row = encode(example, chat, learn=learn)  # type: ignore[arg-type]
            assert (row.ids.tolist(), row.learn.tolist()) == expected
            assert Example.from_json(example.to_json()) == example
            same += 1
    assert same > 100


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data files aren't there")
@pytest.mark.parametrize("name", ["alpaca_en_demo", "alpaca_zh_demo", "glaive_toolcall_en_demo", "identity"])
def test_every_row_of_a_real_file_equals_the_plain_way(name: str) -> None:
    chat = h.chat(h.TOOLS)
    examples = [item for item in read(SHARED / f"{name}.json") if isinstance(item, Example)][:100]
    for example in examples:
        row = encode(example, chat, max_tokens=10**6)
        assert (row.ids.tolist(), row.learn.tolist()) == plainly(example, chat, "assistant")


def as_values(part: Part) -> list[Any]:
    return [part.table.tobytes(), part.codes, part.texts, part.rows, part.examples, part.formats, part.faults, part.notes,
            part.long, part.skipped]  # fmt: skip


def work(chat: Chat | None = None, **changes: Any) -> Work:
    settings = {"mapping": None, "learn": "assistant", "max_tokens": 200, "long": "skip", **changes}
    return Work(chat or h.chat(h.TOOLS), **settings)


def test_workers_give_what_one_process_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "BATCH", 40)
    rows = list(read_rows(h.write(tmp_path / "a.jsonl", *odd(400))))
    alone, spread = ([as_values(part) for part in workers.spread(work(), rows, count)] for count in (0, 2))
    assert len(alone) == 10 and alone == spread


def children() -> set[int]:
    found = set()
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, _, rest = place.read_text().partition(" (")
            state, parent = rest.rpartition(") ")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                found.add(int(pid))
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


@needs_proc
def test_workers_that_die_cost_no_row_and_none_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "BATCH", 20)
    rows = list(read_rows(h.write(tmp_path / "a.jsonl", *odd(400))))
    before = children()
    expected = [as_values(part) for part in workers.spread(work(), rows, 0)]
    found = []
    with contextlib.closing(workers.spread(work(), rows, 2)) as parts:
        for part in parts:
            found.append(as_values(part))
            if len(found) == 3:
                assert len(children() - before) == 2
                for pid in children() - before:
                    os.kill(pid, signal.SIGKILL)
    assert found == expected and children() == before
    with contextlib.closing(workers.spread(work(), rows, 2)) as parts:
        next(parts)
    assert children() == before


def test_without_an_interpreter_the_work_is_done_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(read_rows(h.write(tmp_path / "a.jsonl", *odd(60))))
    expected = [as_values(part) for part in workers.spread(work(), rows, 0)]
    for program in (str(tmp_path / "none"), shutil.which("true"), ""):
        monkeypatch.setattr(sys, "executable", program)
        assert [as_values(part) for part in workers.spread(work(), rows, 2)] == expected


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import data_helpers as h
from lorafit.data import prepare, workers
print("begun", flush=True)
workers._processors = lambda: 2
data = prepare({path!r}, h.chat(), skip_bad_rows=True)
print(len(data.train), flush=True)
"""


@needs_proc
@pytest.mark.parametrize("how", ["runs", "Ctrl-C", "kill"])
def test_a_script_without_a_guard_and_no_process_left_behind(how: str, tmp_path: Path) -> None:
    good = [{"prompt": f"one {n}", "completion": "the cat " * 20} for n in range(2700 if how == "runs" else 200_000)]
    path = h.write(tmp_path / "a.jsonl", *good)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), path=str(path)))
    mark = uuid.uuid4().hex
    paths = os.pathsep.join([str(Path(lorafit.__file__).parent.parent), *sys.path])
    environment = {**os.environ, "MARK": mark, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": paths}

    def marked() -> int:
        found = 0
        for place in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                found += mark.encode() in place.read_bytes()
        return found

    process = subprocess.Popen(
        [sys.executable, script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in the background with Ctrl-C ignored, and that is handed on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    if how != "runs":
        until = time.monotonic() + 60
        while marked() < 3 and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    if how == "runs":
        assert out.split() == ["begun", "2565"] and not err
    else:
        assert out.split() == ["begun"] and err.count("Traceback") == (how == "Ctrl-C")
    until = time.monotonic() + 10
    while marked() and time.monotonic() < until:
        time.sleep(0.05)
    assert not marked()
    if how == "Ctrl-C":
        assert not list((tmp_path / "cache" / "lorafit" / "rows").iterdir())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder; every file is large enough for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("lorafit.data.dataset.SMALL", 0)
    return tmp_path / "cache" / "lorafit" / "rows"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return h.write(tmp_path / "a.jsonl", *odd(200, seed=4))


def values(data: Dataset) -> list[Any]:
    return [
        fingerprint(data),
        data.report.to_json(),
        [row.example for rows in (data.train, data.held_out) for row in rows],
    ]


def prepared(path: Path, **settings: Any) -> Dataset:
    return prepare(path, h.chat(), skip_bad_rows=True, max_tokens=100, long="truncate", **settings)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr("lorafit.data.dataset.spread", fail)


def test_the_second_time_is_the_same_without_work(path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = values(prepared(path, cache=False))
    assert not place.exists()
    assert values(prepared(path)) == expected
    assert {file.name for file in next(place.iterdir()).iterdir()} == {"tokens", "texts", "table", "summary"}
    forbid(monkeypatch)
    assert values(prepared(path)) == expected
    copied = path.with_name("b.jsonl")
    shutil.copy(path, copied)
    assert fingerprint(prepared(copied)) == expected[0]
    other = prepared(path, seed=3)
    assert [row.line for row in other.held_out] != [row.line for row in prepared(path).held_out]


def test_whatever_decides_the_tokens_is_in_the_name(path: Path) -> None:
    dated = h.CHATML + "{{ strftime_now('%Y') }}"
    chats = [
        h.chat(),
        h.chat(h.TRIMS),
        h.chat(system="be brief"),
        h.chat(dated),
        h.chat(dated),
        Chat.of(h.sentencepiece(h.CHATML)),
    ]
    chats[4].date = "2001-02-03"
    works = [work(chat) for chat in chats]
    works += [
        work(**change)
        for change in ({"learn": "last"}, {"max_tokens": 9}, {"long": "error"}, {"mapping": {"text": "a"}})
    ]
    names = {cache.name_of(path, each) for each in works}
    path.write_text(path.read_text() + "\n")
    names.add(cache.name_of(path, works[0]))
    assert len(names) == len(works) + 1 and None not in names
    undated = [h.chat(), h.chat()]
    undated[1].date = "2001-02-03"
    assert len({cache.name_of(path, work(chat)) for chat in undated}) == 1


@pytest.mark.parametrize("name", ["tokens", "texts", "table", "summary"])
def test_a_damaged_cache_is_made_again(name: str, path: Path, place: Path) -> None:
    expected = values(prepared(path))
    file = next(place.iterdir()) / name
    data = file.read_bytes()
    for damage in (data[:-3], data + b"\0", data[:40] + bytes([data[40] ^ 1]) + data[41:], b"", None):
        file.unlink() if damage is None else file.write_bytes(damage)
        assert values(prepared(path)) == expected
        assert file.read_bytes() == data and len(list(place.iterdir())) == 1


def test_no_place_for_a_cache_is_no_error(path: Path, place: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    said: list[str] = []
    data = prepared(path, held_out=h.write(tmp_path / "b.jsonl", *odd(30, seed=9)), say=said.append)
    assert len(said) == 1 and "no cache for a.jsonl" in said[0] and "cache=false" in said[0]
    assert data.train and data.held_out


@pytest.mark.parametrize(("full", "room"), list(product(("tokens", "texts"), (0, 1, 5000))))
def test_a_full_disk_is_no_error(
    full: str, room: int, path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = values(prepared(path, cache=False))
    monkeypatch.setattr(workers, "BATCH", 30)

    class Full:
        def __init__(self, file: Any, room: int) -> None:
            self.file, self.room, self.name = file, room, file.name

        def write(self, data: memoryview) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = self.file.write(data[: self.room])
            self.room -= taken
            return int(taken)

        def close(self) -> None:
            self.file.close()

    class Writer(cache.Writer):
        def __init__(self, name: str | None) -> None:
            super().__init__(name)
            self._streams[full] = Full(self._streams[full], room)

    monkeypatch.setattr("lorafit.data.dataset.Writer", Writer)
    said: list[str] = []
    assert values(prepared(path, say=said.append)) == expected
    assert len(said) == 1 and "No space left" in said[0] and not list(place.iterdir())


def test_another_process_that_is_faster(path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spread = workers.spread

    def overtaken(*given: Any) -> Any:
        yield from spread(*given)
        monkeypatch.setattr("lorafit.data.dataset.spread", spread)
        prepared(path)

    monkeypatch.setattr("lorafit.data.dataset.spread", overtaken)
    assert values(prepared(path)) == values(prepared(path, cache=False)) and len(list(place.iterdir())) == 1


def test_a_cache_removed_while_it_is_used_stays_readable(path: Path, place: Path) -> None:
    data = prepared(path)
    expected = values(data)
    shutil.rmtree(place)
    assert values(data) == expected


def test_the_oldest_goes_when_there_is_too_much(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [h.write(tmp_path / f"{n}.jsonl", *odd(60, seed=n)) for n in range(4)]
    for n, path in enumerate(paths[:3]):
        prepared(path)
        newest = max(place.iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
        os.utime(newest, (n, n))
    names = sorted(place.iterdir(), key=lambda folder: folder.stat().st_mtime)
    prepared(paths[0])  # used again, so no longer the oldest
    size = max(sum(file.stat().st_size for file in name.iterdir()) for name in names)
    (place / "left.tmp").mkdir()
    os.utime(place / "left.tmp", (0, 0))
    monkeypatch.setattr(cache, "LIMIT", int(2.9 * size))
    prepared(paths[3])
    left = set(place.iterdir())
    assert names[0] in left and names[1] not in left and place / "left.tmp" not in left
    monkeypatch.setattr(cache, "LIMIT", 10)
    expected = values(prepared(paths[1], cache=False))
    assert values(prepared(paths[1])) == expected and set(place.iterdir()) == left


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = workers.spread

    def slow(*given: Any) -> Any:
        path.write_text(path.read_text() + json.dumps({"text": "one more"}) + "\n")
        yield from spread(*given)

    monkeypatch.setattr("lorafit.data.dataset.spread", slow)
    prepared(path)
    assert not list(place.iterdir())


def test_small_files_are_not_kept(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepared(path)
    assert not (tmp_path / "cache").exists()


def test_rows_are_a_sequence(path: Path) -> None:
    rows = prepared(path).train
    assert isinstance(rows[0], Tokens) and rows[0].ids.dtype == np.int32 and rows[0].learn.dtype == bool
    lines = [row.line for row in rows]
    assert [rows[-1].line, *[row.line for row in rows[2:9:3]]] == [lines[-1], *lines[2:9:3]]
    assert len(rows[:5]) == 5 and rows[0].example.line == lines[0] and rows[0].full >= len(rows[0].ids)
    with pytest.raises(IndexError):
        rows[len(rows)]
    assert sum(row.cut != "" for row in rows) == prepared(path, held_out_share=0).report.truncated - sum(
        row.cut != "" for row in prepared(path).held_out
    )


def test_a_plan_of_stored_rows_is_that_of_rows_in_memory(path: Path) -> None:
    stored = prepared(path).train
    listed = list(stored)
    plans = [Plan(rows, default_tokens(rows), 2, seed=5) for rows in (stored, listed)]
    for epoch in range(3):
        found = [[[row.line for row in step] for step in plan.epoch(epoch)] for plan in plans]
        assert found[0] == found[1]
    assert plans[0].steps(2.5) == plans[1].steps(2.5)
    ahead = [next(plan.since(plan.steps(1) + 1)) for plan in plans]
    assert [row.line for row in ahead[0]] == [row.line for row in ahead[1]]


def test_memory_does_not_grow_with_the_text(tmp_path: Path, place: Path) -> None:
    rows = [{"prompt": f"one {n}", "completion": "the cat sat on the mat " * 40} for n in range(1500)]
    path = h.write(tmp_path / "a.jsonl", *rows)
    prepare(path, h.chat(), skip_bad_rows=True)
    tracemalloc.start()
    data = prepare(path, h.chat(), skip_bad_rows=True)
    kept, peak = tracemalloc.get_traced_memory()
    plan = Plan(data.train, 2048)
    for step in plan.epoch(0):
        assert sum(len(row.ids) for row in step) < 4096
    trained = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tokens = int(plan.lengths.sum()) * 4
    assert tokens > 1_000_000
    assert kept < 300 * len(rows) and peak < 5_000_000 and trained < 5_000_000


def test_dates_from_a_table_can_be_kept() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"on": datetime.date(2020, 1, 2)}}}
    example = Example((Message("assistant", "x", tool_calls=(call,)),), line=3)
    found = Example.from_json(example.to_json())
    assert found.messages[0].tool_calls[0]["function"]["arguments"] == {"on": "2020-01-02"} and found.line == 3


LATER = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}COUNT| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "llama"])
def test_words_are_those_of_the_tokenizer(kind: str) -> None:
    tokenizer = h.tokenizer(h.CHATML).backend_tokenizer
    if kind != "gpt2":
        split = Split(Regex(LATER.replace("COUNT", "" if kind == "qwen" else "{1,3}")), "isolated")
        tokenizer.pre_tokenizer = PreTokenizers([split, ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.normalizer = NFC()
    words = words_of(tokenizer)
    assert words is not None
    draw = random.Random(1)
    alphabets = ["".join(map(chr, range(128))), "ab1 '\n", "a \t\r\n_.", "'sStTdDlLvVeErRmM ", "0123456789 ,a"]
    pieces = ["<|im_start|>", "<|im_end|>", "</s>", "<s>", "<|im_", "end|>", "don't", "  ", "\r\n\r\n"]
    for number in range(4000):
        letters = draw.choice(alphabets)
        text = "".join(draw.choice(pieces) if draw.random() < 0.1 else draw.choice(letters) for _ in range(number % 60))
        assert words.ids(text) == tokenizer.encode(text, add_special_tokens=False).ids, repr(text)
    assert words.ids("é") is None


def test_words_of_other_tokenizers_are_unknown() -> None:
    assert words_of(h.sentencepiece(h.CHATML).backend_tokenizer) is None
    for change in ("prefix", "normal", "strips", "dropout", "split"):
        tokenizer = h.tokenizer(h.CHATML).backend_tokenizer
        if change == "prefix":
            tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
        elif change == "normal":
            tokenizer.normalizer = Lowercase()
        elif change == "strips":
            tokenizer.add_tokens([AddedToken("<new>", lstrip=True)])
        elif change == "dropout":
            tokenizer.model.dropout = 0.5
        else:
            tokenizer.pre_tokenizer = PreTokenizers([Split(" ", "isolated"), ByteLevel(False, use_regex=False)])
        assert words_of(tokenizer) is None, change


def test_the_dictionary_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.data.words.MOST", 50)
    tokenizer = h.tokenizer(h.CHATML).backend_tokenizer
    words = words_of(tokenizer)
    assert words is not None
    for number in range(200):
        text = f"one {number} two{number:b}"
        assert words.ids(text) == tokenizer.encode(text, add_special_tokens=False).ids
        assert len(words) <= 50

"""Which tokens are learned, for every kind of chat template; and that training begins where inference does."""

from __future__ import annotations

import datetime
import json
from typing import Any

import data_helpers as h
import numpy as np
import pytest

from lorafit.data import Chat, Example, Message, RowFault, Tokens, encode, encode_all
from lorafit.errors import DataError

TALK = h.turns("one two", "the cat", "three four", "sat on the mat")
THOUGHT = (
    Message("user", "one"),
    Message("assistant", "the cat", reasoning="early"),
    Message("user", "two"),
    Message("assistant", "the mat", reasoning="late"),
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS = (
    Message("user", "one"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", "2"),
    Message("assistant", "the mat"),
)


def learned(row: Tokens, chat: Chat) -> list[str]:
    """The text of each run of learned tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], row.learn.astype(int), [0]))))
    return [chat.text(row.ids[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_a_stop_id_that_the_tokenizer_has_not_is_left_out():
    tok = h.tokenizer(h.CHATML)
    assert Chat.of(tok, generation_eos=[len(tok) + 7, 5]).stop == Chat.of(tok, generation_eos=[5]).stop


CASES = [
    ("chatml", h.CHATML, TALK, ["the cat<|im_end|>", "sat on the mat<|im_end|>"]),
    ("bos", h.WITH_BOS, TALK, ["the cat<|im_end|>", "sat on the mat<|im_end|>"]),
    ("generation tag", h.GENERATION, TALK, ["the cat<|im_end|>", "sat on the mat<|im_end|>"]),
    ("no template", None, TALK, ["the cat</s>", "sat on the mat</s>"]),
    ("strips think", h.STRIPS_THINK, THOUGHT, ["the cat<|im_end|>", "<think>\nlate\n</think>\n\nthe mat<|im_end|>"]),
    (
        "strips think in the content",
        h.STRIPS_THINK,
        h.turns("one", "<think>\nearly\n</think>\n\nthe cat", "two", "<think>late</think>the mat"),
        ["the cat<|im_end|>", "<think>late</think>the mat<|im_end|>"],
    ),
    ("empty think", h.EMPTY_THINK, TALK, ["the cat<|im_end|>", "<think>\n\n</think>\n\nsat on the mat<|im_end|>"]),
    ("opens think", h.OPENS_THINK, TALK, ["the cat<|im_end|>", "sat on the mat<|im_end|>"]),
    ("prompts think", h.PROMPTS_THINK, TALK, ["the cat<|im_end|>", "sat on the mat<|im_end|>"]),
    ("parts", h.PARTS, TALK, ["the cat<|im_end|>", "sat on the mat<|im_end|>"]),
    ("channels", h.CHANNELS, THOUGHT, ["the cat<|im_end|>", "late<|im_end|><|im_start|>assistant\nthe mat</s>"]),
    ("strict", h.STRICT, TALK, ["the cat<|im_end|>", "sat on the mat<|im_end|>"]),
    ("trims", h.TRIMS, h.turns("one ", " the cat \n", "two", "\nthe mat "), ["the cat<|im_end|>", "the mat<|im_end|>"]),
    ("keeps spaces", h.CHATML, h.turns("one ", " the cat \n"), [" the cat \n<|im_end|>"]),
    ("no end of turn", h.NO_END, TALK, ["the cat", "sat on the mat</s>"]),
    ("tool calls", h.TOOLS, CALLS, ['<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>',
                                    "the mat<|im_end|>"]),
    ("the same answer twice", h.STRIPS_THINK, h.turns("one", "one", "one", "one"), ["one<|im_end|>", "one<|im_end|>"]),
    ("end of turn quoted", h.CHATML, h.turns("one", "a <|im_end|> b"), ["a <|im_end|> b<|im_end|>"]),
]  # fmt: skip


@pytest.mark.parametrize(("template", "messages", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_learns_the_answers_and_their_ends(template: Any, messages: tuple[Message, ...], expected: list[str]) -> None:
    chat = h.chat(template)
    row = encode(Example(messages), chat)
    assert learned(row, chat) == expected
    assert row.ids.dtype == np.int32 and row.learn.dtype == bool and row.ids.shape == row.learn.shape


FITTING = [c for c in CASES if c[0] not in ("opens think", "prompts think")]


@pytest.mark.parametrize(("template", "messages"), [c[1:3] for c in FITTING], ids=[c[0] for c in FITTING])
def test_training_begins_where_inference_does(template: Any, messages: tuple[Message, ...]) -> None:
    chat = h.chat(template)
    row = encode(Example(messages), chat)
    first = int(np.flatnonzero(row.learn)[0])
    assert chat.prompt_ids(messages[:1]) == row.ids[:first].tolist()
    if chat.ends:  # without an end-of-turn token, words may merge across earlier turns
        last = encode(Example(messages), chat, learn="last")
        first = int(np.flatnonzero(last.learn)[0])
        assert chat.prompt_ids(messages[:-1]) == last.ids[:first].tolist()


def test_no_token_straddles_the_start_of_an_answer() -> None:
    # Tokenised whole, the "\n\n" before a word is two tokens; at the end of the prompt at inference it is one.
    chat = h.chat(h.NO_END.replace("Response:\\n", "Response:\\n\\n"))
    messages = h.turns("one", "the cat")
    whole = chat.ids(chat.render(messages))
    prompt = chat.prompt_ids(messages[:1])
    assert whole[: len(prompt)] != prompt
    row = encode(Example(messages), chat)
    assert row.ids[: len(prompt)].tolist() == prompt and learned(row, chat) == ["the cat</s>"]


@pytest.mark.parametrize("template", [h.CHATML, h.WITH_BOS, h.STRICT, h.NO_END, h.TOOLS, h.EMPTY_THINK, h.GENERATION])
def test_renders_as_transformers_does(template: str) -> None:
    chat = h.chat(template)
    plain = [{"role": m.role, "content": m.content} for m in TALK]
    for generation in (False, True):
        expected = chat.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generation)
        assert chat.render(TALK, generation=generation) == expected
    ids = chat.tokenizer.apply_chat_template(plain[:3], add_generation_prompt=True, return_dict=False)
    assert chat.prompt_ids(TALK[:3]) == ids


def test_one_bos_only() -> None:
    for template in (h.WITH_BOS, None):
        chat = Chat.of(h.tokenizer(template, adds_bos=True))
        ids = encode(Example(TALK), chat).ids.tolist()
        assert ids[0] == 0 and ids.count(0) == 1


def test_learn_settings() -> None:
    chat = h.chat()
    everything = chat.render(TALK)

    def run(learn: Any, messages: tuple[Message, ...] = TALK) -> list[str]:
        return learned(encode(Example(messages), chat, learn=learn), chat)

    assert run("last") == ["sat on the mat<|im_end|>"]
    assert run("all") == [everything]
    assert run("completion") == [everything[everything.index("the cat") :].rstrip()]
    marked = (TALK[0], Message("assistant", "the cat", learn=False), TALK[2], TALK[3])
    assert run("assistant", marked) == ["sat on the mat<|im_end|>"]
    assert run("all", marked) == [part for part in everything.split("the cat<|im_end|>")]
    marked = (Message("user", "one two", learn=True), Message("assistant", "the cat", learn=True), *TALK[2:])
    assert run("last", marked) == ["one two<|im_end|>", "the cat<|im_end|>", "sat on the mat<|im_end|>"]


def test_nothing_learned_is_a_fault() -> None:
    with pytest.raises(RowFault, match="no token is learned"):
        encode(Example((TALK[0], Message("assistant", "the cat", learn=False))), h.chat())


def test_a_turn_that_the_template_drops_is_a_fault() -> None:
    template = h.CHATML.replace("m.content +", "('' if loop.index == 2 else m.content) +").replace(
        "'<|im_start|>' + m.role", "'<|im_start|>' + m.role + messages | length | string"
    )
    with pytest.raises(RowFault, match=r"turn 2 \(assistant\) can't be found"):
        encode(Example(TALK), h.chat(template))


def test_a_template_that_leaves_out_an_answer_is_a_fault() -> None:
    with pytest.raises(RowFault, match=r"turn 2 \(assistant\) isn't shown by the chat template.* its tool call"):
        encode(Example(CALLS), h.chat(h.LOSES_CALLS))
    silent = h.CHATML.replace("m.content +", "(m.content if m.role == 'user' else '') +")
    with pytest.raises(RowFault, match="leaves out its content"):
        encode(Example(TALK), h.chat(silent))


def test_a_tool_result_is_never_learned() -> None:
    messages = (CALLS[0], Message("assistant", "", tool_calls=(CALL,), reasoning="hm"), *CALLS[2:])
    with pytest.raises(RowFault, match=r"turn 2 \(assistant\) can't be found"):
        encode(Example(messages), h.chat(h.EMBEDS_RESULTS))
    chat = h.chat(h.EMBEDS_RESULTS)
    assert learned(encode(Example(messages), chat, learn="last"), chat) == ["the mat<|im_end|>"]


def test_every_byte_of_the_last_character_is_learned() -> None:
    for splits in (True, False):
        chat = h.chat(h.NO_END)
        chat.splits = splits
        row = encode(Example(h.turns("one", "🙂", "two", "🙂")), chat)
        assert learned(row, chat) == ["🙂", "🙂</s>"]


def test_whether_the_prompt_fits() -> None:
    found = {name: (h.chat(t).fits, h.chat(t).fits_early) for name, t, *_ in CASES}
    assert found.pop("opens think") == (False, False) and found.pop("prompts think") == (True, False)
    assert set(found.values()) == {(True, True)}


def test_tokenizers_that_put_a_space_in_front() -> None:
    chat = Chat.of(h.sentencepiece(h.CHATML))
    row = encode(Example(TALK), chat)
    assert not chat.splits and row.ids.tolist() == chat.ids(chat.render(TALK))
    assert [text.strip() for text in learned(row, chat)] == ["the cat<|im_end|>", "sat on the mat<|im_end|>"]
    first = int(np.flatnonzero(row.learn)[0])
    assert chat.prompt_ids(TALK[:1]) == row.ids[:first].tolist()


def test_a_refusing_template_is_a_fault_in_its_own_words() -> None:
    with pytest.raises(RowFault, match="Roles must alternate"):
        encode(Example((*TALK, Message("assistant", "again"))), h.chat(h.STRICT))
    with pytest.raises(RowFault, match="System role not supported"):
        encode(Example(TALK), h.chat(h.STRICT, system="be brief"))


def test_system_goes_only_where_there_is_none() -> None:
    chat = h.chat(system="be brief")
    assert chat.render(TALK).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none two")
    own = (Message("system", "be long"), *TALK)
    assert "be brief" not in chat.render(own) and "be long" in chat.render(own)


def test_tools_and_calls() -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    chat = h.chat(h.TOOLS)
    assert '"name": "add"' in chat.render(TALK, [tool]) and "add" not in chat.render(TALK)
    # A template that knows no calls gets them as text, instead of an empty answer.
    plain = h.chat()
    row = encode(Example(CALLS), plain)
    assert learned(row, plain)[0].startswith('<tool_call>\n{"name": "add"')


def test_stop_ids() -> None:
    assert h.chat().stop == (1, 3)  # </s> and <|im_end|>, found by rendering
    assert h.chat(None).stop == (1,)
    assert h.chat(h.NO_END).stop == (1,) and h.chat(h.NO_END).ends == ()
    assert h.chat(generation_eos=[0]).stop == (1, 0, 3)


def test_a_heading_is_not_an_end() -> None:
    heading = h.CHATML.replace("<|im_end|>\\n", "")
    chat = h.chat(heading)
    assert chat.ends == () and chat.stop == (1,)
    assert learned(encode(Example(TALK), chat), chat) == ["the cat", "sat on the mat</s>"]


def test_no_template_and_no_eos() -> None:
    with pytest.raises(DataError, match="no chat template and no end-of-sequence"):
        Chat.of(h.tokenizer(None, eos=None))


def test_broken_and_several_templates() -> None:
    with pytest.raises(DataError, match="isn't valid Jinja"):
        h.chat("{% for %}")
    assert h.chat({"default": h.CHATML, "rag": "x"}).template == h.CHATML
    assert h.chat({"only": h.CHATML}).template == h.CHATML
    with pytest.raises(DataError, match="several chat templates"):
        h.chat({"a": "x", "b": "y"})


def test_travels_as_json() -> None:
    chat = h.chat(None, system="be brief")
    data = json.loads(json.dumps(chat.to_json()))
    again = Chat.from_json(data, h.tokenizer(h.CHATML))
    assert again.render(TALK) == chat.render(TALK) and again.stop == chat.stop and again.default_template
    assert chat.differs(again) == []
    other = h.chat(h.CHATML)
    words = " ".join(chat.differs(other))
    assert "template" in words and "'be brief' and none" in words and "</s> and </s>, <|im_end|>" in words
    data["stop"][0]["text"] = "<eos>"
    with pytest.raises(DataError, match="was '<eos>' in training but is '</s>'"):
        Chat.from_json(data, h.tokenizer())


def test_the_date_is_fixed() -> None:
    template = "{{ strftime_now('%d %b %Y') }}" + h.CHATML
    data = h.chat(template).to_json()
    assert data["date"] == datetime.date.today().isoformat()
    data["date"] = "2020-01-02"
    old = Chat.from_json(data, h.tokenizer())
    assert old.render(TALK).startswith("02 Jan 2020")
    assert "date" in old.differs(h.chat(template))[0]


def test_over_long_rows() -> None:
    chat = h.chat()
    whole = encode(Example(TALK), chat)
    n = len(whole.ids)
    assert encode(Example(TALK), chat, max_tokens=n).cut == "" and whole.full == n
    for long in ("error", "skip"):
        with pytest.raises(RowFault, match=f"{n} tokens, more than max_tokens={n - 1}") as caught:
            encode(Example(TALK), chat, max_tokens=n - 1, long=long)  # type: ignore[arg-type]
        assert caught.value.length == n
    end = int(np.flatnonzero(whole.learn)[-1])
    start = int(np.flatnonzero(~whole.learn[:end])[-1]) + 1  # of the second answer
    for size, cut in ((end + 1, "end"), (end, "answer"), (start + 1, "answer"), (start, "end")):
        row = encode(Example(TALK), chat, max_tokens=size, long="truncate")
        assert (row.cut, row.full, len(row.ids)) == (cut, n, size)
        assert row.ids.tolist() == whole.ids[:size].tolist()
    with pytest.raises(RowFault, match="nothing learned is left"):
        encode(Example(TALK), chat, max_tokens=3, long="truncate")


def test_plain_text() -> None:
    for adds_bos, expected in ((True, "<s>one two</s>"), (False, "one two</s>")):
        chat = Chat.of(h.tokenizer(adds_bos=adds_bos))
        row = encode(Example((), text="one two"), chat)
        assert row.learn.all() and chat.text(row.ids.tolist()) == expected


def test_batches_equal_single_rows() -> None:
    chat = h.chat(h.EMPTY_THINK)
    rows = [Example(h.turns("one " * (n % 7 + 1), "the cat " * (n % 3 + 1)), line=n) for n in range(1100)]
    rows[700] = Example((Message("user", "x"),), line=700)
    found = list(encode_all(rows, chat))
    assert isinstance(found[700], RowFault) and len(found) == 1100
    for n in (0, 511, 512, 699, 701, 1099):
        row, single = found[n], encode(rows[n], chat)
        assert isinstance(row, Tokens) and row.line == n
        assert row.ids.tolist() == single.ids.tolist() and row.learn.tolist() == single.learn.tolist()


def test_multibyte_text_keeps_its_mask() -> None:
    chat = h.chat()
    row = encode(Example(h.turns("识别 🙂", "细胞🙂理论 é")), chat)
    assert learned(row, chat) == ["细胞🙂理论 é<|im_end|>"]

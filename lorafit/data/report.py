"""What was found in a data file, for people and as JSON."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorafit.data.chat import Chat, any_of
from lorafit.data.example import Example, Fault, Message, RowFault
from lorafit.data.tokens import Tokens


@dataclass
class Report:
    """The state of a data file. Lines count from 1; lengths and totals are in tokens.

    `rows`: all rows of the file, the unusable ones too. `faults`: errors; `notes`: worth telling. `duplicates`: (line,
    first line with the same row). `leaks`: (held-out line, training line) of equal rows, which were left out of the
    held-out rows; `same_prompt`: the same for rows with an equal prompt and another answer, which were kept.
    `lengths`: (low, high, rows) with low <= tokens < high, before truncation. `share`: of the tokens, those learned.
    `over_length`: rows over max_tokens; of these `skipped` were left out and `truncated` cut, `truncated_end` of them
    inside an answer. `text_example`: the first training row as (text, learned) pieces. `system`: the system message
    that every row has.
    """

    path: str
    rows: int = 0
    by_format: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    notes: list[Fault] = field(default_factory=list)
    duplicates: list[tuple[int, int]] = field(default_factory=list)
    leaks: list[tuple[int, int]] = field(default_factory=list)
    same_prompt: list[tuple[int, int]] = field(default_factory=list)
    lengths: list[tuple[int, int, int]] = field(default_factory=list)
    tokens: int = 0
    target_tokens: int = 0
    share: float = 0.0
    over_length: int = 0
    truncated: int = 0
    truncated_end: int = 0
    skipped: int = 0
    held_out_rows: int = 0
    train_rows: int = 0
    text_example: list[tuple[str, bool]] = field(default_factory=list)
    system: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The report in JSON types."""
        data = dataclasses.asdict(self)
        for name in ("duplicates", "leaks", "same_prompt", "lengths", "text_example"):
            data[name] = [list(item) for item in data[name]]
        return data


def histogram(lengths: Iterable[int]) -> list[tuple[int, int, int]]:
    """(low, high, rows) for powers of two from 32, without the empty buckets at both ends."""
    counts: dict[int, int] = {}
    for length in lengths:
        power = max(5, length.bit_length())
        counts[power] = counts.get(power, 0) + 1
    if not counts:
        return []
    powers = range(min(counts), max(counts) + 1)
    return [(0 if power == 5 else 2 ** (power - 1), 2**power, counts.get(power, 0)) for power in powers]


def pieces(row: Tokens, chat: Chat) -> list[tuple[str, bool]]:
    """The row's text as the model sees it, split where the mask changes."""
    ids, learn = row.ids.tolist(), row.learn.tolist()
    starts = [i for i in range(len(ids)) if i == 0 or learn[i] != learn[i - 1]]
    ends = [*starts[1:], len(ids)]
    return [(chat.text(ids[a:b]), learn[a]) for a, b in zip(starts, ends, strict=True)]


def shared_system(rows: Sequence[Tokens], digests: np.ndarray) -> str | None:
    """The system message that all rows have, or None. `digests` are those of the rows' system messages, 0 for none."""
    if not len(digests) or not digests[0] or (digests != digests[0]).any():
        return None
    return system_of(rows[0].example)


def system_of(example: Example) -> str | None:
    """The first system message of a row."""
    return next((message.content for message in example.messages if message.role == "system"), None)


class Traits:
    """What a row has that its author may want to hear about, as the bits of a number, in the order of `NOTES`."""

    def __init__(self, chat: Chat) -> None:
        self._control = any_of(chat.controls)

    def of(self, example: Example) -> int:
        """The bits of a row."""
        found = (
            _has_reasoning(example),
            _has_early_reasoning(example),
            _has_early_answer(example),
            _has_calls(example),
            bool(example.tools),
            bool(example.messages),
            _has_control(example, self._control),
            _has_placeholder(example),
        )
        return sum(has << bit for bit, has in enumerate(found))


CONVERSATION = 1 << 5  # the bit of rows that have messages
SHOWN = 5  # lines that a note on several rows names
_PLACEHOLDER = re.compile(r"\{\{\s*[^\W\d]\w*\s*\}\}")

PLACEHOLDERS = "an answer holds a placeholder such as {{name}}, which it would learn to say; put in what it stands for"
NOTES = (
    "the chat template leaves out reasoning_content",
    "the chat template leaves out the reasoning of all but the last answer; learn=last learns only whole answers",
    "the chat template begins earlier answers otherwise than the last; learn=last learns only answers that begin as at "
    "inference",
    "the chat template has no tool calls; they are written into the answer as <tool_call>{…}</tool_call>",
    "the chat template doesn't show the tools; describe them in a system message",
    "the template begins an answer otherwise than its generation prompt; the prompt at inference will differ from "
    "training",
    "the content holds the text of a special token, which is read as that token",
    PLACEHOLDERS,
)


def template_notes(flags: np.ndarray, lines: np.ndarray, chat: Chat) -> list[Fault]:
    """What the chat template does with rows of these traits that their author may not expect."""
    wanted = (
        not (chat.uses("reasoning_content") or chat.uses("thinking")),
        drops_reasoning(chat),
        chat.fits and not chat.fits_early,
        not chat.uses("tool_calls"),
        not chat.uses("tools"),
        not chat.fits,
        True,
        True,
    )
    notes = []
    for bit, (applies, reason) in enumerate(zip(wanted, NOTES, strict=True)):
        found = np.flatnonzero(flags & (1 << bit)) if applies else np.empty(0)
        if len(found):
            named = ", ".join(str(lines[row]) for row in found[:SHOWN]) + (", …" if len(found) > SHOWN else "")
            count = f" ({len(found)} rows: lines {named})" if len(found) > 1 else ""
            notes.append(Fault(int(lines[found[0]]), reason + count, note=True, rows=len(found)))
    return notes


def drops_reasoning(chat: Chat) -> bool:
    """Whether the template shows the reasoning of the last answer but not of an earlier one."""
    if not (chat.uses("reasoning_content") or chat.uses("thinking") or "</think>" in chat.template):
        return False
    early, late = "lorafitprobeearly", "lorafitprobelate"
    turns = []
    for thought in (early, late):
        turns += [Message("user", "a"), Message("assistant", "b", reasoning=thought)]
    try:
        text = chat.render(turns)
    except RowFault:
        return False
    return early not in text and late in text


def _has_reasoning(example: Example) -> bool:
    return any(message.reasoning for message in example.messages)


def _has_early_reasoning(example: Example) -> bool:
    answers = [message for message in example.messages if message.role == "assistant"]
    return any(message.reasoning or "</think>" in message.content for message in answers[:-1])


def _has_early_answer(example: Example) -> bool:
    return sum(message.role == "assistant" for message in example.messages) > 1


def _has_calls(example: Example) -> bool:
    return any(message.tool_calls for message in example.messages)


def _has_placeholder(example: Example) -> bool:
    return any(
        message.role == "assistant" and "{{" in message.content and _PLACEHOLDER.search(message.content)
        for message in example.messages
    )


def _has_control(example: Example, control: re.Pattern[str]) -> bool:
    texts = [example.text or "", *(message.content for message in example.messages)]
    return any(control.search(text) for text in texts)

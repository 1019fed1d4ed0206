"""What a data file is made of: messages, the rows that hold them, and the faults of rows that can't be used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn. `learn` is None where the run's rule decides, else what the row itself says (weight, train or loss)."""

    role: Role
    content: str
    learn: bool | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()  # {"type": "function", "function": {"name", "arguments": mapping}}
    name: str | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None


@dataclass(frozen=True)
class Example:
    """One row: a conversation, or plain text (then `messages` is empty). Prompt and completion are two messages.

    `line` counts from 1: of the text file, or the row's number in a Parquet file.
    """

    messages: tuple[Message, ...]
    text: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    format: str = "messages"
    line: int = 0

    def to_json(self) -> bytes:
        """The row as JSON, to be read again with `from_json`."""
        messages = [
            [m.role, m.content, m.learn, m.tool_calls, m.name, m.tool_call_id, m.reasoning] for m in self.messages
        ]
        values = [messages, self.text, self.tools, self.format, self.line]
        return _ENCODER.encode(values).encode("utf-8", "surrogatepass")

    @classmethod
    def from_json(cls, data: bytes) -> Example:
        """The row that `to_json` wrote."""
        messages, text, tools, format_, line = json.loads(data.decode("utf-8", "surrogatepass"))
        made = tuple(Message(r, c, learn, tuple(calls), *rest) for r, c, learn, calls, *rest in messages)
        return cls(made, text, tuple(tools), format_, line)


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str)  # Parquet holds dates, too


@dataclass(frozen=True)
class Fault:
    """Why the row at `line` can't be used; or, with `note`, something worth telling that doesn't stop a run.

    A note may be of several `rows`; `line` is the first of them then.
    """

    line: int
    reason: str
    note: bool = False
    rows: int = 1


class RowFault(Exception):
    """One row can't be used. `length` is its tokens when the only trouble is that there are too many, else 0."""

    def __init__(self, reason: str, length: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.length = length

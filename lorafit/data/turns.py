"""Lists of turns, in any of the common spellings, as messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorafit.data.example import ROLES, Message, Role, RowFault

ALIASES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
CALLS = ("function_call", "tool_call")  # ShareGPT roles whose text is the call itself, as JSON
MARKS = ("weight", "train", "loss")  # keys that say whether one message is learned


def is_turns(value: Any) -> bool:
    """Whether `value` is a non-empty list of objects, or JSON text of one, as in a CSV cell."""
    value = unpack(value)
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def unpack(value: Any) -> Any:
    """JSON text of a list, as CSV and Parquet columns hold it, as that list; anything else unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def parse_turns(turns: Sequence[Any]) -> tuple[list[Message], list[Mapping[str, Any]]]:
    """The messages, and the tools that a system message declares. Raises RowFault naming the turn (from 1)."""
    messages: list[Message] = []
    tools: list[Mapping[str, Any]] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise RowFault(f"turn {number} is {kind(turn)}, not an object")
        if turn.get("tools") is not None:
            tools += parse_tools(turn["tools"])
        if "human" in turn and "assistant" in turn:
            messages.append(_message(number, "user", turn["human"], {}))
            messages.append(_message(number, "assistant", turn["assistant"], turn))
            continue
        role = turn.get("role", turn.get("from"))
        if role is None:
            raise RowFault(f"turn {number} has no role; it has {columns(turn)}; expected role/content or from/value")
        content = turn.get("content") if "content" in turn or "value" not in turn else turn["value"]
        messages.append(_message(number, role, content, turn))
    return messages, tools


def _message(number: int, name: Any, content: Any, turn: Mapping[str, Any]) -> Message:
    role = ALIASES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise RowFault(
            f"turn {number} has the unknown role {name!r}; known: {', '.join(ROLES)} and their usual aliases"
        )
    calls = parse_calls(turn["tool_calls"], number) if turn.get("tool_calls") else ()
    if isinstance(name, str) and name.strip().lower() in CALLS:
        calls, content = parse_calls(content, number), ""
    reasoning = turn.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise RowFault(f"turn {number} ({role}): reasoning_content is {kind(reasoning)}, not text")
    text = _content(content, number, role, calls)
    check_text(text, f"turn {number} ({role})")
    check_text(reasoning or "", f"turn {number} ({role})")
    return Message(
        role,
        text,
        learn=_learn(turn, number),
        tool_calls=calls,
        name=_optional(turn.get("name")),
        tool_call_id=_optional(turn.get("tool_call_id")),
        reasoning=reasoning or None,
    )


def _content(content: Any, number: int, role: Role, calls: Sequence[Any]) -> str:
    where = f"turn {number} ({role})"
    if content is None:
        if calls:
            return ""
        raise RowFault(f"{where} has no content (null)")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise RowFault(f"{where}: the content is {kind(content)}, not text")
    if not content.strip() and not calls and role in ("user", "assistant"):
        raise RowFault(f"{where} is empty")
    return content


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    found = part.get("type") if isinstance(part, Mapping) else kind(part)
    raise RowFault(f"{where} holds a content part of type {found!r}; only text parts can be used")


def _learn(turn: Mapping[str, Any], number: int) -> bool | None:
    for key in MARKS:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowFault(f"turn {number}: {key} is {value!r}; only 0, 1, true and false can be used")
        return bool(value)
    return None


def _optional(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def parse_tools(value: Any) -> list[Mapping[str, Any]]:
    """Tool declarations from a list or its JSON text, each wrapped as {"type": "function", "function": {…}}."""
    found = _loads(value, "tools")
    if isinstance(found, Mapping):
        found = [found]
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise RowFault("tools must be a list of objects, or JSON text of one")
    bare = [("function" not in tool and "name" in tool) for tool in found]
    return [{"type": "function", "function": tool} if b else tool for tool, b in zip(found, bare, strict=True)]


def parse_calls(value: Any, number: int) -> tuple[Mapping[str, Any], ...]:
    """Tool calls from a list, one object or their JSON text; `arguments` given as JSON text are parsed."""
    found = _loads(value, f"turn {number}: the tool call")
    calls = found if isinstance(found, list) else [found]
    return tuple(_call(call, number) for call in calls)


def _call(call: Any, number: int) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowFault(f"turn {number}: a tool call needs a name and arguments")
    arguments = function.get("arguments", function.get("parameters"))
    arguments = {} if arguments is None else _loads(arguments, f"turn {number}: the tool call's arguments")
    if not isinstance(arguments, Mapping):
        raise RowFault(f"turn {number}: the tool call's arguments are {kind(arguments)}, not an object")
    id_ = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**id_, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _loads(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return []
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowFault(f"{what}: not valid JSON ({error})") from None


def check_text(text: str, where: str) -> None:
    """Raises RowFault for half a surrogate pair, as a cut-off JSON escape leaves: no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowFault(f"{where} holds half of a character (a lone \\ud800-\\udfff escape)") from None


def kind(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", list: "a list", tuple: "a list", dict: "an object", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def columns(row: Mapping[str, Any]) -> str:
    """The row's columns, for a message."""
    names = [str(name) for name in row]
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "") if names else "no columns"


def weight(value: Any) -> int:
    """About how many letters a value read from a file holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(weight, value.values()))
    return sum(map(weight, value)) if isinstance(value, list) else 8

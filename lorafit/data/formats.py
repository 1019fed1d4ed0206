"""Rows to examples. Every row is recognised by its own columns, so a file may mix formats.

Known: Alpaca, ShareGPT, OpenAI messages, MiniMind conversations, swift's human/assistant pairs, two text columns
such as prompt/completion or question/answer (they become a user and an assistant message), and plain `text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorafit.data.example import Example, Message, RowFault
from lorafit.data.turns import check_text, columns, is_turns, kind, parse_tools, parse_turns, unpack

TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns")
USER = ("instruction", "prompt", "question", "query", "user", "human", "problem", "input")
ANSWER = ("output", "completion", "response", "answer", "assistant", "gpt", "solution", "target", "reply")
SYSTEM = ("system", "system_prompt")
MAPPED = ("user", "assistant", "system", "input", "text", "messages", "tools")  # what --map can name
PREFERENCE = "preference pair ({}): not supported yet; keep the better answer in a column of its own, e.g. 'output'"


def parse(row: Mapping[str, Any], line: int, mapping: Mapping[str, str] | None = None) -> Example:
    """The example in one row. Raises RowFault with the reason.

    `mapping` names columns by their part (`{"user": "question", "assistant": "answer"}`, also system, input, text,
    messages, tools) and replaces recognition.
    """
    if mapping:
        return _mapped(row, line, mapping)
    known = {str(name).strip().lower(): value for name, value in row.items()}
    _refuse_preference(known)
    lists = [name for name in TURNS if name in known]
    full = [name for name in lists if is_turns(known[name])]
    if len(full) > 1:
        raise RowFault(f"two lists of turns ({', '.join(full)}); say which with --map messages={full[0]}")
    if lists and (full or not any(_pair(known))):
        return _from_turns(known, full[0] if full else lists[0], line)
    users, answers = _pair(known)
    if users and answers:
        return _from_columns(known, users, answers, line)
    if "text" in known and not users:
        return Example((), text=_text(known, "text"), format="text", line=line)
    raise RowFault(_unknown(row, users, answers))


def recognised(row: Mapping[str, Any]) -> bool:
    """Whether the row's columns are those of a known format, even if its values are faulty."""
    known = {str(name).strip().lower() for name in row}
    users, answers = _pair(dict.fromkeys(known))
    return bool(known & {*TURNS, "text", "chosen", "rejected"} or (users and answers))


def check(messages: Sequence[Message]) -> None:
    """Raises RowFault for a conversation that nothing can be learned from."""
    if not any(message.role == "assistant" for message in messages):
        raise RowFault("no assistant turn: there is nothing to learn")
    waiting = 0
    for number, message in enumerate(messages, 1):
        if message.role == "user" and waiting:
            raise RowFault(f"turns {waiting} and {number} are both user turns, with no answer between them")
        waiting = number if message.role == "user" else 0 if message.role == "assistant" else waiting


def _pair(known: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The columns that may hold the question, and those that may hold the answer."""
    users = [name for name in USER if name in known]
    answers = [name for name in ANSWER if name in known]
    if "instruction" in users and "input" in users:
        users.remove("input")  # Alpaca's second half of the question
    return users, answers


def _refuse_preference(known: Mapping[str, Any]) -> None:
    if "chosen" in known and "rejected" in known:
        raise RowFault(PREFERENCE.format("chosen/rejected"))
    if "rejected_response" in known:
        raise RowFault(PREFERENCE.format("rejected_response"))
    if "kto_tag" in known or ("completion" in known and isinstance(known.get("label"), bool)):
        raise RowFault(PREFERENCE.format("a label for each answer"))


def _from_turns(known: Mapping[str, Any], name: str, line: int) -> Example:
    turns = unpack(known[name])
    if not isinstance(turns, list):
        raise RowFault(f"column '{name}' must be a list of turns, not {kind(turns)}")
    if not turns:
        raise RowFault(f"column '{name}' holds no turns")
    messages, tools = parse_turns(turns)
    keys = turns[0]
    label = "sharegpt" if "from" in keys else "swift" if "human" in keys else name
    return _conversation(known, messages, tools, label, line)


def _from_columns(known: Mapping[str, Any], users: list[str], answers: list[str], line: int) -> Example:
    if len(users) > 1 or len(answers) > 1:
        found = ", ".join([*users, *answers])
        raise RowFault(f"more than one way to read the columns {found}; say which with {_hint(users, answers)}")
    user, answer = users[0], answers[0]
    if is_turns(known[user]) or is_turns(known[answer]):
        turns = [*_side(known, user, "user"), *_side(known, answer, "assistant")]
        messages, tools = parse_turns(turns)
        return _conversation(known, messages, tools, f"{user}/{answer}", line)
    extra = {"instruction": ("input", "context")}.get(user, ())
    messages = _exchange(known, user, answer, [name for name in extra if known.get(name)])
    label = "alpaca" if (user, answer) == ("instruction", "output") else f"{user}/{answer}"
    return _conversation(known, messages, [], label, line)


def _side(known: Mapping[str, Any], name: str, role: str) -> list[Any]:
    value = unpack(known[name])
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _exchange(known: Mapping[str, Any], user: str, answer: str, extra: Sequence[str]) -> list[Message]:
    """History, question and answer of a row with text columns; `extra` columns follow the question."""
    messages = []
    for number, pair in enumerate(unpack(known.get("history")) or [], 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(t, str) and t for t in pair):
            raise RowFault(f"history entry {number} must be a pair of texts [question, answer]")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    parts = [_text(known, name, empty=bool(extra)) for name in (user, *extra)]
    question = "\n\n".join(part for part in parts if part.strip())
    if not question:
        raise RowFault(f"column '{user}' is empty")
    return [*messages, Message("user", question), Message("assistant", _text(known, answer))]


def _conversation(
    known: Mapping[str, Any], messages: list[Message], tools: list[Mapping[str, Any]], label: str, line: int
) -> Example:
    system = next((known[name] for name in SYSTEM if known.get(name)), None)
    if system is not None:
        if not isinstance(system, str):
            raise RowFault(f"the system prompt is {kind(system)}, not text")
        if messages and messages[0].role == "system" and messages[0].content != system:
            raise RowFault("two system prompts: one in a column, another as the first turn")
        if system.strip() and not (messages and messages[0].role == "system"):
            check_text(system, "the system prompt")
            messages = [Message("system", system), *messages]
    if known.get("tools") is not None:
        tools = [*tools, *parse_tools(known["tools"])]
    check(messages)
    return Example(tuple(messages), tools=tuple(tools), format=label, line=line)


def _mapped(row: Mapping[str, Any], line: int, mapping: Mapping[str, str]) -> Example:
    missing = [column for part, column in mapping.items() if column not in row and part not in ("system", "tools")]
    if missing:
        raise RowFault(f"no column '{missing[0]}'; the row has {columns(row)}; mend --map")
    known = {part: row.get(column) for part, column in mapping.items()}
    if "text" in known:
        return Example((), text=_text(known, "text"), format="text", line=line)
    if "messages" in known:
        return _from_turns(known, "messages", line)
    messages = _exchange(known, "user", "assistant", ["input"] if known.get("input") else [])
    return _conversation(known, messages, [], f"{mapping['user']}/{mapping['assistant']}", line)


def _text(known: Mapping[str, Any], name: str, empty: bool = False) -> str:
    value = known.get(name)
    if value is None:
        raise RowFault(f"column '{name}' is null")
    if not isinstance(value, str):
        raise RowFault(f"column '{name}' must be text, not {kind(value)}")
    if not value.strip() and not empty:
        raise RowFault(f"column '{name}' is empty")
    check_text(value, f"column '{name}'")
    return value


def _unknown(row: Mapping[str, Any], users: list[str], answers: list[str]) -> str:
    if users and not answers:
        return f"no column with the answer; the row has {columns(row)}; name it with {_hint(users, ['COLUMN'])}"
    if answers and not users:
        return f"no column with the question; the row has {columns(row)}; name it with {_hint(['COLUMN'], answers)}"
    if {"role", "content"} <= set(row) or {"from", "value"} <= set(row):
        return "the row is one turn; a row is a whole conversation, with its turns in a list called 'messages'"
    names = [str(name) for name in row]
    first, last = (names[0], names[1]) if len(names) > 1 else ("question", "answer")
    return f"no known format; the row has {columns(row)}; name the columns with {_hint([first], [last])}"


def _hint(users: Sequence[str], answers: Sequence[str]) -> str:
    return f"--map user={users[0]},assistant={answers[0]}"

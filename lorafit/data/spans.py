"""Which characters of a rendered conversation are learned, for any template.

A turn is found by rendering: the conversation up to the turn with the generation prompt is where the answer starts, and
up to and including the turn is where it ends. Templates that render a turn otherwise once more turns follow (they drop
its thinking, say) are handled by rendering once more with a word of our own in place of the turn's content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorafit.data.chat import Chat
from lorafit.data.example import Example, Message, RowFault

Span = tuple[int, int]  # first character, one past the last


@dataclass(frozen=True)
class Rendered:
    """A row as text. A character is learned if it's in `spans` and not in `holes`; `eos`: an EOS id is to follow."""

    text: str
    spans: tuple[Span, ...]
    holes: tuple[Span, ...] = ()
    eos: bool = False


def render_row(example: Example, chat: Chat, learn: str) -> Rendered:
    """A conversation as text with its learned spans. Raises RowFault naming a turn that can't be found."""
    messages = example.messages
    text = chat.render(messages, example.tools)
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise RowFault("no assistant turn: there is nothing to learn")
    first, last = answers[0], answers[-1]
    if learn == "assistant":
        default = set(answers)
    elif learn == "last":
        default = {last}
    else:
        default = {first, last} if learn == "completion" else {last}
    wanted = {n for n, m in enumerate(messages) if (n in default if m.learn is None else m.learn)}
    holes = {n for n, m in enumerate(messages) if m.learn is False and learn in ("completion", "all")}
    needed = wanted | holes | ({first} if learn == "completion" else set())
    found = {n: _locate(example, chat, n, text) for n in sorted(needed)}
    # A template without a token for it can't show where an answer ends: the row ends there, with EOS.
    eos = last in wanted and not _ended(text, found[last], chat)
    if eos:
        text = text[: found[last][1]]
    spans = [found[n] for n in sorted(wanted)]
    if learn == "completion":
        spans.append((found[first][0], len(text.rstrip())))
    if learn == "all":
        spans.append((0, len(text)))
    return Rendered(text, tuple(spans), tuple(found[n] for n in sorted(holes)), eos)


def _ended(text: str, span: Span, chat: Chat) -> bool:
    """Whether the span's last thing is a special token."""
    return text.endswith(chat.controls, *span) or text.endswith(chat.stops, *span)


def _locate(example: Example, chat: Chat, number: int, text: str) -> Span:
    """Where turn `number` (from 0) is learned: from its content to its end-of-turn token."""
    span = _find(example, chat, number, text)
    message = example.messages[number]
    calls = [str(call["function"]["name"]) for call in message.tool_calls]
    shown = [*calls, message.content.split("</think>")[-1].strip()[-20:].strip()]
    if not all(part in text[slice(*span)] for part in shown):
        raise RowFault(
            f"turn {number + 1} ({message.role}) isn't shown by the chat template, which leaves out its "
            + ("tool call" if calls else "content")
        )
    return span


def _find(example: Example, chat: Chat, number: int, text: str) -> Span:
    messages = example.messages
    start = None
    if messages[number].role == "assistant":
        prompt = _try(chat, messages[:number], example, generation=True)
        if prompt is not None and text.startswith(prompt):
            start = len(prompt)
            last = number == len(messages) - 1
            upto = text if last else _try(chat, messages[: number + 1], example)
            if upto is not None and len(upto) >= start and text.startswith(upto):
                return start, _trim(text, start, len(upto), chat)
    return _by_sentinel(example, chat, number, text, start)


def _try(chat: Chat, messages: Sequence[Message], example: Example, generation: bool = False) -> str | None:
    try:
        return chat.render(messages, example.tools, generation)
    except RowFault:
        return None  # some templates refuse a conversation that is cut off here


def _trim(text: str, start: int, end: int, chat: Chat) -> int:
    """The end of the turn in text[start:end]: after its end-of-turn token, without the whitespace behind that."""
    turn = text[start:end]
    found = []
    for token in chat.ends:
        past = turn.rfind(token) + len(token)
        rest = turn[past:].strip()
        if token in turn and (not rest or chat.added.match(rest)):
            found.append(past)
    return start + max(found, default=len(turn.rstrip()))


def _by_sentinel(example: Example, chat: Chat, number: int, text: str, start: int | None) -> Span:
    message = example.messages[number]
    word = "lorafitturn"
    while word in text:
        word += "x"
    plain = replace(message, content=word, tool_calls=(), reasoning=None)
    limit = _next_content(example, chat, number, text, word)
    for stand_in in (plain, replace(plain, tool_calls=message.tool_calls), replace(message, content=word)):
        other = _try(chat, (*example.messages[:number], stand_in, *example.messages[number + 1 :]), example)
        if other is None or other.count(word) != 1:
            continue
        before, after = other.split(word)
        begin = start if start is not None else len(before) if text.startswith(before) else None
        end = _end(text, after, chat, bool(stand_in.tool_calls))
        if begin is not None and end is not None and begin < end <= limit:
            return begin, end
    raise RowFault(
        f"turn {number + 1} ({message.role}) can't be found in the rendered text: the chat template changes more than "
        "its content with it; leave thinking out of that turn, or set train=false for it"
    )


def _next_content(example: Example, chat: Chat, number: int, text: str, word: str) -> int:
    """Where the content of the turn after `number` begins, which is past the end of the turn; else the text's end."""
    if number + 1 < len(example.messages):
        after = replace(example.messages[number + 1], content=word, tool_calls=(), reasoning=None)
        other = _try(chat, (*example.messages[: number + 1], after, *example.messages[number + 2 :]), example)
        if other is not None and other.count(word) == 1 and text.startswith(other[: other.index(word)]):
            return other.index(word)
    return len(text)


def _end(text: str, after: str, chat: Chat, calls: bool) -> int | None:
    """Where a turn ends, given what the template writes after its content; None if the text doesn't end like that."""
    end = len(text) - len(after)
    lead = len(after) - len(after.lstrip())
    token = chat.added.match(after, lead)
    if token is not None and token.group() not in chat.stops:
        token = None  # the heading of the next turn
    if end >= 0 and text.endswith(after):
        if calls:  # they stand between the content and the end of the turn
            stops = [after.find(stop) + len(stop) for stop in chat.stops if stop in after]
            return end + min(stops) if stops else None
        return end + (token.end() if token else 0)
    if token is None:
        return None
    rest = after[token.end() :]  # this turn may end with another token than the stand-in's
    return len(text) - len(rest) if rest.strip() and text.endswith(rest) else None

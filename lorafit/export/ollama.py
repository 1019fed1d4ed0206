"""Merged, for Ollama: a GGUF file and a Modelfile beside it.

Not its ADAPTER line, which recent versions of Ollama refuse. Chat templates are Go's there, not Jinja's: a template that
puts the same words around every message of a role is written as one, after that was tried on conversations; of any other,
Ollama makes what it can from the one inside the GGUF file.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lorafit.data import Chat, Message
from lorafit.data.example import RowFault
from lorafit.errors import AdapterError
from lorafit.export import gguf_model
from lorafit.export.base import Done, Job
from lorafit.files import write_text

MODEL, FILE = "model.gguf", "Modelfile"
_MARK = "lorafitmark"


@dataclass(frozen=True)
class Pieces:
    """A chat template as texts: before and after a message of each role, before an answer, and the system prompt of a
    conversation that has none."""

    around: Mapping[str, tuple[str, str]]
    answer: str
    system: str | None

    def render(self, messages: list[Message]) -> str:
        """A conversation, with an answer's beginning, as Ollama will have it."""
        if self.system is not None and messages[0].role != "system":
            messages = [Message("system", self.system), *messages]
        said = "".join(self.around[m.role][0] + m.content + self.around[m.role][1] for m in messages)
        return said + self.answer


def write(job: Job, place: Path) -> Done:
    """See gguf_model.write; `model.gguf` and `Modelfile` in a folder."""
    chat = job.chat
    done = gguf_model.write(job, place / MODEL)
    pieces = pieces_of(chat)
    write_text(place / FILE, modelfile(chat, pieces), "export again")
    notes = done.notes
    if pieces is None:
        notes += ("the chat template has no Go form, so Ollama goes by the one in model.gguf; compare an answer",)
    figures, name = {**done.figures, "template": pieces is not None}, shlex.quote(job.name.lower())
    return Done(done.checked, figures, notes, f"cd OUT && ollama create {name} && ollama run {name}")


def modelfile(chat: Chat, pieces: Pieces | None) -> str:
    """The Modelfile's text."""
    lines = [f"FROM ./{MODEL}"]
    if pieces is not None:
        lines.append(f'TEMPLATE """{_go(pieces)}"""')
    system = chat.system or (pieces.system if pieces is not None else None)
    if system and '"""' in system:
        raise AdapterError(
            'the system prompt holds """, which a Modelfile has no way to write; shorten it with system='
        )
    if system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{word}"' for word in chat.stops]
    return "\n".join(lines) + "\n"


def pieces_of(chat: Chat) -> Pieces | None:
    """The template as pieces, if they render conversations of every form as it does; None else."""
    try:
        found = _taken_apart(replace(chat, system=None))
        return None if found is None or '"""' in str(found) else replace(found, system=chat.system or found.system)
    except RowFault:
        return None


def _taken_apart(chat: Chat) -> Pieces | None:
    def rendered(messages: list[Message], generation: bool = False) -> str:
        text = chat.render(messages, generation=generation)
        return text.removeprefix(start)

    first_id = chat.tokenizer.bos_token_id
    added = first_id is not None and chat.around[0][:1] == (first_id,)  # then llama.cpp puts it in front itself
    start = chat.tokenizer.bos_token if added else ""
    words = [f"{_MARK}{i}" for i in range(5)]
    messages = [
        Message("system", words[0]),
        Message("user", words[1]),
        Message("assistant", words[2]),
        Message("user", words[3]),
        Message("assistant", words[4]),
    ]
    text, asked = rendered(messages), rendered(messages[:4])
    if [text.count(word) for word in words] != [1] * 5 or not text.startswith(asked):
        return None
    parts = re.split("|".join(words), text)
    after_user, after_assistant = asked[asked.index(words[3]) + len(words[3]) :], parts[5]
    before_assistant = parts[2].removeprefix(after_user)
    before_user = parts[3].removeprefix(after_assistant)
    around = {
        "system": (parts[0], parts[1].removesuffix(before_user)),
        "user": (before_user, after_user),
        "assistant": (before_assistant, after_assistant),
    }
    answer = rendered(messages[:4], generation=True).removeprefix(asked)
    first = (
        rendered(messages[1:2]).partition(words[1])[0].removesuffix(before_user)
    )  # what a default system prompt adds
    before, after = around["system"]
    system = first[len(before) : len(first) - len(after)] if first else None
    found = Pieces(around, answer, system)
    long = [Message("user", "a b"), Message("assistant", "c\nd"), Message("user", "e"), Message("assistant", "f")]
    thought = [Message("user", "a"), Message("assistant", "<think>\nb\n</think>\n\nc")]  # which many templates cut
    for given in ([Message("system", "s t")], []):
        for turns in ([], long[:2], long, thought):
            some = [*given, *turns, Message("user", "g")]
            if found.render(some) != rendered(some, generation=True):
                return None
    return found


def _go(pieces: Pieces) -> str:
    """The pieces as a Go template."""
    cases = "".join(
        f'{{{{ {"else " if n else ""}if eq .Role "{role}" }}}}{_text(before)}{{{{ .Content }}}}{_text(after)}'
        for n, (role, (before, after)) in enumerate(pieces.around.items())
    )
    return f"{{{{ range .Messages }}}}{cases}{{{{ end }}}}{{{{ end }}}}{_text(pieces.answer)}"


def _text(literal: str) -> str:
    return literal.replace("{{", '{{ "{{" }}')

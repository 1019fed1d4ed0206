"""A conversation in the terminal, with adapters switched on the loaded base."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from lorafit.config import nearest
from lorafit.data import Chat, Message, RowFault
from lorafit.errors import AdapterError, DataError
from lorafit.generate import generate, stream
from lorafit.session import Session

HELP = """\
  /adapter NAME   answer with this adapter (base: with none; a+b: with both); without a name: list them
  /compare        the base's answer beside the adapter's, on or off
  /system TEXT    another system prompt; without a text: the one trained with
  /reset          forget the conversation
  /quit           leave (also Ctrl-D)"""


class Talk:
    """The state of a conversation: messages so far, the adapter in use, the settings of sampling."""

    def __init__(
        self,
        session: Session,
        *,
        compare: bool = False,
        stacked: bool = False,
        system: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.session, self.compare, self.system = session, compare, system
        self.options = options or {}
        there = list(session.host.adapters)
        self.adapter = ("+".join(there) if stacked else there[0]) if there else None
        self.messages: list[Message] = []

    @property
    def chat(self) -> Chat:
        """The chat of the adapter in use: its template, stop tokens and system prompt, for the base's answer too."""
        return self.session.chat(self.adapter)

    def pieces(self, adapter: str | None) -> Iterator[str]:
        """The next answer, piece by piece. DataError if the template refuses the conversation."""
        messages = self.messages
        if self.system is not None:
            messages = [Message("system", self.system), *messages]
        try:
            ids = self.chat.prompt_ids(messages)
        except RowFault as fault:
            raise DataError(f"the chat template refuses this conversation: {fault}") from None
        if len(ids) >= self.session.host.base.context:
            raise DataError(
                f"the conversation is {len(ids)} tokens long, the model takes {self.session.host.base.context}; /reset"
            )
        return stream(
            self.chat,
            generate(self.session.host, ids, self.session.stack(adapter), stop=self.chat.stop, **self.options),
        )

    def answers(self, prompt: str) -> dict[str, str]:
        """The answers to one more prompt, by adapter; the conversation stays as it was."""
        self.messages.append(Message("user", prompt))
        try:
            return {name or "base": "".join(self.pieces(name)).strip() for name in self._who()}
        finally:
            self.messages.pop()

    def say(self, prompt: str) -> None:
        """Answer a prompt, streaming; the adapter's answer goes on in the conversation."""
        self.messages.append(Message("user", prompt))
        kept = ""
        try:
            for name in self._who():
                if self.compare:
                    print(f"[{name or 'base'}] ", end="")
                kept = ""
                for piece in self.pieces(name):
                    kept += piece
                    print(piece, end="", flush=True)
                print()
        except (KeyboardInterrupt, DataError):
            self.messages.pop()
            raise
        self.messages.append(Message("assistant", kept.strip()))

    def _who(self) -> list[str | None]:
        return [None, self.adapter] if self.compare and self.adapter else [self.adapter]

    def loop(self) -> None:
        """Read prompts until the end of input."""
        names = ", ".join(self.session.host.adapters) or "none"
        print(f"base {self.session.host.base.name}, adapters: {names}; /help for commands")
        while True:
            try:
                line = input(f"{self.adapter or 'base'}> ").strip()
            except EOFError:
                print()
                return
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    print(self.command(line))
                elif line:
                    self.say(line)
            except KeyboardInterrupt:
                print(" (stopped)")
            except (AdapterError, DataError) as error:
                print(f"lorafit: {error}", file=sys.stderr)

    def command(self, line: str) -> str:
        """Carry out a /command; returns what to print. AdapterError for one that isn't known."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "/adapter":
            return self._switch(rest)
        if word == "/compare":
            self.compare = not self.compare
            return f"comparing with the base: {'on' if self.compare else 'off'}"
        if word == "/system":
            self.system = rest or None
            return f"system prompt: {rest or self.chat.system or 'of the template'}"
        if word == "/reset":
            self.messages.clear()
            return "forgotten"
        if word == "/help":
            return HELP
        raise AdapterError(
            f"unknown command {word}; {nearest(word, ['/adapter', '/compare', '/system', '/reset', '/quit', '/help'])}"
        )

    def _switch(self, name: str) -> str:
        there = list(self.session.host.adapters)
        if not name:
            return "\n".join(
                f"{'*' if n == (self.adapter or 'base') else ' '} {n}"
                for n in dict.fromkeys(["base", *there, self.adapter or "base"])
            )
        if name != "base":
            self.session.stack(name)
        self.adapter = None if name == "base" else name
        return f"answering with {name}"

"""How a conversation becomes text and token ids: the template, the stop tokens and the system prompt, as one value.

The same `Chat` is used for training, sampling and serving, and travels with an adapter, so that the ids fed at inference
are the ids that stood before the answer in training.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import jinja2

from lorafit.data.example import Message, RowFault
from lorafit.data.jinja import compile_template
from lorafit.data.words import Words, words_of
from lorafit.errors import DataError

# For a tokenizer without a template: plain headings, and the end-of-sequence token after every answer.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'][0] | upper + message['role'][1:] + ':\\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{{ '### Assistant:\\n' if add_generation_prompt else '' }}"
)

_PROBE = ("lorafitprobequestion", "lorafitprobeanswer", "lorafitprobeagain", "lorafitprobelast")


@dataclass
class Chat:
    """A tokenizer with the template, stop ids and default system prompt of its conversations.

    `stop`: ids of the tokens that end an answer. `system`: put in front of conversations that have no system message.
    `date`: ISO date that a template sees as today, fixed so that a run renders the same on every day.
    `ends`: the special tokens that the template puts after an answer, as text. `fits`: whether the generation prompt
    is how the template begins the last answer; `fits_early`: an earlier one. `parts`: whether the template wants the
    content as a list of parts. `splits`: whether texts can be tokenised piece by piece. `around`: the ids
    that the tokenizer itself puts before and after plain text. `added`: matches any added token; `controls`:
    the special ones; `stops`: the ones that end an answer; `walls`: those of them that keep apart what stands before
    and behind, so that a text may be cut after one.
    """

    tokenizer: Any
    template: str
    stop: tuple[int, ...]
    system: str | None = None
    default_template: bool = False
    date: str = ""
    ends: tuple[str, ...] = field(init=False, default=())
    fits: bool = field(init=False, default=True)
    fits_early: bool = field(init=False, default=True)
    parts: bool = field(init=False, default=False)
    splits: bool = field(init=False, default=True)
    around: tuple[tuple[int, ...], tuple[int, ...]] = field(init=False, default=((), ()))
    added: re.Pattern[str] = field(init=False, repr=False, default=re.compile("(?!)"))
    controls: tuple[str, ...] = field(init=False, repr=False, default=())
    stops: tuple[str, ...] = field(init=False, repr=False, default=())
    walls: tuple[str, ...] = field(init=False, repr=False, default=())
    _variables: dict[str, Any] = field(init=False, repr=False, default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Any, *, system: str | None = None, generation_eos: Sequence[int] = ()) -> Chat:
        """The chat of a fast Hugging Face tokenizer; `generation_eos` are the model's own stop ids, if it names any.

        Raises DataError when there is no template and no end-of-sequence token, or the template isn't valid.
        """
        template = _template_of(tokenizer)
        default = template is None
        if template is None:
            if tokenizer.eos_token_id is None:
                raise DataError("the tokenizer has no chat template and no end-of-sequence token; set one of them")
            first = tokenizer("a")["input_ids"][:1]
            starts = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
            template = ("{{ bos_token }}" if starts else "") + DEFAULT_TEMPLATE
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        # A config may name an id that its tokenizer hasn't.
        known = [id_ for id_ in generation_eos if tokenizer.convert_ids_to_tokens(id_) is not None]
        stop = tuple(dict.fromkeys([*eos, *known]))
        today = datetime.date.today().isoformat()
        return cls(tokenizer, template, stop, system, default, today)

    def __post_init__(self) -> None:
        """Compiles the template and finds out how it ends an answer. Raises DataError for a template that's broken."""
        self.date = self.date or datetime.date.today().isoformat()
        self._variables = dict(self.tokenizer.special_tokens_map)
        tokens = [token for token in self.tokenizer.added_tokens_decoder.values() if token.content.strip()]
        self.added = any_of([token.content for token in tokens])
        self.controls = tuple(token.content for token in tokens if token.special)
        try:
            compile_template(self.template)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template isn't valid Jinja: {error}; mend it in the model's folder") from None
        joined, first, second = (self.ids(text) for text in ("b\na", "b\n", "a"))
        self.splits = joined == first + second
        whole = self.tokenizer("a")["input_ids"]
        at = next((i for i in range(len(whole)) if whole[i : i + len(second)] == second), 0)
        self.around = (tuple(whole[:at]), tuple(whole[at + len(second) :]))
        self._probe()
        words = self.tokenizer.convert_ids_to_tokens(list(self.stop))
        self.stops = tuple(sorted({*self.ends, *words}))
        self.walls = tuple(word for word in self.stops if self._is_wall(word))

    @cached_property
    def words(self) -> Words | None:
        """The quick way to the ids of ASCII text, where the tokenizer has one."""
        return words_of(self.tokenizer.backend_tokenizer)

    def light(self) -> Chat:
        """The same for another process, which needn't import transformers: it tokenises, but can't be made anew."""
        other = copy.copy(self)
        vars(other).pop("words", None)
        other.tokenizer = Backend(self.tokenizer.backend_tokenizer, self.tokenizer.eos_token_id)
        return other

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), generation: bool = False
    ) -> str:
        """The conversation as text, with the answer's beginning when `generation`. Raises RowFault if it's refused."""
        rows = [self._plain(message) for message in messages]
        if self.system and not any(message.role == "system" for message in messages):
            rows.insert(0, {"role": "system", "content": self.system})
        try:
            return compile_template(self.template).render(
                messages=rows,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=generation,
                strftime_now=datetime.date.fromisoformat(self.date).strftime,
                **self._variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RowFault(f"the chat template refuses the conversation: {' '.join(str(error).split())}") from None

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The ids fed at inference: the conversation and the beginning of an answer. Raises RowFault if it's refused."""
        return self.ids(self.render(messages, tools, generation=True))

    def ids(self, text: str) -> list[int]:
        """The ids of text that holds its own special tokens; none are added."""
        return cast("list[int]", self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included, whitespace untouched."""
        return cast(
            str, self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def uses(self, name: str) -> bool:
        """Whether the template reads a variable or key, such as tools, tool_calls or reasoning_content."""
        return re.search(rf"\b{name}\b", self.template) is not None

    def to_json(self) -> dict[str, Any]:
        """Everything that decides the rendering, in JSON types."""
        words = self.tokenizer.convert_ids_to_tokens(list(self.stop))
        return {
            "template": self.template,
            "default_template": self.default_template,
            "stop": [{"id": id_, "text": word} for id_, word in zip(self.stop, words, strict=True)],
            "system": self.system,
            "date": self.date,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], tokenizer: Any) -> Chat:
        """The chat that `to_json` wrote. Raises DataError when a stop token is another token in this tokenizer."""
        for entry in data["stop"]:
            found = tokenizer.convert_ids_to_tokens(entry["id"])
            if found != entry["text"]:
                raise DataError(
                    f"stop token {entry['id']} was {entry['text']!r} in training but is {found!r} in this tokenizer; "
                    "use the tokenizer of the training run"
                )
        stop = tuple(int(entry["id"]) for entry in data["stop"])
        return cls(tokenizer, data["template"], stop, data["system"], data["default_template"], data["date"])

    def differs(self, other: Chat) -> list[str]:
        """What renders or stops differently in `other`, in words; empty when nothing does."""
        found = []
        if self.template != other.template:
            found.append(f"the chat template differs ({len(self.template)} and {len(other.template)} characters)")
        if self.system != other.system:
            found.append(f"the system prompt differs ({_quote(self.system)} and {_quote(other.system)})")
        mine, theirs = (c.tokenizer.convert_ids_to_tokens(sorted(c.stop)) for c in (self, other))
        if self.stop != other.stop and (sorted(self.stop), mine) != (sorted(other.stop), theirs):
            found.append(f"the stop tokens differ ({', '.join(map(str, mine))} and {', '.join(map(str, theirs))})")
        if self.date != other.date and self.uses("strftime_now"):
            found.append(f"the date that the template shows differs ({self.date} and {other.date})")
        return found

    def _plain(self, message: Message) -> dict[str, Any]:
        row: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning is not None:
            row |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
        if message.tool_calls and self.uses("tool_calls"):
            row["tool_calls"] = list(message.tool_calls)
        elif message.tool_calls:  # the template would leave the call out and teach an empty answer
            row["content"] = "\n".join(filter(None, [message.content, *map(_call_text, message.tool_calls)]))
        if self.parts:
            row["content"] = [{"type": "text", "text": row["content"]}]
        optional = {"name": message.name, "tool_call_id": message.tool_call_id}
        return row | {key: value for key, value in optional.items() if value is not None}

    def _is_wall(self, word: str) -> bool:
        """Whether a text can be cut behind every occurrence of this token without a change to its ids.

        Tokenizers take the added tokens out of a text first, leftmost and longest, and look at what is between them by
        itself. So an occurrence is that token unless another one overlaps it, begins earlier or is longer.
        """
        tokens = {token.content: token for token in self.tokenizer.added_tokens_decoder.values()}
        token = tokens.pop(word, None)
        strips = token is not None and (token.lstrip or token.rstrip or token.normalized)
        if token is None or strips or not self.splits or word != word.strip():
            return False
        if any(other.single_word for other in (token, *tokens.values())):
            return False
        overlaps = any(word.startswith(other[at:]) for other in (word, *tokens) for at in range(1, len(other)))
        if overlaps or any(word in other for other in tokens):
            return False
        sides = ("a", "a "), ("\n", "a", " a", "\na")
        return all(
            self.ids(f"{before}{word}{after}") == self.ids(before + word) + self.ids(after)
            for before in sides[0]
            for after in sides[1]
        )

    def _probe(self) -> None:
        """Renders a conversation of known words to see what follows an answer and whether the prompt fits."""
        question, answer, again, last = _PROBE
        turns = [Message("user", question), Message("assistant", answer), Message("user", again)]
        text = ""
        for self.parts in (False, True):
            with contextlib.suppress(RowFault):
                text = self.render([*turns, Message("assistant", last)])
                if all(text.count(word) == 1 for word in _PROBE):
                    break
        else:
            self.parts = False  # an unusual template: each row shows whether it works
            return
        with contextlib.suppress(RowFault):
            self.fits = text.startswith(self.render(turns, generation=True))
            self.fits_early = text.startswith(self.render(turns[:1], generation=True))
        final = self.added.match(text[text.index(last) + len(last) :].lstrip())
        between = text[text.index(answer) + len(answer) : text.index(again)]
        middle = self.added.match(between.lstrip())
        ends = {final.group()} if final else set()
        stops = set(self.tokenizer.convert_ids_to_tokens(list(self.stop)))
        # A single special token between two turns may be the heading of the next one, not the end of the answer.
        if middle and (middle.group() in stops or len(self.added.findall(between)) > 1):
            ends.add(middle.group())
        self.ends = tuple(sorted(ends))
        if final:
            self.stop = tuple(dict.fromkeys([*self.stop, self.tokenizer.convert_tokens_to_ids(final.group())]))


@dataclass(frozen=True)
class Backend:
    """What is left of a tokenizer in another process."""

    backend_tokenizer: Any
    eos_token_id: int | None


def _template_of(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        if "default" not in template and len(template) != 1:
            raise DataError(
                f"the tokenizer has several chat templates ({', '.join(template)}) and none named 'default'"
            )
        template = template.get("default") or next(iter(template.values()))
    return template or None


def any_of(names: Sequence[str]) -> re.Pattern[str]:
    """A pattern that matches any of the names, the longest first."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches


def _call_text(call: Mapping[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"


def _quote(text: str | None) -> str:
    return "none" if text is None else f"'{text[:40]}…'" if len(text) > 40 else f"'{text}'"

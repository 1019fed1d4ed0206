"""What to train with where the user says nothing. One place decides: `settle` is what train and plan take, and
`lorafit advise` shows the same choices with their reasons.

Choices rest on the rows, the model's shape and the settings that the user made, never on its weights, so that train decides
the same before it has loaded them. docs/advice.md has what they were measured to be worth.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lorafit.batches import Plan, default_tokens
from lorafit.config import Config
from lorafit.data import Chat, Dataset, Tokens
from lorafit.data.store import lengths_of
from lorafit.log import many
from lorafit.methods import find

# One learned token holds so many bits at most that a fine-tuning run takes in (a loss of two nats), and a trained number
# takes up so many (LoRA Without Regret, Schulman et al. 2025).
BITS_A_TOKEN, BITS_A_NUMBER = 3.0, 2.0
RANK, SIMPLE_RANK, MOST_RANK = 16, 8, 256
SAMPLE = 64  # rows that are looked at
FULL_STEP = 2048  # tokens; of smaller steps the best rate is lower
FEW_STEPS, MOST_EPOCHS = 40, 10.0

# What a task is like, by the names that `--task` takes. `simple`: an answer holds so little that a small rank takes it up.
TASKS = {
    "chat": "answers to questions and instructions",
    "classify": "one of a few short answers",
    "extract": "JSON or fields from a text",
    "style": "how it says things, not what",
    "tools": "calls of functions",
    "code": "programs",
    "knowledge": "facts, or plain text",
}
SIMPLE = ("classify", "extract", "style")


@dataclass(frozen=True)
class Choice:
    """A setting with its value, a line of reason and where that is from; `yours`: the user made it."""

    setting: str
    value: Any
    reason: str
    source: str
    yours: bool = False

    @property
    def words(self) -> str:
        """As it is written on a command line."""
        if isinstance(self.value, list):
            return f"{self.setting}={','.join(self.value)}"
        return f"{self.setting}={_short(self.value)}"

    def to_json(self) -> dict[str, Any]:
        """In JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Facts:
    """The training rows in numbers. `tokens` and `learned` are of an epoch; `median` and `longest` tokens of a row."""

    rows: int
    held_out: int
    tokens: int
    learned: int
    median: int
    longest: int
    lines: Sequence[Tokens]  # some of them

    @staticmethod
    def of(data: Dataset) -> Facts:
        """Without reading more than some rows."""
        lengths = lengths_of(data.train)
        every = max(1, -(-len(data.train) // SAMPLE))
        tokens = int(lengths.sum())
        return Facts(
            rows=len(data.train),
            held_out=len(data.held_out),
            tokens=tokens,
            learned=round(tokens * data.report.share),
            median=int(np.median(lengths)) if len(lengths) else 0,
            longest=int(lengths.max(initial=0)),
            lines=[data.train[i] for i in range(0, len(data.train), every)],
        )

    @cached_property
    def answers(self) -> list[str]:
        """The last answers of some rows; of plain text none."""
        found = ([m.content for m in row.example.messages if m.role == "assistant"] for row in self.lines)
        return [texts[-1] for texts in found if texts]

    @cached_property
    def task(self) -> str:
        """What the rows look like, in the words of `TASKS`. Style can't be told from chat."""
        examples = [row.example for row in self.lines]
        most = len(examples) / 2
        if not examples or sum(example.text is not None for example in examples) > most:
            return "knowledge"
        if sum(bool(e.tools) or any(m.tool_calls for m in e.messages) for e in examples) > most:
            return "tools"
        if len(self.answers) >= 8 and _few_kinds(self.answers):
            return "classify"
        if sum(map(_is_json, self.answers)) > most:
            return "extract"
        return "code" if sum("```" in text for text in self.answers) > most else "chat"

    def tokens_a_character(self, chat: Chat) -> float:
        """Of the texts of some rows, without what the template adds: how well the tokenizer knows their script. 0 where there are
        no characters."""
        characters = sum(map(len, self.texts))
        return sum(len(chat.ids(text)) for text in self.texts) / characters if characters else 0.0

    @cached_property
    def texts(self) -> list[str]:
        """What some rows say, without what the template adds."""
        return [t for row in self.lines for t in [row.example.text or "", *(m.content for m in row.example.messages)]]

    @cached_property
    def lettered(self) -> float:
        """The share of letters, of any writing, among the characters of some rows that aren't spaces: small for sums."""
        marks = [unicodedata.category(c)[0] for text in self.texts for c in text if not c.isspace()]
        return sum(mark in "LM" for mark in marks) / len(marks) if marks else 0.0

    @cached_property
    def script(self) -> str:
        """The writing that most letters of some rows are in."""
        letters = "".join(
            part
            for row in self.lines
            for part in [row.example.text or "", *(m.content for m in row.example.messages if m.role != "system")]
        )
        counts = {name: len(re.findall(letter, letters)) for name, letter in _SCRIPTS.items()}
        name = max(counts, key=lambda key: counts[key])
        return name if counts[name] else "none"

    def to_json(self) -> dict[str, Any]:
        """In JSON types."""
        keys = ("rows", "held_out", "tokens", "learned", "median", "longest")
        return {
            **{key: getattr(self, key) for key in keys},
            "looks_like": self.task,
            "script": self.script,
        }


_SCRIPTS = {
    "Latin": "[A-Za-zÀ-ɏ]",
    "Chinese": "[㐀-鿿]",
    "Japanese": "[぀-ヿ]",
    "Korean": "[가-힯]",
    "Cyrillic": "[Ѐ-ӿ]",
    "Arabic": "[؀-ۿ]",
    "Devanagari": "[ऀ-ॿ]",
}


def advise(config: Config, facts: Facts, shape: Any, rows: Sequence[Tokens], task: str | None = None) -> list[Choice]:
    """Every setting that advice has a word on. `shape`: the model's transformers config; `task` as in `TASKS`, else what the
    rows look like. What the user set is taken as it is, and what depends on it follows it."""
    tokens = config.batch_tokens or default_tokens(rows, config.share)
    an_epoch = Plan(rows, tokens, seed=config.seed).steps(1)
    return [
        _method(config),
        _targets(config),
        *_rank(config, facts, shape, task or facts.task),
        _batch(config, tokens, an_epoch),
        _rate(config, shape, tokens),
        _length(config, facts, an_epoch),
    ]


def settle(config: Config, data: Dataset, shape: Any) -> list[Choice]:
    """Put advice into `config` where the user said nothing. Returns what was put there."""
    found = [choice for choice in advise(config, Facts.of(data), shape, data.train) if not choice.yours]
    for choice in found:
        put(config, choice)
    return [choice for choice in found if choice.setting in ("r", "batch_tokens", "lr", "epochs")]


def put(config: Config, choice: Choice) -> None:
    """Put one choice into a config."""
    if choice.setting in config.options:
        config.options[choice.setting] = choice.value
    elif choice.setting != "targets":  # empty targets mean the method's own, which may know better what it can adapt
        setattr(config, choice.setting, choice.value)


def _method(config: Config) -> Choice:
    if "method" in config.given or config.start:
        return _yours("method", config.method, "--from keeps the old adapter's" if config.start else "")
    why = "tuned, its variants end within 1-2 % of it; the learning rate decides more than the method"
    return Choice("method", config.method, why, "arXiv 2602.04998")


def _targets(config: Config) -> Choice:
    if config.targets or config.start:
        return _yours(
            "targets", config.targets or ["all-linear"], "--from keeps the old adapter's" if config.start else ""
        )
    own = list(find(config.method).targets)
    if own != ["all-linear"]:
        return Choice("targets", own, f"what method={config.method} is made for", f"arXiv {find(config.method).paper}")
    why = "attention alone is worse, with as many numbers trained too"
    return Choice("targets", own, why, "arXiv 2305.14314; LoRA Without Regret")


def _rank(config: Config, facts: Facts, shape: Any, task: str) -> list[Choice]:
    """Rank and alpha, of methods that have the two as LoRA has them; of others what they are."""
    if config.start:
        return []
    options, own = config.options, [key for key in ("r", "alpha") if key in config.options]
    if "r" in config.given or config.method not in ("lora", "dora", "lora+"):
        default = f"the default of method={config.method}"
        return [
            _yours(key, options[key]) if key in config.given else Choice(key, options[key], default, "its paper")
            for key in own
        ]
    r, why, source = _rank_for(facts, shape, task)
    if r > (side := min(_sides(shape))):
        why = f"the model's smallest matrix has a side of {side}, to which a larger r adds nothing"
        r, source = side, "the model's config.json"
    made = [Choice("r", r, why, source)]
    if "alpha" in config.given:
        return [*made, _yours("alpha", options["alpha"])]
    why = "fixed, whatever r is: then the best learning rate doesn't move with r"
    return [*made, Choice("alpha", options["alpha"], why, "arXiv 2602.06204; LoRA Without Regret")]


def _rank_for(facts: Facts, shape: Any, task: str) -> tuple[int, str, str]:
    need = facts.learned * BITS_A_TOKEN / (BITS_A_NUMBER * numbers_a_rank(shape))
    if need > RANK:
        r = min(MOST_RANK, 1 << (int(need) - 1).bit_length())
        why = f"{facts.learned:,} learned tokens hold more than r={RANK} takes up (3 bits a token, 2 bits a number)"
        return r, why, "LoRA Without Regret"
    if task in SIMPLE:
        return SIMPLE_RANK, f"{task}: little to take up, so half the file does", "arXiv 2106.09685, r=1 near r=64"
    why = f"takes up {RANK / max(need, 1e-9):,.0f} times what these rows hold; a larger r changes little"
    return RANK, why if need > 0.01 else "far more than these rows hold", "LoRA Without Regret; arXiv 2106.09685"


def numbers_a_rank(shape: Any) -> int:
    """Numbers that a LoRA on all linear layers trains for each rank, of a decoder with a gated feed-forward."""
    return numbers_of(int(shape.get_text_config().num_hidden_layers), *_sides(shape))


def numbers_of(layers: int, h: int, q: int, kv: int, inner: int) -> int:
    """The same from the sizes of its layers: the model's width, queries, keys, and the feed-forward's width."""
    return layers * (2 * (h + q) + 2 * (h + kv) + 3 * (h + inner))


def _sides(shape: Any) -> tuple[int, int, int, int]:
    """`sides` of a base's config."""
    text = shape.get_text_config()
    return sides(
        int(text.hidden_size), lambda *keys: next((int(n) for key in keys if (n := getattr(text, key, None))), 0)
    )


def sides(h: int, size: Callable[..., int]) -> tuple[int, int, int, int]:
    """The sizes that a layer's matrices have on their sides: the model's width h, queries, keys, and the feed-forward's width.
    `size` gives the first of some names that the base's config has, or 0."""
    heads = size("num_attention_heads", "n_head") or 1  # some have none at all
    dim = size("head_dim") or h // heads
    inner = size("intermediate_size", "n_inner") or 4 * h
    return h, heads * dim, (size("num_key_value_heads") or heads) * dim, inner


def _batch(config: Config, tokens: int, an_epoch: int) -> Choice:
    if config.batch_tokens:
        return _yours("batch_tokens", tokens)
    why = f"{many(an_epoch, 'step')} an epoch; LoRA learns best from small batches"
    return Choice("batch_tokens", tokens, why, "arXiv 2602.09492, 2508.02932")


def _rate(config: Config, shape: Any, tokens: int) -> Choice:
    if config.lr is not None:
        return _yours("lr", config.lr)
    kind = find(config.method)
    rate = float(f"{default_lr(shape, tokens) * kind.lr_factor:.2g}")
    width = shape.get_text_config().hidden_size
    why = f"by the width of {width} and steps of {tokens} tokens; it decides more than any other setting"
    if kind.lr_factor != 1:
        why += f"; {kind.lr_factor:g} times that for {config.method}"
    return Choice("lr", rate, why, "LoRA Without Regret; arXiv 2602.06204; measured, docs/advice.md")


def default_lr(shape: Any, tokens: int) -> float:
    """LoRA's rate for a model with this transformers config, in steps of `tokens` tokens."""
    text = shape.get_text_config()
    return rate_for(int(text.hidden_size), str(text.model_type), tokens)


def rate_for(width: int, family: str, tokens: int) -> float:
    """5e-4 at a width of 2000, and less for wider models: by the fit of LoRA Without Regret for Llama, by the root of the
    width (arXiv 2602.06204) for others. In steps of fewer than 2048 tokens less, with their root (2205.10287), down to half."""
    power = 0.781 if family == "llama" else 0.5
    small = min(1.0, max(0.5, math.sqrt(tokens / FULL_STEP)))
    return 5e-4 * math.pow(2000 / width, power) * small


def _length(config: Config, facts: Facts, an_epoch: int) -> Choice:
    if config.steps is not None:
        return _yours("steps", config.steps)
    if "epochs" in config.given:
        return _yours("epochs", config.epochs)
    kept = "the adapter of the best one is kept" if facts.held_out else "nothing is held out to stop by"
    epochs = passes(config.epochs, an_epoch, facts.held_out)
    if epochs > config.epochs:
        why = f"three passes would be {round(config.epochs * an_epoch)} steps, too few to learn; {kept}"
        return Choice("epochs", epochs, why, "measured, docs/advice.md")
    why = f"about {round(config.epochs * an_epoch)} steps; {kept}"
    return Choice("epochs", config.epochs, why, "common practice, 1 to 3")


def passes(epochs: float, an_epoch: float, held_out: float) -> float:
    """These epochs, of so many steps each; more where that is few steps and rows are held out to stop by. Without them more
    passes mostly do harm (measured, docs/advice.md)."""
    if not held_out or epochs * an_epoch >= FEW_STEPS:
        return epochs
    return max(epochs, min(MOST_EPOCHS, float(math.ceil(FEW_STEPS / an_epoch))))


def _yours(setting: str, value: Any, why: str = "") -> Choice:
    return Choice(setting, value, why or "as you set it", "you", yours=True)


def _few_kinds(answers: Sequence[str]) -> bool:
    plain = [text.strip().lower() for text in answers]
    return len(set(plain)) <= len(plain) / 4 and max(map(len, plain)) <= 60


def _is_json(text: str) -> bool:
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

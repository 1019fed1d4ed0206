"""Scores on held-out rows: loss and perplexity of the learned tokens; exact match and token F1 of generated answers."""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from lorafit.batches import fill, pack
from lorafit.data import Chat, Message, Tokens
from lorafit.errors import OutOfMemory
from lorafit.generate import answer
from lorafit.host import Host
from lorafit.machine import attempt
from lorafit.route import StackLike, stack
from lorafit.train.loop import watched
from lorafit.train.loss import losses

TOKENS = 2048  # of a forward, where memory allows
SAMPLE_TOKENS = 48  # of an answer to a held-out prompt, at most
EVALUATIONS = 8  # of a run, beside that of its start, where the user sets no number


def spacing(steps: int) -> int:
    """Steps between evaluations, where the user sets none."""
    return max(1, math.ceil(steps / EVALUATIONS))


@dataclass(frozen=True)
class Scores:
    """`loss` is the mean over the learned tokens of all rows. The answer scores (0 to 1) are None unless asked for."""

    loss: float
    perplexity: float
    rows: int
    target_tokens: int
    exact_match: float | None = None
    token_f1: float | None = None
    answers: int | None = None

    def to_json(self) -> dict[str, Any]:
        """In JSON types, without what wasn't asked for."""
        return {k: v for k, v in asdict(self).items() if v is not None}


def evaluate(
    host: Host,
    rows: Sequence[Tokens],
    spec: StackLike = None,
    *,
    tokens: int = TOKENS,
    progress: Callable[[int, int], object] | None = None,
) -> Scores:
    """Loss and perplexity of these rows through a stack of adapters (None: the plain base).

    A forward takes at most `tokens` tokens, or one row; half of them from where memory isn't enough. OutOfMemory where it
    isn't enough for a single row.
    """
    total, count = 0.0, 0
    lengths = [len(row.ids) for row in rows]
    runs = deque(fill(lengths, tokens))
    while runs:
        run = runs[0]
        found, error = attempt(partial(_sum, host, [rows[i] for i in run], spec))
        if found is None:
            held = sum(lengths[i] for i in run)
            if len(run) == 1:
                raise OutOfMemory(f"out of memory while one row of {held} tokens was scored ({error})")
            at, tokens = run.start, max(1, held // 2)
            runs = deque(range(at + r.start, at + r.stop) for r in fill(lengths[at:], tokens))
            continue
        total, count = total + found[0], count + found[1]
        runs.popleft()
        if progress:
            progress(run.stop, len(rows))
    mean = total / count if count else math.nan
    return Scores(mean, math.exp(min(mean, 700.0)) if mean == mean else math.nan, len(rows), count)


@torch.no_grad()
def _sum(host: Host, rows: Sequence[Tokens], spec: StackLike) -> tuple[float, int]:
    with host.route(spec), watched(host):
        each = losses(host, pack(rows, share=host.shares(stack(spec))))
    return each.cpu().double().sum().item(), len(each)


def score_answers(
    host: Host,
    chat: Chat,
    rows: Sequence[Tokens],
    spec: StackLike = None,
    *,
    max_new: int = 128,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[float, float, int]:
    """Mean exact match and token F1 of greedy answers to each row's last turn, and how many rows had one."""
    asked = [(row, found) for row in rows if (found := prompt_of(row)) is not None]
    exact = f1 = 0.0
    if progress:
        progress(0, len(asked))
    for done, (row, (messages, expected)) in enumerate(asked, 1):
        ids = chat.prompt_ids(messages, row.example.tools)
        text = answer(host, chat, ids, spec, max_new=max_new)
        exact += float(normal(text) == normal(expected))
        f1 += token_f1(text, expected)
        if progress:
            progress(done, len(asked))
    n = len(asked)
    return (exact / n, f1 / n, n) if n else (math.nan, math.nan, 0)


def prompt_of(row: Tokens) -> tuple[list[Message], str] | None:
    """The messages before a row's last answer, and that answer; None for plain text or where it is a tool call."""
    messages = list(row.example.messages)
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if len(messages) < 2 or not messages[-1].content:
        return None
    return messages[:-1], messages[-1].content


def normal(text: str) -> str:
    """Lower case, one space, no surrounding punctuation: what exact match compares."""
    return " ".join(words(text))


def words(text: str) -> list[str]:
    """Words, and each Chinese, Japanese or Korean character by itself."""
    return re.findall(r"[぀-ヿ㐀-鿿가-힯]|[^\W぀-ヿ㐀-鿿가-힯]+", text.lower())


def token_f1(text: str, expected: str) -> float:
    """Harmonic mean of precision and recall over words, as in SQuAD (arXiv 1606.05250)."""
    got, want = Counter(words(text)), Counter(words(expected))
    same = sum((got & want).values())
    if not same:
        return float(not got and not want)
    precision, recall = same / sum(got.values()), same / sum(want.values())
    return 2 * precision * recall / (precision + recall)

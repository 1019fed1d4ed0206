"""Examples to token ids and the mask of the learned ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np

from lorafit.data.chat import Chat
from lorafit.data.example import Example, RowFault
from lorafit.data.spans import Rendered, Span, render_row

Learn = Literal["assistant", "completion", "all", "last"]
Long = Literal["error", "truncate", "skip"]
Cut = Literal["", "answer", "end"]

BATCH = 512  # texts per call of the tokenizer


@dataclass(frozen=True)
class Tokens:
    """One row as the model sees it.

    `ids` int32 (n,) and `learn` bool (n,): learn[i] says that token i is a target. `full` is the number of tokens
    before truncation. `cut` is "" for a whole row, "answer" when the row was truncated inside a learned answer (its
    end-of-turn is lost), "end" when it was truncated after one, so every answer that is left is whole.
    """

    ids: np.ndarray
    learn: np.ndarray
    line: int
    example: Example
    cut: Cut = ""
    full: int = 0


def encode(
    example: Example, chat: Chat, *, learn: Learn = "assistant", max_tokens: int = 4096, long: Long = "error"
) -> Tokens:
    """One row as tokens. Raises RowFault: refused by the template, no learned token, or (with a length) too long."""
    result = next(encode_all([example], chat, learn=learn, max_tokens=max_tokens, long=long))
    if isinstance(result, RowFault):
        raise result
    return result


def encode_all(
    examples: Iterable[Example],
    chat: Chat,
    *,
    learn: Learn = "assistant",
    max_tokens: int = 4096,
    long: Long = "error",
) -> Iterator[Tokens | RowFault]:
    """Every row as tokens or its fault, in order; the tokenizer gets many texts at a time.

    The text is cut where a learned span starts and the pieces are tokenised apart, so that the ids before the first
    answer are those of `Chat.prompt_ids` even where the tokenizer would merge across. Tokenizers that put a space in
    front of every text (SentencePiece) get the text whole.
    """
    rows = iter(examples)
    while batch := list(islice(rows, BATCH)):
        rendered = [_render(example, chat, learn) for example in batch]
        pieces = [[] if isinstance(row, RowFault) else _pieces(row, chat) for row in rendered]
        encoded = iter(_tokenise([piece for row in pieces for piece in row], chat))
        for example, row, parts in zip(batch, rendered, pieces, strict=True):
            if isinstance(row, RowFault):
                yield row
                continue
            ids, mask = _assemble(row, parts, list(islice(encoded, len(parts))), chat, example.text is not None)
            yield _fit(ids, mask, example, max_tokens, long)


def _render(example: Example, chat: Chat, learn: Learn) -> Rendered | RowFault:
    if example.text is not None:
        return Rendered(example.text, ((0, len(example.text)),), eos=True)
    try:
        return render_row(example, chat, learn)
    except RowFault as fault:
        return fault


def _pieces(row: Rendered, chat: Chat) -> list[str]:
    starts = sorted({start for start, _ in row.spans if 0 < start < len(row.text)}) if chat.splits else []
    return [row.text[a:b] for a, b in zip([0, *starts], [*starts, len(row.text)], strict=True)]


def _tokenise(texts: Sequence[str], chat: Chat) -> Iterator[tuple[list[int], list[Span]]]:
    if not texts:
        return
    batch: Any = chat.tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    yield from zip(batch["input_ids"], batch["offset_mapping"], strict=True)


def _assemble(
    row: Rendered, parts: Sequence[str], encoded: Sequence[tuple[list[int], list[Span]]], chat: Chat, plain: bool
) -> tuple[list[int], np.ndarray]:
    ids: list[int] = []
    masks = []
    base = 0
    for part, (piece_ids, offsets) in zip(parts, encoded, strict=True):
        ids += piece_ids
        masks.append(_mask(np.asarray(offsets, dtype=np.int64).reshape(-1, 2) + base, row))
        base += len(part)
    mask = np.concatenate(masks) if masks else np.zeros(0, dtype=bool)
    if plain:
        ids = [*chat.around[0], *ids, *chat.around[1]]
        mask = np.ones(len(ids), dtype=bool)
    eos = chat.tokenizer.eos_token_id
    if row.eos and eos is not None and ids[-1:] != [eos]:
        ids, mask = [*ids, eos], np.append(mask, True)
    return ids, mask


def _mask(offsets: np.ndarray, row: Rendered) -> np.ndarray:
    """Which tokens, by their (first, past-the-last) characters, touch a span; a token in a hole is never learned."""
    first, past = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    mask = np.zeros(len(offsets), dtype=bool)
    for start, end in row.spans:
        mask |= (first < end) & (past > start)
    for start, end in row.holes:
        mask &= ~((first < end) & (past > start))
    return mask


def _fit(ids: list[int], mask: np.ndarray, example: Example, max_tokens: int, long: Long) -> Tokens | RowFault:
    if not mask.any():
        return RowFault("no token is learned; check train/weight marks and the learn setting")
    cut: Cut = ""
    length = len(ids)
    if length > max_tokens:
        reason = f"{length} tokens, more than max_tokens={max_tokens}"
        if long != "truncate":
            return RowFault(f"{reason}; raise it, or use --long truncate or --long skip", length)
        # The token after the cut is learned and so is the one before: the cut is inside an answer.
        cut = "answer" if mask[max_tokens] and mask[max_tokens - 1] else "end"
        ids, mask = ids[:max_tokens], mask[:max_tokens]
        if not mask.any():
            return RowFault(f"{reason}; nothing learned is left after truncation, raise it or use --long skip", length)
    return Tokens(np.asarray(ids, dtype=np.int32), mask, example.line, example, cut, length)

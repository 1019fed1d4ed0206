"""Examples to token ids and the mask of the learned ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Literal, cast

import numpy as np

from lorafit.data.chat import Chat
from lorafit.data.example import Example, RowFault
from lorafit.data.spans import Rendered, render_row

Learn = Literal["assistant", "completion", "all", "last"]
Long = Literal["error", "truncate", "skip"]
Cut = Literal["", "answer", "end"]
CUTS: tuple[Cut, ...] = ("", "answer", "end")

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
        cuts = [None if isinstance(row, RowFault) else _cuts(row, chat) for row in rendered]
        texts: dict[bool, list[str]] = {False: [], True: []}  # by whether their offsets are needed
        for row, cut in zip(rendered, cuts, strict=True):
            if not isinstance(row, RowFault) and cut is not None:
                texts[cut.learn is None] += [row.text[a:b] for a, b in pairwise(cut.at)]
        encoded = {offsets: _tokenise(found, chat, offsets) for offsets, found in texts.items()}
        for example, row, cut in zip(batch, rendered, cuts, strict=True):
            if isinstance(row, RowFault) or cut is None:
                yield cast("RowFault", row)
                continue
            parts = list(islice(encoded[cut.learn is None], len(cut.at) - 1))
            ids, mask = _assemble(row, cut, parts, chat, example.text is not None)
            yield _fit(ids, mask, example, max_tokens, long)


def _render(example: Example, chat: Chat, learn: Learn) -> Rendered | RowFault:
    if example.text is not None:
        return Rendered(example.text, ((0, len(example.text)),), eos=True)
    try:
        return render_row(example, chat, learn)
    except RowFault as fault:
        return fault


@dataclass(frozen=True)
class _Cut:
    """Where a text is cut (its two ends among them) and, for each piece, whether all of it is learned.

    `learn` is None where a piece is learned in part, so that the place of its tokens in the text must be known.
    """

    at: tuple[int, ...]
    learn: tuple[bool, ...] | None


def _cuts(row: Rendered, chat: Chat) -> _Cut:
    size = len(row.text)
    starts = sorted({start for start, _ in row.spans if 0 < start < size}) if chat.splits else []
    plain = _Cut((0, *starts, size), None)
    if row.holes or not chat.splits:
        return plain
    ends = set()
    for _, end in row.spans:
        begin = max((start for start in starts if start < end), default=0)
        if 0 < end < size and row.text.endswith(chat.walls, begin, end):
            ends.add(end)
    at = (0, *sorted({*starts, *ends}), size)
    learn = []
    for start, end in pairwise(at):
        covered = [min(end, last) - max(start, first) for first, last in row.spans]
        if any(0 < shared < end - start for shared in covered):
            return plain
        learn.append(any(shared == end - start for shared in covered))
    return _Cut(at, tuple(learn))


def _tokenise(texts: Sequence[str], chat: Chat, offsets: bool) -> Iterator[Any]:
    """One `tokenizers.Encoding` a text, or without `offsets` its ids.

    The wrapper of transformers is left out: it takes as long as the work itself.
    """
    tokenizer = chat.tokenizer.backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if offsets:
        yield from tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return
    words = chat.words
    known = [words.ids(text) for text in texts] if words is not None else [None] * len(texts)
    rest = [text for text, ids in zip(texts, known, strict=True) if ids is None]
    others = iter(tokenizer.encode_batch_fast(rest, add_special_tokens=False))
    for ids in known:
        yield next(others).ids if ids is None else ids


def _assemble(
    row: Rendered, cut: _Cut, encoded: Sequence[Any], chat: Chat, plain: bool
) -> tuple[list[int], np.ndarray]:
    pieces = [encoding.ids for encoding in encoded] if cut.learn is None else encoded
    ids = [id_ for piece in pieces for id_ in piece]
    if cut.learn is not None:
        learn = np.repeat(cut.learn, [len(piece) for piece in pieces])
    else:
        masks = [np.zeros(len(piece), dtype=bool) for piece in pieces]
        for mask, encoding, (start, end) in zip(masks, encoded, pairwise(cut.at), strict=True):
            for value, spans in ((True, row.spans), (False, row.holes)):
                for first, last in spans:
                    mask[slice(*_touched(encoding, first - start, last - start, end - start))] = value
        learn = np.concatenate(masks)
    if plain:
        ids = [*chat.around[0], *ids, *chat.around[1]]
        learn = np.ones(len(ids), dtype=bool)
    eos = chat.tokenizer.eos_token_id
    if row.eos and eos is not None and ids[-1:] != [eos]:
        ids, learn = [*ids, eos], np.append(learn, True)
    return ids, learn


def _touched(encoding: Any, start: int, end: int, length: int) -> tuple[int, int]:
    """The tokens, as (first, past the last), that touch characters start..end of a text of `length` characters."""
    start, end = max(start, 0), min(end, length)
    if start >= end:
        return 0, 0
    count = len(encoding)
    first = 0 if start == 0 else encoding.char_to_token(start)
    past = count - 1 if end == length else encoding.char_to_token(end - 1)
    if first is not None and past is not None:
        while past + 1 < count and encoding.token_to_chars(past + 1)[0] < end:  # the other bytes of the last character
            past += 1
        return first, past + 1
    # A character that belongs to no token (a normaliser dropped it): look at all of them.
    touched = [n for n, (a, b) in enumerate(encoding.offsets) if a < end and max(b, a + 1) > start]
    return (touched[0], touched[-1] + 1) if touched else (0, 0)


def _fit(ids: list[int], mask: np.ndarray, example: Example, max_tokens: int, long: Long) -> Tokens | RowFault:
    if not mask.any():
        return RowFault("no token is learned; check train/weight marks and the learn setting")
    cut: Cut = ""
    length = len(ids)
    if length > max_tokens:
        reason = f"{length} tokens, more than max_tokens={max_tokens}"
        if long != "truncate":
            return RowFault(f"{reason}; raise it, or use long=truncate or long=skip", length)
        # The token after the cut is learned and so is the one before: the cut is inside an answer.
        cut = "answer" if mask[max_tokens] and mask[max_tokens - 1] else "end"
        ids, mask = ids[:max_tokens], mask[:max_tokens]
        if not mask.any():
            return RowFault(f"{reason}; nothing learned is left after truncation, raise it or use long=skip", length)
    return Tokens(np.asarray(ids, dtype=np.int32), mask, example.line, example, cut, length)

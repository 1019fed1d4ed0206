"""ASCII text to ids by a dictionary of words, several times faster than the tokenizer that fills it.

Byte-level tokenizers take the added tokens out of a text, split what is between them into words by a regular expression, and
look at each word by itself; so a word's ids are always the same. The expressions known here are written again for ASCII,
where Python's `re` and the tokenizer's own engine mean the same by them. Everything else is left to the tokenizer: other
expressions, other letters, added tokens that look at their neighbours, and words that the tokenizer would split further.
"""

from __future__ import annotations

import json
import re
from typing import Any

MOST = 100_000  # words in memory

_ENDS = r"'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_ENDS}| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
_LATER = rf"(?i:{_ENDS})|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]%s| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# As a tokenizer's file writes it -> for ASCII.
_KNOWN = {
    rf"(?i:{_ENDS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{count}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+":
    _LATER % count
    for count in ("", "{1,3}")
}  # fmt: skip

_ALPHABET = "".join(map(chr, range(128)))
_PROBES = (
    _ALPHABET,
    " ".join(_ALPHABET),
    "\n".join(_ALPHABET + "a") + "\n",
    "I'd we'LL it's  'tis 'S 12345 x1y2 3.14\t\ta \n\n b\r\n\r\n  c_d__e --> (f)?!  \x0b\x0c\x1c\x1f\x00 <|g|> ",
)


class Words(dict[str, list[int]]):
    """The ids of words that were seen; others are asked of the tokenizer. Made by `words_of`."""

    def __init__(self, tokenizer: Any, words: str) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._words = re.compile(words, re.ASCII)
        self._added = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def __missing__(self, word: str) -> list[int]:
        if len(self) >= MOST:
            self.clear()
        if len(self._tokenizer.pre_tokenizer.pre_tokenize_str(word)) != 1:
            raise _Unsure
        ids: list[int] = self._tokenizer.encode(word, add_special_tokens=False).ids
        self[word] = ids
        return ids

    def ids(self, text: str) -> list[int] | None:
        """The ids of a text; None where only the tokenizer can tell."""
        if not text.isascii():
            return None
        ids: list[int] = []
        try:
            for number, part in enumerate(self._split.split(text)):
                if number % 2:
                    ids.append(self._added[part])
                else:
                    for word in self._words.findall(part):
                        ids += self[word]
        except _Unsure:
            return None
        return ids


class _Unsure(Exception):
    """A word that isn't one."""


def words_of(tokenizer: Any) -> Words | None:
    """The words of a `tokenizers.Tokenizer`; None for one whose way of splitting isn't known."""
    try:
        splits = json.loads(tokenizer.pre_tokenizer.__getstate__())
        normal = None if tokenizer.normalizer is None else json.loads(tokenizer.normalizer.__getstate__())["type"]
        expression = _expression(splits)
        random = getattr(tokenizer.model, "dropout", None)
    except Exception:  # written in Python, or of another kind
        return None
    added = tokenizer.get_added_tokens_decoder().values()
    looks = any(token.lstrip or token.rstrip or token.single_word or not token.content for token in added)
    if expression is None or normal not in (None, "NFC") or random or looks:
        return None
    words = Words(tokenizer, expression)
    for probe in _PROBES:
        if words.ids(probe) != tokenizer.encode(probe, add_special_tokens=False).ids:
            return None
    return words


def _expression(splits: dict[str, Any]) -> str | None:
    """The expression for ASCII words of a pre-tokenizer."""
    parts = splits["pretokenizers"] if splits["type"] == "Sequence" else [splits]
    *first, last = parts
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not first:
        return _GPT2 if last["use_regex"] else None
    if len(first) > 1 or last["use_regex"] or first[0]["type"] != "Split":
        return None
    if first[0]["behavior"] != "Isolated" or first[0]["invert"]:
        return None
    return _KNOWN.get(first[0]["pattern"].get("Regex", ""))

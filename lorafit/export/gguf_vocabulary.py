"""A tokenizer as GGUF metadata.

Two kinds are written. Byte-level BPE ("gpt2") comes with the name of its first step, which cuts a text into words: llama.cpp
has no pattern in its files, only names of patterns in its code. So the pattern of tokenizer.json is looked up, and one that
has no name there is refused: a wrong name would give other tokens, without a word. SentencePiece ("llama") comes with scores,
which a tokenizer.json has as the order of its merges.
"""

from __future__ import annotations

import json
from typing import Any

from gguf import TokenType

from lorafit.errors import ModelError

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
# Patterns of tokenizer.json by llama.cpp's name, and whether a word that is a token as a whole isn't merged from letters.
_PATTERNS = {
    _SHORT + _WORDS % r"\p{N}{1,3}": ("llama-bpe", True),
    _SHORT + _WORDS % r"\p{N}": ("qwen2", False),
}
_BYTES = {f"<0x{i:02X}>" for i in range(256)}


def add(writer: Any, tokenizer: Any, chat: Any, rows: int) -> None:
    """Write the tokenizer of a base whose embedding has so many rows. ModelError for one that llama.cpp has no name for."""
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, added = _tokens(tokenizer, rows), tokenizer.added_tokens_decoder
    kinds = [_kind(added.get(i), token) for i, token in enumerate(tokens)]
    if _is_sentencepiece(inner):
        prefix = _prefix(inner)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([token or f"[PAD{i}]" for i, token in enumerate(tokens)])
        writer.add_token_scores(_scores(inner, tokens))
        unknown = tokenizer.unk_token_id
        for i, token in enumerate(tokens):
            if i == unknown:
                kinds[i] = TokenType.UNKNOWN
            elif token in _BYTES:
                kinds[i] = TokenType.BYTE
        writer.add_add_space_prefix(prefix)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre(inner))
        writer.add_token_list([token or f"[PAD{i}]" for i, token in enumerate(tokens)])
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in inner["model"]["merges"]])
    writer.add_token_types(kinds)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    for name, id_ in ids.items():
        if id_ is not None:
            getattr(writer, f"add_{name}_token_id")(id_)
    ends = [tokenizer.convert_tokens_to_ids(word) for word in chat.ends] if chat is not None else []
    turn = next((id_ for id_ in ends if id_ is not None and id_ != ids["eos"]), None)
    if turn is not None:
        writer.add_eot_token_id(turn)
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    writer.add_add_bos_token(whole != bare and whole[0] == ids["bos"])
    writer.add_add_eos_token(whole != bare and whole[-1] == ids["eos"])


def _tokens(tokenizer: Any, rows: int) -> list[str | None]:
    """By id; None where a row of the embedding has no token. ModelError for a token without a row."""
    found: list[str | None] = [None] * rows
    for token, id_ in tokenizer.get_vocab().items():
        if id_ >= rows:
            raise ModelError(f"token {token!r} has the id {id_}, and the embedding {rows} rows; llama.cpp refuses that")
        found[id_] = token
    return found


def _kind(added: Any, token: str | None) -> TokenType:
    if token is None:
        return TokenType.UNUSED
    if added is None:
        return TokenType.NORMAL
    return TokenType.CONTROL if added.special else TokenType.USER_DEFINED


def pre(inner: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json of byte-level BPE cuts words. ModelError where it has none."""
    steps = _steps(inner.get("pre_tokenizer"))
    normal = [step["type"] for step in _steps(inner.get("normalizer"))]
    names = [step["type"] for step in steps]
    whole = bool(inner["model"].get("ignore_merges"))
    found: tuple[str, bool] | None = None
    if inner["model"]["type"] == "BPE" and names and names[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        cuts = bool(steps[-1].get("use_regex", True))
        if cuts and names == ["ByteLevel"]:
            found = "gpt-2", False
        elif cuts and names == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            found = "smollm", False
        elif not cuts and names == ["Split", "ByteLevel"] and steps[0].get("behavior") == "Isolated":
            found = _PATTERNS.get(steps[0].get("pattern", {}).get("Regex", ""))
    if found is None or found[1] != whole or normal not in ([], ["NFC"]):
        raise ModelError(
            "llama.cpp has no name here for how this tokenizer cuts words; write a folder with --format hf, and convert it"
            " with llama.cpp's convert_hf_to_gguf.py"
        )
    return found[0]


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A step of tokenizer.json, or those of a sequence."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for one in part.get("pretokenizers") or part.get("normalizers") or () for step in _steps(one)]


# --- SentencePiece -----------------------------------------------------------------------------------------------------


def _is_sentencepiece(inner: dict[str, Any]) -> bool:
    return inner["model"]["type"] == "BPE" and bool(inner["model"].get("byte_fallback"))


def _prefix(inner: dict[str, Any]) -> bool:
    """Whether a text gets a space in front. ModelError where the steps aren't SentencePiece's."""
    before, cuts = _steps(inner.get("normalizer")), _steps(inner.get("pre_tokenizer"))
    names: list[str] = [step["type"] for step in before]
    if names in (["Prepend", "Replace"], ["Replace"]) and not cuts:
        return names[0] == "Prepend"
    if not names and [step["type"] for step in cuts] == ["Metaspace"] and not cuts[0].get("split", True):
        return str(cuts[0].get("prepend_scheme", "always")) != "never"
    raise ModelError(
        "this tokenizer is like SentencePiece's, but not one that llama.cpp reads; write a folder with --format hf, and convert"
        " it with llama.cpp's convert_hf_to_gguf.py"
    )


def _scores(inner: dict[str, Any], tokens: list[str | None]) -> list[float]:
    """llama.cpp joins the two neighbours whose token has the highest score: the order in which merges make tokens, falling."""
    order: dict[str, int] = {}
    for rank, merge in enumerate(inner["model"]["merges"]):
        order.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    last = len(order)
    return [float(-order.get(token or "", last)) for token in tokens]

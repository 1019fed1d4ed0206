"""Tokens that a base's tokenizer is given on top of its own, and the rows for them in embedding and output head.

Nothing is written to the base's folder: the tokenizer is extended in memory, and the model's files are read as if these rows
stood in them. A new row is the mean of the rows of the tokens that spelled the text before; so it is the same at every load,
and what training changes of it is the adapter's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.errors import ConfigError
from lorafit.model.shards import Files


@dataclass(frozen=True)
class NewTokens:
    """`texts` with their `ids`, and `pieces`: the ids that each was spelled with before."""

    texts: tuple[str, ...]
    ids: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict[str, int]:
        """Ids by text, as lorafit.json has them."""
        return dict(zip(self.texts, self.ids, strict=True))


def extend(tokenizer: Any, texts: Sequence[str]) -> NewTokens | None:
    """Give a tokenizer these tokens; None for no texts. ConfigError for one that it has already, or that is empty."""
    if not texts:
        return None
    from tokenizers import AddedToken

    own, pieces = tokenizer.get_vocab(), []
    for text in texts:
        if not text.strip() or text != text.strip():
            raise ConfigError(f"new_tokens: {text!r} must have no space around it, and something in it")
        if text in own:
            raise ConfigError(f"new_tokens: {text!r} is a token of this tokenizer already; leave it out")
        if texts.count(text) > 1:
            raise ConfigError(f"new_tokens: {text!r} is named twice")
        pieces.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
    return NewTokens(tuple(texts), tuple(tokenizer.convert_tokens_to_ids(list(texts))), tuple(pieces))


def grow(config: Any, new: NewTokens) -> None:
    """Make a transformers config say as many rows as there are then."""
    text = config.get_text_config()
    config.vocab_size = text.vocab_size = max(text.vocab_size, *(i + 1 for i in new.ids))


class Grown:
    """A folder's tensors, those of the embedding and of the output head with rows for new tokens."""

    def __init__(self, files: Files, model: Any, new: NewTokens) -> None:
        """`model` is the folder's, without weights, as its config says once it has grown."""
        self.folder: Path = files.folder
        self.files, self.new = files, new
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        held = {id(p) for module in ends if module is not None for p in module.parameters()}
        names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in held}
        prefix = f"{model.base_model_prefix}."
        spelled = {s for name in names for s in (name, name.removeprefix(prefix), prefix + name)}
        self.names = spelled & set(files.shapes)
        rows = model.config.get_text_config().vocab_size
        self.shapes = {
            name: torch.Size((rows, *shape[1:])) if name in self.names else shape
            for name, shape in files.shapes.items()
        }

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """As in Files; a tensor that has grown is a copy."""
        found = self.files.read(name, dtype)
        if name not in self.names:
            return found
        whole = found.new_zeros(self.shapes[name])
        whole[: len(found)] = found
        for at, pieces in zip(self.new.ids, self.new.pieces, strict=True):
            whole[at] = found[list(pieces)].float().mean(0)
        return whole

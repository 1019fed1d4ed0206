"""Sampling with a key-value cache, through any stack of adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from lorafit.data import Chat
from lorafit.host import Host
from lorafit.route import StackLike


@torch.no_grad()
def _logits(host: Host, ids: Tensor, cache: DynamicCache, spec: StackLike) -> Tensor:
    with (
        host.route(spec),
        host.base.remembering(),
    ):  # opened for each forward, so that a caller may stop listening between tokens
        out = host.base.model(input_ids=ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: Tensor = out.logits[0, -1].float()
    return logits


def generate(
    host: Host,
    ids: Sequence[int],
    spec: StackLike = None,
    *,
    stop: Collection[int] = (),
    max_new: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """New token ids after `ids`, one by one, without the stop token that ends them. Temperature 0 is greedy."""
    generator = torch.Generator(host.base.device).manual_seed(seed)
    cache = DynamicCache(config=host.base.model.config)
    room = max(0, min(max_new, host.base.context - len(ids)))
    feed = torch.tensor(list(ids), device=host.base.device)
    for _ in range(room):
        token = pick(_logits(host, feed, cache, spec), temperature, top_p, generator)
        if token in stop:
            return
        yield token
        feed = torch.tensor([token], device=host.base.device)


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token id from logits (vocabulary,): the best, or drawn from the smallest set that holds `top_p`."""
    if temperature <= 0:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(-1).sort(descending=True)
    probabilities[(probabilities.cumsum(-1) - probabilities) >= top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def stream(chat: Chat, tokens: Iterator[int]) -> Iterator[str]:
    """Token ids as pieces of text; a character that isn't complete yet waits for its last token."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = chat.tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("�"):
            yield text[len(shown) :]
            shown = text
    text = chat.tokenizer.decode(ids, skip_special_tokens=True)
    if len(text) > len(shown):
        yield text[len(shown) :]


def answer(host: Host, chat: Chat, ids: Sequence[int], spec: StackLike = None, *, max_new: int = 64) -> str:
    """A greedy answer as text."""
    return "".join(stream(chat, generate(host, ids, spec, stop=chat.stop, max_new=max_new))).strip()

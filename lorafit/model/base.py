"""The frozen base: a transformers model, where it came from, and the two products that lorafit asks of it.

`hidden` runs packed documents through the body, `head` turns chosen positions into logits. Both are checked against the
model's plain forward on a tiny input when the base is loaded: an architecture that mixes packed documents or treats its
logits further (a cap, a scale) is run document by document and through its own forward instead, never silently wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.errors import ModelError
from lorafit.model.attention import UNREAD_MASK
from lorafit.model.body import Added, Body, Products, plain_products
from lorafit.model.new_tokens import NewTokens
from lorafit.model.quant import Quant, QuantLinear
from lorafit.model.starts import Part
from lorafit.model.streamed import Source
from lorafit.native.quantised import ROUNDED
from lorafit.packing import Packing


@dataclass
class Base:
    """A loaded base. `packs`: documents may share a row. `plain_head`: logits are the head's product with the hidden state.
    `body`: our own run through its layers, where its family is known. `quant`: how its linear weights are stored, if not in
    its own type. `source`: where its weights lie, where it was read tensor by tensor. `new`: tokens that its files
    don't know."""

    model: Any
    tokenizer: Any
    path: Path
    name: str
    fingerprint: str
    packs: bool = False
    plain_head: bool = False
    body: Body | None = None
    quant: Quant | None = None
    source: Source | None = None
    new: NewTokens | None = None
    recomputed: list[Any] = field(default_factory=list)  # modules that keep no activations, see `checkpointing`

    @property
    def streamed(self) -> bool:
        """It holds no weights but codes, see streamed.py."""
        return bool(next(self.model.parameters()).is_meta)

    @property
    def device(self) -> torch.device:
        """Where the weights are, or are read to."""
        device: torch.device = next(self.model.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and the activations."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def coarse(self) -> bool:
        """The same tokens give the same but for rounding that shows: 16 bits, or products that round what they are given."""
        return self.dtype != torch.float32 or (self.quant is not None and self.quant.kind == ROUNDED)

    @property
    def head(self) -> Any:
        """The output head's module."""
        return self.model.get_output_embeddings()

    @property
    def context(self) -> int:
        """The longest document the model was made for, in tokens."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 2048)

    def parameters(self) -> int:
        """How many numbers the base holds (a shared weight counted once)."""
        total: int = sum(p.numel() for p in self.model.parameters())
        return total + sum(m.shape.numel() for m in self.model.modules() if isinstance(m, QuantLinear))

    def parts(self) -> dict[str, Part]:
        """What stands beside the codes of its weights, by path."""
        found = {path: m.part for path, m in self.model.named_modules() if isinstance(m, QuantLinear)}
        return {path: part for path, part in found.items() if part is not None}

    def checkpointing(self, on: bool) -> None:
        """Recompute each layer's activations in the backward pass. The base's own dropout stays off."""
        if self.body is not None:
            self.body.checkpointing = on
        if not on:
            self.model.activation_checkpointing_disable()
            self.recomputed = []
            return
        if not self.packs or not self.model.supports_gradient_checkpointing:
            raise ModelError(f"{self.name}: activation checkpointing isn't available for this architecture")
        self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.recomputed = [m for m in self.model.modules() if getattr(m, "gradient_checkpointing", False)]
        for module in self.recomputed:
            module.training = True  # transformers asks for it; set on these modules alone, not on what they hold
        ids = torch.arange(8, device=self.device)
        with torch.no_grad():
            off, again = self.hidden(ids, [8]), self.hidden(ids, [8])
        if not torch.equal(off, again):  # a layer that drops out by its own `training`
            self.model.activation_checkpointing_disable()
            self.model.eval()
            self.recomputed = []
            raise ModelError(f"{self.name}: activation checkpointing would turn on this architecture's own dropout")

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Within it the model's modules take part in a cache of keys and values: with checkpointing on, transformers drops it."""
        for module in self.recomputed:
            module.training = False
        try:
            yield
        finally:
            for module in self.recomputed:
                module.training = True

    def fast(
        self, ids: Tensor, packing: Packing, products: Products = plain_products, added: Added | None = None
    ) -> Tensor:
        """What `hidden` gives, by the body's kernels; `products` stands for the linear modules (deltas come in there, and
        `added` says what they are where they are all of low rank)."""
        assert self.body is not None
        return self.body.hidden(ids, packing, products, added)

    def hidden(self, ids: Tensor, lengths: Sequence[int], packed: bool | None = None) -> Tensor:
        """Last hidden states (tokens, width) of documents that lie end to end in ids (tokens,)."""
        return self._run(self.model.base_model, ids, lengths, packed, "last_hidden_state")

    def logits(self, ids: Tensor, lengths: Sequence[int], packed: bool | None = None) -> Tensor:
        """Logits (tokens, vocabulary) by the model's own forward."""
        return self._run(self.model, ids, lengths, packed, "logits")

    def _run(self, part: Any, ids: Tensor, lengths: Sequence[int], packed: bool | None, field: str) -> Tensor:
        lengths = list(lengths)
        if packed if packed is not None else self.packs:
            positions = torch.cat([torch.arange(n, device=ids.device) for n in lengths])
            out = part(
                input_ids=ids[None],
                position_ids=positions[None],
                attention_mask=UNREAD_MASK.to(ids.device),
                doc_lengths=lengths,
                use_cache=False,
            )
            whole: Tensor = getattr(out, field)[0]
            return whole
        # One document a call: plain, exact for every architecture, and what the packed row is tested against. The
        # route (which adapter a token meets) is told which documents these are by the caller, see host.py.
        return torch.cat([getattr(part(input_ids=doc[None], use_cache=False), field)[0] for doc in ids.split(lengths)])


@torch.no_grad()
def alone(base: Base, ids: Tensor, lengths: Sequence[int], states: bool = False) -> tuple[Tensor, list[Tensor]]:
    """What the model's own forward gives documents that lie end to end in ids (tokens,), each in a call of its own.

    Logits (tokens, vocabulary), and with `states` those before each layer and after the last one's norm, (tokens, width);
    none where the model doesn't give them.
    """
    asked = {"output_hidden_states": True} if states else {}
    outs = [base.model(input_ids=doc[None], use_cache=False, **asked) for doc in ids.split(list(lengths))]
    parts = zip(*(getattr(out, "hidden_states", None) or () for out in outs), strict=True)
    return torch.cat([out.logits[0] for out in outs]), [torch.cat([state[0] for state in part]) for part in parts]


def near(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Whether logits (tokens, vocabulary) are the same but for rounding: no number is off by `tolerance`, or all of them together
    by no more than that is of the largest one.

    The second because of thirty layers' rounding some of 700,000 numbers may be off by 5 % of the largest one, where the whole
    is off by 2 % (SmolLM2 in nf4, measured); documents that see each other are off by half.
    """
    share = tolerance / max(1.0, want.abs().max().item())
    return bool((got - want).abs().max() < tolerance or (got - want).norm() < share * want.norm())


@torch.no_grad()
def probe(base: Base) -> None:
    """Set `packs` and `plain_head`, and check `body`, from two documents of 9 and 5 tokens.

    Costs three of the model's forwards, the documents alone and packed, and our own layers once; where they aren't used,
    two forwards more, because nothing else has shown then that `hidden` is what the head of the whole model gets.
    """
    vocabulary = base.model.get_input_embeddings().weight.shape[0]
    lengths = [9, 5]
    ids = (torch.arange(sum(lengths), device=base.device) * 7919 + 11) % vocabulary
    logits, states = alone(base, ids, lengths, states=base.body is not None)
    want = logits.float()
    tolerance = (0.05 if base.coarse else 1e-4) * max(1.0, want.abs().max().item())
    kinds = set(getattr(base.model.config.get_text_config(), "layer_types", None) or ())
    try:
        packed = base.logits(ids, lengths, packed=True).float()
        base.packs = kinds <= {"full_attention", "sliding_attention"} and near(packed, want, tolerance)
    except (TypeError, ValueError, RuntimeError):
        base.packs = False
    # These kinds of rotary angles depend on the longest position of a call: a document would change its neighbours' angles.
    rope = str(getattr(getattr(base.model.base_model, "rotary_emb", None), "rope_type", ""))
    base.packs = base.packs and "dynamic" not in rope and "longrope" not in rope
    if base.body is not None and not (base.packs and base.body.agrees(ids, lengths, states, base.coarse)):
        base.body = None
    head = base.head
    if head is not None and getattr(base.model, "base_model", None) is not None:
        if base.body is None:
            # In the time of one document alone, where each forward reads all weights and what packing changes is known.
            states = [base.hidden(ids, lengths, packed=base.packs and base.streamed)]
        got = head(states[-1]).float()
        text = base.model.config.get_text_config()
        treated = [getattr(text, name, None) for name in ("final_logit_softcapping", "logits_scaling", "logit_scale")]
        base.plain_head = (
            all(value in (None, 1, 1.0) for value in treated)
            and got.shape == want.shape
            and bool((got - want).abs().max() < tolerance * 0.1)
        )

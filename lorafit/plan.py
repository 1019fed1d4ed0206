"""How much memory a run will take, told before a byte of weights is read: from config.json and the rows' lengths alone.

The estimate adds up what must be in memory at the height of a step. The activation term counts what autograd keeps in a
Llama-like layer, times 1.5 for the backward pass's own buffers and the allocator's gaps (measured: within about 10 % on
SmolLM2-135M at 256 to 2048 tokens, bf16 and fp32).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorafit.batches import Plan as Batches
from lorafit.batches import default_tokens, targets
from lorafit.config import Config
from lorafit.data import Tokens
from lorafit.methods import find
from lorafit.model.load import pick_device, pick_dtype
from lorafit.model.quant import Quant
from lorafit.model.sites import find_sites, pattern_value, select
from lorafit.train.loss import CHUNK

RUNTIME = 350_000_000  # Python, torch and transformers, before any model
SLACK = 1.5


@dataclass(frozen=True)
class Estimate:
    """Bytes of each part at the height of a training step, and their sum."""

    runtime: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    micro_batch_tokens: int
    steps: int
    trainable_parameters: int
    total_parameters: int
    precision: str

    @property
    def peak_bytes(self) -> int:
        """The estimated peak of resident memory."""
        return (
            self.runtime
            + self.weights
            + self.adapter
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
        )

    def to_json(self) -> dict[str, Any]:
        """In JSON types."""
        return {"peak_bytes": self.peak_bytes, **asdict(self)}


def estimate(config: Config, path: Path, rows: Sequence[Tokens]) -> Estimate:
    """The memory of training `config` on these rows; the model is built without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.from_pretrained(path, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
        sites = find_sites(model)
        kind = find(config.method)
        number = held = 0
        for site in select(sites, config.targets or kind.targets):
            options = dict(config.options)
            if "r" in options:
                options["r"] = pattern_value(config.rank_pattern, site.path, options["r"])
            layer = kind(site, None, **options)
            number += sum(p.numel() for p in layer.parameters())
            held += sum(t.numel() for t in layer.state_dict().values())
    dtype = pick_dtype(config.precision, pick_device(config.device))
    wide = dtype.itemsize
    total = sum(p.numel() for p in model.parameters())
    weights = total * wide
    if quant := Quant.of(config.quant, config.double_quant):
        coded = [site.shape for site in sites.values() if site.kind in ("linear", "conv1d") and not site.head]
        weights += sum(quant.size(shape) - shape.numel() * wide for shape in coded)
        weights += 2 * max(shape.numel() for shape in coded) * wide  # numbers of those that share an input
    text = shape.get_text_config()
    batches = Batches(rows, config.batch_tokens or default_tokens(rows, config.share), config.accumulate, config.seed)
    largest = most = 0
    for micro in (micro for step in batches.epoch(0) for micro in batches.micros(step)):
        largest = max(largest, sum(len(row.ids) for row in micro))
        most = max(most, targets(micro))
    return Estimate(
        runtime=RUNTIME,
        weights=weights,
        adapter=held * 4,
        gradients=number * 4,
        optimizer=number * 8,
        activations=activations(text, largest, wide, config.checkpointing),
        logits=min(CHUNK, most) * text.vocab_size * (wide + 12),
        micro_batch_tokens=largest,
        steps=config.steps or batches.steps(config.epochs),
        trainable_parameters=number,
        total_parameters=total,
        precision="bf16" if dtype is torch.bfloat16 else "fp32",
    )


def activations(text: Any, tokens: int, wide: int, checkpointing: bool) -> int:
    """Bytes that autograd keeps for `tokens` tokens; `wide` is the bytes of a number.

    A layer keeps, in numbers a token: 6 h for two norms (their fp32 copies count double in bf16), 3 q + 2 kv for attention,
    4 i for the gated product. With checkpointing: one layer, and each layer's input.
    """
    h, layers = int(text.hidden_size), int(text.num_hidden_layers)
    heads = text.num_attention_heads
    dim = getattr(text, "head_dim", None) or h // heads
    q, kv = heads * dim, (getattr(text, "num_key_value_heads", None) or heads) * dim
    inner = getattr(text, "intermediate_size", None) or 4 * h
    layer = int(SLACK * wide * (6 * h + 3 * q + 2 * kv + 4 * inner))
    return tokens * (layer + layers * h * wide if checkpointing else layers * layer)

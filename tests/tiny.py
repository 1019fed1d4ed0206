"""Tiny random models of the shapes that users have, and rows of random tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from lorafit.data.tokens import Tokens
from lorafit.model.base import Base
from lorafit.model.load import prepare
from lorafit.model.quant import QuantLinear, put

VOCAB = 61
_SIZE = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def model(shape: str, scale: float = 0.25, **changes):
    torch.manual_seed(0)
    if shape == "gpt2":
        sizes = dict(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
        made = GPT2LMHeadModel(GPT2Config(**{**sizes, "tie_word_embeddings": False, **changes}))
    else:
        kinds = {
            "llama": (LlamaConfig, LlamaForCausalLM, {}),
            "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 4}),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
            "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4, "num_experts_per_tok": 2}),
        }
        config, kind, extra = kinds[shape]
        made = kind(config(**{**_SIZE, **extra, **changes}))
    with torch.no_grad():  # the default 0.02 makes logits so small that an error would hide in the tolerance
        for name, p in made.named_parameters():
            if p.ndim >= 2:
                p.normal_(0, scale)
            elif name.endswith("bias"):
                p.normal_(0, 0.1)
    return made.eval()


def base(shape: str, dtype: torch.dtype = torch.float32, **changes) -> Base:
    return prepare(model(shape, **changes).to(dtype), None, Path("nowhere"), shape)


def randomize(adapter, scale: float = 0.2) -> None:
    """Give every parameter of an adapter values far from its start, so that its delta is felt."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(0, scale, generator=generator)


def randomize_peft(model, scale: float = 0.2, only: str = "lora_") -> None:
    """The same for a model that PEFT has wrapped."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if only in name:
                p.normal_(0, scale, generator=generator)


def rows(lengths, seed: int = 0, learn: str = "half") -> list[Tokens]:
    generator = np.random.default_rng(seed)
    made = []
    for line, n in enumerate(lengths, 1):
        mask = np.ones(n, dtype=bool) if learn == "all" else np.arange(n) >= n // 2
        ids = generator.integers(0, VOCAB, n).astype(np.int32)
        made.append(Tokens(ids=ids, learn=mask, line=line, example=None, cut=""))
    return made


def ids(n: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCAB, n))


@torch.no_grad()
def restore(model) -> None:
    """Undo `convert` but for what it rounded: modules of the model's number type that hold what the codes stand for."""
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            with torch.device("meta"):
                out, width = module.shape
                made = Conv1D(out, width) if module.turned else nn.Linear(width, out, module.bias is not None)
            weight = module.numbers()
            made.weight = nn.Parameter(weight.t().contiguous() if module.turned else weight, requires_grad=False)
            made.bias = module.bias
            put(model, path, made)

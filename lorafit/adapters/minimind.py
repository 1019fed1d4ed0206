"""MiniMind's own weights (a `.pth` file) as a Hugging Face folder of Qwen 3, whose layers and names are the same.

What the file doesn't say is as in MiniMind's configuration since its third version: RMS norms with 1e-6, rotary base 1e6, a
context of 32,768 tokens, tokens 1 and 2 around a conversation's turns. Checked with its code of August 2026.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config

from lorafit import files
from lorafit.errors import ModelError
from lorafit.model.load import blank
from lorafit.model.shards import Entry, write_shards

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
MOST = 1_000_000_000  # bytes of a file


def is_base(tensors: Mapping[str, Tensor]) -> bool:
    """They are a whole model's, not an adapter's."""
    return EMBEDDING in tensors


def config_of(tensors: Mapping[str, Tensor], name: object) -> Qwen3Config:
    """From the tensors' shapes. ModelError for a MiniMind of another shape: with experts, or before its norms of q and k."""
    first = "model.layers.0."
    if any(".experts." in key for key in tensors):
        raise ModelError(f"{name} is a mixture of experts; only MiniMind's dense models can be converted")
    need = [f"self_attn.{part}.weight" for part in ("q_norm", "q_proj", "k_proj")] + ["mlp.gate_proj.weight"]
    if missing := [key for key in need if first + key not in tensors]:
        raise ModelError(f"{name} has no {first}{missing[0]}; only MiniMind since its third version can be converted")
    vocabulary, width = tensors[EMBEDDING].shape
    head = tensors[first + need[0]].shape[0]
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=tensors[first + need[3]].shape[0],
        num_hidden_layers=1 + max(int(key.split(".")[2]) for key in tensors if key.startswith("model.layers.")),
        num_attention_heads=tensors[first + need[1]].shape[0] // head,
        num_key_value_heads=tensors[first + need[2]].shape[0] // head,
        head_dim=head,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=HEAD not in tensors or torch.equal(tensors[HEAD], tensors[EMBEDDING]),
        bos_token_id=1,
        eos_token_id=2,
        architectures=["Qwen3ForCausalLM"],
    )


def write(tensors: Mapping[str, Tensor], name: object, tokenizer: Path, out: Path) -> dict[str, Any]:
    """The folder, with the files of `tokenizer`; the tensors are the very ones. Returns the model's figures.

    ModelError where a tensor is missing, unknown or of another shape, or there is no tokenizer.
    """
    if not (tokenizer / TOKENIZER[0]).is_file():
        raise ModelError(
            f"{tokenizer} has no tokenizer.json; MiniMind keeps it in its model folder, name that with --tokenizer"
        )
    config = config_of(tensors, name)
    tied = bool(config.tie_word_embeddings)
    kept = {key: t.contiguous() for key, t in tensors.items() if not (tied and key == HEAD)}

    def fill(place: Path) -> None:
        kind = str(kept[EMBEDDING].dtype).removeprefix("torch.")
        config.dtype = kind
        config.save_pretrained(place)
        want = {key: tuple(p.shape) for key, p in blank(place).named_parameters()}
        have = {key: tuple(t.shape) for key, t in kept.items()}
        if wrong := sorted(key for key in want.keys() | have.keys() if want.get(key) != have.get(key)):
            key = wrong[0]
            raise ModelError(
                f"{name}: {key} is {have.get(key, 'missing')}, a Qwen 3 of its shape has {want.get(key, 'no such')}"
            )
        entries = [Entry(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in kept.items()]
        write_shards(place, entries, iter([kept]), MOST)
        for part in TOKENIZER:
            if (tokenizer / part).is_file():
                shutil.copyfile(tokenizer / part, place / part)

    files.write_folder(out, fill, again="try again")
    return {
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "parameters": sum(t.numel() for t in kept.values()),
    }

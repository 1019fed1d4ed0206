"""Models of the shapes that users bring, with random weights: speed doesn't ask what a weight is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

SHAPES = ("qwen3", "gpt2")  # beside the Llama that the default model is
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def build(shape: str, source: Path, place: Path) -> Path:
    """Write a model of about 100 million weights into `place`, with the tokenizer of the model in `source`."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

    from lorafit.model.load import load_tokenizer, quiet

    quiet()
    tokenizer = load_tokenizer(source)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    made: Any
    torch.manual_seed(0)
    if shape == "gpt2":
        # Without the dropout that GPT-2's config asks for: it would be active on the other side alone.
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        made = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **off, **ends))
    else:
        made = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=640,
                intermediate_size=1920,
                num_hidden_layers=14,
                num_attention_heads=10,
                num_key_value_heads=5,
                head_dim=64,
                max_position_embeddings=8192,
                tie_word_embeddings=True,
                **ends,
            )
        )
    made.to(torch.bfloat16).save_pretrained(place)
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copy(source / name, place / name)
    return place

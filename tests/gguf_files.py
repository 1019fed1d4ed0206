"""Writing GGUF files as llama.cpp's converter does, by hand: its names for tensors, and what it does to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from data_helpers import CHATML, tokenizer
from gguf import GGMLQuantizationType as Type
from gguf import quants
from tiny import model
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

# Widths that hold whole blocks of 32.
SIZES = dict(hidden_size=64, intermediate_size=96)
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


# Beside a norm of its own before the second half of a layer, this one is after the first.
_GEMMA = {"post_attention_layernorm": "post_attention_norm"}


def named(key: str, gemma: bool = False) -> str:
    """llama.cpp's name of a tensor."""
    path, leaf = key.rsplit(".", 1)
    for prefix in ("model.layers.", "transformer.h."):
        if path.startswith(prefix):
            number, rest = path.removeprefix(prefix).split(".", 1)
            return f"blk.{number}.{({**_NAMES, **_GEMMA} if gemma else _NAMES)[rest]}.{leaf}"
    return f"{_NAMES[path]}.{leaf}"


def alternating(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k as llama.cpp keeps them for the architecture llama."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def stored(weight: torch.Tensor, kind: str) -> np.ndarray:
    """Numbers as a type holds them; norms and biases stay fp32."""
    numbers = weight.float().numpy()
    return numbers if weight.ndim == 1 else quants.quantize(np.ascontiguousarray(numbers), Type[kind])


def made(shape: str, kind: str = "F32", **changes: Any) -> Any:
    """A tiny model whose weights are numbers that the type can hold, and as many tokens as the tokenizer has."""
    sizes = {**(dict(n_embd=64) if shape == "gpt2" else SIZES), "vocab_size": len(tokenizer()), **changes}
    tiny = _gemma(shape, **sizes) if shape.startswith("gemma") else model(shape, scale=0.1, **sizes)
    with torch.no_grad():
        for name, p in tiny.named_parameters():
            if p.ndim == 2:
                turned = shape == "gpt2" and name.startswith("transformer.h.")
                rows = p.t() if turned else p
                numbers = torch.from_numpy(quants.dequantize(stored(rows, kind), Type[kind]))
                p.copy_(numbers.t() if turned else numbers)
            elif "norm" in name or "ln_" in name:
                p.copy_(1 + 0.1 * torch.randn_like(p))
    return tiny


def _gemma(shape: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    kinds = {"gemma2": (Gemma2Config, Gemma2ForCausalLM), "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM)}
    config, kind = kinds[shape]
    heads = dict(
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32
    )
    tiny = kind(config(**heads, max_position_embeddings=64, sliding_window=4, bos_token_id=0, eos_token_id=1, **sizes))
    with torch.no_grad():
        for p in tiny.parameters():
            p.normal_(0, 0.1)
    return tiny.eval()


def write(
    path: Path, tiny: Any, kind: str = "F32", more: Mapping[str, Any] = MappingProxyType({}), arch: str = ""
) -> Path:
    """The model as a GGUF file. `more`: metadata after the architecture's name, and tensors, as numbers or (type, bytes), that
    stand in for the model's or are added; None leaves one out."""
    c, kind_of = tiny.config, tiny.config.model_type
    arch = arch or {"mistral": "llama", "gemma3_text": "gemma3"}.get(kind_of, kind_of)
    gemma = arch.startswith("gemma")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("Tiny")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_head_count(c.num_attention_heads)
    if arch == "gpt2":
        writer.add_feed_forward_length(4 * c.hidden_size)
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_freq_base(c.rope_parameters.get("full_attention", c.rope_parameters)["rope_theta"])
        if arch == "qwen3" or gemma:
            writer.add_key_length(c.head_dim)
            writer.add_value_length(c.head_dim)
        if gemma:
            writer.add_sliding_window(c.sliding_window)
        if arch == "gemma2":
            writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
            writer.add_final_logit_softcapping(c.final_logit_softcapping)
    for key, value in more.items():
        if isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{arch}.{key}", value)
    _vocabulary(writer)
    for key, p in tiny.state_dict().items():
        name, weight = named(key, gemma), p.detach()
        if name in more or (key == "lm_head.weight" and c.tie_word_embeddings):
            continue
        if arch == "gpt2" and weight.ndim == 2 and name.startswith("blk."):
            weight = weight.t()
        if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = c.num_attention_heads if ".attn_q." in name else c.num_key_value_heads
            weight = torch.from_numpy(alternating(weight.float().numpy(), heads))
        if gemma and weight.ndim == 1:
            weight = weight + 1
        writer.add_tensor(name, stored(weight, kind), raw_dtype=None if weight.ndim == 1 else Type[kind])
    for name, value in more.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[1], raw_dtype=Type[value[0]])
        elif isinstance(value, np.ndarray):
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _vocabulary(writer: Any) -> None:
    tok = tokenizer(CHATML)
    inner = json.loads(tok.backend_tokenizer.to_str())["model"]
    tokens = sorted(inner["vocab"], key=inner["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>", "<|im_start|>", "<|im_end|>") else 1 for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in inner["merges"]])
    writer.add_bos_token_id(tok.bos_token_id)
    writer.add_eos_token_id(tok.convert_tokens_to_ids("<|im_end|>"))
    writer.add_eot_token_id(tok.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)

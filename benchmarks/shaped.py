"""A model folder of a known shape with random weights in shards, written one tensor at a time; nothing is downloaded.

    python benchmarks/shaped.py llama2-7b models/7b        13.5 GB in 2 GB shards, a minute or two
    python benchmarks/shaped.py llama3-70b models/70b --config-only

The tokenizer is trained on --text (this file's own words by default), so that data files can be used with it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from lorafit.model.shards import Entry, write_shards

SHARD = 2_000_000_000
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPES: dict[str, Any] = {
    "tiny": LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4
    ),
    "qwen2.5-1.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    "llama2-7b": LlamaConfig(  # LlamaConfig's own defaults are Llama-2-7B's
        max_position_embeddings=4096,
    ),
    "llama3-8b": LlamaConfig(
        vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=8192
    ),
    "llama3-70b": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
}


def tokenizer(text: str, size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `size` ids."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        text.splitlines(),
        trainers.BpeTrainer(
            vocab_size=min(size, 32000), special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<|im_end|>")
    made.chat_template = TEMPLATE
    return made


def write(config: Any, place: Path, text: str, weights: bool = True) -> None:
    """The folder: config, tokenizer, and the weights in bf16 of a normal distribution, gains 1."""
    place.mkdir(parents=True, exist_ok=True)
    made = tokenizer(text, config.vocab_size)
    config.bos_token_id, config.eos_token_id = made.bos_token_id, made.eos_token_id
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(place)
    made.save_pretrained(place)
    if not weights:
        return
    generator = torch.Generator().manual_seed(0)
    entries = [Entry(name, torch.bfloat16, tuple(p.shape)) for name, p in model.named_parameters()]

    def tensors() -> Iterator[dict[str, torch.Tensor]]:
        for number, entry in enumerate(entries, 1):
            print(f"\r{number} of {len(entries)} tensors", end="", file=sys.stderr, flush=True)
            empty = torch.empty(entry.shape, dtype=entry.dtype)
            yield {entry.name: empty.fill_(1) if empty.ndim == 1 else empty.normal_(0, 0.02, generator=generator)}
        print(file=sys.stderr)

    write_shards(place, entries, tensors(), SHARD)


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("place", type=Path)
    parser.add_argument("--text", type=Path, default=Path(__file__), help="what the tokenizer is trained on")
    parser.add_argument("--config-only", action="store_true", help="no weights: for lorafit plan")
    args = parser.parse_args()
    write(SHAPES[args.shape], args.place, args.text.read_text(encoding="utf-8"), not args.config_only)


if __name__ == "__main__":
    main()

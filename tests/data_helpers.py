"""A tiny tokenizer and chat templates of every kind, for the tests of lorafit.data."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lorafit.data import Chat, Message

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Drops the thinking of every answer but the last.
STRIPS_THINK = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\\n') if '</think>' in m.content else m.content %}"
    "{% if m.role == 'assistant' and loop.last and m.reasoning_content %}"
    "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' + said }}"
    "{% elif m.role == 'assistant' and not loop.last %}{{ said }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
EMPTY_THINK = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STRICT = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"
)
TRIMS = CHATML.replace("m.content +", "(m.content | trim) +")
WITH_BOS = "{{ bos_token }}" + CHATML
NO_END = (
    "{% for m in messages %}{{ ('### Response:\\n' if m.role == 'assistant' else '### Instruction:\\n')"
    " + m.content + '\\n\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The prompt opens a thought that an answer in a conversation doesn't have.
OPENS_THINK = CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{%- generation -%}"
    "{{ m.content + '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = ["the cat sat on the mat\n\n", "### Response:\n\n", "one two three four five", "user assistant system"] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    return str(tokenizer.to_str())


def tokenizer(template: Any = None, *, adds_bos: bool = False, eos: str | None = "</s>") -> Any:
    """A byte-level BPE tokenizer with <s>, </s>, <|im_start|> and <|im_end|>."""
    inner = Tokenizer.from_str(_trained())
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    outer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=eos)
    outer.chat_template = template
    return outer


def chat(template: Any = CHATML, **options: Any) -> Chat:
    return Chat.of(tokenizer(template), **options)


def turns(*texts: str) -> tuple[Message, ...]:
    """User and assistant messages in turn."""
    return tuple(Message("assistant" if n % 2 else "user", text) for n, text in enumerate(texts))


def write(path: Path, *rows: Any) -> Path:
    """JSON Lines; a row that is a str is written as it is."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows))
    return path

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
# Earlier answers have no thinking, the prompt and the last answer do.
PROMPTS_THINK = EMPTY_THINK.replace(
    "'<|im_start|>assistant\\n' }}{% endif", "'<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif"
)
# Content as a list of parts, as templates of vision models want it.
PARTS = CHATML.replace("m.content +", "(m.content | map(attribute='text') | join) +")
# Several special tokens in an answer: thinking is a message of its own, and the last answer ends otherwise.
CHANNELS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.reasoning_content and loop.last %}"
    "{{ m.reasoning_content + '<|im_end|><|im_start|>assistant\\n' }}{% endif %}"
    "{{ m.content + ('</s>' if loop.last and m.role == 'assistant' else '<|im_end|>') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Shows content and tool calls, but not the tool calls of an empty answer.
LOSES_CALLS = CHATML.replace(
    "m.content +", "m.content + (m.tool_calls | string if m.tool_calls and m.content else '') +"
)
# A tool's answer is shown inside the turn that called it.
EMBEDS_RESULTS = (
    "{% for m in messages %}{% if m.role != 'tool' %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson + (messages[loop.index].content if not loop.last else '') }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
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


def sentencepiece(template: str) -> Any:
    """A tokenizer that writes a space as ▁ and puts one in front of every text."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    inner.train_from_iterator(["one two three four user", "the cat sat on the mat", "\n"] * 4, trainer)
    outer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
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

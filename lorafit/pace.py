"""How long a run will take: measured on this machine in some seconds, with no weights read.

A step's time is that of its layers and a rest (the embedding, the head, the loss). The very steps that would be trained are
taken with a model of the same shape with random numbers, of one layer and of three; the difference is two layers. So are
forwards, for the held-out rows, and a few tokens of an answer. For a GPU that isn't here there is arithmetic.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorafit.batches import Plan, default_tokens
from lorafit.config import Config
from lorafit.data import Tokens
from lorafit.errors import ConfigError
from lorafit.evaluate import SAMPLE_TOKENS, TOKENS, evaluate
from lorafit.generate import generate
from lorafit.host import Host
from lorafit.methods import find
from lorafit.model.base import Base
from lorafit.model.load import pick_dtype, prepare
from lorafit.model.quant import Quant, convert
from lorafit.model.quant_load import fill_buffers
from lorafit.plan import Estimate
from lorafit.train.loop import Job, train

FEW, MORE = 1, 3  # layers
SECONDS = 5.0  # of either, at most, once two steps are done
NAME = "adapter"
BYTES_OF = {"bf16": 2.0, "fp32": 4.0}  # of a number
CODES = {"nf4": 0.52, "fp4": 0.52, "int8": 1.0}  # bytes that stand for one


@dataclass(frozen=True)
class Time:
    """Seconds of a whole training, part by part. `answers`: to held-out prompts, None where it isn't known. `dequantising`:
    where it isn't part of the others, which were measured with it."""

    steps: float
    evaluations: float
    answers: float | None
    dequantising: float = 0.0

    @property
    def total(self) -> float:
        """Of the parts that are known."""
        return self.steps + self.evaluations + (self.answers or 0.0) + self.dequantising

    def to_json(self) -> dict[str, Any]:
        """In JSON types."""
        return asdict(self)


def measured(config: Config, path: Path, rows: Sequence[Tokens], made: Estimate) -> Time:
    """On this machine's processor, from steps, forwards and answers of a few layers."""
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(path, local_files_only=True)
    layers = int(shape.get_text_config().num_hidden_layers)
    few, more = (_seconds(config, shape, rows, number) for number in (FEW, MORE))
    step, score, answer = (a + max(0.0, b - a) / (MORE - FEW) * (layers - FEW) for a, b in zip(few, more, strict=True))
    return Time(made.trained_tokens * step, made.scored_tokens * score, made.answers * SAMPLE_TOKENS * answer)


def by_rate(config: Config, made: Estimate, rate: float, bytes_a_second: float) -> Time:
    """On a GPU that reaches `rate` operations a second, and so many bytes of its memory.

    Of a base in codes each product makes the numbers anew, forward and backward, whatever the size of the micro-batch:
    codes are read, numbers written.
    """
    numbers = made.coded_parameters * (BYTES_OF[made.precision] + CODES[made.quant]) if made.coded_parameters else 0.0
    passes = made.steps * config.accumulate * (2 + int(config.checkpointing)) + -(-made.scored_tokens // TOKENS)
    scoring = 2.0 * made.total_parameters * made.scored_tokens
    return Time(operations(config, made) / rate, scoring / rate, None, passes * numbers / bytes_a_second)


def operations(config: Config, made: Estimate) -> float:
    """Of the steps, in multiplications and additions: each weight forward, backward for its input, for itself if
    it is trained, and forward again with checkpointing. Every token is taken for learned."""
    passes = 2 + int(config.checkpointing) + int(made.trainable_parameters > made.total_parameters / 2)
    return 2.0 * passes * made.total_parameters * made.trained_tokens


def _seconds(config: Config, shape: Any, rows: Sequence[Tokens], layers: int) -> tuple[float, float, float]:
    """With a model of so many layers: of a token of a training step, of one that is scored, and of one of an answer. What is
    adapted is adapted plainly: targets that name layers by number, and a method that stores the base its own way, would find
    another model here."""
    host = Host(_random(config, shape, layers))
    if host.base.body is not None:
        host.base.body.shares = config.share
    if config.checkpointing:
        host.base.checkpointing(True)
    kind = find(config.method)
    try:
        host.add(NAME, config.method, config.targets or kind.targets, **config.options)
    except ConfigError:
        host.add(NAME, "lora", **({"r": config.options["r"]} if "r" in config.options else {}))
    tokens = config.batch_tokens or default_tokens(rows, config.share)
    return _step(host, config, rows, tokens), _score(host, rows, tokens // config.accumulate), _answer(host, rows)


def _step(host: Host, config: Config, rows: Sequence[Tokens], tokens: int) -> float:
    """The least seconds a token of a few training steps."""
    job = Job(NAME, Plan(rows, tokens, config.accumulate, config.seed), 1 << 30, lr=1e-9)
    found: list[float] = []
    began = last = time.perf_counter()
    for step in train(host, [job]):
        now = time.perf_counter()
        # The last step of an epoch may be a short one, in which a token takes longer or shorter than in the others.
        if not found or step.tokens > tokens / 2 or step.tokens == job.plan.lengths.sum():
            found.append((now - last) / step.tokens)
        last = now
        if (len(found) > 1 and now - began > SECONDS) or len(found) > 8:
            break
    return min(found[1:])  # the first warms up


def _score(host: Host, rows: Sequence[Tokens], tokens: int) -> float:
    """The least seconds a token of scoring the first rows, two forwards' worth of them."""
    few = [rows[i] for i in range(min(len(rows), 64))]
    while len(few) > 1 and sum(len(row.ids) for row in few) > 2 * min(TOKENS, tokens):
        few.pop()
    found = []
    for _ in range(2):
        began = time.perf_counter()
        evaluate(host, few, NAME, tokens=min(TOKENS, tokens))
        found.append((time.perf_counter() - began) / sum(len(row.ids) for row in few))
    return min(found)


def _answer(host: Host, rows: Sequence[Tokens]) -> float:
    """The least seconds of a token after a prompt."""
    found, last = [], 0.0
    for _ in generate(host, rows[0].ids[:64].tolist(), NAME, max_new=5):
        now = time.perf_counter()
        found.append(now - last)
        last = now
    return min(found[1:], default=0.0)  # the first is the prompt's


@torch.no_grad()
def _random(config: Config, shape: Any, layers: int) -> Base:
    """A base of this shape with fewer layers, its numbers random and small."""
    from transformers import AutoModelForCausalLM

    cut = copy.deepcopy(shape)
    text = cut.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(cut, dtype=pick_dtype(config.precision, torch.device("cpu")))
    fill_buffers(model)
    some = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) * 0.02
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            flat = torch.empty(empty.shape, dtype=empty.dtype).view(-1)
            for start in range(0, len(flat), len(some)):
                flat[start : start + len(some)] = some[: len(flat) - start]
            setattr(module, name, torch.nn.Parameter(flat.view(empty.shape), requires_grad=False))
    model.tie_weights()
    quant = Quant.of(config.quant, config.double_quant)
    if quant is not None:
        convert(model, quant)
    return prepare(model, None, Path(os.devnull), "random", quant)

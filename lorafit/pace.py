"""How long a run will take: measured on this machine in some seconds, with no weights read.

A step's time is that of its layers and a rest (the embedding, the head, the loss). The very steps that would be trained are
taken with a model of the same shape with random numbers, of one layer and of three; the difference is two layers.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorafit.batches import Plan
from lorafit.config import Config
from lorafit.data import Tokens
from lorafit.errors import ConfigError
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


def seconds_a_token(config: Config, path: Path, rows: Sequence[Tokens], tokens: int) -> float:
    """Of training, in steps of `tokens` tokens of these rows, on this machine's processor."""
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(path, local_files_only=True)
    layers = int(shape.get_text_config().num_hidden_layers)
    few, more = (_least(config, shape, rows, tokens, number) for number in (FEW, MORE))
    each = max(0.0, more - few) / (MORE - FEW)
    return few + each * (layers - FEW)


def operations(config: Config, made: Estimate) -> float:
    """Of the whole training, in multiplications and additions: each weight forward, backward for its input, for itself if
    it is trained, and forward again with checkpointing. Every token is taken for learned."""
    passes = 2 + int(config.checkpointing) + int(made.trainable_parameters > made.total_parameters / 2)
    return 2.0 * passes * made.total_parameters * made.trained_tokens


def _least(config: Config, shape: Any, rows: Sequence[Tokens], tokens: int, layers: int) -> float:
    """The least seconds a token of a few steps with a model of so many layers. What is adapted is adapted plainly: targets that
    name layers by number, and a method that stores the base its own way, would find another model here."""
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

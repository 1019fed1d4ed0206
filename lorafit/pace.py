"""How long a run will take: measured on this machine in about ten seconds, with no weights read.

The rows that would be trained on go through a model of the same shape with random numbers. Of a large one it has a few layers,
and beside it there is one of a single layer: their difference is what a layer takes. Where a whole micro-batch would take too
long, a part of it is taken, and half of that part: their difference is what a token takes. So it is with forwards, for the
held-out rows, and a few tokens of an answer. What the rounds differ by is how far the sum may be off. For a GPU that isn't here
there is arithmetic.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorafit.batches import Plan, default_tokens, fill
from lorafit.config import Config
from lorafit.data import Tokens
from lorafit.errors import ConfigError
from lorafit.evaluate import SAMPLE_TOKENS, TOKENS, evaluate
from lorafit.generate import generate
from lorafit.host import Host
from lorafit.methods import find
from lorafit.model.base import Base
from lorafit.model.load import pick_dtype, prepare
from lorafit.model.quant import Quant, QuantLinear, convert, put
from lorafit.model.quant_load import fill_buffers
from lorafit.plan import Estimate
from lorafit.train.loop import Job, train

NUMBERS = 600_000_000  # of the layers that are made, about: all of 135M, 12 of 1.5B, 2 of 7B
SECONDS = 10.0  # of the measurement, about; making the layers comes on top
STEPS, FORWARDS, ANSWERS = 0.6, 0.25, 0.15  # of those
ROUNDS = 6  # of a measurement, at most
WARM = 128  # tokens, about, of what is taken first
# The least that is said to be off, of the time: what a machine's speed changes by in an hour; and what adds to it.
OFF, OFF_ONE_ROUND, OFF_CUT = 0.1, 0.1, 0.1
NAME = "adapter"
BYTES_OF = {"bf16": 2.0, "fp32": 4.0}  # of a number
CODES = {"nf4": 0.52, "fp4": 0.52, "int8": 1.0, "w8a8": 1.0}  # bytes that stand for one


@dataclass(frozen=True)
class Time:
    """Seconds of a whole training, part by part. `answers`: to held-out prompts, None where it isn't known. `dequantising`:
    where it isn't part of the others, which were measured with it. `off`: the share of the sum that it may be off by, either
    way; None where that isn't known."""

    steps: float
    evaluations: float
    answers: float | None
    dequantising: float = 0.0
    off: float | None = None

    @property
    def total(self) -> float:
        """Of the parts that are known."""
        return self.steps + self.evaluations + (self.answers or 0.0) + self.dequantising

    def to_json(self) -> dict[str, Any]:
        """The parts in JSON types."""
        return {key: value for key, value in asdict(self).items() if key != "off"}


def measured(config: Config, path: Path, rows: Sequence[Tokens], made: Estimate, seconds: float = SECONDS) -> Time:
    """On this machine's processor, in about so many `seconds`."""
    models = Models.of(config, path)
    step, most, off = _step(models, config, rows, STEPS * seconds)
    score = _score(models, rows, most, FORWARDS * seconds) if made.scored_tokens else 0.0
    word = _answer(models, rows, ANSWERS * seconds) if made.answers else 0.0
    return Time(made.trained_tokens * step, made.scored_tokens * score, made.answers * SAMPLE_TOKENS * word, off=off)


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


@dataclass(frozen=True)
class Models:
    """Random models of a shape that has so many `layers`: each with some of them, by how many; one, or one with a single
    layer and one with more."""

    hosts: dict[int, Host]
    layers: int

    @staticmethod
    def of(config: Config, path: Path) -> Models:
        """Of the shape in this folder, with what `config` adapts."""
        from transformers import AutoConfig

        shape = AutoConfig.from_pretrained(path, local_files_only=True)
        layers = int(shape.get_text_config().num_hidden_layers)
        more = min(layers, max(2, NUMBERS // max(1, _numbers_of_a_layer(config, shape))))
        model = _random(config, shape, more)
        models = {more: model} if more == layers else {1: _first_layer(config, shape, model), more: model}
        quant = Quant.of(config.quant, config.double_quant)
        return Models(
            {n: _host(config, prepare(m, None, Path(os.devnull), "random", quant)) for n, m in models.items()}, layers
        )

    def timed(self, work: Callable[[Host], float]) -> float:
        """Seconds with all layers, where `work` returns those with the layers of a host."""
        found = {number: work(host) for number, host in self.hosts.items()}
        few, more = min(found), max(found)
        if few == more:
            return found[more]
        layer = max(0.0, found[more] - found[few]) / (more - few)
        return found[few] + (self.layers - few) * layer

    def rounds(self, work: Callable[[Host], float], seconds: float) -> list[float]:
        """`timed` again and again in about so many seconds, at least once; the first of three or more only warms up."""
        found: list[float] = []
        began = time.perf_counter()
        while len(found) < ROUNDS:
            found.append(self.timed(work))
            taken = time.perf_counter() - began
            if taken * (1 + 1 / len(found)) > seconds:  # with another one
                break
        return found[1:] if len(found) > 2 else found


def _host(config: Config, base: Base) -> Host:
    """With an adapter. What is adapted is adapted plainly: targets that name layers by number, and a method that stores the
    base its own way, would find another model here."""
    host = Host(base)
    if base.body is not None:
        base.body.shares = config.share
    if config.checkpointing:
        base.checkpointing(True)
    try:
        host.add(NAME, config.method, config.targets or find(config.method).targets, **config.options)
    except ConfigError:
        host.add(NAME, "lora", **({"r": config.options["r"]} if "r" in config.options else {}))
    return host


def _step(models: Models, config: Config, rows: Sequence[Tokens], seconds: float) -> tuple[float, int, float]:
    """Seconds a token of a training step; how many tokens there was time for at once; and by what share the first may be off.

    A micro-batch is taken for a step, so an update counts too often where steps have several: little, but with method=full.
    """
    plan = Plan(rows, config.batch_tokens or default_tokens(rows, config.share), config.accumulate, config.seed)
    micro = plan.micros(next(plan.since(0)))[0]
    jobs = {id(host): Job(NAME, plan, 1 << 30, lr=1e-9) for host in models.hosts.values()}

    def taking(documents: list[Tokens]) -> Callable[[Host], float]:
        def take(host: Host) -> float:
            job = jobs[id(host)]
            job.plan = Plan(documents, _tokens(documents))
            began = time.perf_counter()
            next(train(host, [job]))
            return time.perf_counter() - began

        return take

    began = time.perf_counter()
    few, more = _first(micro, WARM), _first(micro, 2 * WARM)
    models.timed(taking(few))  # what is made once: kernels, the optimiser's state
    largest = models.hosts[max(models.hosts)]
    short, long = (taking(documents)(largest) for documents in (few, more))
    left = seconds - (time.perf_counter() - began)
    round_ = left / (3 if len(models.hosts) == 1 else 4.5)  # three of them, and a single layer takes half at most
    each = max(long - short, 0.2 * long) / max(1, _tokens(more) - _tokens(few))
    whole, some = _tokens(micro), _first(micro, max(WARM, _tokens(more) + (round_ - long) / each))
    if _tokens(some) == whole:
        found = models.rounds(taking(some), left)
    else:
        half = _first(some, _tokens(some) // 2)
        found = [
            _longer(short, _tokens(half), long, _tokens(some), whole)
            for short, long in zip(
                models.rounds(taking(half), left / 3), models.rounds(taking(some), 2 * left / 3), strict=False
            )
        ]
    middle = statistics.median(found)
    off = max(OFF, (max(found) - min(found)) / (2 * middle))
    off += OFF_ONE_ROUND * (len(found) == 1) + OFF_CUT * (_tokens(some) < whole)
    return middle / whole, _tokens(some), off


def _longer(short: float, few: int, long: float, more: int, tokens: int) -> float:
    """Seconds of so many `tokens`, where `few` take `short` and `more` take `long`: a part is the same for any number."""
    each = (long - short) / (more - few) if more > few else 0.0
    # Of rows that are nearly alike in number the difference is noise: a token takes no more than all of it.
    return long + min(max(each, 0.5 * long / more), long / more) * (tokens - more)


def _score(models: Models, rows: Sequence[Tokens], most: int, seconds: float) -> float:
    """Seconds a token of scoring the first rows: a forward, of as many tokens as there was time to train on."""
    few = _first([rows[i] for i in range(min(len(rows), 64))], min(TOKENS, most))

    def score(host: Host) -> float:
        began = time.perf_counter()
        evaluate(host, few, NAME)
        return time.perf_counter() - began

    return statistics.median(models.rounds(score, seconds)) / _tokens(few)


def _answer(models: Models, rows: Sequence[Tokens], seconds: float) -> float:
    """Seconds of a token after a prompt."""

    def answer(host: Host) -> float:
        found, last = [], 0.0
        for _ in generate(host, rows[0].ids[:64].tolist(), NAME, max_new=5):
            now = time.perf_counter()
            found.append(now - last)
            last = now
        return min(found[1:], default=0.0)  # the first is the prompt's

    return statistics.median(models.rounds(answer, seconds))


def _tokens(rows: Sequence[Tokens]) -> int:
    return sum(len(row.ids) for row in rows)


def _first(rows: Sequence[Tokens], tokens: float) -> list[Tokens]:
    """The first rows with no more tokens than that, or the beginning of the first."""
    most = max(2, int(tokens))
    found = list(rows[: fill([len(row.ids) for row in rows], most)[0].stop])
    if _tokens(found) <= most:
        return found
    row = found[0]
    return [Tokens(row.ids[:most], row.learn[:most], row.line, row.example)]


def _numbers_of_a_layer(config: Config, shape: Any) -> int:
    """How many weights a layer more adds."""
    one, two = (int(sum(p.numel() for p in _hollow(config, shape, n).parameters())) for n in (1, 2))
    return two - one


def _hollow(config: Config, shape: Any, layers: int) -> Any:
    """A model of this shape with so many layers, without weights."""
    from transformers import AutoModelForCausalLM

    cut = copy.deepcopy(shape)
    text = cut.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(cut, dtype=pick_dtype(config.precision, torch.device("cpu")))


@torch.no_grad()
def _random(config: Config, shape: Any, layers: int) -> Any:
    """A model of this shape with so many layers, its numbers random and small; quantised, if `config` says so."""
    model = _hollow(config, shape, layers)
    fill_buffers(model)
    some = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(model.dtype) * 0.02
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            flat = torch.empty(empty.shape, dtype=empty.dtype).view(-1)
            for part in flat.split(len(some)):
                part.copy_(some[: len(part)])
            setattr(module, name, torch.nn.Parameter(flat.view(empty.shape), requires_grad=False))
    model.tie_weights()
    quant = Quant.of(config.quant, config.double_quant)
    if quant is not None:
        convert(model, quant)
    return model


def _first_layer(config: Config, shape: Any, model: Any) -> Any:
    """A model of a single layer that has the tensors of this one."""
    made = _hollow(config, shape, 1)
    fill_buffers(made)
    for path, module in list(made.named_modules()):
        whole = model.get_submodule(path)
        if isinstance(whole, QuantLinear):
            put(made, path, QuantLinear(whole.quantised, whole.bias, whole.dtype, whole.turned))
            continue
        for name, _ in list(module.named_parameters(recurse=False)):
            setattr(module, name, getattr(whole, name))
    made.tie_weights()
    return made

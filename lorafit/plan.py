"""How much memory and disk a run will take, told before a byte of weights is read: from config.json and the rows' lengths.

The model is built without weights, so that every site is known. What is in memory at the height of a step is then added up:
the base, the adapter with its gradients and optimiser, what the layers keep for the backward, and the chunk of logits or
the widest part of a layer's backward, whichever is more. docs/memory.md shows predictions beside measured peaks.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lorafit import log, peft_files
from lorafit.adapter import Adapter, create, tables, whole_sites
from lorafit.batches import Plan as Batches
from lorafit.batches import default_tokens, spared
from lorafit.config import Config
from lorafit.data import Tokens
from lorafit.data.store import lengths_of
from lorafit.errors import LorafitError, ModelError
from lorafit.evaluate import TOKENS, prompt_of, spacing
from lorafit.methods import Method, find
from lorafit.model.body import Body
from lorafit.model.load import blank, pick_device, pick_dtype
from lorafit.model.quant import Quant, linears
from lorafit.model.sites import Site, find_sites, select
from lorafit.native import build
from lorafit.native.gemm import DEEP
from lorafit.run import KEEP
from lorafit.train.loss import CHUNK
from lorafit.train.optim import state_bytes

RUNTIME = 455_000_000  # Python, torch, transformers, a tokenizer, buffers of kernels: beside any model (measured)
CONTEXT = 600_000_000  # of a GPU's memory: CUDA's own
KEPT_BY_TWINS = 1.6  # what torch's operations keep for the backward, over our kernels (measured: 135M on an H100)
# Gaps between blocks that come and go (measured): there are none in the pool.
AIR = 1.33  # in the C library's heap
AIR_ON_GPU = 1.05  # in torch's blocks
COMPARED = 20_000_000  # logits of each model that merging compares: of a large vocabulary not those of every position


@dataclass(frozen=True)
class Estimate:
    """Bytes of each part at the height of a training step, of the other things that a run is followed by, and its size.

    `mapped` is the part of `weights` that lies in files: where memory is short the system reads it again when it is needed.
    """

    runtime: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    mapped: int
    evaluating: int
    merging: int
    disk: int
    tokens: int  # of an epoch
    trained_tokens: int  # of all steps
    micro_batches: int  # of a step
    micro_batch_tokens: int
    longest: int
    steps: int
    evaluations: int
    scored_tokens: int  # of all evaluations
    answers: int  # in all evaluations
    trainable_parameters: int
    total_parameters: int
    coded_parameters: int  # stored in codes
    precision: str
    quant: str

    @property
    def peak_bytes(self) -> int:
        """The estimated peak of resident memory while training. Gradients come while activations go; those of one micro-batch
        are still there when the next one's activations come."""
        lasting = self.runtime + self.weights + self.adapter + self.optimizer + self.logits
        more = max if self.micro_batches == 1 else operator.add
        return lasting + int(more(self.activations, self.gradients))

    def to_json(self) -> dict[str, Any]:
        """In JSON types."""
        return {"peak_bytes": self.peak_bytes, **asdict(self)}


@dataclass(frozen=True)
class Width:
    """The numbers of a decoder layer that memory depends on."""

    layers: int
    h: int
    q: int
    kv: int
    heads: int
    inner: int
    vocabulary: int

    @staticmethod
    def of(shape: Any) -> Width:
        """From a transformers config."""
        text = shape.get_text_config()
        h, heads = int(text.hidden_size), int(text.num_attention_heads)
        dim = getattr(text, "head_dim", None) or h // heads
        kv = getattr(text, "num_key_value_heads", None) or heads
        inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * h
        return Width(int(text.num_hidden_layers), h, heads * dim, kv * dim, heads, int(inner), int(text.vocab_size))


@dataclass
class Model:
    """A model without weights, and what `config` would train of it."""

    model: Any
    width: Width
    sites: list[Site]
    chosen: list[tuple[Site, Method]]
    dtype: torch.dtype
    fast: bool  # our own run through the layers takes it
    gpu: bool
    codable: bool  # it can be quantised

    @property
    def numbers(self) -> int:
        """Trainable."""
        return sum(p.numel() for _, layer in self.chosen for p in layer.parameters())

    @property
    def held(self) -> int:
        """Numbers of the adapter in memory: also those that it starts from, or has made of the weights."""
        return sum(t.numel() for _, layer in self.chosen for t in (*layer.parameters(), *layer.buffers()))

    @property
    def stored(self) -> int:
        """Numbers of the adapter on disk."""
        return sum(t.numel() for _, layer in self.chosen for t in layer.state_dict().values())

    @property
    def total(self) -> int:
        """Of the base."""
        return sum(p.numel() for p in self.model.parameters())


def empty(config: Config, path: Path, gpu: bool | None = None, source: Path | None = None) -> Model:
    """The model of a folder's config.json, on no device. `gpu`: whether it is to run on one; None: as `device` says.
    `source`: the adapter that training starts from, whatever the config says of methods.

    ModelError for a model that can't be looked at without its weights, or can't be quantised as `config` asks.
    """
    try:
        return _empty(config, path, gpu, source)
    except LorafitError:
        raise
    except Exception as error:  # a config of a kind that transformers has no language model for, or has it otherwise
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{path} can't be planned for: {line[:200]}") from None


def _empty(config: Config, path: Path, gpu: bool | None, source: Path | None) -> Model:
    place = torch.device("cuda" if gpu else "cpu") if gpu is not None else pick_device(config.device)
    dtype = torch.bfloat16 if gpu and config.precision == "auto" else pick_dtype(config.precision, place)
    new = len(config.new_tokens)
    model = blank(path, dtype, _rows_of(source) if source else 0)
    if new:
        model = blank(path, dtype, model.get_input_embeddings().weight.shape[0] + new)
    sites = find_sites(model)
    adapter = _fresh(config, sites) if source is None else _saved(source, sites)
    chosen = [(sites[path], layer) for path, layer in adapter.items()]
    fast = Body.of(model) is not None
    try:
        codable = bool(list(linears(model)))
    except ModelError:
        if config.quant != "none":
            raise
        codable = False
    return Model(model, Width.of(model.config), list(sites.values()), chosen, dtype, fast, place.type != "cpu", codable)


def _fresh(config: Config, sites: Mapping[str, Site]) -> Adapter:
    """What training begins with, as Host.add makes it, but on no device."""
    with torch.device("meta"):
        return create(
            select(sites, config.targets or find(config.method).targets),
            config.method,
            config.options,
            rank_pattern=config.rank_pattern,
            alpha_pattern=config.alpha_pattern,
            whole=whole_sites(sites, config.whole),
            tables=tables(sites),
            tokens=range(len(config.new_tokens)),
            seed=None,
        )


def _rows_of(folder: Path) -> int:
    """Rows that an adapter's new tokens need."""
    return 1 + max((peft_files.read_notes(folder).get("new_tokens") or {}).values(), default=-1)


def _saved(source: Path, sites: Mapping[str, Site]) -> Adapter:
    """What training goes on from, on no device."""
    with warnings.catch_warnings(), torch.device("meta"):  # torch says of each number that it is nowhere already
        warnings.simplefilter("ignore")
        return peft_files.load(source, sites, shapes=True)


def estimate(config: Config, model: Model, rows: Sequence[Tokens], held_out: Sequence[Tokens] = ()) -> Estimate:
    """What training `config` on these rows takes, with evaluations on those that are held out."""
    wide = model.dtype.itemsize
    batches = Batches(rows, config.batch_tokens or default_tokens(rows, config.share), config.accumulate, config.seed)
    steps = config.steps or batches.steps(config.epochs)
    epoch = batches.epoch(0)
    largest = batches.largest(epoch)
    held = through = sum(len(row.ids) for row in largest)
    if config.share and model.fast and not model.gpu:
        through -= spared(largest)
    longest = int(batches.lengths.max(initial=0))
    quant = Quant.of(config.quant, config.double_quant)
    weights, mapped = _weights(model, quant)
    number = model.numbers
    beside = CONTEXT if model.gpu else RUNTIME
    heads_trained = any(site.head or site.lookup for site, _ in model.chosen)
    kernels = config.native and not model.gpu and build.possible()
    air = AIR_ON_GPU if model.gpu else 1.0 if config.native and build.pooled() else AIR
    logits = min(CHUNK, held) * model.width.vocabulary * (wide if kernels and not heads_trained else 2 * wide + 12)
    scored = max(longest, min(TOKENS, int(batches.lengths.sum())))
    passing = int(air * scored * wide * (3 * model.width.h + 3 * model.width.inner))
    most = max((site.shape.numel() for site in model.sites), default=0)
    state = state_bytes(config.optimizer.removeprefix("paged_"), number)
    evaluations = 1 + -(-steps // (config.eval_every or spacing(steps))) if len(held_out) else 0
    disk = 4 * model.stored + (KEEP + 1) * (4 * model.stored + state) + (mapped if quant else 0)
    return Estimate(
        runtime=beside,
        weights=weights,
        adapter=4 * model.held,
        gradients=4 * number,
        optimizer=state_bytes(config.optimizer, number),
        activations=int(air * activations(model, through, config.checkpointing, kernels)),
        logits=logits,
        mapped=mapped,
        evaluating=beside + weights + 4 * number + max(passing, logits),
        merging=RUNTIME + 4 * number + 3 * 4 * most + 3 * 4 * COMPARED,  # it reads and writes weight by weight
        disk=disk,
        tokens=int(batches.lengths.sum()),
        trained_tokens=round(batches.lengths.sum() * steps / max(1, len(epoch))),
        micro_batches=config.accumulate,
        micro_batch_tokens=held,
        longest=longest,
        steps=steps,
        evaluations=evaluations,
        scored_tokens=evaluations * int(lengths_of(held_out).sum()),
        answers=evaluations * _asked(held_out, config.samples),
        trainable_parameters=number,
        total_parameters=model.total,
        coded_parameters=sum(shape.numel() for shape in _coded(model)) if quant else 0,
        precision="bf16" if model.dtype is torch.bfloat16 else "fp32",
        quant=config.quant,
    )


def _weights(model: Model, quant: Quant | None) -> tuple[int, int]:
    """Bytes of the base in memory, and how many of them lie in files."""
    wide = model.dtype.itemsize
    whole = model.total * wide
    if quant is None:
        return whole, 0
    coded = _coded(model)
    codes = sum(quant.size(shape) for shape in coded)
    rest = whole - sum(shape.numel() * wide for shape in coded)
    return codes + rest + _numbers_at_once(model, coded) * wide, codes


def _coded(model: Model) -> list[torch.Size]:
    """The weights that quantising takes."""
    return [site.shape for site in model.sites if site.kind in ("linear", "conv1d") and not site.head]


def _asked(held_out: Sequence[Tokens], most: int) -> int:
    """Prompts of these rows that an evaluation answers."""
    prompts = (row for row in held_out if prompt_of(row) is not None)
    return sum(1 for _ in islice(prompts, most))


def _numbers_at_once(model: Model, coded: Sequence[torch.Size]) -> int:
    """How many numbers of a quantised base exist at once: those of the products that share an input."""
    return (2 if model.fast else 1) * max((shape.numel() for shape in coded), default=0)


def activations(model: Model, tokens: int, checkpointing: bool, kernels: bool) -> int:
    """Bytes that a forward of `tokens` tokens keeps for its backward, and what the widest part of the backward adds; with our
    kernels, or with their twins.

    With checkpointing: one layer, and of each layer the two streams that it begins with.
    """
    w, wide = model.width, model.dtype.itemsize
    layer = _kept(model, tokens, kernels)
    ends = tokens * wide * 3 * w.h  # the last norm, the learned tokens' states and their gradient
    backward = tokens * wide * (3 * w.inner + 3 * w.h)
    streams = (2 if model.fast else 1) * tokens * wide * w.h
    kept = layer + w.layers * streams if checkpointing else w.layers * layer
    return kept + ends + backward


def _kept(model: Model, tokens: int, kernels: bool) -> int:
    """Bytes that a layer keeps."""
    w, wide = model.width, model.dtype.itemsize
    # Two streams, q, k, v, attention's output, gate and up; norms and the gated product are made again.
    numbers = 2 * w.h + 2 * w.q + 2 * w.kv + 2 * w.inner
    if not model.fast:  # modules: norms with copies of their own, the gated product's steps
        numbers = 6 * w.h + 3 * w.q + 2 * w.kv + 4 * w.inner
    factor = KEPT_BY_TWINS if model.fast and not kernels else 1.0
    whole = int(factor * tokens * wide * numbers) + 4 * tokens * w.heads
    return whole + sum(_kept_by(site, layer, tokens, wide) for site, layer in model.chosen) // w.layers


def _kept_by(site: Site, layer: Method, tokens: int, wide: int) -> int:
    """Bytes that an adapter's layer keeps: x·Aᵀ, and the output where that is scaled; where the base's product isn't the only
    one, its input and itself in the base's type."""
    *lead, out, width = site.shape
    made = layer.eval().scaled(site.weight)
    if made is None:
        numbers: int = sum(t.numel() for t in layer.state_dict().values())
        return wide * (numbers + tokens * width)
    r = 0 if made.low is None else -(-made.low[0].shape[0] // DEEP) * DEEP
    more = 2 * tokens * wide * width if layer.train().draws else 0  # dropout: what fell out, and what is left
    return wide * tokens * (r + (0 if made.gain is None else out)) + more


# --- does it fit? ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """`fits`: as asked. Else `change` are the settings with which it does, empty where nothing makes it fit.

    `streams`: only because the system reads weights from their file again and again, slowly.
    """

    fits: bool
    memory: int
    best: Estimate
    change: dict[str, Any]
    streams: bool = False

    @property
    def words(self) -> str:
        """The change as it is written on a command line."""
        return " ".join(f"{key}={str(value).lower()}" for key, value in self.change.items())

    def to_json(self) -> dict[str, Any]:
        """In JSON types."""
        word = "fits" if self.fits else "fits with" if self.change else "doesn't fit"
        return {
            "verdict": word,
            "memory": self.memory,
            "change": self.change,
            "streams": self.streams,
            "peak_bytes_then": self.best.peak_bytes,
        }


def judge(
    config: Config,
    model: Model,
    rows: Sequence[Tokens],
    memory: int,
    streams: bool = True,
    held_out: Sequence[Tokens] = (),
) -> Verdict:
    """Whether it fits into `memory` bytes; else the first of what changes nothing (smaller micro-batches), what only
    costs time (checkpointing) and what costs a little exactness (4 bits) with which it does; else, with `streams`, the
    first with which all but the weights does. A limit on resident memory counts those too: without `streams` there."""
    tried: list[tuple[dict[str, Any], Estimate]] = []
    for change in _changes(config, rows, model.codable):  # most runs fit as asked: the others aren't estimated then
        found = estimate(replace(config, **change), model, rows, held_out)
        if found.peak_bytes <= memory:
            return Verdict(not change, memory, found, change)
        tried.append((change, found))
    for change, found in tried if streams and not model.gpu else []:
        if found.peak_bytes - found.mapped <= memory:
            return Verdict(not change, memory, found, change, streams=True)
    return Verdict(False, memory, min((found for _, found in tried), key=lambda made: made.peak_bytes), {})


def stored_otherwise(
    config: Config, model: Model, rows: Sequence[Tokens], memory: int, held_out: Sequence[Tokens] = ()
) -> tuple[Config, Estimate] | None:
    """The same training with the base in nf4 where it was to be in 16 bits, or the other way round; None where that isn't
    possible or doesn't fit."""
    if find(config.method).needs_codes or not model.codable:
        return None
    other = replace(config, quant="nf4" if config.quant == "none" else "none")
    found = estimate(other, model, rows, held_out)
    return (other, found) if found.peak_bytes <= memory else None


def least(config: Config, model: Model, rows: Sequence[Tokens]) -> Estimate:
    """With the settings as asked, but micro-batches as small as they can be."""
    smaller = [change for change in _changes(config, rows) if set(change) <= {"accumulate"}]
    return min(
        (estimate(replace(config, **change), model, rows) for change in smaller), key=lambda made: made.peak_bytes
    )


def way_out(config: Config, verdict: Verdict) -> str:
    """What to do where no change of settings makes it fit."""
    if config.method == "full":
        return "method=lora takes far less"
    if verdict.best.weights > verdict.memory:
        return f"the weights alone are {log.size(verdict.best.weights)}, so a smaller model is needed"
    return "a smaller model or a smaller max_tokens is needed"


def _changes(config: Config, rows: Sequence[Tokens], codable: bool = False) -> Iterator[dict[str, Any]]:
    """Settings to try, the least painful first; 4 bits only where the model can be stored in them."""
    longest = int(lengths_of(rows).max(initial=1))
    tokens = config.batch_tokens or default_tokens(rows, config.share)
    smaller, accumulate = [], config.accumulate
    while tokens // accumulate > longest:
        accumulate *= 2
        smaller.append({"accumulate": accumulate})
    quants: list[dict[str, Any]] = [{}]
    if config.quant == "none" and codable:
        quants.append({"quant": "nf4"})
    for quant in quants:
        yield quant
        for pieces in smaller:
            yield quant | pieces
        if not config.checkpointing:
            yield quant | {"checkpointing": True}
            for pieces in smaller:
                yield quant | pieces | {"checkpointing": True}

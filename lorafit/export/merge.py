"""Merging: the base with an adapter added in, as a standard Hugging Face folder, proved before it counts.

Each weight is added in fp32 and cast once. The loaded base is overwritten site by site, so nothing larger than one weight
exists twice; the folder is then read back from disk and its logits compared with the unmerged model's. Where the adapter was
trained on a quantised base and is added to the original weights, also with those of the model as it was trained.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit import files
from lorafit.data import Chat
from lorafit.errors import LorafitError, RunError
from lorafit.host import Host
from lorafit.model.load import load
from lorafit.model.quant import QuantLinear
from lorafit.model.sites import Site
from lorafit.route import StackLike, stack

SHARD = "2GB"
NUMBERS = 20_000_000  # logits kept of each model, 80 MB: with a large vocabulary not every position of every prompt

# Largest logit difference allowed, as a share of the logits' standard deviation: about three times what rounding a
# trained adapter's merged weights to the type does.
_ALLOWED = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.2}
_LOST = 0.5  # share of the adapter's effect that rounding may take away


@dataclass(frozen=True)
class AsTrained:
    """Merged beside the model as it was trained, on a base in `quant`, which is another one: it lacks what quantising did.

    `largest` and `mean` are of |logit difference|, `agree` the share of positions with the same best token; `effect` is the
    mean |logit difference| that the adapter makes on that base. `unseen`, by site: ‖q‖ / ‖ΔW‖, where q is what quantising
    took from the weight.
    """

    quant: str
    largest: float
    mean: float
    effect: float
    agree: float
    unseen: dict[str, float]

    @property
    def differs(self) -> bool:
        """The merged model is farther from what was trained than that is from its base."""
        return self.mean > self.effect


@dataclass(frozen=True)
class Proof:
    """Merged beside unmerged on the same prompts, both computed in fp32.

    `largest` and `mean` are of |logit difference|; `spread` is the standard deviation of the logits, `kl` the mean
    divergence of the next-token distributions in nats, `agree` the share of positions with the same best token.
    `effect` is the mean |logit difference| between the unmerged model and the plain base: `mean / effect` is the share of
    the training that rounding took away. `tolerance` is what `largest` was held against. `error` of a merge into codes, by
    site: ‖what rounding W + ΔW to codes did to it‖ / ‖ΔW‖.
    """

    dtype: str
    largest: float
    mean: float
    effect: float
    spread: float
    kl: float
    agree: float
    positions: int
    tolerance: float
    as_trained: AsTrained | None = None
    error: dict[str, float] | None = None

    @property
    def holds(self) -> bool:
        """The difference is within the tolerance, and most of what the adapter does is left."""
        return self.largest <= self.tolerance and self.lost <= _LOST

    @property
    def lost(self) -> float:
        """The share of the adapter's effect that rounding took away (0 for an adapter without one)."""
        return self.mean / self.effect if self.effect > 1e-6 * self.spread else 0.0

    def to_json(self) -> dict[str, Any]:
        """In JSON types."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        return {**values, "lost": self.lost}


def merge(
    host: Host,
    spec: StackLike,
    out: Path,
    prompts: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype,
    tolerance: float | None = None,
    chat: Chat | None = None,
    trained: Host | None = None,
    working: Callable[[str], object] = lambda text: None,
) -> Proof:
    """Write base + adapters to `out` in `dtype`. The host (in fp32) is used up: its base holds the merged weights after.

    `trained`: the adapters on their base as they were trained, where that is another, quantised one; to compare with alone.
    RunError if `out` isn't empty; LorafitError, and no folder, if the merged model's logits are off by more than the
    tolerance, by default a share of the logits' spread that rounding to `dtype` stays well under (_ALLOWED).
    """
    out = free(out)
    if host.base.quant is not None:
        raise RunError(
            f"this base is stored in {host.base.quant}; rounding to that would undo most of what was learned, so merge into"
            " the original weights (quant=none) or what the codes stand for (restored)"
        )
    assert host.base.dtype is torch.float32
    want, plain = logits_of(host, spec, prompts), logits_of(host, None, prompts)
    there = [logits_of(trained, stack, prompts) for stack in (spec, None)] if trained is not None else []
    unseen: dict[str, float] = {}
    working("adding the adapter to the base")
    for site, merged in merged_weights(host, spec):
        if trained is not None and isinstance(trained.sites[site.path].module, QuantLinear):
            weight = site.weight()
            unseen[site.path] = ratio(weight - trained.sites[site.path].weight(), merged - weight)
        site.write(merged)
    for name in list(host.adapters):
        host.remove(name)
    working(f"writing {out}")
    proof: Proof | None = None

    def fill(place: Path) -> None:
        nonlocal proof
        write(host, place, dtype, chat)
        host.base.model = None  # the folder is judged by what it loads as, with one model in memory at a time
        host.base.body = None  # it and the sites hold the modules too
        host.sites.clear()
        host.site_of.clear()
        gc.collect()
        working("reading it back and comparing")
        got = logits_of(Host(load(str(place), precision="fp32", device="cpu")), None, prompts)
        proof = compare(want, got, plain, dtype, tolerance)
        if trained is not None:
            off = compare(there[0], got, there[1], dtype, None)
            shift = AsTrained(str(trained.base.quant), off.largest, off.mean, off.effect, off.agree, unseen)
            proof = replace(proof, as_trained=shift)
        if not proof.holds:
            raise LorafitError(
                f"the merged model isn't the same: largest logit difference {proof.largest:.4g}, allowed"
                f" {proof.tolerance:.4g}; {proof.lost:.0%} of the adapter's effect lost; nothing was written; try --dtype fp32"
            )

    files.write_folder(out, fill, again="merge again")
    assert proof is not None
    return proof


def free(out: Path) -> Path:
    """The folder's absolute path. RunError where there is something in it."""
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists already and isn't empty; name another folder")
    return out


def merged_weights(host: Host, spec: StackLike) -> Iterator[tuple[Site, Tensor]]:
    """Each adapted site with W + ΔW (*lead, out, in), fp32. LorafitError for one that isn't finite."""
    for path, site in host.sites.items():
        if any(path in host.adapters[name] for name in stack(spec)):
            merged = host.merged_weight(site, spec)
            if not torch.isfinite(merged).all():
                raise LorafitError(f"{path}: the merged weight isn't finite; the adapter is damaged")
            yield site, merged


def ratio(error: Tensor, change: Tensor) -> float:
    """‖error‖ / ‖change‖; infinite for an error of no change at all."""
    off, by = float(error.norm()), float(change.norm())
    return off / by if by else math.inf if off else 0.0


def write(
    host: Host, place: Path, dtype: torch.dtype, chat: Chat | None, codes: Mapping[str, Tensor] | None = None
) -> None:
    """The model folder: sharded safetensors, config, generation settings, the tokenizer and the template trained with.
    `codes`: what is written of the quantised modules, but for their biases."""
    model: Any = host.base.model
    with torch.no_grad():
        for p in model.parameters():  # one weight at a time, cast once
            p.data = p.data.to(dtype)
    model.config.dtype = dtype
    if chat is not None and model.generation_config is not None:
        model.generation_config.eos_token_id = list(chat.stop)
    tensors = None
    if codes:
        coded = [(path, module) for path, module in model.named_modules() if isinstance(module, QuantLinear)]
        inner = {f"{path}.{name}" for path, module in coded for name, _ in module.named_buffers()}
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in inner} | dict(codes)
    model.save_pretrained(place, max_shard_size=SHARD, state_dict=tensors)
    tokenizer = host.base.tokenizer
    if tokenizer is not None:
        if chat is not None:
            tokenizer.chat_template = chat.template
        tokenizer.save_pretrained(place)
    for path in place.iterdir():
        path.chmod(0o644)  # safetensors files come out readable by their owner alone


@torch.no_grad()
def logits_of(host: Host, spec: StackLike, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits (positions, vocabulary) of each prompt under a stack; of every n-th position, so that they take no more than
    NUMBERS in all."""
    found: list[Tensor] = []
    every = 1
    for ids in prompts:
        with host.route(spec):
            logits = host.logits(torch.tensor(list(ids), device=host.base.device), [len(ids)])
        every = every if found else -(-sum(map(len, prompts)) * logits.shape[-1] // NUMBERS)
        found.append(logits[:: max(1, every)].float().cpu().clone())
    return found


def compare(
    want: list[Tensor], got: list[Tensor], plain: list[Tensor], dtype: torch.dtype, tolerance: float | None
) -> Proof:
    """The merged model's logits `got` beside the unmerged model's, `want`, and the base's, `plain`."""
    a, b = torch.cat(want), torch.cat(got)
    difference = (a - b).abs()
    spread = float(a.std())
    if tolerance is None:
        tolerance = spread * _ALLOWED[dtype]
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    return Proof(
        dtype=str(dtype).removeprefix("torch."),
        largest=float(difference.max()),
        mean=float(difference.mean()),
        effect=float((a - torch.cat(plain)).abs().mean()),
        spread=spread,
        kl=max(0.0, float((log_a.exp() * (log_a - log_b)).sum(-1).mean())),  # rounding may make it negative
        agree=float((a.argmax(-1) == b.argmax(-1)).float().mean()),
        positions=len(a),
        tolerance=tolerance,
    )

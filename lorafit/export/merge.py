"""Merging: the base with an adapter added in, as a standard Hugging Face folder, proved before it counts.

Each weight is added in fp32 and cast once. Of a streamed base (model/streamed.py) one weight after the other is read, summed
and written, so that merging takes less memory than training did; one in memory is overwritten site by site.

A wrong merge and the rounding of a right one are told apart. The sums, in fp32, must compute what base and adapter compute. The
folder, read back, must hold the sums as they are in its type, bit by bit, and compute what they compute. What is left between
the unmerged model and the folder is rounding: it is told, and refused only where it takes most of the adapter's effect.
Where the adapter was trained on a quantised base and is added to the original weights, the model as it was trained is compared
with too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafit import files
from lorafit.data import Chat
from lorafit.errors import AdapterError, LorafitError, RunError
from lorafit.export.sums import Rounding, Sums, adapted_sites, merged_biases, merged_weight
from lorafit.host import Host
from lorafit.model.base import Base
from lorafit.model.load import load
from lorafit.model.quant import QuantLinear
from lorafit.model.shards import write_shards
from lorafit.model.sites import Site
from lorafit.native.quantised import ROUNDED
from lorafit.plan import COMPARED
from lorafit.route import StackLike, stack

SHARD = 1_000_000_000  # bytes of a file

# Largest logit difference between what must be the same, as a share of the logits' standard deviation.
_SAME = 1e-4
_SHAKEN = 2**-19  # see _unsteady
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
class Exact:
    """Largest |logit difference| between what must be the same, all computed in fp32: the sums W + ΔW beside base and adapter
    (`formula`), and the folder beside the sums as they are in its type (`folder`). `allowed` is what both were held against."""

    formula: float
    folder: float
    allowed: float


class Right(NamedTuple):
    """Sums that are right: `formula` and `allowed` as in Exact, and logits of what rounding leaves of them."""

    formula: float
    allowed: float
    logits: Tensor


@dataclass(frozen=True)
class Proof:
    """Merged beside unmerged on the same prompts, both computed in fp32: what rounding did.

    `largest` and `mean` are of |logit difference|; `spread` is the standard deviation of the logits, `kl` the mean
    divergence of the next-token distributions in nats, `agree` the share of positions with the same best token.
    `effect` is the mean |logit difference| between the unmerged model and the plain base: `mean / effect` is the share of
    the training that rounding took away. `tolerance` is what `largest` was held against, if anything. `error` of a merge into
    codes, by site: ‖what rounding W + ΔW to codes did to it‖ / ‖ΔW‖. `exact` is what shows that there is rounding alone.
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
    exact: Exact | None = None
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
    """Write base + adapters to `out` in `dtype`. The host (in fp32) is used up, and without a base after.

    Of a base in codes, what they stand for is written. `trained`: the adapters on their base as they were trained, where that
    is another, quantised one; to compare with alone. RunError if `out` isn't empty; LorafitError, and no folder, if the merged
    model isn't the same: but for rounding, or by more than `tolerance` with it, or by most of what the adapter does.
    """
    out = files.free(out)
    base = host.base
    if base.quant is not None and base.source is None:
        raise RunError(f"this base was quantised to {base.quant} in memory; load it from its folder to merge into it")
    assert base.dtype is torch.float32
    sums = Sums(host, spec)
    with sums.choices.remembered():
        want, effect = finite_effect(host, spec, prompts)
    there = effect_of(trained, spec, prompts) if trained is not None else None
    unseen: dict[str, float] = {}
    proof: Proof | None = None

    def summed(site: Site) -> Tensor:
        merged = merged_weight(host, site, spec)
        if trained is not None and isinstance(trained.sites[site.path].module, QuantLinear):
            weight = site.weight()
            unseen[site.path] = ratio(weight - trained.sites[site.path].weight(), merged - weight)
        return merged

    def fill(place: Path) -> None:
        nonlocal proof
        working("adding the adapter to the base, and writing")
        prints = sums.prints(dtype)
        if base.source is not None:
            adapted = {site.path for site in adapted_sites(host, spec)}
            copy(base, place, dtype, host.sites.values(), adapted, summed, merged_biases(host, spec))
            write_settings(base, place, dtype, chat)
        right = proved_sums(
            sums, want, prompts, lambda name, weight: weight.to(dtype).float(), summed=summed, working=working
        )
        if base.source is None:
            for name in list(host.adapters):
                host.remove(name)
            write(host, place, dtype, chat)
        sums.forget()  # the folder is judged by what it loads as, with one model in memory at a time
        working("reading the folder back: each number, and its answers beside the unmerged model's")
        got = _read_back(place, dtype, prints, prompts)
        proof = replace(
            compare(want, got, effect, dtype, math.inf if tolerance is None else tolerance),
            exact=proved_written("folder", right, got),
        )
        if trained is not None and there is not None:
            off = compare(there[0], got, there[1], dtype, math.inf)
            shift = AsTrained(str(trained.base.quant), off.largest, off.mean, off.effect, off.agree, unseen)
            proof = replace(proof, as_trained=shift)
        if not proof.holds:
            limit = "" if tolerance is None else f", allowed {proof.tolerance:.4g}"
            raise LorafitError(
                f"the merged model isn't the same after rounding: largest logit difference {proof.largest:.4g}{limit};"
                f" {proof.lost:.0%} of the adapter's effect lost; nothing was written; try `lorafit merge … --dtype fp32`"
            )

    files.write_folder(out, fill, again="merge again")
    assert proof is not None
    return proof


def proved_sums(
    sums: Sums,
    want: Tensor,
    prompts: Sequence[Sequence[int]],
    rounding: Rounding,
    *,
    summed: Callable[[Site], Tensor] | None = None,
    working: Callable[[str], object] = lambda text: None,
) -> Right:
    """That the sums W + ΔW, in fp32, compute what base and adapter do, whose logits are `want`, with the experts they chose.

    A base in memory holds the sums after `rounding` then; `summed` gives those of the sites that are overwritten there.
    LorafitError where the difference isn't rounding of fp32.
    """
    host, quant = sums.host, sums.host.base.quant
    working("checking each sum: its answers beside those of base and adapter")
    if quant is not None and quant.kind == ROUNDED:  # such a base rounds inputs too, which sums can't
        with sums.computed(lambda name, held: held()):
            want = logits_of(host, sums.spec, prompts)
    sums.settle(summed)
    with sums.computed(sums.parameter):
        with sums.choices.repeated():
            got = logits_of(host, None, prompts)
        formula, allowed = farthest(want, got), _SAME * float(want.std())
        if not formula <= allowed:
            with sums.choices.repeated(), _unsteady(host):
                allowed = max(allowed, farthest(got, logits_of(host, None, prompts)))
    if not formula <= allowed:
        raise LorafitError(
            f"the merged model isn't the same: before any rounding its logits are off by {formula:.4g}, allowed"
            f" {allowed:.4g}; nothing was written; that is a fault of lorafit, please report it with the base and the method"
        )
    del want, got
    working("checking what rounding leaves of them")
    sums.settle_rounded(rounding)
    with sums.computed(sums.rounded(rounding)):
        logits = logits_of(host, None, prompts)
    if not bool(logits.isfinite().all()):
        raise LorafitError(
            "the merged model has numbers that are too large for the type it is written in: its logits aren't finite; nothing"
            " was written; try another type, such as `lorafit merge … --dtype bf16`"
        )
    return Right(formula, allowed, logits)


@contextmanager
def _unsteady(host: Host) -> Iterator[None]:
    """Within it the embedding's output is off by some 2⁻¹⁹ of itself. In some models rounding of fp32 grows a lot on its way to
    the logits, and so does this: they move by one to fifty times what the order of additions makes of them (measured on tiny
    models, with random adapters of all sizes), and by far less than what rounding to 16 bits makes of them.
    """
    generator = torch.Generator().manual_seed(0)

    def shaken(module: Any, args: Any, y: Tensor) -> Tensor:
        return y * (1 + _SHAKEN * torch.randn(y.shape, generator=generator).to(y.device))

    hook = host.base.model.get_input_embeddings().register_forward_hook(shaken)
    try:
        yield
    finally:
        hook.remove()


def proved_written(what: str, right: Right, got: Tensor) -> Exact:
    """That what was read back, with logits `got`, computes what the sums in its type do. LorafitError otherwise."""
    off = farthest(right.logits, got)
    if not off <= right.allowed:
        raise LorafitError(
            f"the {what} isn't what was merged: read back, its logits are off by {off:.4g}, allowed {right.allowed:.4g}; nothing"
            " was kept; that is a fault of lorafit, please report it with the base"
        )
    return Exact(right.formula, off, right.allowed)


def _read_back(
    place: Path, dtype: torch.dtype, prints: Mapping[str, bytes], prompts: Sequence[Sequence[int]]
) -> Tensor:
    """The folder's logits. LorafitError for a number in it that isn't as it should be."""
    read = Host(load(str(place), precision="fp32", device="cpu", streamed=True))
    found = Sums(read, None).prints(dtype)
    wrong = [name for name in {**prints, **found} if prints.get(name) != found.get(name)]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise LorafitError(f"{wrong[0]}{more} in the folder isn't what was merged; nothing was kept, merge again")
    return logits_of(read, None, prompts)


def ratio(error: Tensor, change: Tensor) -> float:
    """‖error‖ / ‖change‖; infinite for an error of no change at all."""
    off, by = float(error.norm()), float(change.norm())
    return off / by if by else math.inf if off else 0.0


def copy(
    base: Base,
    place: Path,
    dtype: torch.dtype,
    sites: Iterable[Site],
    adapted: Container[str],
    summed: Callable[[Site], Tensor],
    biases: Mapping[str, Tensor],
) -> None:
    """The base's weights from its files into a folder, one after the other: of `adapted` sites what `summed` gives instead, and
    those `biases`, of codes what they stand for. The names are those that the base's folder has them by."""
    source = base.source
    assert source is not None
    names = source.names
    entries = [entry for name in names for entry in source.entries(name, dtype)]
    sites = list(sites)
    changed = {source.keys[site.bias_name]: biases[site.path] for site in sites if site.path in biases}
    made = {
        source.keys[site.name]: site for site in sites if site.path in adapted or isinstance(site.module, QuantLinear)
    }

    def tensors() -> Iterator[dict[str, Tensor]]:
        for name in names:
            site = made.get(source.keys[name])
            if (bias := changed.get(source.keys[name])) is not None:
                tensor = bias.to(dtype)
            elif site is None:
                tensor = source.read(name, source.entries(name, dtype)[0].dtype)
            else:
                tensor = site.turned(summed(site) if site.path in adapted else site.weight()).to(dtype)
            yield source.parts(name, tensor)

    write_shards(place, entries, tensors(), SHARD)


def write(
    host: Host, place: Path, dtype: torch.dtype, chat: Chat | None, codes: Mapping[str, Tensor] | None = None
) -> None:
    """The model folder of a base in memory: sharded safetensors and settings. `codes`: what is written of the quantised
    modules, but for their biases."""
    model: Any = host.base.model
    with torch.no_grad():
        for p in model.parameters():  # one weight at a time, cast once
            p.data = p.data.to(dtype)
    tensors = None
    if codes:
        coded = [(path, module) for path, module in model.named_modules() if isinstance(module, QuantLinear)]
        inner = {f"{path}.{name}" for path, module in coded for name, _ in module.named_buffers()}
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in inner} | dict(codes)
    model.save_pretrained(place, max_shard_size=SHARD, state_dict=tensors)
    write_settings(host.base, place, dtype, chat)


def write_settings(base: Base, place: Path, dtype: torch.dtype, chat: Chat | None) -> None:
    """What stands beside the weights: config, generation settings, the tokenizer and the template trained with."""
    model: Any = base.model
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(place)
    if model.generation_config is not None:
        if chat is not None:
            model.generation_config.eos_token_id = list(chat.stop)
        model.generation_config.save_pretrained(place)
    tokenizer = base.tokenizer
    if tokenizer is not None:
        if chat is not None:
            tokenizer.chat_template = chat.template
        tokenizer.save_pretrained(place)


@torch.no_grad()
def logits_of(host: Host, spec: StackLike, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits (positions, vocabulary) under a stack, of every n-th position of each prompt, so that they take no more than
    COMPARED in all. The prompts share a pass where the base allows it: each pass may read all weights."""
    base = host.base
    every = max(1, -(-sum(map(len, prompts)) * base.head.weight.shape[0] // COMPARED))
    found = []
    for group in [prompts] if base.packs and base.plain_head else [[prompt] for prompt in prompts]:
        ends = list(accumulate(map(len, group)))
        chosen = [at for end, prompt in zip(ends, group, strict=True) for at in range(end - len(prompt), end, every)]
        ids = torch.tensor([i for prompt in group for i in prompt], device=base.device)
        with host.route(spec):
            logits = host.logits(ids, list(map(len, group)), torch.tensor(chosen, device=base.device))
        found.append(logits.float().cpu())
    return torch.cat(found) if len(found) > 1 else found[0]


def effect_of(host: Host, spec: StackLike, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, float]:
    """The logits under a stack, and their mean |difference| from those of the base alone."""
    want = logits_of(host, spec, prompts)
    plain = logits_of(host, None, prompts)
    return want, _mean([_sum((a - b).abs()) for a, b in _pieces(want, plain)], want)


def finite_effect(host: Host, spec: StackLike, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, float]:
    """The same. AdapterError where the logits aren't finite: nothing can be compared with them."""
    want, effect = effect_of(host, spec, prompts)
    if not bool(want.isfinite().all()):
        for path, layer in (item for name in stack(spec) for item in host.adapters[name].items()):
            if not all(bool(p.isfinite().all()) for p in layer.parameters()):
                raise AdapterError(f"{path}: the merged weight isn't finite; the adapter is damaged")
        names = "+".join(stack(spec))
        what = f"{names}: its numbers are too large: with it the" if names else "the"
        raise AdapterError(f"{what} logits of {host.base.name} aren't finite")
    return want, effect


def farthest(want: Tensor, got: Tensor) -> float:
    """The largest |difference| of two models' logits (positions, vocabulary); NaN where one of them is."""
    return max((float((a - b).abs().max()) for a, b in _pieces(want, got)), key=lambda x: math.inf if x != x else x)


def compare(want: Tensor, got: Tensor, effect: float, dtype: torch.dtype, tolerance: float | None) -> Proof:
    """The merged model's logits `got` (positions, vocabulary) beside the unmerged model's, `want`; `effect` as in Proof. By
    default they must be the same in fp32."""
    spread = float(want.std())
    largest, off, divergence, same = [], [], [], 0
    for a, b in _pieces(want, got):
        difference = (a - b).abs()
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        largest.append(difference.max())
        off.append(_sum(difference))
        divergence.append(_sum(log_a.exp() * (log_a - log_b)))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    mean = _mean(off, want)
    if tolerance is None:
        tolerance = spread * _SAME
    return Proof(
        dtype=str(dtype).removeprefix("torch."),
        largest=float(torch.stack(largest).max()),
        mean=mean,
        effect=effect,
        spread=spread,
        kl=max(0.0, float(torch.stack(divergence).sum()) / len(want)),  # rounding may make it negative
        agree=same / len(want),
        positions=len(want),
        tolerance=tolerance,
    )


def _pieces(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some positions of both at a time: what is computed of logits takes several times their memory."""
    return zip(a.split(64), b.split(64), strict=True)


def _sum(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.float64)


def _mean(sums: Sequence[Tensor], of: Tensor) -> float:
    return float(torch.stack(list(sums)).sum()) / of.numel()

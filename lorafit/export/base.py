"""What every format is given and what it hands back; and the comparisons that several share."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.adapter import Adapter
from lorafit.data import Chat
from lorafit.errors import AdapterError, LorafitError
from lorafit.export.merge import Proof, compare, finite_effect, logits_of
from lorafit.host import Host
from lorafit.methods import Method
from lorafit.methods.lora import given
from lorafit.methods.rows import Rows
from lorafit.model.sites import Site

Pair = tuple[Tensor, Tensor]  # a (*lead, r, in) and b (*lead, out, r), fp32, the scale in b


@dataclass
class Job:
    """An adapter to export: `name` on `host`, whose base computes in fp32 on the CPU, and is used up where it is merged.

    `folder` holds the adapter's files, `prompts` are token ids to compare logits on. `dtype` is that of a merged folder,
    `type` that of a merged GGUF file's weights. `trained`: the adapter on its base as it was trained, where that is another,
    quantised one. `alone`: the base without any adapter, which a format of merged weights can hold too.
    """

    host: Host
    name: str
    folder: Path
    chat: Chat
    prompts: Sequence[Sequence[int]]
    dtype: torch.dtype = torch.bfloat16
    type: str = "f16"
    trained: Host | None = None
    alone: bool = False
    working: Callable[[str], object] = field(default=lambda text: None)

    @property
    def spec(self) -> str | None:
        """What is added to the base."""
        return None if self.alone else self.name

    @property
    def adapter(self) -> Adapter:
        """The adapter itself."""
        return self.host.adapters[self.name]


@dataclass(frozen=True)
class Done:
    """An export that was read back and compared: `checked` says with what, `figures` are the numbers. `notes`: what the user
    should know. `use`: the command that uses it, with OUT and BASE for the places."""

    checked: str
    figures: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    use: str = ""


def low_rank(job: Job, what: str) -> dict[str, Pair]:
    """The factors of each site, by path. AdapterError where a layer adds something else than a product of them."""
    found = {}
    for path, layer in job.adapter.items():
        factors = layer.factors()
        if factors is None:
            raise AdapterError(
                f"{what} holds products of low rank, and what is added to {path} isn't one (method '{job.adapter.method}'"
                f"{_words(layer) if path in job.adapter.beside else ''}); merge it with --format hf, gguf or ollama"
            )
        a, b, scale = factors
        found[path] = a.detach().float(), b.detach().float() * scale
        if not bool(found[path][1].isfinite().all()):
            raise AdapterError(
                f"{job.folder}: what is added to {path} has numbers that are too large: B isn't finite with its scale"
            )
    return found


def _words(layer: Method) -> str:
    return ", rows of new tokens" if isinstance(layer, Rows) else ", trained whole"


def only(pairs: Mapping[str, Pair], sites: Mapping[str, Site], kinds: Container[str], why: str) -> None:
    """AdapterError for the first site that isn't of these kinds (`head`: the output head; `tied`: an embedding that the head
    shares)."""
    words = {
        "conv1d": "a transposed linear layer",
        "embedding": "the embedding",
        "experts": "a layer of experts",
        "head": "the output head",
        "tied": "an embedding that is the output head too",
    }
    for path in pairs:
        site = sites[path]
        kind = "head" if site.head else "tied" if site.tied else site.kind
        if kind not in kinds:
            raise AdapterError(f"{path} is {words.get(kind, kind)}, {why}; merge it with --format hf, gguf or ollama")


def as_lora(pairs: Mapping[str, Pair], sites: Mapping[str, Site], notes: Mapping[str, Any]) -> Adapter:
    """These factors as a LoRA of scale 1."""
    layers = {path: given(sites[path], a, b) for path, (a, b) in pairs.items()}
    largest = max(a.shape[-2] for a, _ in pairs.values())
    options = {"r": largest, "alpha": float(largest), "dropout": 0.0, "rslora": False}
    made = Adapter("lora", options, layers)
    made.notes = dict(notes)
    return made


def one_rank(pairs: Mapping[str, Pair]) -> tuple[int, dict[str, Pair]]:
    """The same products with one rank, the largest: zeros are added, which are multiplied with zeros."""
    r = max(a.shape[-2] for a, _ in pairs.values())
    made = {}
    for path, (a, b) in pairs.items():
        more = r - a.shape[-2]
        made[path] = torch.nn.functional.pad(a, (0, 0, 0, more)), torch.nn.functional.pad(b, (0, more))
    return r, made


def same_logits(job: Job, exported: Adapter) -> Proof:
    """The logits through an adapter that was read back beside those through the one that was exported. LorafitError where
    they differ by more than 1e-4 of the logits' spread."""
    job.working("reading it back and comparing")
    want, effect = finite_effect(job.host, job.name, job.prompts)
    name = f"{job.name} exported"
    job.host.attach(name, exported)
    try:
        got = logits_of(job.host, name, job.prompts)
    finally:
        job.host.remove(name)
    proof = compare(want, got, effect, torch.float32, None)
    if not proof.holds:
        raise LorafitError(
            f"what was read back isn't the same: largest logit difference {proof.largest:.4g}, allowed {proof.tolerance:.4g};"
            " nothing was written"
        )
    return proof


def said(proof: Proof) -> dict[str, Any]:
    """A proof's figures, without the name of a type that wasn't chosen."""
    values = replace(proof, error=None).to_json()
    return {key: value for key, value in values.items() if key != "dtype"}


LOGITS = "logits through the adapter that was read back, beside the exported one's"

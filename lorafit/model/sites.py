"""A site is one adaptable weight of the base, always seen as a (*lead, out, in) matrix. The only file that knows how
transformers stores weights.

Kinds: `linear` (nn.Linear), `conv1d` (GPT-2's, stored transposed), `embedding` (a product with one-hot rows: out = width,
in = vocabulary), `experts` (3-D parameters, lead = experts). A QuantLinear is of the kind that it stands for. One weight is
one site: an output head that shares the embedding's weight is a second use of that site, not a site of its own.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafit.config import nearest
from lorafit.errors import ConfigError
from lorafit.model.quant import QuantLinear
from lorafit.model.starts import Start
from lorafit.model.streamed import present

_ATTENTION = re.compile(r"(^|\.)(self_attn|self_attention|attention|attn)\.")
PRESETS = {
    "all-linear": "every linear layer and expert, without the embedding and the output head",
    "attention": "the linear layers inside attention",
    "all": "every site, with the embedding and the output head",
}


@dataclass(frozen=True, eq=False)
class Site:
    """One adaptable weight: where it is, how it is stored, and its (*lead, out, in) view."""

    path: str  # of the module; for experts of the parameter
    kind: str
    module: nn.Module
    parameter: str = "weight"
    tied: tuple[tuple[str, nn.Module], ...] = ()  # output heads that use the same weight
    head: bool = False

    @property
    def lookup(self) -> bool:
        """Inputs are ids, not vectors."""
        return self.kind == "embedding"

    @property
    def gain(self) -> float:
        """What the module multiplies its output by (Gemma's scaled embedding); 1 for all others."""
        return float(getattr(self.module, "embed_scale", 1.0)) if self.lookup else 1.0

    @property
    def flipped(self) -> bool:
        """The stored tensor is the transpose of the (out, in) view."""
        return self.kind in ("conv1d", "embedding") or (
            self.kind == "experts" and bool(getattr(self.module, "is_transposed", False))
        )

    @property
    def stored(self) -> Tensor:
        """The parameter as the base holds it, or read now where the base is streamed."""
        if isinstance(self.module, QuantLinear):
            return self.module.codes
        return present(self.module, self.parameter)

    @property
    def name(self) -> str:
        """Of the parameter in the model."""
        return self.path if self.kind == "experts" else f"{self.path}.{self.parameter}"

    @property
    def shape(self) -> torch.Size:
        """(*lead, out, in)."""
        if isinstance(self.module, QuantLinear):
            return self.module.shape
        shape: torch.Size = self.turned(getattr(self.module, self.parameter)).shape
        return shape

    def turned(self, w: Tensor) -> Tensor:
        """From how the weight is stored to (*lead, out, in), or back."""
        return w.transpose(-1, -2) if self.flipped else w

    def weight(self) -> Tensor:
        """The weight as (*lead, out, in), without a copy where storage allows."""
        if isinstance(self.module, QuantLinear):
            return self.module.numbers()
        return self.turned(self.stored.detach())

    @property
    def bias_parameter(self) -> str:
        """The bias's name in the module."""
        return f"{self.parameter}_bias" if self.kind == "experts" else "bias"

    @property
    def bias_name(self) -> str:
        """Of the bias in the model, if it has one."""
        return f"{self.path.rpartition('.')[0] if self.kind == 'experts' else self.path}.{self.bias_parameter}"

    @property
    def bias(self) -> Tensor | None:
        """(*lead, out), as the base holds it."""
        name = self.bias_parameter
        return None if getattr(self.module, name, None) is None else present(self.module, name).detach()

    def start(self, method: str) -> tuple[Tensor, Tensor] | None:
        """(a (r, in), b (out, r)), where the weight is codes that this method has made with b·a beside them."""
        part = self.module.part if isinstance(self.module, QuantLinear) else None
        return (part.a, part.b) if part is not None and part.method == method else None

    def write(self, w: Tensor) -> None:
        """Overwrite the base's weight with w (*lead, out, in), cast once. For merging alone; not into codes, which would round
        away what was learned."""
        assert not isinstance(self.module, QuantLinear) and not getattr(self.module, self.parameter).is_meta
        with torch.no_grad():
            self.stored.copy_(self.turned(w))

    def write_bias(self, bias: Tensor) -> None:
        """The same for its bias (*lead, out)."""
        with torch.no_grad():
            getattr(self.module, self.bias_parameter).copy_(bias)


def find_sites(model: Any) -> dict[str, Site]:
    """Every site of a transformers causal language model, by path, in the model's order."""
    head = model.get_output_embeddings()
    embeddings = model.get_input_embeddings()
    names = {module: name for name, module in model.named_modules()}
    shares = head is not None and embeddings is not None and head.weight is embeddings.weight
    found: dict[str, Site] = {}
    for path, module in model.named_modules():
        if module is head:
            if not shares:
                found[path] = Site(path, "linear", module, head=True)
        elif isinstance(module, QuantLinear):
            found[path] = Site(path, "conv1d" if module.turned else "linear", module)
        elif isinstance(module, nn.Linear):
            found[path] = Site(path, "linear", module)
        elif isinstance(module, Conv1D):
            found[path] = Site(path, "conv1d", module)
        elif module is embeddings and isinstance(module, nn.Embedding):
            found[path] = Site(path, "embedding", module, tied=((names[head], head),) if shares else ())
        elif hasattr(module, "has_gate") and hasattr(module, "num_experts"):  # set by transformers' experts decorator
            for parameter in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
                if isinstance(getattr(module, parameter, None), nn.Parameter):
                    found[f"{path}.{parameter}"] = Site(f"{path}.{parameter}", "experts", module, parameter)
    return found


def matches(pattern: str, path: str) -> bool:
    """A site's whole path, its last part(s) (`q_proj`, `self_attn.q_proj`), or a glob over the path (`*.3.mlp.*`)."""
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(path, pattern)
    return path == pattern or path.endswith("." + pattern)


def select(sites: Mapping[str, Site], targets: Iterable[str]) -> list[Site]:
    """The sites that targets (names, globs, presets) mean, in the model's order. ConfigError for one without a match."""
    chosen: set[str] = set()
    for target in targets:
        if target in PRESETS:
            hits = [path for path, site in sites.items() if _in_preset(target, site)]
        else:
            hits = [path for path in sites if matches(target, path)]
        if not hits:
            raise ConfigError(_no_match(target, sites))
        chosen.update(hits)
    if not chosen:
        raise ConfigError(f"no targets; name some of: {', '.join(_leaves(sites))}, or a preset: {', '.join(PRESETS)}")
    return [site for path, site in sites.items() if path in chosen]


def _in_preset(preset: str, site: Site) -> bool:
    if preset == "all":
        return True
    if site.head or site.kind == "embedding":
        return False
    return preset == "all-linear" or bool(_ATTENTION.search(site.path))


def _no_match(target: str, sites: Mapping[str, Site]) -> str:
    for site in sites.values():
        for path, _ in site.tied:
            if matches(target, path):
                return f"target '{target}' shares its weight with {site.path}; target '{site.path}', both uses follow"
    leaves = _leaves(sites)
    hint = nearest(target, [*leaves, *PRESETS])
    there = f"; this model has {', '.join(leaves)}" if hint.startswith("did") else ""
    return f"target '{target}' matches nothing{there}; {hint}"


def _leaves(sites: Mapping[str, Site]) -> list[str]:
    return sorted({path.rsplit(".", 1)[-1] for path in sites})


def pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the most specific (longest) pattern that matches a site, or the default."""
    hits = [pattern for pattern in patterns if matches(pattern, path)]
    return patterns[max(hits, key=len)] if hits else default


def ranks(model: Any, start: Start) -> dict[str, int]:
    """The rank of each site that a start is for, by path. ConfigError for a target or a pattern without a match."""
    chosen, patterns = select(find_sites(model), start.targets), dict(start.rank_pattern)
    for pattern in patterns:
        if not any(matches(pattern, site.path) for site in chosen):
            raise ConfigError(f"pattern '{pattern}' matches none of the {len(chosen)} adapted sites")
    return {site.path: pattern_value(patterns, site.path, start.r) for site in chosen}

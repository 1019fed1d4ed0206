"""An adapter as an object: one method's layers by site path. Its files are in peft_files/."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.errors import AdapterError, ConfigError
from lorafit.methods import Method, Observer, Stepper, find
from lorafit.methods.full import Full, beside
from lorafit.methods.rows import Rows
from lorafit.model.sites import Site, matches, pattern_value, select


class Adapter(nn.Module):
    """One method's layers, by site path. Its `parameters()` are the trainable set."""

    def __init__(self, method: str, options: Mapping[str, Any], layers: Mapping[str, Method]) -> None:
        super().__init__()
        self.method = method
        self.options = dict(options)
        self.notes: dict[str, Any] = {}  # travels in lorafit.json
        self.own: dict[str, dict[str, Any]] = {}  # the settings of sites that patterns give others than `options`
        self.layers = nn.ModuleDict({_key(path): layer for path, layer in layers.items()})
        told = [
            (path, layer) for path, layer in layers.items() if layer.dropout or type(layer).train is not Method.train
        ]
        self._told = told  # when training begins and ends
        super().train(False)

    def __contains__(self, path: str) -> bool:
        return _key(path) in self.layers

    def __getitem__(self, path: str) -> Method:
        layer = self.layers[_key(path)]
        assert isinstance(layer, Method)
        return layer

    def items(self) -> Iterator[tuple[str, Method]]:
        """Site paths and their layers."""
        for key, layer in self.layers.items():
            assert isinstance(layer, Method)
            yield key.replace("/", "."), layer

    @property
    def beside(self) -> list[str]:
        """The sites whose layers aren't the method's: those trained whole, and rows of new tokens."""
        kind = find(self.method)
        return [path for path, layer in self.items() if isinstance(layer, Full | Rows) and not isinstance(layer, kind)]

    def numbers(self) -> int:
        """How many trainable numbers it has."""
        return sum(p.numel() for p in self.parameters())

    def ranks(self) -> list[int]:
        """Of the layers that add a product of low rank."""
        return [found[0].shape[-2] for _, layer in self.items() if (found := layer.factors()) is not None]

    def observer(self) -> Observer | None:
        """See Method.observer."""
        return find(self.method).observer(dict(self.items()))

    def penalty(self) -> Tensor | None:
        """See Method.penalty."""
        return find(self.method).penalty([layer for _, layer in self.items()])

    def update(self, optimizer: Stepper, step: int, steps: int) -> None:
        """See Method.update."""
        with torch.no_grad():
            find(self.method).update([layer for _, layer in self.items()], optimizer, step, steps)

    def train(self, mode: bool = True) -> Adapter:
        """As torch's, but only layers that make something of it are told: hundreds of them take a tenth of a small step."""
        self.training = mode
        for _, layer in self._told:
            layer.train(mode)
        return self

    def reseed(self, seed: int) -> None:
        """Draw the random choices of the next forwards from `seed`; see Method.seed."""
        for path, layer in self._told:
            layer.seed = zlib.crc32(f"{seed}:{path}".encode())


def _key(path: str) -> str:
    return path.replace(".", "/")  # nn.ModuleDict takes no dots


def create(
    sites: Sequence[Site],
    method: str,
    options: Mapping[str, Any],
    *,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    whole: Sequence[Site] = (),
    tables: Sequence[Site] = (),
    tokens: Sequence[int] = (),
    seed: int | None = 0,
) -> Adapter:
    """A fresh adapter for these sites, and for those to be trained `whole`; with rows for `tokens` in those `tables` that
    aren't. Without a seed it is drawn as torch draws, also on the meta device. AdapterError where the method can't adapt a kind
    of site."""
    kind = find(method)
    kept = {site.path for site in whole}
    sites = [site for site in sites if site.path not in kept]
    for pattern in [*(rank_pattern or {}), *(alpha_pattern or {})]:
        if not any(matches(pattern, site.path) for site in sites):
            raise AdapterError(f"pattern '{pattern}' matches none of the {len(sites)} adapted sites")
    for given, option in ((rank_pattern, "r"), (alpha_pattern, "alpha")):
        if given and option not in options:
            raise AdapterError(f"method '{method}' has no {option}, so it takes no pattern for it")
    layers: dict[str, Method] = {}
    others: dict[str, dict[str, Any]] = {}
    for site in sites:
        if site.kind not in kind.kinds:
            raise AdapterError(f"method '{method}' can't adapt {site.path}, which is of kind '{site.kind}'")
        own = dict(options)
        if rank_pattern:
            own["r"] = pattern_value(rank_pattern, site.path, own["r"])
        if alpha_pattern:
            own["alpha"] = pattern_value(alpha_pattern, site.path, own["alpha"])
        generator = None
        if seed is not None:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{site.path}".encode()))
        layers[site.path] = kind(site, generator, **own)
        if own != dict(options):
            others[site.path] = own
    for site in whole:
        layers[site.path] = beside(site, kind)
    for site in tables if tokens else ():
        there = layers.get(site.path)
        if there is not None and not isinstance(there, Full):
            raise ConfigError(
                f"new_tokens trains rows of {site.path}, which method={method} adapts too; leave it out of targets, or train"
                f" it whole={site.path}"
            )
        layers.setdefault(site.path, Rows(site, tokens))
    made = Adapter(method, options, layers)
    made.own = others
    return made


def tables(sites: Mapping[str, Site]) -> list[Site]:
    """Those that have a row for each token: the embedding, and an output head that doesn't share its weight."""
    return [site for site in sites.values() if site.lookup or site.head]


def whole_sites(sites: Mapping[str, Site], names: Sequence[str]) -> list[Site]:
    """The sites to be trained whole that these names mean. ConfigError for one without a match, or for experts."""
    found = select(sites, names) if names else []
    if experts := [site.path for site in found if site.kind == "experts"]:
        raise ConfigError(
            f"whole={','.join(names)}: {experts[0]} are experts, which can't be trained whole beside a method"
        )
    return found

"""A base with the sums W + ΔW in the place of its weights: computed with in fp32 or rounded, and told number by number.

It is what a merged folder is held against, so it is made apart from what writes the folder, and of a streamed base
(model/streamed.py) anew for each forward: no more than a weight is in memory.
"""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.errors import AdapterError
from lorafit.host import Host
from lorafit.model.experts import Choices
from lorafit.model.quant import QuantLinear
from lorafit.model.sites import Site
from lorafit.model.streamed import Change, changed, present
from lorafit.route import StackLike, stack


def adapted_sites(host: Host, spec: StackLike) -> list[Site]:
    """The sites that a stack changes."""
    return [site for path, site in host.sites.items() if any(path in host.adapters[name] for name in stack(spec))]


@torch.no_grad()
def merged_weight(host: Host, site: Site, spec: StackLike) -> Tensor:
    """W + ΔW (*lead, out, in), fp32. AdapterError if it isn't finite."""
    merged = host.merged_weight(site, spec)
    if not all(
        map(math.isfinite, map(float, merged.aminmax()))
    ):  # which NaN passes through, with no copy of the weight
        raise AdapterError(f"{site.path}: the merged weight isn't finite; the adapter is damaged")
    return merged


@torch.no_grad()
def merged_biases(host: Host, spec: StackLike) -> dict[str, Tensor]:
    """The biases (*lead, out) that a stack changes, with its deltas, fp32, by site."""
    found = {site.path: host.merged_bias(site, spec) for site in adapted_sites(host, spec)}
    return {path: bias for path, bias in found.items() if bias is not None}


# What is left of a parameter in another type, fp32, from its name and numbers.
Rounding = Callable[[str, Tensor], Tensor]


class Sums:
    """Of a host's base (in fp32) and a stack of its adapters, which must stay there. Codes count as the weights that they
    stand for. `choices`: of experts, for who compares base and adapters with the sums."""

    def __init__(self, host: Host, spec: StackLike) -> None:
        self.host, self.spec = host, spec
        adapted = adapted_sites(host, spec)
        self._sites = {site.name: site for site in adapted}
        self._sites |= {f"{path}.weight": site for site in adapted for path, _ in site.tied}
        self._biases = {host.sites[path].bias_name: bias for path, bias in merged_biases(host, spec).items()}
        self._coded = [site for site in host.sites.values() if isinstance(site.module, QuantLinear)]
        self.choices = Choices(host.base.model)

    def parameter(self, name: str, held: Callable[[], Tensor]) -> Tensor:
        """One of the merged model, as the model has it, fp32; `held` gives the base's."""
        if (site := self._sites.get(name)) is not None:
            # Laid out as one that is read: products then round alike.
            return site.turned(merged_weight(self.host, site, self.spec)).contiguous()
        bias = self._biases.get(name)
        return held().detach().float() if bias is None else bias

    def rounded(self, rounding: Rounding) -> Change:
        """The same, rounded."""
        return lambda name, held: rounding(name, self.parameter(name, held))

    @contextmanager
    def computed(self, change: Change) -> Iterator[None]:
        """Within it the base computes with what `change` makes of its parameters. One in memory does so of codes alone, and
        for the rest with what it holds: see `settle` and `settle_rounded`."""
        hooks = [
            site.module.register_forward_hook(partial(_instead, site, change), prepend=True) for site in self._coded
        ]
        try:
            with changed(self.host.base.model, change):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def settle(self, summed: Callable[[Site], Tensor] | None = None) -> None:
        """Overwrite what the base holds in memory with the sums, which `summed` may give: then it isn't the base any more, and
        `parameter` is for codes alone."""
        if self.host.base.streamed:
            return
        for site in adapted_sites(self.host, self.spec):
            if not isinstance(site.module, QuantLinear):
                site.write(merged_weight(self.host, site, self.spec) if summed is None else summed(site))
                if site.bias_name in self._biases:
                    site.write_bias(self._biases[site.bias_name])

    @torch.no_grad()
    def settle_rounded(self, rounding: Rounding) -> None:
        """Round what the base holds in memory."""
        if not self.host.base.streamed:
            for name, p in self.host.base.model.named_parameters():
                p.copy_(rounding(name, p))

    def forget(self) -> None:
        """The host's base and adapters: from here on another model is in memory. Sites and choices hold the modules too."""
        host = self.host
        for name in list(host.adapters):
            host.remove(name)
        for held in (host.sites, host.site_of, self._sites, self._coded):
            held.clear()
        host.base.model = host.base.body = host.base.source = None
        self.choices = Choices(None)
        gc.collect()

    @torch.no_grad()
    def prints(self, dtype: torch.dtype) -> dict[str, bytes]:
        """Of each parameter in `dtype` and each buffer that a folder holds, by name: a digest of its bits."""
        model = self.host.base.model
        found = {}
        for site in self._coded:
            found[site.name] = _digest(self.parameter(site.name, partial(_stored, site)).to(dtype))
        for name, _ in model.named_parameters():
            path, _, key = name.rpartition(".")
            found[name] = _digest(self.parameter(name, partial(present, model.get_submodule(path), key)).to(dtype))
        for path, module in model.named_modules():
            for key, buffer in module.named_buffers(recurse=False):
                if key not in module._non_persistent_buffers_set and not isinstance(module, QuantLinear):
                    name = f"{path}.{key}" if path else key
                    found[name] = _digest(buffer.float() if buffer.is_floating_point() else buffer)
        return found


def _stored(site: Site) -> Tensor:
    return site.turned(site.weight())


def _instead(site: Site, change: Change, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A layer of codes in torch's own product, with other numbers."""
    bias = None if module.bias is None else change(site.bias_name, lambda: module.bias)
    return F.linear(args[0], site.turned(change(site.name, partial(_stored, site))), bias)


def _digest(tensor: Tensor) -> bytes:
    return hashlib.blake2b(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).digest()

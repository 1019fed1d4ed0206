"""What stands in an adapter beside its method's layers: weights that are trained whole, as PEFT's modules_to_save.

PEFT stores such a weight as it is after training, not what training changed; so here the base's is added, and taken off again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.adapter import Adapter
from lorafit.errors import AdapterError
from lorafit.methods import Method
from lorafit.methods.full import beside
from lorafit.model.sites import Site

KINDS = ("linear", "conv1d", "embedding")  # that can be stored so


def to_beside(layer: Method, site: Site) -> dict[str, Tensor]:
    """Its tensors by PEFT's names, in the layout that the base stores them in: with its bias, and once more for a head that
    shares the weight, as PEFT wants them."""
    w = site.weight()
    whole = site.turned(w.float() + layer.delta_weight(w).detach().to(w.device)).cpu().contiguous()
    found = {f"{path}.weight": whole.clone() for path in (site.path, *(path for path, _ in site.tied))}
    return found if site.bias is None else found | {f"{site.path}.bias": site.bias.cpu().float()}


def settings_of(adapter: Adapter, sites: Mapping[str, Site], modules: Sequence[str]) -> dict[str, Any]:
    """Their part of adapter_config.json, heads that share a weight by their own names too. PEFT takes a name for the end of a
    module's path."""
    paths = [name for path in adapter.beside for name in (path, *(head for head, _ in sites[path].tied))]
    names = []
    for path in paths:
        leaf = path.rpartition(".")[2]
        alike = {module for module in modules if module.endswith(leaf)}
        names.append(leaf if alike <= set(paths) else path)
    return {"modules_to_save": sorted(set(names)) or None}


def meant(config: Mapping[str, Any], sites: Mapping[str, Site], folder: Path) -> list[str]:
    """The sites that a config's modules_to_save means. AdapterError where it names something else."""
    names = config.get("modules_to_save") or []
    there = {p: site for site in sites.values() for p in (site.path, *(name for name, _ in site.tied))}
    found: list[str] = []
    for name in names:
        hits = [path for path in there if path.endswith(name)]
        if not hits or any(there[path].kind not in KINDS for path in hits):
            raise AdapterError(
                f"{folder}: modules_to_save names '{name}'; linear layers and embeddings of the base can be loaded whole,"
                " nothing else"
            )
        found += [there[path].path for path in hits]
    return list(dict.fromkeys(found))


def from_beside(parts: Mapping[str, Tensor], site: Site, kind: type[Method]) -> tuple[Method | None, list[str]]:
    """A layer of these tensors, or what is wrong with them."""
    whole, bias = parts.get("weight"), parts.get("bias")
    if whole is None:
        return None, ["has no weight"]
    shape = tuple(site.turned(torch.empty(site.shape, device="meta")).shape)
    if tuple(whole.shape) != shape:
        return None, [f"weight is {tuple(whole.shape)}, expected {shape}"]
    mine = site.bias
    if bias is not None and not (mine is None or mine.is_meta) and not torch.equal(bias.to(mine), mine):
        return None, ["its bias was trained too, which isn't possible here"]
    layer, w = beside(site, kind), site.weight()
    delta = torch.empty(site.shape, device="meta") if w.is_meta else site.turned(whole).float() - w.float().cpu()
    layer.delta = nn.Parameter(delta.contiguous())
    return layer, []

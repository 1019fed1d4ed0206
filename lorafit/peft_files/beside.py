"""What stands in an adapter beside its method's layers: weights that are trained whole, as PEFT's modules_to_save, and rows of
the embedding, as its trainable_token_indices.

PEFT stores such a weight, or row, as it is after training, not what training changed; so here the base's is added, and taken
off again.
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
from lorafit.methods.rows import Rows
from lorafit.model.sites import Site

ROWS = "token_adapter.trainable_tokens_delta"
KINDS = ("linear", "conv1d", "embedding")  # that can be stored so


def to_beside(layer: Method, site: Site) -> dict[str, Tensor]:
    """Its tensors by PEFT's names, in the layout that the base stores them in: with its bias, and once more for a head that
    shares the weight, as PEFT wants them."""
    w = site.weight()
    if isinstance(layer, Rows):
        rows = _table(site, w)[layer.ids].float() + layer.delta.detach()
        return {f"{site.path}.{ROWS}": rows.cpu().contiguous()}
    whole = site.turned(w.float() + layer.delta_weight(w).detach().to(w.device)).cpu().contiguous()
    found = {f"{path}.weight": whole.clone() for path in (site.path, *(path for path, _ in site.tied))}
    return found if site.bias is None else found | {f"{site.path}.bias": site.bias.cpu().float()}


def settings_of(adapter: Adapter, sites: Mapping[str, Site], modules: Sequence[str]) -> dict[str, Any]:
    """Their part of adapter_config.json, heads that share a weight by their own names too. PEFT takes a name for the end of a
    module's path."""
    rows = {path: layer for path, layer in adapter.items() if isinstance(layer, Rows)}
    paths = [p for path in adapter.beside if path not in rows for p in (path, *(head for head, _ in sites[path].tied))]
    return {
        "modules_to_save": sorted({_ending(path, paths, modules) for path in paths}) or None,
        "trainable_token_indices": {_ending(p, [p], modules): layer.ids.tolist() for p, layer in rows.items()} or None,
    }


def _ending(path: str, paths: Sequence[str], modules: Sequence[str]) -> str:
    """The last part of a module's path, where it means none but these."""
    leaf = path.rpartition(".")[2]
    return leaf if {module for module in modules if module.endswith(leaf)} <= set(paths) else path


def _table(site: Site, w: Tensor) -> Tensor:
    """A site's weight (out, in) as a table with a row for each token."""
    return w.t() if site.lookup else w


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


def indices(config: Mapping[str, Any], sites: Mapping[str, Site], folder: Path) -> dict[str, list[int]]:
    """The rows that a config's trainable_token_indices means, by site; of a shared weight once. AdapterError where it means
    none."""
    given = config.get("trainable_token_indices")
    if not given:
        return {}
    if isinstance(given, list):
        given = dict.fromkeys((site.path for site in sites.values() if site.lookup), given)
    there = {p: site for site in sites.values() for p in (site.path, *(name for name, _ in site.tied))}
    found: dict[str, list[int]] = {}
    for name, ids in given.items() if isinstance(given, dict) else ():
        hits = {site.path: site for path, site in there.items() if path.endswith(name) and (site.lookup or site.head)}
        rows = next((len(_table(site, torch.empty(site.shape, device="meta"))) for site in hits.values()), 0)
        whole = isinstance(ids, list) and all(isinstance(i, int) and i >= 0 for i in ids) and len(set(ids)) == len(ids)
        if not (hits and ids and whole) or any(found.get(path, ids) != ids for path in hits):
            break
        if max(ids) >= rows:
            raise AdapterError(
                f"{folder} trains row {max(ids)} of {name}, and this base has {rows}: it was made on one with more tokens,"
                " and doesn't say which"
            )
        found |= dict.fromkeys(hits, ids)
    else:
        if found:
            return found
    raise AdapterError(
        f"{folder}: trainable_token_indices={given!r} can't be meant for this base; rows of its embedding"
    )


def from_rows(parts: Mapping[str, Tensor], site: Site, ids: Sequence[int]) -> tuple[Method | None, list[str]]:
    """The same for rows."""
    rows, layer, w = parts.get(ROWS), Rows(site, ids), site.weight()
    if rows is None or len(parts) > 1:
        return None, [f"has {', '.join(sorted(parts))}; expected {ROWS}"]
    if rows.shape != layer.delta.shape:
        return None, [f"{ROWS} is {tuple(rows.shape)}, expected {tuple(layer.delta.shape)}"]
    before = torch.empty_like(rows, device="meta") if w.is_meta else _table(site, w)[list(ids)].float().cpu()
    layer.delta = nn.Parameter(before if w.is_meta else (rows.float() - before).contiguous())
    return layer, []


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

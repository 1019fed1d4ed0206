"""An adapter's files, in PEFT's format, so that every tool of the ecosystem reads them.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's; `lorafit.json` beside them holds what PEFT has no place
for: the base's fingerprint, the chat template and stop tokens it was trained with, and the method's settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lorafit.adapter import Adapter
from lorafit.errors import AdapterError, ConfigError
from lorafit.methods import Method, find
from lorafit.model.sites import Site
from lorafit.peft_files.beside import from_beside, from_rows, indices, meant, to_beside
from lorafit.peft_files.settings import (
    CONFIG,
    INT8,
    OWN,
    PICKLED,
    PREFIX,
    WEIGHTS,
    ancestor,
    check_values,
    method_in,
    method_of,
    options_for,
    passed_over,
    promised,
    read_config,
    read_notes,
    settings_of,
)
from lorafit.peft_files.tensors import (
    LORAS,
    by_site,
    coded,
    from_adalora,
    from_peft,
    numbers,
    peft_path,
    shapes_of,
    to_peft,
    untied,
)
from lorafit.peft_files.written import as_lora, config_of, felt, peft_type

__all__ = [
    "CONFIG",
    "INT8",
    "OWN",
    "PREFIX",
    "WEIGHTS",
    "ancestor",
    "load",
    "method_of",
    "passed_over",
    "peft_type",
    "read_config",
    "read_notes",
    "save",
    "settings_of",
]


def save(
    adapter: Adapter,
    folder: Path,
    sites: Mapping[str, Site],
    base_folder: str,
    modules: Sequence[str],
    int8: bool = False,
) -> None:
    """Write the adapter's files into `folder`, which must exist. `modules`: all module paths of the base. `int8`: a LoRA's
    tensors in 8 bits with a scale for each row, which PEFT doesn't read.

    The folder isn't swapped in whole here; a run does that (see run.py).
    """
    adapter = felt(adapter)
    beside = adapter.beside
    tensors: dict[str, Tensor] = {}
    config = config_of(adapter, sites, base_folder, modules)
    for path, layer in adapter.items():
        if path in beside:
            tensors |= {f"{PREFIX}{name}": tensor for name, tensor in to_beside(layer, sites[path]).items()}
            continue
        for name, tensor in to_peft(layer, sites[path]).items():
            tensors[f"{PREFIX}{peft_path(sites[path], adapter)}.{name}"] = tensor
    if int8:
        if beside:
            raise AdapterError(
                f"{beside[0]} has more than a product of low rank, and can't be stored in int8; compress it to a rank as well"
            )
        if config["peft_type"] != "LORA":
            raise AdapterError(f"method '{adapter.method}' can't be stored in int8; compress it to a rank as well")
        config["peft_type"], tensors = INT8, coded(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    own = {"method": adapter.method, "options": adapter.options, **adapter.notes}
    if (as_it_is := as_lora(adapter)) is not None and adapter.method not in LORAS:
        own |= {"method": "lora", "options": as_it_is}
        own.setdefault("trained_as", {"method": adapter.method, "options": adapter.options})
    (folder / OWN).write_text(json.dumps(own, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _finite(key: str, tensor: Tensor, folder: Path) -> Tensor:
    """The same; in fp32 where torch can't compute with its type, or it is wider. AdapterError where fp32 can't hold it."""
    if not tensor.is_floating_point() or tensor.is_meta:
        return tensor
    computed = tensor.float()
    if not bool(computed.isfinite().all()):
        raise AdapterError(
            f"{folder / WEIGHTS}: {key} holds numbers that aren't finite in fp32; the adapter is damaged"
        )
    return tensor if tensor.dtype in (torch.bfloat16, torch.float16) else computed


def load(folder: Path, sites: Mapping[str, Site], fingerprint: str = "", shapes: bool = False) -> Adapter:
    """Read an adapter, strictly: every key must have a place of its shape, and the base must be the one it was made for.
    `shapes`: without its numbers, on the meta device; of the file only the header is read.

    AdapterError names the first of what is wrong. An adapter without `lorafit.json` (made by PEFT) has no fingerprint to check.
    """
    config, own = read_config(folder), read_notes(folder)
    check_values(config, folder)
    if not (folder / WEIGHTS).is_file() and (folder / PICKLED).is_file():
        raise AdapterError(
            f"{folder / PICKLED} is a pickle, which lorafit doesn't read; load the adapter in PEFT and save it anew as {WEIGHTS}"
        )
    made_for = own.get("fingerprint", "")
    if fingerprint and made_for and fingerprint != made_for:
        raise AdapterError(
            f"{folder} was made for another base ({own.get('base', '?')}, fingerprint {made_for[:8]}, not"
            f" {fingerprint[:8]}); load it on that one"
        )
    try:
        tensors = shapes_of(folder / WEIGHTS) if shapes else safetensors.torch.load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder / WEIGHTS} can't be read: {error}") from None
    tensors = {key: _finite(key, tensor, folder) for key, tensor in tensors.items()}
    if config.get("peft_type") == "ADALORA":
        config, tensors = from_adalora(config, tensors, sites, folder)
    method, options = method_in(config, own, folder)
    if config.get("peft_type") == INT8:
        tensors = numbers(tensors, folder)
    if any(site.tied for site in sites.values()):
        tensors = untied(config, tensors, sites, folder)
    whole, rows = meant(config, sites, folder), indices(config, sites, folder)
    grouped, bad = by_site(tensors, sites, config.get("target_parameters") or [], whole)
    layers: dict[str, Method] = {}
    others = {}
    for path, parts in grouped.items():
        site = sites[path]
        if path in rows:
            made, wrong = from_rows(parts, site, rows[path])
        elif path in whole:
            made, wrong = from_beside(parts, site, find(method))
        else:
            own_options = options_for(path, config, options)
            try:
                made, wrong = from_peft(parts, site, method, own_options)
            except ConfigError as error:  # of the method, which doesn't know where its settings come from
                raise AdapterError(f"{folder / CONFIG}: {error}") from None
            if own_options != options:
                others[path] = own_options
        bad += [f"{path}: {reason}" for reason in wrong]
        if made is not None:
            layers[path] = made
    missing = [path for path in [*promised(config, sites), *whole, *rows] if path not in grouped]
    bad += [f"{path}: named in {CONFIG}, but its tensors are missing" for path in missing]
    if bad or not layers:
        listed = "; ".join(bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise AdapterError(f"{folder} doesn't fit this base: {listed or 'it holds no tensors'}")
    adapter = Adapter(method, options, layers)
    adapter.notes = {key: value for key, value in own.items() if key not in ("method", "options")}
    adapter.own = others
    return adapter

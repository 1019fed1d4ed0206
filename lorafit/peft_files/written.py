"""The adapter_config.json that is written for an adapter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lorafit.adapter import Adapter
from lorafit.methods import Method
from lorafit.methods.ia3 import IA3
from lorafit.model.sites import Site
from lorafit.peft_files.beside import settings_of
from lorafit.peft_files.tensors import LORAS, pair


def peft_type(kind: type[Method]) -> str | None:
    """PEFT's type that a method's adapters are stored as; None where PEFT has none, and the files are lorafit's alone."""
    if kind is IA3:
        return "IA3"
    return "LORA" if kind in LORAS.values() or kind.factors is not Method.factors else None


def config_of(adapter: Adapter, sites: Mapping[str, Site], base_folder: str, modules: Sequence[str]) -> dict[str, Any]:
    """What is written of an adapter. `modules`: all module paths of the base."""
    paths = [path for path, _ in adapter.items() if path not in adapter.beside]
    plain = [p for p in paths if sites[p].kind != "experts"]
    experts = [p for p in paths if sites[p].kind == "experts"]
    conv1d = bool(plain) and all(sites[p].kind == "conv1d" for p in plain)
    options = as_lora(adapter)
    config: dict[str, Any] = {
        "peft_type": f"LORAFIT_{adapter.method.upper()}" if options is None else "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_folder,
        "inference_mode": True,
        "target_modules": _short(plain, modules),
        "target_parameters": experts or None,
        **settings_of(adapter, sites, modules),
    }
    if adapter.method == "ia3":
        inputs = {p for p, layer in adapter.items() if isinstance(layer, IA3) and layer.inputs}
        kind = "LORAFIT_IA3" if config["trainable_token_indices"] else "IA3"  # which in PEFT has no rows of new tokens
        known = {key: value for key, value in config.items() if value is not None}
        return (
            known | _feedforward(known["target_modules"], plain, inputs) | {"peft_type": kind, "fan_in_fan_out": conv1d}
        )
    if options is None:
        return config | _patterns(adapter)
    found = {p: factors for p in paths if (factors := pair(adapter[p])) is not None}
    ranks = {p: a.shape[-2] for p, (a, _, _) in found.items()}
    alphas = {p: alpha_of(ranks[p], s, options["rslora"]) for p, (_, _, s) in found.items()}
    return config | {
        "r": options["r"],
        "lora_alpha": options["alpha"],
        "lora_dropout": 0.0 if experts else options["dropout"],  # PEFT refuses dropout on parameters
        "use_rslora": options["rslora"],
        "use_dora": adapter.method == "dora",
        "bias": "none",
        "fan_in_fan_out": conv1d,
        "init_lora_weights": True,
        "rank_pattern": {re.escape(p): r for p, r in ranks.items() if r != options["r"]},
        "alpha_pattern": {re.escape(p): alpha for p, alpha in alphas.items() if abs(alpha - options["alpha"]) > 1e-6},
        "ensure_weight_tying": any(sites[p].tied for p, _ in adapter.items()),
    }


def felt(adapter: Adapter) -> Adapter:
    """Without the layers of rank 0."""
    layers = {p: layer for p, layer in adapter.items() if (f := layer.stored()) is None or f[0].shape[-2]}
    if len(layers) == len(adapter.layers):
        return adapter
    kept = Adapter(adapter.method, adapter.options, layers)
    kept.notes, kept.own = adapter.notes, adapter.own
    return kept


def as_lora(adapter: Adapter) -> dict[str, Any] | None:
    """The settings of LoRA under which an adapter is stored, where all its layers add products of low rank: its own, or r and
    alpha as most of its sites have them."""
    if adapter.method in LORAS:
        return adapter.options
    beside = adapter.beside
    found = [layer.stored() for path, layer in adapter.items() if path not in beside]
    if not found or None in found:
        return None
    root = adapter.method == "rslora"
    pairs = Counter((f[0].shape[-2], alpha_of(f[0].shape[-2], f[2], root)) for f in found if f is not None)
    r, alpha = pairs.most_common(1)[0][0]
    return {"r": r, "alpha": alpha, "dropout": adapter.options.get("dropout", 0.0), "rslora": root}


def _patterns(adapter: Adapter) -> dict[str, dict[str, Any]]:
    """What tells of no layer's factors which r and alpha it has."""
    found: dict[str, dict[str, Any]] = {}
    for key, option in (("rank_pattern", "r"), ("alpha_pattern", "alpha")):
        other = {
            re.escape(p): own[option]
            for p, own in adapter.own.items()
            if own.get(option) != adapter.options.get(option)
        }
        found |= {key: other} if other else {}
    return found


def alpha_of(r: int, scale: float, rslora: bool) -> float:
    """The alpha that gives this scale."""
    return round(scale * (r**0.5 if rslora else r), 9)


def _feedforward(targets: list[str], paths: Sequence[str], inputs: set[str]) -> dict[str, list[str]]:
    """IA3's modules, and which of them scale their inputs: short names if each means modules of one sort."""
    meant = {name: {p for p in paths if p == name or p.endswith("." + name)} for name in targets}
    if any(found & inputs and found - inputs for found in meant.values()):
        return {"target_modules": list(paths), "feedforward_modules": sorted(inputs)}
    return {"target_modules": targets, "feedforward_modules": [name for name in targets if meant[name] & inputs]}


def _short(paths: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Leaf names (`q_proj`) when they mean exactly these modules, as other tools expect; whole paths otherwise."""
    leaves = sorted({path.rsplit(".", 1)[-1] for path in paths})
    meant = {m for m in modules if m.rsplit(".", 1)[-1] in leaves}
    return leaves if meant == set(paths) else list(paths)

"""What stands beside an adapter's tensors: PEFT's adapter_config.json and our lorafit.json, read and checked."""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorafit.errors import AdapterError
from lorafit.files import load_json, sha256
from lorafit.methods import find, settings
from lorafit.model.sites import Site

PREFIX = "base_model.model."
WEIGHTS, CONFIG, OWN = "adapter_model.safetensors", "adapter_config.json", "lorafit.json"
INT8, SCALE = "LORAFIT_INT8", ".scale"  # a LoRA whose tensors are int8, each with its rows' scales beside it
PICKLED = "adapter_model.bin"  # what PEFT once wrote


def read_config(folder: Path) -> dict[str, Any]:
    """What adapter_config.json holds. AdapterError if it isn't there."""
    values = load_json(folder / CONFIG, AdapterError)
    if values is None:
        raise AdapterError(f"{folder / CONFIG} is missing; {folder} is not an adapter")
    if "lora_parameters" in values and "peft_type" not in values:
        raise AdapterError(f"{folder} is an adapter of mlx-lm; first: lorafit adapter convert {folder} OUT")
    return values


def read_notes(folder: Path) -> dict[str, Any]:
    """What lorafit.json holds; {} for an adapter made elsewhere."""
    found = load_json(folder / OWN, AdapterError) or {}
    for key, kind in _NOTES.items():
        if found.get(key) is not None and not isinstance(found[key], kind):
            raise AdapterError(f"{folder / OWN}: {key}={found[key]!r} can't be meant; the file is damaged")
    if not all(isinstance(i, int) and i >= 0 for i in (found.get("new_tokens") or {}).values()):
        raise AdapterError(f"{folder / OWN}: new_tokens={found['new_tokens']!r} can't be meant; the file is damaged")
    return found


_NOTES = {
    "method": str,
    "options": dict,
    "base": str,
    "fingerprint": str,
    "chat": dict,
    "lineage": dict,
    "trained_as": dict,
    "new_tokens": dict,
}


def ancestor(given: str, folder: Path) -> dict[str, Any]:
    """What is remembered of an adapter that another one was made of: where it was, its tensors' hash, and its own lineage."""
    before, weights = read_notes(folder).get("lineage"), folder / WEIGHTS
    found = {"adapter": given, "sha256": sha256(weights) if weights.is_file() else ""}
    return found | ({"lineage": before} if before else {})


# --- what a config means -----------------------------------------------------------------------------------------------

# PEFT features that change what the tensors mean; an adapter that uses one would compute something else here.
_UNSUPPORTED = [
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "velora_config",
    "kasa_config",
    "arrow_config",
    "monteclora_config",
    "corda_config",
]
_HARMLESS_STARTS = ("gaussian", "orthogonal", "eva")
_CONVERTED = ("pissa", "olora", "corda", "lora_ga")  # PEFT can save these as plain LoRAs of the base as it was
# What PEFT's LORA, IA3 and ADALORA have beside the above: read here, or without meaning once an adapter is trained.
# fmt: off
_KNOWN = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "beta1", "beta2", "bias", "deltaT", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "feedforward_modules", "inference_mode", "init_ia3_weights",
    "init_lora_weights", "init_r", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "orth_reg_weight", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters",
    "target_r", "task_type", "tfinal", "tinit", "total_step", "trainable_token_indices", "use_dora", "use_rslora",
})
# fmt: on
_MOST_RANK = 1 << 16  # more than any weight has: not even asked for


def check_values(config: Mapping[str, Any], folder: Path) -> None:
    """AdapterError where a value that is used isn't of its kind; a file may have been written by anybody."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    bad = [key for key in ("lora_alpha", "lora_dropout") if config.get(key) is not None and not number(config[key])]
    if (r := config.get("r")) is not None and not (number(r) and r <= _MOST_RANK):
        bad.append("r")
    for key, most in (("rank_pattern", _MOST_RANK), ("alpha_pattern", math.inf)):
        found = config.get(key) or {}
        if key == "rank_pattern" and config.get("peft_type") == "ADALORA":
            found = {}  # there it says which triplets are left, see from_adalora
        if not isinstance(found, dict) or not all(
            number(v) and 0 < v <= most and _compiles(pattern) for pattern, v in found.items()
        ):
            bad.append(key)
        else:
            _bounded(key, found, folder)
    for key in ("target_modules", "target_parameters", "modules_to_save"):
        found = config.get(key) or []
        if isinstance(found, str) and key == "target_modules":
            _bounded(key, [found], folder)
        elif isinstance(found, str):
            raise AdapterError(
                f"{folder / CONFIG}: {key}={found!r} must be a list of names; write [{json.dumps(found)}]"
            )
        elif not (isinstance(found, list) and all(isinstance(v, str) for v in found)):
            bad.append(key)
    if bad:
        raise AdapterError(f"{folder / CONFIG}: {bad[0]}={config[bad[0]]!r} can't be meant; the file is damaged")


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


_MOST_BITS = 32  # of choices that a pattern may leave open: five `.*`, or hundreds of names
_LONG = 64  # characters that an open repeat may take: about a module's path
_SRE: Any = importlib.import_module("re._parser")  # the standard library's own; it has no types


def _bounded(key: str, patterns: Iterable[str], folder: Path) -> None:
    """AdapterError for a pattern that could be tried for ever: Python's `re` goes through all ways of dividing a text."""
    for pattern in patterns:
        if _compiles(pattern) and _bits(_SRE.parse(pattern)) > _MOST_BITS:
            raise AdapterError(
                f"{folder / CONFIG}: {key} has the pattern {pattern!r}, which may be tried for ever on a name that it doesn't"
                " match; write it without repeats of repeats"
            )


def _bits(parsed: Any) -> float:
    """At most so many choices, in bits, does a parsed pattern leave to whoever tries it."""
    found = 0.0
    for kind, value in parsed:
        name = str(kind)
        if name.endswith("_REPEAT"):
            least, most, inner = value
            most = min(int(most), max(_LONG, least))
            found += math.log2(most - least + 1) + most * _bits(inner)
        elif name == "BRANCH":
            found += math.log2(sum(2 ** min(_bits(one), 99.0) for one in value[1]))
        elif name in ("SUBPATTERN", "ATOMIC_GROUP", "ASSERT", "ASSERT_NOT"):
            found += _bits(value if name == "ATOMIC_GROUP" else value[-1])
        elif name == "GROUPREF_EXISTS":
            found += sum(_bits(one) for one in value[1:] if one is not None)
    return found


def passed_over(folder: Path) -> list[str]:
    """A line about the settings of a config that are on and aren't known here, if there are any."""
    known = _KNOWN | set(_UNSUPPORTED)
    strange = sorted(key for key, value in read_config(folder).items() if value and key not in known)
    return [f"{folder / CONFIG} has {', '.join(strange)}, not known here and passed over"] if strange else []


def method_in(config: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> tuple[str, dict[str, Any]]:
    """The method and its settings. AdapterError where the tensors would mean something else here."""
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind.startswith("LORAFIT_") and kind != INT8:
        name, options = str(own.get("method", "")), dict(own.get("options", {}))
        if unknown := [key for key in options if key not in settings(find(name))]:
            raise AdapterError(f"{folder / OWN}: method '{name}' has no setting '{unknown[0]}'")
        return name, options
    if kind == "IA3":
        return "ia3", {"feedforward": _feedforward_of(config, folder)}
    if kind not in ("LORA", INT8):
        raise AdapterError(f"{folder} is a '{kind}' adapter; only LORA, IA3 and ADALORA can be loaded")
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append(f"bias={config['bias']}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_CONVERTED):
        raise AdapterError(
            f"{folder} was trained with init_lora_weights={start}, which changed the base too; save it from PEFT with"
            " path_initial_model_for_weight_conversion=, which makes a plain LoRA of it"
        )
    if isinstance(start, str) and start not in _HARMLESS_STARTS:  # PEFT edits the base for these when it loads them
        used.append(f"init_lora_weights={start}")
    if used:
        raise AdapterError(f"{folder} uses {', '.join(used)}, which can't be loaded yet")
    try:
        options = {
            "r": int(config["r"]),
            "alpha": float(config["lora_alpha"]),
            "dropout": float(config.get("lora_dropout") or 0.0),
            "rslora": bool(config.get("use_rslora", False)),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG}: {type(error).__name__} at {error}") from None
    return "dora" if config.get("use_dora") else "lora", options


def method_of(folder: Path) -> str:
    """The method of a saved adapter, told without its tensors."""
    return settings_of(folder)[0]


def settings_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """An adapter's method and its settings, with targets and patterns as adapter_config.json has them."""
    config, own = read_config(folder), read_notes(folder)
    check_values(config, folder)
    named = {"targets": "target_modules", "whole": "modules_to_save"}
    named |= {"rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"}
    found = {ours: config[theirs] for ours, theirs in named.items() if config.get(theirs)}
    if own.get("new_tokens"):
        found["new_tokens"] = list(own["new_tokens"])
    if config.get("peft_type") == "ADALORA":  # loaded as a LoRA with a rank for each weight
        return "lora", found
    method, options = method_in(config, own, folder)
    return method, {**found, **options}


def _feedforward_of(config: Mapping[str, Any], folder: Path) -> list[str]:
    named = config.get("feedforward_modules") or []
    if not isinstance(named, list):
        raise AdapterError(f"{folder} uses feedforward_modules={named}, which can't be loaded yet")
    return [str(name) for name in named]


def options_for(path: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a site, by the patterns for its r and alpha."""
    own = dict(options)
    if "r" not in own:
        return own
    for key, option in (("rank_pattern", "r"), ("alpha_pattern", "alpha")):
        for pattern, value in (config.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                own[option] = value
                break
    return own


def promised(config: Mapping[str, Any], sites: Mapping[str, Site]) -> list[str]:
    """The sites that a list of target_modules means; a file that lacks one of them is incomplete. Experts' weights are
    parameters, not modules: those target_parameters names."""
    targets = config.get("target_modules")
    narrowed = ("layers_to_transform", "layers_pattern", "exclude_modules")
    if not isinstance(targets, list) or any(config.get(key) for key in narrowed):
        return []
    modules = [p for p, site in sites.items() if site.kind != "experts"]
    return [p for p in modules if any(p == t or p.endswith("." + t) for t in targets)]

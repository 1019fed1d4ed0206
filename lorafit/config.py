"""Settings: one dataclass, read from YAML and `key=value`, written back as YAML.

A setting is declared once, as a field below (or as a keyword argument of a method's class, passed in as `extra`); types,
checks, help and the YAML keys are derived from that. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lorafit.errors import ConfigError


def setting(default: Any, help: str, **bounds: float) -> Any:
    """A dataclass field with its help text and, if given, `low`/`high` bounds (inclusive)."""
    metadata = {"help": help, **bounds}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """Everything that decides a training run. `None` means: chosen from the data or the machine, and shown."""

    data: str = setting("", "file with examples: .jsonl .json .csv .parquet .txt")
    model: str = setting("smollm2", "Hugging Face folder or hub id; 'smollm2' is the embedded SmolLM2-135M-Instruct")
    out: str | None = setting(None, "run folder; default runs/<data>-<number>")
    held_out: str | None = setting(None, "file with held-out rows, instead of a split of the data")
    held_out_share: float = setting(
        0.05, "share of the rows held out (at least 8 rows, at most 500); 0 for none", low=0, high=0.5
    )

    learn: Literal["assistant", "completion", "all", "last"] = setting(
        "assistant", "which tokens are learned: every assistant turn, everything after the prompt, all, the last turn"
    )
    map: dict[str, str] = setting({}, "column names, e.g. user=question,assistant=answer")
    system: str | None = setting(None, "system prompt for conversations that have none")
    max_tokens: int | None = setting(None, "longest row in tokens; default: the model's context, at most 4096", low=8)
    long: Literal["error", "truncate", "skip"] = setting("error", "what to do with a row over max_tokens")
    skip_bad_rows: bool = setting(False, "leave out rows that can't be used (counted) instead of stopping")

    cache: bool = setting(
        True, "keep a large file's tokens in the user's cache folder, so that the next start is quick"
    )

    method: str = setting("lora", "how the weights are adapted; see `lorafit methods`")
    targets: list[str] = setting([], "sites to adapt: names, globs, attention, all-linear; default: the method's own")
    whole: list[str] = setting(
        [],
        "sites trained whole beside the method's: names, globs, such as embed_tokens,lm_head (PEFT's modules_to_save)",
    )
    new_tokens: list[str] = setting(
        [], "texts that become tokens of their own, with rows that are trained; or a file with one a line"
    )
    rank_pattern: dict[str, int] = setting({}, "another r for sites that match a name or glob")
    alpha_pattern: dict[str, float] = setting({}, "another alpha for sites that match a name or glob")
    start: str | None = setting(None, "run or adapter folder to start new training from (--from)")
    quant: Literal["none", "nf4", "fp4", "int8", "w8a8"] = setting(
        "none",
        "keep the frozen base's linear weights in 4 or 8 bits: a quarter or half of the memory, somewhat less exact; w8a8"
        " computes in 8 bits too, which is faster without AMX",
    )
    double_quant: bool = setting(True, "with nf4 and fp4: quantise their scales too, 4.13 bits a weight instead of 4.5")

    epochs: float = setting(3.0, "passes over the training rows; unset, more where that would be few steps", low=0)
    steps: int | None = setting(None, "optimiser steps, instead of epochs", low=1)
    lr: float | None = setting(
        None, "peak learning rate; default: by the model's width and the tokens of a step", low=0
    )
    schedule: Literal["constant", "linear", "cosine"] = setting("cosine", "how the learning rate falls after warm-up")
    warmup: float = setting(0.03, "share of the steps in which the learning rate rises", low=0, high=1)
    clip: float = setting(1.0, "largest gradient norm; 0 for none", low=0)
    weight_decay: float = setting(0.0, "AdamW weight decay", low=0)
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = setting(
        "adamw",
        "AdamW's state: in fp32; 8bit: in a quarter of that, nearly as exact; paged: where the system can take its memory"
        " back, the same result",
    )
    batch_tokens: int | None = setting(
        None,
        "tokens of an optimiser step; default: by the size of the data, four rows or more if they share most",
        low=1,
    )
    accumulate: int = setting(1, "micro-batches a step is split into; changes memory, not the result", low=1)
    seed: int = setting(0, "order of rows, split, initial weights, dropout", low=0)
    precision: Literal["auto", "bf16", "fp32"] = setting(
        "auto", "the base and the activations; adapters and optimiser stay fp32"
    )
    checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, slower")
    native: bool = setting(
        True,
        "fast paths: C++ kernels (compiled once, some seconds), on a GPU compiled layers; false: torch's operations alone",
    )
    share: bool = setting(
        True,
        "what rows of a step begin with alike (a system prompt) goes through the model once; false: once for each row",
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    memory: str | None = setting(
        None, "most memory to take, such as 6G (Linux; on CUDA the device's); default: what is left"
    )

    eval_every: int | None = setting(None, "steps between evaluations; default: eight a run", low=1)
    patience: int = setting(3, "stop after this many evaluations without improvement; 0 for never", low=0)
    checkpoint_every: int = setting(100, "steps between checkpoints (evaluations make one too)", low=1)
    samples: int = setting(2, "held-out prompts answered at each evaluation", low=0)
    log: Literal["none", "tensorboard"] = setting("none", "another place for the metrics")

    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": ""}
    )  # of the method; top-level keys in YAML
    given: frozenset[str] = frozenset()  # the settings that `build` was given a value for: advice leaves them alone


Extra = Mapping[str, tuple[Any, Any]]  # option name -> (type, default); a method's own settings


def defaults(cls: type = Config) -> dict[str, dataclasses.Field[Any]]:
    """The settings a user can write, by name."""
    return {f.name: f for f in dataclasses.fields(cls) if f.name not in ("options", "given")}


def choices(name: str) -> list[str]:
    """The words that a setting of words takes; none where it takes anything else."""
    hint = typing.get_type_hints(Config)[name]
    return [str(word) for word in typing.get_args(hint)] if typing.get_origin(hint) is Literal else []


# What other tools call our settings; a hint names ours.
_ELSEWHERE = {
    "learning_rate": "lr",
    "batch_size": "batch_tokens",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "rank": "r",
    "lora_r": "r",
    "target_r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "modules_to_save": "whole",
    "max_length": "max_tokens",
    "max_seq_length": "max_tokens",
    "gradient_accumulation_steps": "accumulate",
    "gradient_checkpointing": "checkpointing",
}


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint that ends an error message: the most similar known name, or all of them when none is similar."""
    elsewhere = [other for other, ours in _ELSEWHERE.items() if ours in known]
    close = difflib.get_close_matches(name, [*known, *elsewhere], n=1, cutoff=0.6)
    close = [_ELSEWHERE.get(close[0], close[0])] if close and close[0] not in known else close
    return f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(sorted(known))


def build(values: Mapping[str, Any], extra: Extra | None = None) -> Config:
    """A checked Config from plain values (YAML or text). Raises ConfigError naming the key."""
    extra = extra or {}
    known = defaults()
    hints = typing.get_type_hints(Config)
    config = Config()
    for key, value in values.items():
        if key in known:
            checked = coerce(key, hints[key], value)
            _bounds(key, checked, known[key].metadata)
            setattr(config, key, checked)
        elif key in extra:
            config.options[key] = coerce(key, extra[key][0], value)
        else:
            raise ConfigError(f"unknown setting '{key}'; {nearest(key, [*known, *extra])}")
    config.given = frozenset(
        key for key in values if (config.options if key in extra else vars(config))[key] is not None
    )
    for key, (_, default) in extra.items():
        config.options.setdefault(key, default)
    if config.memory is not None:
        byte_count("memory", config.memory)
    return config


def flat(config: Config) -> dict[str, Any]:
    """The settings as one flat mapping, the method's options beside the rest: what config.yaml holds."""
    values = {name: getattr(config, name) for name in defaults()}
    return {**values, **config.options}


def pairs(words: Sequence[str]) -> dict[str, str]:
    """`["lr=1e-4", "r=8"]` as a mapping. Raises ConfigError for a word without '='."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{word}' is not a setting; write key=value, for example lr=1e-4")
        found[key.strip().replace("-", "_")] = value
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError naming the file and the line."""
    try:
        with path.open(encoding="utf-8") as file:  # errors name a file where they would call a text "<unicode string>"
            node = yaml.compose(file, Loader=yaml.SafeLoader)
            if node is not None:
                _once(path, node)
            file.seek(0)
            values = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must hold settings as 'key: value' lines")
    return values


def _once(path: Path, node: yaml.Node) -> None:
    """ConfigError where settings, or what one of them holds, name a key twice: YAML's reader would keep the last one."""
    values = [value for _, value in node.value] if isinstance(node, yaml.MappingNode) else []
    for mapping in (one for one in (node, *values) if isinstance(one, yaml.MappingNode)):
        known: dict[str, int] = {}
        for key, _ in mapping.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in known:
                raise ConfigError(f"{path} has '{name}' in line {known[name]} and in line {line}; leave one out")
            known[name] = line


def to_yaml(config: Config) -> str:
    """The settings as YAML, every one written out."""
    return yaml.safe_dump(flat(config), sort_keys=False, allow_unicode=True)


def byte_count(key: str, text: str, least: float = 1e6) -> int:
    """`6G`, `500M`, `1.5 GB` in powers of 1000, `6GiB` in powers of 1024. Raises ConfigError naming the key, for less than
    `least` too: a letter was forgotten."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    if not found or (found[3] and not found[2]):
        raise ConfigError(f"{key}={text}: must be an amount of memory, for example {key}=6G or {key}=500M")
    amount = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " "))
    if not amount:
        raise ConfigError(f"{key}={text}: must be more than nothing, for example {key}=6G")
    if amount < least:
        raise ConfigError(f"{key}={text}: that is {amount} bytes; write {key}={found[1]}G or {key}={found[1]}M")
    return amount


def _bounds(key: str, value: Any, metadata: Mapping[str, Any]) -> None:
    low, high = metadata.get("low"), metadata.get("high")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if low is not None and value < low:
            raise ConfigError(f"{key}={value}: must be at least {low}")
        if high is not None and value > high:
            raise ConfigError(f"{key}={value}: must be at most {high}")


def coerce(key: str, kind: Any, value: Any) -> Any:
    """`value` (text from the command line, or what YAML made of it) as `kind`. Raises ConfigError naming the key."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "auto")):
            return None
        return coerce(key, next(a for a in args if a is not type(None)), value)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{key}={value}: must be one of {', '.join(map(str, args))}")
        return value
    if origin is list:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ConfigError(f"{key}={value}: must be a list, for example {key}=a,b")
        return [coerce(key, args[0], item.strip() if isinstance(item, str) else item) for item in items]
    if origin is dict:
        return _mapping(key, args[1], value)
    try:
        return _scalar(kind, value)
    except (TypeError, ValueError):
        name = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "text")
        raise ConfigError(f"{key}={value}: must be {name}") from None


def _mapping(key: str, kind: Any, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        items = [item.partition("=")[::2] for item in value.split(",") if item]
        if any(not name or not text for name, text in items):
            raise ConfigError(f"{key}={value}: must look like {key}=name=value,name=value")
        value = dict(items)
    if not isinstance(value, dict):
        raise ConfigError(f"{key}={value}: must be a mapping")
    return {str(name).strip(): coerce(f"{key}.{name}", kind, item) for name, item in value.items()}


def _scalar(kind: Any, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[_lower(value)]
    if kind is int:
        number = float(value)
        if isinstance(value, bool) or number != int(number):
            raise ValueError(value)
        return int(number)
    if kind is float:
        if isinstance(value, bool):
            raise ValueError(value)
        number = float(value)
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError(value)
        return number
    if kind is str:
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise TypeError(value)
        return str(value)
    raise AssertionError(f"no coercion for {kind}")


def _lower(value: Any) -> str:
    text = str(value).lower()
    if text not in ("true", "yes", "1", "false", "no", "0"):
        raise ValueError(value)
    return text

"""What is searched: settings by name, each with the values it may take.

lr: {low: 1.0e-5, high: 1.0e-2, log: true}    a range
r: [8, 16, 32]                                choices
targets: [attention, [q_proj, v_proj]]        each item is one choice
"""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.config import Config, coerce, defaults, nearest, read_yaml
from lorafit.errors import ConfigError
from lorafit.methods import METHODS, find
from lorafit.methods import settings as method_settings

Values = dict[str, Any]

# Settings that neither the base nor the rows depend on; beside them the methods' own.
SEARCHED = (
    "method", "targets", "rank_pattern", "alpha_pattern", "lr", "batch_tokens", "epochs", "steps", "schedule", "warmup",
    "clip", "weight_decay", "optimizer", "accumulate", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Range:
    """Numbers from low to high; `log`: evenly by their logarithm. `points`: how many a grid takes."""

    low: float
    high: float
    log: bool = False
    whole: bool = False
    points: int = 4

    def at(self, share: float) -> float | int:
        """The number at a share (0 to 1) of the way, in three digits."""
        value = self.low + (self.high - self.low) * share
        if self.log:
            value = self.low * (self.high / self.low) ** share
        return round(value) if self.whole else digits(value)

    def grid(self) -> list[float | int]:
        """So many numbers, evenly, the ends among them."""
        return list(dict.fromkeys(self.at(i / max(1, self.points - 1)) for i in range(self.points)))


@dataclass(frozen=True)
class Choice:
    """One of these values."""

    values: tuple[Any, ...]

    def grid(self) -> list[Any]:
        """All of them."""
        return list(self.values)


Space = Mapping[str, Range | Choice]


def digits(value: float) -> float:
    """In three digits, as settings are written."""
    return float(f"{value:.3g}")


def read(path: Path) -> Mapping[str, Any]:
    """The mapping in a space's file. ConfigError where there is none."""
    found = read_yaml(path)
    if not found:
        raise ConfigError(f"{path} searches nothing; write for example 'lr: {{low: 1.0e-5, high: 1.0e-3, log: true}}'")
    return found


def space(written: Mapping[str, Any], given: Mapping[str, Any]) -> Space:
    """A checked space. ConfigError for settings that are unknown, fixed by `given` or not to be searched, and for values that
    they can't take: all of them in one line."""
    kinds = _methods(written, given)
    own = {key: kind for name in kinds for key, (kind, _) in method_settings(find(name)).items()}
    hints = {key: kind for key, kind in typing.get_type_hints(Config).items() if key in SEARCHED} | own
    found: dict[str, Range | Choice] = {}
    wrong: list[str] = []
    for key, value in written.items():
        try:
            _may(key, list(hints), [*SEARCHED, *own], given)
            found[key] = _one(key, hints[key], value)
            if key == "lr":
                _positive(found[key])
        except ConfigError as error:
            wrong.append(str(error))
    if "steps" in found and "epochs" in {**found, **given}:
        wrong.append("steps and epochs both say how long; leave one out")
    if wrong:
        raise ConfigError("; and ".join(wrong))
    return found


def _may(key: str, known: Sequence[str], searched: Sequence[str], given: Mapping[str, Any]) -> None:
    """ConfigError where a setting can't be searched."""
    if key in defaults() and key not in SEARCHED:
        raise ConfigError(
            f"'{key}' can't be searched: the rows or the base depend on it; these can: {', '.join(searched)}"
        )
    if key not in known:
        raise ConfigError(f"unknown setting '{key}' in the space; {nearest(key, list(known))}")
    if key in given:
        raise ConfigError(f"{key} is set to {given[key]} and searched; leave one out")
    if key == "seed" and "held_out" not in given:
        raise ConfigError("seed decides which rows are held out; give them with --held-out to search it")


def _methods(written: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """The methods that candidates may have."""
    named = written.get("method", given.get("method", Config().method))
    names = [str(name) for name in (named if isinstance(named, list) else [named])]
    for name in names:
        find(name)
    return names


def _one(key: str, kind: Any, value: Any) -> Range | Choice:
    if isinstance(value, dict) and typing.get_origin(kind) is not dict:
        return _range(key, kind, value)
    if not isinstance(value, list):
        wide = " or {low: ..., high: ...}" if _kinds(kind) in ([int], [float]) else ""
        raise ConfigError(
            f"{key} has one value in the space, {value}; write a list, {key}: [{value}, ...]{wide}, or set it for all"
            f" candidates with {key}=VALUE"
        )
    items = value
    if not items:
        raise ConfigError(f"{key} has no values in the space; give some, for example {key}: [1, 2]")
    found: list[Any] = []
    for item in items:
        checked = coerce(key, kind, item)
        if checked not in found:
            found.append(checked)
    return Choice(tuple(found))


def _positive(rates: Range | Choice) -> None:
    if any(rate == 0 for rate in ((rates.low,) if isinstance(rates, Range) else rates.values)):
        raise ConfigError("lr=0 in the space trains nothing; leave it out, or begin the range above 0")


def _range(key: str, kind: Any, value: Mapping[str, Any]) -> Range:
    known = {"low": float, "high": float, "log": bool, "points": int}
    for name in value:
        if name not in known:
            raise ConfigError(f"{key}.{name} in the space is unknown; {nearest(name, list(known))}")
    if missing := {"low", "high"} - value.keys():
        raise ConfigError(f"{key} in the space has no {min(missing)}; a range is {{low: ..., high: ..., log: true}}")
    plain = _kinds(kind)
    if plain not in ([int], [float]):
        raise ConfigError(f"{key} takes no range; list its values: {key}: [...]")
    made = {name: coerce(f"{key}.{name}", known[name], item) for name, item in value.items()}
    for end in ("low", "high"):
        coerce(f"{key}.{end}", kind, value[end])
    if not made["low"] < made["high"] or (made.get("log") and made["low"] <= 0):
        what = "above 0 and below high, for log: true" if made.get("log") else "below high"
        raise ConfigError(f"{key}: low={made['low']:g} and high={made['high']:g}; low must be {what}")
    if made.get("points", 2) < 2:
        raise ConfigError(f"{key}.points={made['points']}: must be at least 2")
    return Range(**made, whole=plain == [int])


def _kinds(kind: Any) -> list[Any]:
    """What a setting may be, beside None."""
    return [each for each in (typing.get_args(kind) or (kind,)) if each is not type(None)]


def settled(values: Mapping[str, Any], given: Mapping[str, Any]) -> Values:
    """A candidate's settings: `given` with the searched `values`, without those that its method doesn't have."""
    whole = {**given, **values}
    if "steps" in values:
        whole.pop("epochs", None)
    if "epochs" in values:
        whole.pop("steps", None)
    kept = own({"method": Config().method, **whole})
    return {key: value for key, value in whole.items() if key not in values or key in kept}


def own(values: Mapping[str, Any]) -> Values:
    """Without settings that the method among them doesn't have."""
    if "method" not in values:
        return dict(values)
    known = method_settings(find(str(values["method"])))
    others = {key for kind in METHODS.values() for key in method_settings(kind)} - known.keys()
    return {key: value for key, value in values.items() if key not in others}


def alike(values: Mapping[str, Any], start: Mapping[str, Any]) -> Values:
    """What is equal for two candidates that are the same: what they change, and what they leave as it is."""
    return own({**start, **values})


def distinct(all_of_them: Iterable[Values]) -> list[Values]:
    """Those that aren't there before already, in their order."""
    found: dict[str, Values] = {}
    for values in all_of_them:
        found.setdefault(json.dumps(values, sort_keys=True), values)
    return list(found.values())


def edges(searched: Space) -> Iterator[tuple[str, Any]]:
    """Each setting with each of its choices, or the ends of its range: what can be tried before anything is trained."""
    for key, one in searched.items():
        for value in one.values if isinstance(one, Choice) else (one.at(0), one.at(1)):
            yield key, value


def nearly(one: float, other: float) -> bool:
    """Whether two rates are within a fifth of each other: trying both tells nothing."""
    return one > 0 and other > 0 and abs(math.log(one / other)) < math.log(1.2)

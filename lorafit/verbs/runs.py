"""`lorafit runs`."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafit.files import at_work, load_json, read_json, unfinished_search
from lorafit.verbs.common import add_json, print_json

ABOUT = "list runs by data file, each file's best first; or compare the settings and results of two"
EXAMPLE = """\
  lorafit runs
  lorafit runs runs/a-1 runs/a-2"""


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="two runs to compare; or folders that hold runs")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """List or compare."""
    from lorafit.log import table, terminal_columns

    places = [Path(p) for p in args.runs]
    if len(places) == 2 and all((p / "config.yaml").is_file() for p in places):
        _compare(places, args.json)
        return
    single = [p for p in places if _is_run(p)]
    folders = single + [c for p in (places or [Path("runs")]) for c in sorted(p.glob("*")) if _is_run(c)]
    if not folders:
        from lorafit.errors import RunError

        raise RunError(f"no runs in {', '.join(map(str, places)) or 'runs/'}; make one with: lorafit train DATA")
    found = []
    for folder in folders:
        (config, config_bad), (summary, summary_bad) = _read(folder, _settings), _read(folder, _summary)
        if damaged := config_bad or summary_bad:
            summary |= {"damaged": damaged, "stopped": "damaged"}
        if process := at_work(folder / "tune"):
            summary |= {"stopped": f"search going on (process {process})"}
        elif unfinished_search(folder):
            go_on = shlex.join(["lorafit", "tune", "--resume", "--out", str(folder)])
            summary |= {"stopped": "search not finished", "go_on": go_on}
        elif process := at_work(folder):
            summary |= {"stopped": f"going on (process {process})"}
        found.append(
            {
                "run": str(folder),
                "data": Path(str(config.get("data", "?"))).name,
                "base": config.get("model"),
                "method": config.get("method"),
                "quant": config.get("quant", "none"),
                **summary,
            }
        )
    found.sort(key=lambda r: (r["data"], _order(r.get("held_out_loss_after"))))
    if args.json:
        print_json(found)
        return
    coded = any(r["quant"] != "none" for r in found)  # else every base is in its own type, which needn't be said
    rows = [
        [
            r["run"], r["data"], str(r["base"] or ""), *([str(r["quant"])] if coded else []), str(r["method"] or ""),
            _loss(r.get("held_out_loss_before")), _loss(r.get("held_out_loss_after")),
            *(_shown(key, r.get(key)) for key in ("trainable_parameters", "adapter_bytes", "seconds")),
            r.get("stopped", "not finished"),
        ]
        for r in found
    ]  # fmt: skip
    print(
        table(
            [
                *("run", "data", "base", *(["quant"] if coded else [])),
                *("method", "before", "best", "trainable", "size", "took", "stopped"),
            ],
            rows,
            "lllll"[not coded :] + "rrrrrl",
            fit=terminal_columns(),
        )
    )
    for damaged in [r["damaged"] for r in found if "damaged" in r]:
        print(f"\n{damaged}")
    if waiting := [r["go_on"] for r in found if "go_on" in r]:
        print("\n".join(["", "a search that isn't running any more goes on with:", *(f"  {line}" for line in waiting)]))


def _read(folder: Path, what: Callable[[Path], dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """What is in a run's file; nothing, and why, where it is damaged: the other runs are listed all the same."""
    from lorafit.errors import LorafitError

    try:
        return what(folder), ""
    except LorafitError as error:
        return {}, str(error)


def _summary(folder: Path) -> dict[str, Any]:
    """A run's results; {} where there are none yet. RunError where they are damaged."""
    from lorafit.errors import RunError

    found = load_json(folder / "summary.json", RunError) or {}
    for key, kind in _KINDS.items():
        value = found.get(key)
        if isinstance(value, bool) or not isinstance(value, kind | None):
            raise RunError(f"{folder / 'summary.json'} is damaged: {key} is {str(value)[:40]!r}")
    return found


def _order(loss: float | None) -> float:
    """The best first, then those without a loss."""
    return math.inf if loss is None or math.isnan(loss) else loss


_KINDS: dict[str, Any] = {  # of what the list shows
    **dict.fromkeys(("held_out_loss_before", "held_out_loss_after", "seconds"), int | float),
    **dict.fromkeys(("trainable_parameters", "adapter_bytes"), int),
    "stopped": str,
    "seconds_of": dict,
}


def _is_run(folder: Path) -> bool:
    """Of a training, or of a search, which has no settings of its own before its last phase."""
    return (folder / "config.yaml").is_file() or unfinished_search(folder)


def _settings(folder: Path) -> dict[str, Any]:
    """As far as they are known: of a search, what was asked for."""
    from lorafit import config as settings

    if (folder / "config.yaml").is_file():
        return settings.read_yaml(folder / "config.yaml")
    asked = read_json(folder / "tune" / "search.json").get("settings")
    return asked if isinstance(asked, dict) else {}


def _compare(folders: list[Path], as_json: bool) -> None:
    from lorafit import config as settings
    from lorafit.log import table, terminal_columns

    both = []
    for folder in folders:
        both.append({**settings.read_yaml(folder / "config.yaml"), **_summary(folder)})
    keys = [k for k in dict.fromkeys([*both[0], *both[1]]) if both[0].get(k) != both[1].get(k) and k != "out"]
    if as_json:
        print_json({"runs": [str(f) for f in folders], "different": {k: [b.get(k) for b in both] for k in keys}})
        return
    rows = [[_WORDS.get(k, k), *(_shown(k, b.get(k)) for b in both)] for k in keys]
    print(table(["", *map(str, folders)], rows, "lll", fit=terminal_columns()))


# Results in words; settings keep the names that they are given by.
_WORDS = {
    "base_path": "base's folder",
    "base_fingerprint": "base's fingerprint",
    "held_out_loss_before": "held-out loss before training",
    "held_out_loss_after": "held-out loss at the best step",
    "best_step": "best step",
    "seconds": "time",
    "seconds_of": "time by part",
    "tokens_per_second": "tokens per second",
    "peak_rss_bytes": "peak memory",
    "peak_gpu_bytes": "peak memory of the GPU",
    "planned_peak_bytes": "peak memory, as expected",
    "trainable_parameters": "trained numbers",
    "total_parameters": "all numbers",
    "adapter_bytes": "adapter's size",
    "base_bytes": "base's size",
    "train_rows": "training rows",
    "held_out_rows": "held-out rows",
}


def _shown(key: str, value: Any) -> str:
    """A setting or a result as the list of runs would show it."""
    from lorafit.log import count, duration, size
    from lorafit.verbs.train import split_of

    if key == "seconds_of":
        return split_of(value)
    if value is None or isinstance(value, bool | str) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if key.endswith("_bytes"):
        return size(value)
    if key == "seconds":
        return duration(value)
    return count(value) if isinstance(value, int) else f"{value:.4g}"


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"

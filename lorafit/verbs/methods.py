"""`lorafit methods`."""

from __future__ import annotations

import argparse
from typing import Any

from lorafit.verbs.common import add_json, importing, print_json, terminal

ABOUT = "the ways of adapting a weight, with their settings"
EXAMPLE = """\
  lorafit methods
  lorafit methods --model DIR"""


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.add_argument(
        "--model", metavar="M", help="count what each trains of this folder, hub id, GGUF file or 'smollm2', by default"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Print the registry."""
    with importing():
        from lorafit.log import table
        from lorafit.methods import METHODS

    trained = _trained(args.model) if args.model else {}
    found = [{**_described(name), **({"trainable": trained[name]} if trained else {})} for name in METHODS]
    if args.json:
        print_json(found)
        return
    rows = [[str(m["method"]), str(m["about"]), str(m["paper"]) or "-"] for m in found]
    print(table(["method", "what", "arXiv"], rows, "lll"))
    rows = [
        [
            str(m["method"]),
            *([_count(m["trainable"])] if trained else []),
            " ".join(f"{key}={_shown(value)}" for key, value in m["settings"].items()) or "-",
            ",".join(m["targets"]),
            ",".join(m["kinds"]),
            str(m["quant"]),
            str(m["peft"]),
        ]
        for m in found
    ]
    heads = ["method", *(["trained"] if trained else []), "settings", "targets", "kinds", "quant", "stored as"]
    print()
    print(table(heads, rows, "l" + "r" * bool(trained) + "lllll"))
    print("\nall go through mixed batches, stacks and merging; docs/methods.md has formulas and when to use which")


def _described(name: str) -> dict[str, Any]:
    """A method as --json has it. `quant`: whether the base may be quantised; `peft`: PEFT's type that it is stored as."""
    from lorafit.methods import METHODS, settings
    from lorafit.peft_files import peft_type

    kind = METHODS[name]
    own = {key: default for key, (_, default) in settings(kind).items()}
    return {
        "method": name,
        "about": kind.about,
        "paper": kind.paper,
        "kinds": sorted(kind.kinds),
        "targets": list(kind.targets),
        "settings": own,
        "dropout": "dropout" in own,
        "quant": "needed" if kind.needs_codes else "own codes" if kind.codes else "yes",
        "peft": peft_type(kind) or "own format",
    }


def _trained(model: str) -> dict[str, int | None]:
    """Numbers that each method trains of a model with its default settings; None where its targets aren't there."""
    from lorafit.config import Config
    from lorafit.errors import AdapterError, ConfigError
    from lorafit.methods import METHODS, settings
    from lorafit.model.load import locate
    from lorafit.plan import empty

    found: dict[str, int | None] = {}
    with terminal().working("looking at the model") as spinner:
        path = locate(model, spinner.rename, False)
        for name, kind in METHODS.items():
            options = {key: default for key, (_, default) in settings(kind).items()}
            try:
                found[name] = empty(Config(method=name, options=options), path).numbers
            except (AdapterError, ConfigError):
                found[name] = None
    return found


def _count(number: int | None) -> str:
    from lorafit.log import count

    return "-" if number is None else count(number)


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)

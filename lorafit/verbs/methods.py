"""`lorafit methods`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from lorafit.verbs.common import add_json, importing, print_json, terminal

ABOUT = "the ways of adapting a weight, with their settings"
EXAMPLE = """\
  lorafit methods
  lorafit methods dora
  lorafit methods --model DIR"""

PAGE = "docs/methods.md"


def page_of(name: str) -> str:
    """The document of one method."""
    return f"docs/methods/{name.replace('+', '-plus')}.md"


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.add_argument("method", nargs="?", metavar="METHOD", help="this one alone, with all that is known of it")
    parser.add_argument(
        "--model", metavar="M", help="count what each trains of this folder, hub id, GGUF file or 'smollm2', by default"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Print the registry, or one method of it."""
    with importing():
        from lorafit.log import table
        from lorafit.methods import METHODS, find

    if args.method is not None:
        find(args.method)
    names = [args.method] if args.method is not None else list(METHODS)
    trained = _trained(args.model, names) if args.model else {}
    found = [{**described(name), **({"trainable": trained[name]} if trained else {})} for name in names]
    if args.json:
        print_json(found if args.method is None else found[0])
        return
    if args.method is not None:
        print(_page(found[0]))
        return
    rows = [[str(m["method"]), str(m["about"]), str(m["paper"]) or "-"] for m in found]
    print(table(["method", "what", "arXiv"], rows, "lll"))
    rows = [
        [
            str(m["method"]),
            *([_count(m["trainable"])] if trained else []),
            " ".join(f"{key}={shown(value)}" for key, value in m["settings"].items()) or "-",
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
    print(
        f"\nall go through mixed batches, stacks and merging; {PAGE} has when to use which, lorafit methods NAME one alone"
    )


def _page(m: dict[str, Any]) -> str:
    """A method in lines."""
    lines = [
        (m["method"], m["about"]),
        ("adds to W", m["formula"] or "-"),
        ("paper", f"https://arxiv.org/abs/{m['paper']}" if m["paper"] else "-"),
        ("more", f"{page_of(m['method'])}: when to use it, and its trap"),
        ("settings", " ".join(f"{key}={shown(value)}" for key, value in m["settings"].items()) or "-"),
        ("trained", f"{_count(m['trainable'])} numbers of that model" if "trainable" in m else ""),
        ("targets", f"{','.join(m['targets'])} unless others are named; kinds that it takes: {', '.join(m['kinds'])}"),
        ("goes with", "mixed batches, stacks, resuming, whole=, new_tokens=, " + _QUANT[m["quant"]]),
        ("not with", ", ".join([*m["not_kinds"], *([] if m["dropout"] else ["dropout"])])),
        ("combine", "all ways; cat and linear are exact" if m["low_rank"] else "svd, ties, dare: it has no exact sum"),
        ("stored as", m["peft"] if m["peft"] == "own format" else f"PEFT {m['peft']}"),
        ("export", ", ".join(m["formats"]) + ("; with new_tokens= not peft" if m["peft"] == "IA3" else "")),
    ]
    wide = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{wide}}  {text}" for label, text in lines if text)


_QUANT = {
    "yes": "a quantised base",
    "needed": "a quantised base, which it needs",
    "own codes": "a quantised base in codes of its own",
}


def described(name: str) -> dict[str, Any]:
    """A method as --json has it. `quant`: whether the base may be quantised; `peft`: PEFT's type that it is stored as;
    `formats`: what it can be exported to."""
    from lorafit.export import FORMATS, MERGED
    from lorafit.methods import METHODS, Method, settings
    from lorafit.peft_files import peft_type

    kind = METHODS[name]
    own = {key: default for key, (_, default) in settings(kind).items()}
    stored, low = peft_type(kind), kind.factors is not Method.factors
    return {
        "method": name,
        "about": kind.about,
        "formula": kind.formula,
        "paper": kind.paper,
        "kinds": sorted(kind.kinds),
        "not_kinds": sorted(Method.kinds - kind.kinds),
        "targets": list(kind.targets),
        "settings": own,
        "dropout": "dropout" in own,
        "quant": "needed" if kind.needs_codes else "own codes" if kind.codes else "yes",
        "peft": stored or "own format",
        "low_rank": low,
        "formats": list(FORMATS) if low else [*(["peft"] if stored else []), *MERGED],
    }


def _trained(model: str, names: Sequence[str]) -> dict[str, int | None]:
    """Numbers that each of these methods trains of a model with its default settings; None where its targets aren't there."""
    from lorafit.config import Config
    from lorafit.errors import AdapterError, ConfigError
    from lorafit.methods import METHODS, settings
    from lorafit.model.load import locate
    from lorafit.plan import empty

    found: dict[str, int | None] = {}
    with terminal().working("looking at the model") as spinner:
        path = locate(model, spinner.rename, False)
        for name in names:
            options = {key: default for key, (_, default) in settings(METHODS[name]).items()}
            try:
                found[name] = empty(Config(method=name, options=options), path).numbers
            except (AdapterError, ConfigError):
                found[name] = None
    return found


def _count(number: int | None) -> str:
    from lorafit.log import count

    return "-" if number is None else count(number)


def shown(value: Any) -> str:
    """A setting's value as it is written."""
    return ",".join(value) if isinstance(value, list) else str(value)

"""`lorafit methods`."""

from __future__ import annotations

import argparse

from lorafit.verbs.common import add_json, print_json

ABOUT = "the ways of adapting a weight, with their settings"
EXAMPLE = """\
  lorafit methods"""


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Print the registry."""
    from lorafit.log import table
    from lorafit.methods import METHODS, settings

    found = [
        {
            "method": name,
            "about": kind.about,
            "kinds": sorted(kind.kinds),
            "settings": {key: default for key, (_, default) in settings(kind).items()},
        }
        for name, kind in METHODS.items()
    ]
    if args.json:
        print_json(found)
        return
    rows = [
        [str(m["method"]), " ".join(f"{k}={v}" for k, v in m["settings"].items()) or "-", str(m["about"])]  # type: ignore[attr-defined]
        for m in found
    ]
    print(table(["method", "settings", "what"], rows, "lll"))

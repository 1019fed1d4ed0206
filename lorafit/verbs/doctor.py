"""`lorafit doctor`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorafit.verbs.common import add_json, print_json

ABOUT = "what is wrong with a run, finished or not, and which setting to change; told from its files alone"
EXAMPLE = """\
  lorafit doctor runs/data-1
  lorafit doctor runs/data-1 --json"""


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.add_argument("run", metavar="RUN", help="a run folder")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Print the findings, the worst first; exit 2 through RunError if one of them is a fault."""
    from lorafit.doctor import examine, verdict
    from lorafit.errors import RunError
    from lorafit.log import many

    folder = Path(args.run)
    found = examine(folder)
    line = verdict(folder, found)
    if args.json:
        print_json({"run": str(folder), "verdict": line, "findings": [finding.to_json() for finding in found]})
    else:
        print(f"{folder}\n{line}")
        for finding in found:
            print(f"\n{finding.level:<8} {finding.what}\n         {finding.evidence}")
            if finding.do:
                print(f"         {'so' if finding.command else 'do'}: {finding.do}")
            if finding.command:
                print(f"         {finding.command}")
    levels = [finding.level for finding in found]
    if "fault" in levels:
        counted = [(levels.count(level), level) for level in ("fault", "warning") if level in levels]
        raise RunError(f"{folder}: " + ", ".join(many(n, level) for n, level in counted))

"""Every table of docs/speed.md in one sitting.

    python benchmarks/all.py --data FILE --out results.json --write docs/speed.md docs/zh/speed.md
    python benchmarks/all.py --from results.json --write docs/speed.md     the pages again, nothing measured

Takes about two hours on two cores; keep the machine idle. Each part is saved when it is done: started again with the
same --out, it goes on with the parts that are missing. PEFT and TRL must be there: pip install 'lorafit[bench]'.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lorafit.bench import cases, tables
from lorafit.log import Terminal

PARTS = {
    "trained": ["speed", "memory", "loss"],
    "cases": ["cases"],
    "limit": ["limit"],
    "profile": ["profile"],
    "start": ["start"],
}
BEGIN, END = "<!-- tables: begin; benchmarks/all.py --write replaces what follows -->", "<!-- tables: end -->"


def measure(settings: cases.Settings, out: Path) -> dict[str, Any]:
    """All parts that `out` doesn't hold yet, added to what it holds."""
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    for part, names in PARTS.items():
        if part in found:
            continue
        settings.cases = names
        new = cases.run(settings, Terminal())
        asked = [*found.get("settings", {}).get("cases", []), *names]
        found = {**found, **new, "settings": {**new["settings"], "cases": asked}}
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def write(page: Path, found: dict[str, Any]) -> None:
    """Put the tables between a page's markers."""
    body = "\n\n".join([*(table.markdown() for table in tables.tables(found)), tables.method(found)])
    tables.put(page, BEGIN, body, END)


def main() -> None:
    """Measure or read, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="rows to train on; default: documents of Alpaca-like lengths")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few rows and peers, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path("results.json"), metavar="FILE")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="results measured before")
    parser.add_argument("--write", type=Path, nargs="*", default=[], metavar="PAGE")
    args = parser.parse_args()
    if args.source:
        found = json.loads(args.source.read_text(encoding="utf-8"))
    else:
        given = {"model": args.model, "data": args.data, "repeats": args.repeats}
        settings = cases.quick(**given) if args.quick else cases.Settings(**given, rows=args.rows)
        found = measure(settings, args.out)
    for table in tables.tables(found):
        print(table.text() + "\n")
    print(tables.method(found))
    for page in args.write:
        write(page, found)


if __name__ == "__main__":
    main()

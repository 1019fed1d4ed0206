"""`lorafit tune`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lorafit.verbs.common import add_base, add_json, add_rows, asked, importing, print_json, terminal

ABOUT = "find good settings: many adapters trained at once over one base, weak ones cut early, the best one kept"
EXAMPLE = """\
  lorafit tune data.jsonl --out runs/tuned
  lorafit tune data.jsonl --out runs/tuned --budget 30m --model DIR epochs=2
  lorafit tune data.jsonl --out runs/tuned --search random --space space.yaml --budget 32
  lorafit tune --resume --out runs/tuned       go on after a stop or a kill"""


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments. What key=value sets is the same for all candidates."""
    parser.add_argument("source", nargs="?", metavar="DATA|CONFIG.yaml", help="rows, or settings that all share")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="a setting that all candidates share")
    add_base(parser)
    parser.add_argument("--out", metavar="RUN", help="run folder; default runs/<data>-<number>")
    add_rows(parser)
    parser.add_argument("--budget", metavar="8|30m", help="candidates, or time (s, m, h); default 8")
    parser.add_argument(
        "--objective", default="loss", metavar="loss|token_f1|exact_match", help="what decides among the best"
    )
    parser.add_argument(
        "--search", default="staged", metavar="staged|grid|random|tpe", help="how candidates are chosen"
    )
    parser.add_argument("--space", metavar="FILE.yaml", help="which settings are searched, and where")
    parser.add_argument("--together", type=int, metavar="N", help="most adapters at once; default: what memory allows")
    parser.add_argument(
        "--workers",
        default=None,
        metavar="local:N|ray://…",
        help="train in other processes, here or of a Ray cluster, each with its own base",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the search in --out")
    parser.add_argument(
        "--from", dest="start", help=argparse.SUPPRESS
    )  # which train has: it is said what there is here
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Search, then say what came of it."""
    from lorafit.config import build, defaults
    from lorafit.errors import ConfigError
    from lorafit.files import need_data
    from lorafit.log import terminal_columns

    source, found = asked(args, "tune", "tune")
    if args.start is not None:
        raise ConfigError(
            "a search has no --from: its candidates start from fresh adapters; --resume --out RUN goes on with a search, and"
            f" lorafit train DATA --from {args.start} starts one training from an adapter"
        )
    if args.resume and (source is not None or set(found) > {"out"} or _asked(args)):
        raise ConfigError("--resume goes on with the search as it is; give it --out RUN alone, or --workers")
    build({key: value for key, value in found.items() if key in defaults()})
    if source is not None:
        need_data(source)
    if source is None and not args.resume and "data" not in found:
        raise ConfigError("no data; give a file: lorafit tune DATA, or --resume --out RUN")

    with importing():
        from lorafit.tune import space, study
        from lorafit.tune.options import Options

    out = terminal()
    if args.resume:
        made = study.resume(found["out"], out, args.workers)
    else:
        searched = space.read(Path(args.space)) if args.space else None
        options = Options(args.search, args.budget, args.objective, args.together, searched, args.workers or "none")
        made = study.tune(source, found, options, out)
    table = json.loads((made.folder / "tune.json").read_text(encoding="utf-8"))
    summary = json.loads((made.folder / "summary.json").read_text(encoding="utf-8"))
    if args.json:
        print_json({"run": str(made.folder), **summary, "tune": table})
    else:
        print(described(str(made.folder), summary, table, terminal_columns()))


def _asked(args: argparse.Namespace) -> bool:
    """Whether the command line says how to search."""
    plain = args.objective == "loss" and args.search == "staged"
    return not plain or any((args.budget, args.space, args.together))


def described(run: str, summary: dict[str, Any], found: dict[str, Any], columns: int | None = None) -> str:
    """A finished search in lines for people: what was tried, in a table of so many `columns`, and the run that the winner is."""
    from lorafit import tried
    from lorafit.log import duration, table
    from lorafit.verbs import train

    heads = [head.lower() for head in tried.heads(found)]
    lines = [
        table(heads, tried.rows(found), "ll" + "r" * (len(heads) - 3) + "l", fit=columns),
        "",
        f"the work of {found['trainings']:.1f} trainings for {len(found['candidates'])} candidates, in"
        f" {duration(found['seconds'])}",
        *filter(None, [tried.budget(found)]),
        f"winner         {tried.winner(found)}",
        train.described(run, summary),
        f"  lorafit train {run}/config.yaml --out OTHER    the winner alone (in bf16 it differs by rounding)",
    ]
    return "\n".join(lines)

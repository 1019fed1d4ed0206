"""`lorafit bench`."""

from __future__ import annotations

import argparse

from lorafit.config import choices
from lorafit.verbs.common import add_base, add_json, print_json, terminal

ABOUT = "compare training with PEFT and TRL, and with the limit of this machine"
EXAMPLE = """\
  lorafit bench --quick
  lorafit bench --data data.jsonl --model DIR
  lorafit bench --cases limit,profile      without PEFT and TRL"""


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.add_argument("--quick", action="store_true", help="few rows and peers: minutes instead of an hour or more")
    parser.add_argument(
        "--cases", metavar="A,B", help="some of speed,memory,loss,cases,limit,profile,start; default: all of them"
    )
    add_base(parser)
    parser.add_argument("--data", metavar="DATA", help="rows to train on; default: documents of Alpaca-like lengths")
    parser.add_argument("--rows", type=int, metavar="N", help="rows to train on, 8 a step; default 96")
    parser.add_argument("--held-out", type=int, metavar="N", help="last rows, to score on; default 100")
    parser.add_argument("--repeats", type=int, metavar="N", help="runs of every side; default 3")
    parser.add_argument("--peers", metavar="A,B", help="trainer, script, trl, trlpack, kbit; each also as NAME+tuned")
    parser.add_argument("--grid", metavar="A,B", help="only these rows of the table of cases")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], help="of the base; default auto")
    parser.add_argument("--quant", choices=choices("quant"), help="how both sides store the base (bitsandbytes' there)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="rows are cut here on both sides; default 512")
    parser.add_argument(
        "--no-share",
        action="store_true",
        help="our side too takes what rows of a step begin with alike once for each row",
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="our side too with it, as kbit is; trainer is without"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Measure, then print the tables."""
    from lorafit.bench import cases, tables

    names = ("model", "data", "rows", "held_out", "repeats", "precision", "max_tokens", "quant")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    for name in ("cases", "peers", "grid"):
        if (value := getattr(args, name)) is not None:
            given[name] = [word.strip() for word in value.split(",")]
    if args.no_share:
        given["share"] = False
    if args.checkpointing:
        given["checkpointing"] = True
    settings = cases.quick(**given) if args.quick else cases.Settings(**given)
    found = cases.run(settings, terminal())
    if args.json:
        print_json(found)
        return
    for made in tables.tables(found):
        print(made.text() + "\n")
    print(tables.method(found))

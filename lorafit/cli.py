"""The command line: declares the verbs, turns errors into one line and an exit code. No logic of its own."""

from __future__ import annotations

import argparse
import io
import os
import sys

from lorafit import __version__
from lorafit.errors import ConfigError, LorafitError
from lorafit.verbs import (
    adapter,
    advise,
    bench,
    chat,
    check,
    demo,
    doctor,
    eval_,
    export,
    merge,
    methods,
    plan,
    runs,
    train,
    tune,
)

VERBS = {
    "demo": demo,
    "check": check,
    "plan": plan,
    "advise": advise,
    "train": train,
    "tune": tune,
    "doctor": doctor,
    "eval": eval_,
    "chat": chat,
    "merge": merge,
    "adapter": adapter,
    "export": export,
    "runs": runs,
    "methods": methods,
    "bench": bench,
}

START = """\
start here:
  lorafit check data.jsonl                  what is in the file, and what is wrong with it
  lorafit train data.jsonl                  fit an adapter to the embedded model (or --model DIR)
  lorafit chat runs/data-1 --compare        talk to it, beside the base

every verb has --help with an example; a bare `lorafit demo` shows the whole way on data of its own"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    whole = argparse.ArgumentParser(
        prog="lorafit",
        description="Fit low-rank adapters to a frozen language model, on the machine you have.",
        epilog=START,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"lorafit {__version__}")
    verbs = whole.add_subparsers(dest="verb", metavar="VERB")
    for name, module in VERBS.items():
        about, example = module.ABOUT, module.EXAMPLE
        sub = verbs.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"example:\n{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add(sub)
    return whole


def _take(args: argparse.Namespace, rest: list[str]) -> None:
    """key=value words may stand anywhere among the options, which argparse alone can't read."""
    for word in rest:
        if "=" not in word or word.startswith("-") or not hasattr(args, "settings"):
            hint = f"; settings are written {word.lstrip('-')}=VALUE" if hasattr(args, "settings") else ""
            raise ConfigError(
                f"unknown argument '{word}'{hint}; see lorafit {args.verb + ' ' if args.verb else ''}--help"
            )
    if rest:
        args.settings = [*args.settings, *rest]


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 2 for the user's mistake, 1 for ours, 130 when interrupted; a verb may
    end with one of its own."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that can't show a character shows another one
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    whole = parser()
    args, rest = whole.parse_known_args(arguments)
    if args.verb is None and not rest:
        whole.print_help()
        return 0
    try:
        _take(args, rest)
        code: int | None = VERBS[args.verb].run(args)
    except LorafitError as error:
        print(f"lorafit: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("lorafit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `lorafit … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code or 0

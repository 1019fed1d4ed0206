"""`lorafit eval`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lorafit.verbs.common import add_json, add_model, importing, opened, print_json, terminal

if TYPE_CHECKING:
    from pathlib import Path

    from lorafit.data import Chat, Dataset, Tokens

SAME = 0.01  # of a loss: a smaller difference is none

ABOUT = "score adapters on a data file, beside their base"
EXAMPLE = """\
  lorafit eval runs/mine test.jsonl
  lorafit eval runs/mine runs/other data.jsonl --unseen
  lorafit eval runs/mine runs/other test.jsonl --answers --json
  lorafit eval runs/mine runs/other test.jsonl --stack
  lorafit eval base test.jsonl --model DIR"""


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs or adapter folders, or 'base'")
    parser.add_argument("data", metavar="DATA")
    add_model(parser)
    parser.add_argument(
        "--learn", choices=["assistant", "completion", "all", "last"], help="which tokens count; default: as trained"
    )
    parser.add_argument("--map", metavar="user=COL,assistant=COL", help="which columns hold what")
    parser.add_argument("--answers", action="store_true", help="also generate answers: exact match and token F1")
    parser.add_argument("--stack", action="store_true", help="also all of them at once: their deltas are added")
    parser.add_argument("--max-new", type=int, default=128, metavar="N", help="longest generated answer, in tokens")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="rows over this are left out and counted; default: the context"
    )
    parser.add_argument(
        "--unseen",
        action="store_true",
        help="only rows that none of the runs learned from: what they held out, or new ones",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    parser.add_argument(
        "--skip-bad-rows", action="store_true", help="leave out rows that can't be used, and count them"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Score the base and each adapter, with the chat it was trained with."""
    from lorafit.config import coerce
    from lorafit.errors import ConfigError, LorafitError
    from lorafit.log import count, table
    from lorafit.machine import memory_limit

    with importing():
        from lorafit import evaluate
        from lorafit.data import prepare

    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit {args.limit}: must be at least 1")
    _check_data(args.data)
    out = terminal()
    session = opened(args, out)
    host = session.host
    result: dict[str, Any] = {
        "data": args.data,
        "base": host.base.name,
        "quant": str(host.base.quant or "none"),
        "scores": {},
        "trained_on": {},
    }
    first = next(iter(host.adapters), None)
    asked: dict[str, str] = {}  # the key in `sets` of each that is scored
    sets: dict[str, Any] = {}  # rows by what decides their tokens: adapters of one chat share them
    names: list[str | None] = [None, *host.adapters]
    if args.stack and first is not None:
        names.append("+".join(host.adapters))
    seen: dict[str, set[int]] = {}  # lines that each learned from, where that is known

    def read(name: str | None) -> tuple[str, Dataset, Any, str]:
        """What a name is scored on, with its key, chat and `learn`. The base has the very tokens of the first adapter."""
        chat = session.chat(name or first)
        notes = host.adapters[session.stack(name or first)[0]].notes if first else {}
        learn = args.learn or notes.get("learn", "assistant")
        key = json.dumps([chat.to_json(), learn], sort_keys=True)
        if key not in sets:
            with out.working(f"reading {args.data}"):
                sets[key] = prepare(
                    args.data,
                    chat,
                    held_out_share=0,
                    mapping=coerce("map", dict[str, str], args.map) if args.map else None,
                    learn=learn,
                    max_tokens=args.max_tokens or host.base.context,
                    long="skip",
                    skip_bad_rows=args.skip_bad_rows,
                )
        return key, sets[key], chat, learn

    for each in host.adapters:
        _, data, chat, _ = read(each)
        with out.working(f"looking what {each} learned from"):
            try:
                seen[each] = _lines(session.folders.get(each), chat, data.train)
            except LorafitError as error:  # nothing is said where the run or its data is gone, or it was made by others
                if args.unseen:
                    raise ConfigError(
                        f"--unseen: what {each} learned from isn't known: {error}; leave --unseen out"
                    ) from None
    learned = set().union(*seen.values()) if args.unseen else set()
    for name in names:
        key, data, chat, learn = read(name)
        rows = [row for row in data.train if row.line not in learned][: args.limit]
        if not rows:
            raise ConfigError(
                f"--unseen: all {count(len(data.train))} rows of {args.data} were learned from; give others"
            )
        label = name or "base"
        asked[label] = key
        with memory_limit(), out.working(f"scoring {label}") as spinner:
            scores = evaluate.evaluate(host, rows, session.stack(name), progress=spinner.update)
            if args.answers:
                spinner.rename(f"answering as {label}")
                exact, f1, n = evaluate.score_answers(
                    host, chat, rows, session.stack(name), max_new=args.max_new, progress=spinner.update
                )
                scores = dataclasses.replace(scores, exact_match=exact, token_f1=f1, answers=n)
        result["scores"][label] = scores.to_json()
        if name in seen:
            result["trained_on"][name] = sum(row.line in seen[name] for row in rows)
        result |= {"unseen": args.unseen, "left_out": len(data.report.faults) + data.report.skipped, "learn": learn}
    if args.json:
        print_json(result)
        return
    lines = [
        [name, f"{s['loss']:.4f}", f"{s['perplexity']:.2f}", count(s["rows"]), count(s["target_tokens"])]
        + ([f"{s['exact_match']:.1%}", f"{s['token_f1']:.1%}"] if args.answers else [])
        for name, s in result["scores"].items()
    ]
    print(table(["model", "loss", "perplexity", "rows", "tokens"] + (["exact", "F1"] if args.answers else []), lines))
    if line := better(result["scores"], asked):
        print(line)
    stored = "its own precision" if host.base.quant is None else f"{host.base.quant}; --quant none scores it in 16 bits"
    print(f"the base is {host.base.name} in {stored}")
    for name, number in result["trained_on"].items():
        if number:
            print(
                f"{name} learned from {count(number)} of these rows, so its score says little of others; --unseen scores the"
                " others alone"
            )
    if line := left_out(sets.values(), args.data, args.max_tokens or host.base.context, args.limit):
        print(line)


def _check_data(data: str) -> None:
    """ConfigError where the last word is a run: the data file was forgotten."""
    from pathlib import Path

    from lorafit.errors import ConfigError

    place = Path(data)
    if any((place / name).is_file() for name in ("config.yaml", "adapter_config.json", "adapter/adapter_config.json")):
        raise ConfigError(
            f"{data} is a run, and the file to score on comes last: lorafit eval … {data} DATA; with --unseen it may be the"
            " file that they were trained on"
        )


def _lines(folder: Path | None, chat: Chat, rows: Sequence[Tokens]) -> set[int]:
    """The lines of the rows that an adapter learned from. LorafitError where that can't be known."""
    from lorafit import fit
    from lorafit.errors import RunError

    if folder is None:
        raise RunError("it lies in no run")
    return {row.line for row, learned in zip(rows, fit.learned_from(folder.parent, chat, rows), strict=True) if learned}


def left_out(sets: Iterable[Dataset], name: str, most: int, limit: int | None) -> str:
    """A line on the rows of a data file that can't be scored, of the chat that has most of them: those that are bad, or longer
    than `most` tokens; and how many of the others were. '' where there are none."""
    from lorafit.log import count, many

    data = max(sets, key=lambda one: one.report.skipped, default=None)
    if data is None or not (out := len(data.report.faults) + data.report.skipped):
        return ""
    parts = [f"{len(data.report.faults)} bad"] * bool(data.report.faults)
    parts += [f"{data.report.skipped} over {count(most)} tokens"] * bool(data.report.skipped)
    scored, there = len(data.train[:limit]), len(data.train)
    others = (
        "all others were scored" if scored == there else f"of the other {count(there)} the first {scored} were scored"
    )
    return f"left out of {name}: {out} of its {many(data.report.rows, 'row')} ({', '.join(parts)}); {others}"


def better(scores: dict[str, dict[str, Any]], asked: dict[str, str]) -> str:
    """A line on who has the lowest loss, of the adapters if there are several. `asked`: by name, what was scored; losses of other
    tokens aren't compared. '' for a base alone."""
    from lorafit.log import count

    names = [name for name in scores if name != "base" or len(scores) == 2]
    if len(names) < 2:
        return ""
    if len({asked[name] for name in names}) > 1:
        return "their losses can't be compared: their chats or learn= differ, so other tokens were scored"
    first, second = sorted(names, key=lambda name: float(scores[name]["loss"]))[:2]
    low, high = scores[first]["loss"], scores[second]["loss"]
    on = f"on {count(scores[first]['rows'])} rows"
    if not low < high * (1 - SAME):
        return (
            f"{first} and {second} are within {SAME:.0%}: no difference to speak of, loss {low:.4f} and {high:.4f} {on}"
        )
    best = "better" if len(names) == 2 else f"the best of {len(names)}"
    other = "" if len(names) == 2 else f" of {second}, the next"
    line = f"{first} is {best}: loss {low:.4f} against {high:.4f}{other} ({1 - low / high:.0%} lower) {on}"
    base = scores.get("base", {}).get("loss")
    worse = base is not None and "base" not in names and asked.get("base") == asked[first] and base < low
    return f"{line}; but the base alone is better than that: {base:.4f}" if worse else line

"""`lorafit check`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lorafit.verbs.common import add_json, given, importing, print_json, terminal

ABOUT = "look at a data file: formats, bad rows by line, lengths, duplicates, what is learned"
EXAMPLE = """\
  lorafit check data.jsonl
  lorafit check data.csv --map user=question,assistant=answer --model DIR"""


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.add_argument("data", metavar="DATA")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="learn=, max_tokens=, long=, system=, held_out_share=, seed="
    )
    parser.add_argument("--model", metavar="M", help="whose tokenizer and chat template; default: the embedded model")
    parser.add_argument("--held-out", metavar="FILE", help="held-out rows: checked too, and against DATA")
    parser.add_argument("--map", metavar="user=COL,assistant=COL", help="which columns hold what")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Print the report; exit 2 through DataError if rows can't be used."""
    from lorafit.errors import DataError

    with importing():
        from lorafit.fit import read_config, read_data

    config = read_config(args.data, given(args))
    _, chat, data = read_data(config, terminal(), strict=False)
    report, longest = data.report, config.max_tokens
    if args.json:
        print_json({**report.to_json(), "max_tokens": longest, "model": config.model})
    else:
        print(described(report, chat, longest))
        sys.stdout.flush()
    if report.faults and not report.train_rows:
        raise DataError(f"{config.data}: none of the {report.rows} rows can be used; the reasons are above")
    if report.faults:
        raise DataError(
            f"{config.data}: {len(report.faults)} of {report.rows} rows can't be used; mend them, or train with --skip-bad-rows"
        )


def described(report: Any, chat: Any, max_tokens: int | None) -> str:
    """The report in lines for people."""
    from lorafit.log import count, table

    formats = ", ".join(f"{name} {count(n)}" for name, n in report.by_format.items()) or "none"
    lines = [
        f"{report.path}: {count(report.rows)} rows ({formats})",
        f"usable      {count(report.train_rows)} to train on, {count(report.held_out_rows)} held out",
        f"tokens      {count(report.tokens)}, {report.share:.0%} of them learned",
        f"over length {report.over_length} rows over {max_tokens} tokens"
        + (f" ({report.truncated} cut, {report.truncated_end} inside an answer)" if report.truncated else "")
        + (f" ({report.skipped} left out)" if report.skipped else ""),
        f"duplicates  {len(report.duplicates)}",
        f"leaks       {len(report.leaks)} held-out rows equal a training row; {len(report.same_prompt)} share a prompt",
        f"template    {'lorafit default (the model has none)' if chat.default_template else 'of the model'};"
        f" an answer ends with {', '.join(repr(e) for e in chat.ends) or repr(chat.tokenizer.eos_token)}",
    ]
    if report.system:
        lines.append(f"system      every row: {report.system!r}")
    if report.lengths:
        most = max(n for *_, n in report.lengths)
        rows = [
            [f"{low}-{high - 1}", count(n), "█" * max(1 if n else 0, round(30 * n / most))]
            for low, high, n in report.lengths
        ]
        lines += ["", table(["tokens", "rows", ""], rows, "rrl")]
    if report.text_example:
        text = "".join(f"⟦{piece}⟧" if learned else piece for piece, learned in report.text_example)
        lines += ["", "one row as the model sees it, what is learned between ⟦ and ⟧:", _indent(_cut(text, 1500))]
    notes = sorted(report.notes, key=lambda note: note.line)
    for title, items in (("bad rows", report.faults), ("notes", notes)):
        if items:
            lines += ["", f"{title}:"] + [f"  line {fault.line}: {fault.reason}" for fault in items[:200]]
            if len(items) > 200:
                lines.append(f"  … and {count(len(items) - 200)} more; --json lists them all")
    return "\n".join(lines)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length // 2] + " […] " + text[-length // 2 :]


def _indent(text: str) -> str:
    return "\n".join("  " + "".join(c if c.isprintable() else "�" for c in line) for line in text.splitlines())

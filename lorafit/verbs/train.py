"""`lorafit train`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lorafit.log import count, duration, size
from lorafit.verbs.common import add_base, add_json, add_rows, asked, importing, print_json, terminal

ABOUT = "fit an adapter: data file or YAML configuration in, run folder out"
EXAMPLE = """\
  lorafit train data.jsonl
  lorafit train data.jsonl --model DIR --out runs/mine epochs=5 r=32 lr=1e-4
  lorafit train --resume --out runs/mine       go on after a stop or a kill
  lorafit train more.jsonl --from runs/mine    new training, from the old adapter"""


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments. Every setting of config.yaml can also be given as key=value."""
    parser.add_argument(
        "source", nargs="?", metavar="DATA|CONFIG.yaml", help="rows (.jsonl .json .csv .parquet .txt) or settings"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting; --help-settings lists them")
    add_base(parser)
    parser.add_argument("--out", metavar="RUN", help="run folder; default runs/<data>-<number>")
    add_rows(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--force", action="store_true", help="resume even if settings, data or base have changed")
    parser.add_argument("--from", dest="start", metavar="RUN", help="start new training from an old adapter")
    parser.add_argument("--help-settings", action="store_true", help="list every setting with its default")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Train, then say what came of it."""
    from lorafit.config import build, defaults
    from lorafit.errors import ConfigError
    from lorafit.files import need_data

    if args.help_settings:
        print(settings_table())
        return
    source, found = asked(args, "train", "config.yaml")
    if args.resume and args.start:
        raise ConfigError("--resume goes on with a run, --from starts a new one; use one of them")
    # Told before seconds of imports; names are looked at after them, since methods have settings of their own.
    build({key: value for key, value in found.items() if key in defaults()})
    if source is not None:
        need_data(source)
    if args.force and not args.resume:
        raise ConfigError("--force only goes with --resume")
    if source is None and not args.resume and "data" not in found:
        raise ConfigError("no data; give a file: lorafit train DATA, or --resume --out RUN")

    with importing():
        from lorafit import fit

    out = terminal()
    if args.resume:
        found |= {"data": source} if source is not None else {}
        made = fit.resume(found["out"], found, args.force, out)
    else:
        made = fit.fit(fit.read_config(source, found), out)
    summary = json.loads((made.folder / "summary.json").read_text(encoding="utf-8"))
    if args.json:
        print_json({"run": str(made.folder), **summary})
    else:
        print(described(str(made.folder), summary))


def described(run: str, summary: dict[str, Any]) -> str:
    """A finished run in lines for people, with what to do next: of what could be better, doctor's first finding."""
    from lorafit.doctor import examine

    finding = next((one for one in examine(Path(run)) if one.level != "note"), None)
    before, after = summary["held_out_loss_before"], summary["held_out_loss_after"]
    lines = []
    if before is not None and after is not None:
        change = (after - before) / before
        verdict = "it learned" if change < -0.02 else "it hardly learned" if change < 0.02 else "it got worse"
        lines.append(
            f"held-out loss  {before:.4f} -> {after:.4f} ({change:+.1%}), best at step {summary['best_step']}: {verdict}"
        )
    if before is not None and summary["best_step"] == 0:
        lines.append("               no evaluation was better than the start, so adapter/ holds the start")
    if finding is not None:
        lines.append(f"doctor         {finding.what}" + (f"; to mend it: {finding.do}" if finding.do else ""))
    share = summary["trainable_parameters"] / summary["total_parameters"]
    on_gpu = f", {size(summary['peak_gpu_bytes'])} of the GPU's" if summary["peak_gpu_bytes"] else ""
    speed = f"{summary['tokens_per_second']:.0f} tokens/s in its steps, " if summary["tokens_per_second"] else ""
    lines += [
        f"stopped        {summary['stopped']}, after {summary['steps']} steps",
        f"took           {duration(summary['seconds'])}, {speed}peak memory {size(summary['peak_rss_bytes'])}{on_gpu}",
        *([f"               of that {split}"] if (split := split_of(summary.get("seconds_of"))) else []),
        f"adapter        {count(summary['trainable_parameters'])} numbers ({share:.2%} of the base), "
        f"{size(summary['adapter_bytes'])} on disk; the base {size(summary['base_bytes'])}",
        f"run            {run} (report.html shows the curves)",
        "",
        "next:",
        *([f"  {finding.command}"] if finding is not None and finding.command else []),
        *([f"  lorafit doctor {run}"] if finding is not None else []),
        f"  lorafit chat {run} --compare",
        f"  lorafit eval {run} DATA",
        f"  lorafit merge {run} OUT",
    ]
    return "\n".join(lines)


def split_of(seconds: dict[str, float] | None) -> str:
    """What a run's time went to, in words; '' where that isn't known."""
    return ", ".join(f"{part} {duration(spent)}" for part, spent in (seconds or {}).items() if spent >= 0.05)


def settings_table() -> str:
    """Every setting with its default, the methods' own among them."""
    import dataclasses

    from lorafit.config import choices, defaults
    from lorafit.log import table, terminal_columns
    from lorafit.methods import METHODS
    from lorafit.methods import settings as own

    rows = []
    for name, f in defaults().items():
        default = None if f.default is dataclasses.MISSING else f.default
        meaning = f.metadata["help"] + (f" ({', '.join(known)})" if (known := choices(name)) else "")
        rows.append([name, "-" if default in (None, "") else str(default), meaning])
    for method, kind in METHODS.items():
        rows += [[name, str(default), f"of method={method}"] for name, (_, default) in own(kind).items()]
    return table(["setting", "default", "meaning"], rows, "lll", fit=terminal_columns())

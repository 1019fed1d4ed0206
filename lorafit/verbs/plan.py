"""`lorafit plan`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import UserError
from lorafit.verbs.common import add_json, importing, print_json, refuse, terminal, wanted

if TYPE_CHECKING:
    from lorafit.config import Config
    from lorafit.data import Tokens
    from lorafit.log import Terminal
    from lorafit.pace import Time
    from lorafit.places import Place
    from lorafit.plan import Estimate, Verdict

ABOUT = "will it fit, and how long will it take? told before any weights are read"
EXAMPLE = """\
  lorafit plan data.jsonl --model DIR
  lorafit plan data.jsonl --model DIR --for 'RTX 4090' quant=nf4
  lorafit plan data.jsonl --model DIR --for 16G checkpointing=true batch_tokens=512 --json
  lorafit plan data.jsonl && lorafit train data.jsonl

exit code: 0 if training with these words fits, in smaller micro-batches if need be (it takes those by itself);
2 if it doesn't, or only with the other settings that are shown"""

PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "runtime")


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments: as of train."""
    parser.add_argument("source", metavar="DATA|CONFIG.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting of train")
    parser.add_argument(
        "--model",
        metavar="M",
        help="Hugging Face folder (config.json and tokenizer are enough), GGUF file or hub id; default: the embedded model",
    )
    parser.add_argument(
        "--for",
        dest="place",
        metavar="cpu|GPU|SIZE",
        help="a GPU by name, or memory such as 16G; default: where train would run here",
    )
    parser.add_argument("--no-time", action="store_true", help="leave out the measurement, about ten seconds")
    parser.add_argument("--from", dest="start", metavar="RUN", help="plan training that starts from an old adapter")
    parser.add_argument("--map", metavar="user=COL,assistant=COL", help="which columns hold what")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out rows that can't be used")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the parts, the peaks, the verdict and the time. Returns the exit code: 0 where `train` would run with these words."""
    refuse(args)
    with importing():
        from lorafit import fit
        from lorafit.plan import empty, estimate, judge, stored_otherwise, way_out

    out = terminal()
    want = wanted(args, out, weights=False)
    config, path, data, place = want.config, want.path, want.data, want.place
    fit.advised(config, path, data)
    with out.working("adding up"):
        model = empty(config, path, place.gpu, want.source)
        asked = estimate(config, model, data.train, data.held_out)
        verdict = judge(config, model, data.train, place.memory, config.memory is None, data.held_out)
        plainly = verdict.fits and not verdict.streams
        other = stored_otherwise(config, model, data.train, place.memory, data.held_out) if plainly else None
    # `lorafit plan … && lorafit train …`: smaller micro-batches are what training takes by itself.
    code = 0 if verdict.fits or set(verdict.change) == {"accumulate"} else UserError.exit_code

    if not args.json:  # what is known is shown before the time is measured
        print(described(asked, verdict, place, way_out(config, verdict)), flush=True)

    def takes(config: Config, made: Estimate, share: float = 1.0) -> Time | None:
        return time_of(config, made, path, data.train, place, out, args.no_time, share)

    time = takes(replace(config, **verdict.change), verdict.best)
    # Measured for who asked for 4 bits; for who didn't, it isn't worth the time.
    others = takes(*other, 0.5) if other is not None and (place.gpu or config.quant != "none") else None
    if args.json:
        print_json(
            {
                **asked.to_json(),
                **verdict.to_json(),
                "for": place.name,
                **seconds(time),
                "seconds_are": "measured" if place.here else "from the data sheet",
                "otherwise": None
                if other is None
                else {
                    "quant": other[0].quant,
                    "peak_bytes": other[1].peak_bytes,
                    "seconds": others.total if others is not None else None,
                },
            }
        )
        return code
    for line in (timed(asked, verdict, place, time), otherwise(asked, other[1], time, others) if other else ""):
        if line:
            print(line)
    return code


def time_of(
    config: Config,
    made: Estimate,
    path: Path,
    rows: Sequence[Tokens],
    place: Place,
    out: Terminal,
    skip: bool,
    share: float = 1.0,
) -> Time | None:
    """Of the whole training; None where it isn't known. `share`: of the seconds that measuring takes elsewhere."""
    from lorafit.pace import SECONDS, by_rate, measured

    if place.rate is not None and place.bytes_a_second is not None:
        return by_rate(config, made, place.rate, place.bytes_a_second)
    if skip or place.gpu or not place.here:
        return None
    with out.working("measuring steps on this machine"):
        return measured(config, path, rows, made, share * SECONDS)


def seconds(time: Time | None) -> dict[str, Any]:
    """The time for --json."""
    if time is None:
        return {"seconds": None, "seconds_of": None, "seconds_off": None}
    return {"seconds": time.total, "seconds_of": time.to_json(), "seconds_off": time.off}


def otherwise(asked: Estimate, other: Estimate, time: Time | None, others: Time | None) -> str:
    """A line on the base in 4 bits where 16 fit, or the other way round."""
    from lorafit.log import duration, size
    from lorafit.native.quantised import ROUNDED

    peaks = f"{size(other.peak_bytes)} instead of {size(asked.peak_bytes)}"
    longer = f", {duration(others.total)} instead of {duration(time.total)}" if time and others else ""
    if asked.quant == "none":
        return (
            f"quant={other.quant} would fit too ({peaks}{longer}): smaller, but slower, since numbers are made again for"
            " each product, and somewhat less exact"
        )
    faster = "" if time and others and others.total > time.total else " faster and"
    use = "memory is short, or steps are slow without AMX" if asked.quant == ROUNDED else "memory is short"
    return f"quant=none fits too ({peaks}{longer}):{faster} exact; {asked.quant} is for where {use}"


def described(asked: Estimate, verdict: Verdict, place: Place, way_out: str) -> str:
    """Memory and the verdict, for people."""
    from lorafit.log import count, size, table

    rows = [[part, size(getattr(asked, part))] for part in PARTS]
    rows += [["peak, training", size(asked.peak_bytes)]]
    rows += [["peak, evaluating", size(asked.evaluating)], ["peak, merging", size(asked.merging)]]
    rows += [["on disk", size(asked.disk)]]
    lines = [table(["memory", "bytes"], rows)]
    stored = f" stored in {asked.quant}, computed" if asked.quant != "none" else ""
    lines.append(
        f"{count(asked.trainable_parameters)} of {count(asked.total_parameters)} parameters trained,{stored} in"
        f" {asked.precision}; {asked.steps} steps, at most {count(asked.micro_batch_tokens)} tokens at once"
    )
    lines.append(f"{place.name}: {size(place.memory)} to use")
    peak = size(verdict.best.peak_bytes)
    if verdict.streams:
        how = f" with {verdict.words}" if verdict.change else ""
        lines.append(
            f"its weights don't fit: it would run{how} (peak {peak}), but read what has no room from the file again in every"
            " step; that takes half as long again where 40% have no room, more where more"
        )
    elif verdict.fits:
        lines.append("it fits")
    elif verdict.change:
        lines.append(f"it fits with {verdict.words} (peak {peak})")
    else:
        lines.append(f"it doesn't fit: {peak} at least; {way_out}")
    return "\n".join(lines)


def timed(asked: Estimate, verdict: Verdict, place: Place, time: Time | None) -> str:
    """A line on the time; "" where there is nothing to say."""
    from lorafit.log import duration

    if not (verdict.fits or verdict.change):
        return ""
    if time is None:
        unknown = place.rate is None and not place.here
        return "how long it takes isn't known of a size of memory; without --for it is measured here" if unknown else ""
    how = "measured here" if place.here else "by the data sheet, see docs/memory.md"
    off = f" ±{time.off:.0%}" if time.off is not None else ""
    parts = [
        f"{name} {duration(seconds)}"
        for name, seconds in (
            ("steps", time.steps),
            ("held-out rows", time.evaluations),
            ("answers", time.answers),
            ("numbers from codes", time.dequantising),
        )
        if seconds
    ]
    rest = "; answers come on top" if time.answers is None and asked.answers else ""
    return f"training takes about {duration(time.total)}{off} ({how}{rest}): {', '.join(parts)}"

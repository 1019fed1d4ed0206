"""`lorafit advise`."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.verbs.common import add_base, add_json, add_rows, importing, print_json, refuse, terminal, wanted

if TYPE_CHECKING:
    from lorafit.advice import Choice, Facts
    from lorafit.config import Config
    from lorafit.data import Dataset
    from lorafit.data.report import Report
    from lorafit.places import Place
    from lorafit.plan import Verdict

ABOUT = "which settings to train with, and why: from the data, the model's shape and the machine, without training"
EXAMPLE = """\
  lorafit advise data.jsonl
  lorafit advise data.jsonl --model DIR --task classify
  lorafit advise data.jsonl --out settings.yaml && lorafit train settings.yaml"""

MARGIN = " " * 10  # of what is said of the data
MEASURED_ROWS, MEASURED_TOKENS = 32, 4096  # of the rows that the base's loss is measured on


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments: as of train, where they bear on settings."""
    parser.add_argument("source", metavar="DATA|CONFIG.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that you have chosen already")
    add_base(parser)
    parser.add_argument("--task", metavar="TASK", help="chat, classify, extract, style, tools, code or knowledge")
    parser.add_argument(
        "--for", dest="place", metavar="cpu|GPU|SIZE", help="another machine, as in `lorafit plan`; default: this one"
    )
    parser.add_argument(
        "--out", dest="yaml", metavar="FILE.yaml", help="write the settings, for `lorafit train FILE.yaml`"
    )
    parser.add_argument(
        "--no-measure", action="store_true", help="don't load the base for its loss on some rows, nor time some steps"
    )
    parser.add_argument(
        "--from", dest="start", metavar="RUN", help="advice for training that starts from an old adapter"
    )
    add_rows(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Print what was seen, the settings with their reasons, and the command."""
    refuse(args)
    with importing():
        from lorafit import advice, plan
        from lorafit.log import terminal_columns
        from lorafit.model.load import shape_of
        from lorafit.verbs.plan import seconds, time_of, timed

    out = terminal()
    _check(args, list(advice.TASKS))
    want = wanted(args, out, weights=not args.no_measure)
    config, path, data, place = want.config, want.path, want.data, want.place
    facts = advice.Facts.of(data)
    choices = advice.advise(config, facts, shape_of(path), data.train, args.task)
    for choice in choices:
        advice.put(config, choice)
    with out.working("adding up"):
        model = plan.empty(config, path, place.gpu, want.source)
        verdict = plan.judge(config, model, data.train, place.memory, config.memory is None, data.held_out)
        asked = plan.estimate(config, model, data.train, data.held_out)
    changed = replace(config, **verdict.change)
    time = time_of(changed, verdict.best, path, data.train, place, out, args.no_measure)
    here = not args.no_measure and place.here and not place.gpu  # then the kernels are there, and known
    choices += _for_memory(config, verdict, asked.peak_bytes, place, _by_codes(config) if here else "")
    loss = None if args.no_measure else _base_loss(config, data, want.source, out)
    pieces = facts.tokens_a_character(want.chat)
    notes = _notes(config, facts, data, loss, pieces)
    command = _command(args, choices)
    if args.yaml:
        _write(Path(args.yaml), config, choices)
    if args.json:
        print_json(
            {
                "data": {**facts.to_json(), "tokens_a_character": round(pieces, 3)},
                "base_loss": loss,
                "settings": {choice.setting: choice.to_json() for choice in choices},
                **verdict.to_json(),
                "for": place.name,
                **seconds(time),
                "notes": notes,
                "command": command,
            }
        )
        return
    fits = _fits(verdict, place, plan.way_out(config, verdict))
    takes = timed(asked, verdict, place, time)
    if args.no_measure and place.here and not place.gpu and (verdict.fits or verdict.change):
        takes = "`lorafit plan` measures how long training takes"
    lines = [*notes, fits, *([takes] if takes else [])]
    print(_described(config, facts, choices, lines, terminal_columns()))
    print(f"\nto train with these settings:\n  {command}")
    same = not verdict.change and (args.task is None or args.task == facts.task)
    if same:
        print(
            "only what you set yourself has to be written: the rest is what `lorafit train` chooses where nothing is set"
        )
    if args.yaml:
        print(f"or: lorafit train {shlex.quote(args.yaml)}")


def _check(args: argparse.Namespace, tasks: list[str]) -> None:
    from lorafit.config import nearest
    from lorafit.errors import ConfigError

    if args.task is not None and args.task not in tasks:
        raise ConfigError(f"--task {args.task}: {nearest(args.task, tasks)}")
    if args.yaml and Path(args.yaml).suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out {args.yaml}: name a .yaml file, which `lorafit train` then takes")
    if args.yaml and Path(args.yaml).exists():
        raise ConfigError(f"{args.yaml} exists already; name another file with --out")


def _for_memory(config: Config, verdict: Verdict, peak: int, place: Place, quicker: str) -> list[Choice]:
    """What has to be set so that it fits, and `quant` in any case. `quicker`: what products in 8 bits would do for the time."""
    from lorafit.advice import Choice
    from lorafit.log import size

    why = f"as it is it needs {size(peak)}, and {size(place.memory)} are there"
    found = [Choice(key, value, why, "lorafit plan") for key, value in verdict.change.items()]
    if "quant" not in verdict.change:
        yours = "quant" in config.given
        reason = "as you set it" if yours else "the base fits as it is; 4 bits cost a little exactness"
        if quicker and not yours and config.quant == "none":
            reason += f", and w8a8, which {quicker}, less than that"
        found.append(Choice("quant", config.quant, reason, "you" if yours else "lorafit plan", yours))
    return found


def _by_codes(config: Config) -> str:
    """What products in 8 bits would do for the time of a step on this processor, in words; docs/speed.md has the figures."""
    import torch

    from lorafit.model.load import pick_dtype
    from lorafit.native import build

    if pick_dtype(config.precision, torch.device("cpu")) == torch.float32:
        return "takes half the time in fp32" if build.multiplies_codes() else ""
    return "takes a fifth less time without AMX" if build.slow_in_bf16() else ""


def _base_loss(config: Config, data: Dataset, source: Path | None, out: Any) -> float | None:
    """The base's loss on some of the rows, held-out ones if there are any: how new they are to it."""
    from lorafit.batches import fill
    from lorafit.evaluate import evaluate
    from lorafit.fit import quant_for
    from lorafit.host import Host
    from lorafit.model.load import load

    rows = list((data.held_out or data.train)[:MEASURED_ROWS])
    rows = rows[: fill([len(row.ids) for row in rows], MEASURED_TOKENS)[0].stop] if rows else rows
    if not rows:
        return None
    with out.working("loading the base"):
        host = Host(
            load(config.model, precision=config.precision, device=config.device, quant=quant_for(config, source))
        )
    with out.working(f"measuring the base's loss on {len(rows)} rows") as spinner:
        return evaluate(host, rows, tokens=1024, progress=spinner.update).loss


def _notes(config: Config, facts: Facts, data: Dataset, loss: float | None, pieces: float) -> list[str]:
    """What no setting mends, or what is to be known beside them. `pieces`: tokens of a character."""
    from lorafit.data.dataset import LEAST
    from lorafit.data.report import PLACEHOLDERS
    from lorafit.log import many

    report, found = data.report, []
    if loss is not None:
        found.append(f"the base's loss on some of these rows is {loss:.2f}: {_novelty(loss)}")
    if pieces > 0.8 and facts.lettered > 0.5:  # digits and signs are tokens of their own in many tokenizers, by design
        most = f" (most is {facts.script})" if facts.script != "none" else ""
        found.append(
            f"the base's tokenizer needs {pieces:.1f} tokens for a character of these rows, so it has seen"
            f" little of their writing, or of a part of it{most}; a base that knows it will learn more"
        )
    if not facts.held_out:
        found.append(f"{_why_none(config, facts, report)}; nothing is held out, so nobody will know how well it learns")
    elif not config.held_out and facts.held_out < LEAST:
        found.append(
            f"only {many(facts.held_out, 'row')} could be held out, because the others are there more than once; so few say"
            " little"
        )
    elif facts.rows < 50:
        found.append(f"only {facts.rows} rows to train on: it will learn a manner, hardly facts, and memorise soon")
    if len(report.duplicates) > report.rows / 20:
        found.append(
            f"{len(report.duplicates)} of {report.rows} rows are copies of others, which makes those weigh more; leave them out"
        )
    found += [f"line {note.line}: {note.reason}" for note in report.notes if note.reason.startswith(PLACEHOLDERS)]
    if report.share < 0.1:
        found.append(f"only {report.share:.0%} of the tokens are learned; the rest is prompt and only costs time")
    return found


def _why_none(config: Config, facts: Facts, report: Report) -> str:
    """Why nothing is held out."""
    from lorafit.data.dataset import SMALLEST
    from lorafit.log import many

    if config.held_out:
        return f"every row of {config.held_out} is one of the training rows too"
    if config.held_out_share <= 0:
        return f"held_out_share={config.held_out_share:g}"
    if facts.rows < SMALLEST:
        return f"only {many(facts.rows, 'row')}, and {SMALLEST} are needed to hold some out"
    return f"all of the {facts.rows} rows are copies of {many(facts.rows - len(report.duplicates), 'different one')}"


def _novelty(loss: float) -> str:
    if loss < 0.5:
        return "it says nearly this by itself, so there is little to learn"
    if loss < 2.5:
        return "new rows in a manner that it knows"
    return "far from what it knows; expect to need more rows, or another base"


def _described(config: Config, facts: Facts, choices: list[Choice], notes: list[str], columns: int | None) -> str:
    """For a terminal that is so many columns wide; None: lines of any length."""
    from lorafit.advice import TASKS
    from lorafit.log import NARROW, count, many, table, wrap

    said = [
        f"{many(facts.rows, 'row')} to train on, {facts.held_out} held out; {count(facts.tokens)} tokens,"
        f" {count(facts.learned)} of them learned; a row has {facts.median} tokens (median), at most {facts.longest}",
        f"looks like {facts.task}: {TASKS[facts.task]} (--task says otherwise); writing: {facts.script}",
        *notes,
    ]
    if columns is not None:
        said = ["\n  ".join(wrap(line, max(NARROW, columns - len(MARGIN) - 2))) for line in said]
    text = "\n".join([str(config.data), *said]).replace("\n", "\n" + MARGIN)
    rows = [[choice.words, f"{choice.reason} ({choice.source})"] for choice in choices]
    return f"{'data':{len(MARGIN)}}{text}\n\n{table(['setting', 'why (from)'], rows, 'll', columns)}"


def _fits(verdict: Verdict, place: Place, way_out: str) -> str:
    from lorafit.log import size

    peak = size(verdict.best.peak_bytes)
    fits = (
        "it fits" if verdict.fits else "it fits with these settings" if verdict.change else f"it doesn't fit: {way_out}"
    )
    return f"{place.name}: {fits} (peak {peak} of {size(place.memory)})"


def _command(args: argparse.Namespace, choices: list[Choice]) -> str:
    """The same words for train, and the settings that advice chose."""
    from lorafit.config import defaults

    words = ["lorafit", "train", args.source]
    for option, value in (("model", args.model), ("held-out", args.held_out), ("map", args.map), ("from", args.start)):
        words += [f"--{option}", value] if value is not None else []
    words += ["--skip-bad-rows"] if args.skip_bad_rows else []
    plain = defaults()
    for choice in choices:
        known = plain.get(choice.setting)
        if not choice.yours and choice.setting != "targets" and (known is None or known.default != choice.value):
            words.append(choice.words)
    return shlex.join([*words, *args.settings])


def _write(path: Path, config: Config, choices: list[Choice]) -> None:
    """The settings as YAML that train takes, each with its reason."""
    import yaml

    from lorafit import files
    from lorafit.config import flat

    def line(key: str, value: Any) -> str:
        return str(yaml.safe_dump({key: value}, allow_unicode=True, width=1 << 20))

    values = flat(config)
    advised = {choice.setting: choice for choice in choices if not choice.yours and choice.setting != "targets"}
    parts = [line(key, values[key]) for key in values if key in config.given | {"model"} and key not in advised]
    parts += [f"# {choice.reason} ({choice.source})\n{line(key, choice.value)}" for key, choice in advised.items()]
    files.write_text(path, "".join(parts), again="try again")

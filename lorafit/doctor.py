"""What is wrong with a run, told from the files of its folder alone: each finding with its figures and what to change.

Nothing is loaded and nothing guessed from weights. A finding is a `fault` where the run can't be used as it is or taught little,
a `warning` where it could have gone clearly better, a `note` where there is only something to know. docs/advice.md has the list.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any, Literal

from lorafit.advice import RANK, numbers_of, passes, rate_for, sides
from lorafit.batches import LEAST_TOKENS, TOGETHER
from lorafit.config import Config, read_yaml
from lorafit.data.dataset import SMALLEST
from lorafit.data.report import PLACEHOLDERS
from lorafit.files import busy, read_json, read_json_lines, unfinished_search
from lorafit.methods import METHODS, settings
from lorafit.run import STOPPED, Run

Level = Literal["fault", "warning", "note"]

HARDLY = 0.02  # of the held-out loss: a smaller change is none
LITTLE = 0.05  # of the held-out loss: what a run with far too low a rate, or far too few numbers, may well gain
FEW_STEPS = 20
FEW_ROWS = 50
ROWS = ("train_rows", "held_out_rows")
# Methods that train r numbers for each row and column of a matrix, as LoRA does.
AS_LORA = (
    "lora", "rslora", "lora+", "dora", "pissa", "olora", "loftq", "eva", "adalora", "reflora", "reflora-s", "scalora",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What is wrong, the figures that say so, and what to do about it: in words, and as a command where there is one. `step`:
    where in the run it shows."""

    name: str
    level: Level
    what: str
    evidence: str
    do: str = ""
    command: str = ""
    step: int | None = None

    def to_json(self) -> dict[str, Any]:
        """In JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Files:
    """What a run folder holds, as far as it is there and can be read."""

    folder: Path
    config: dict[str, Any]
    data: dict[str, Any]
    chat: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any]
    stopped: dict[str, Any]
    searching: bool = False  # a search that isn't over, which has its winner's settings already
    process: str = ""  # that is at work in it

    @staticmethod
    def of(folder: Path) -> Files:
        """RunError where it isn't a run."""
        run = Run.open(folder)
        return Files(
            folder,
            read_yaml(run.folder / "config.yaml"),
            read_json(folder / "data.json"),
            read_json(folder / "chat.json"),
            by_step(read_json_lines(folder / "metrics.jsonl")),
            by_step(read_json_lines(folder / "evaluations.jsonl")),
            read_json(folder / "summary.json"),
            read_json(folder / STOPPED),
            unfinished_search(folder),
            busy(folder),
        )

    @cached_property
    def losses(self) -> list[tuple[int, float]]:
        """(step, training loss), where it is finite."""
        return [(row["step"], value) for row in self.steps if (value := number(row, "loss")) is not None]

    @cached_property
    def held_out(self) -> list[tuple[int, float]]:
        """(step, held-out loss), where it is finite; step 0 is before training."""
        return [(row["step"], v) for row in self.evaluations if (v := number(row, "held_out_loss")) is not None]

    @property
    def before(self) -> float | None:
        """Held-out loss before training."""
        return self.held_out[0][1] if self.held_out and self.held_out[0][0] == 0 else None

    @property
    def best(self) -> tuple[int, float] | None:
        """The evaluation with the lowest held-out loss."""
        return min(self.held_out, key=lambda point: point[1], default=None)

    @property
    def last(self) -> int:
        """The last step that was taken."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def learned(self) -> float | None:
        """By how much of itself the held-out loss fell at best; negative where it rose."""
        after = [value for step, value in self.held_out if step > 0]
        return 1 - min(after) / self.before if after and self.before else None

    def ends(self, share: float = 0.1) -> tuple[float, float] | None:
        """Means of the training loss over the first and the last part of the steps; None for fewer than 4."""
        values = [value for _, value in self.losses]
        if len(values) < 4:
            return None
        some = max(2, round(len(values) * share))
        return fmean(values[:some]), fmean(values[-some:])

    def setting(self, key: str) -> float | None:
        """A setting that is a number."""
        return number(self.config, key)

    @property
    def fell(self) -> bool:
        """Whether the training loss fell by more than it swings from step to step."""
        values = [value for _, value in self.losses]
        third = len(values) // 3
        if third < 3:
            return False
        first, last = values[:third], values[-third:]
        noise = math.sqrt((variance(first) + variance(last)) / third)
        return fmean(first) - fmean(last) > max(3 * noise, 0.1 * fmean(first))

    @property
    def epochs(self) -> float | None:
        """How many times the training rows were gone through."""
        rows, held, tokens = (number(self.data, key) for key in ("train_rows", "held_out_rows", "tokens"))
        if rows is None or held is None or tokens is None or min(rows, tokens) < 1 or held < 0:
            return None
        return sum(number(row, "tokens") or 0 for row in self.steps) / (tokens * rows / (rows + held))

    def again(self, *changes: str) -> str:
        """The command that trains anew with these settings changed."""
        known = {change.partition("=")[0] for change in changes}
        drop = ["eval_every=auto"] if known & {"steps", "epochs"} and self.config.get("eval_every") else []
        return shlex.join(
            ["lorafit", "train", str(self.folder / "config.yaml"), "--out", f"{self.folder}-again", *changes, *drop]
        )

    def longer(self, factor: float) -> str:
        """The setting that makes it so many times as long."""
        if steps := self.setting("steps"):
            return f"steps={max(1, round(steps * factor))}"
        return f"epochs={max(0.1, float(self.setting('epochs') or 3) * factor):.3g}"


def by_step(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the order of their steps; of a step that was taken again after a resume the later one. Without what is no step."""
    found = {step: row for row in rows if type(step := row.get("step")) is int and 0 <= step < 1 << 53}
    return [found[step] for step in sorted(found)]


def number(row: dict[str, Any], key: str) -> float | None:
    """A finite number of a row, whose square is finite too; None for anything else."""
    value = row.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100 else None


def items(row: dict[str, Any], key: str, kind: type[Any], length: int = 0) -> list[Any]:
    """The well-formed items of a row's list, of this kind and length if one is given; none where it isn't a list."""
    found = row.get(key)
    return (
        [i for i in found if isinstance(i, kind) and (not length or len(i) == length)]
        if isinstance(found, list)
        else []
    )


def examine(folder: Path, ending: bool = False) -> list[Finding]:
    """What is to be said of a run, the worst first. Empty: nothing. RunError where it isn't a run. `ending`: its report is being
    written, the last that a search lacks."""
    files = Files.of(folder)
    if ending and files.summary:
        files = replace(files, searching=False)
    found = [finding for check in _CHECKS if (finding := check(files)) is not None]
    named = {finding.name for finding in found}
    found = [finding for finding in found if not _HIDES.get(finding.name, set()) & named]
    order = ["fault", "warning", "note"]
    return sorted(found, key=lambda finding: order.index(finding.level))


def verdict(folder: Path, found: Sequence[Finding]) -> str:
    """One line on a run's health."""
    files = Files.of(folder)
    worst = found[0].level if found else "healthy"
    word = {"fault": "ill", "warning": "could be better"}.get(worst, "healthy")
    after = min((point for point in files.held_out if point[0] > 0), key=lambda point: point[1], default=None)
    if files.before and after is not None:
        end = files.held_out[-1]
        rose = f"; {end[1]:.4f} at step {end[0]}, the last time" if end[1] > (1 + HARDLY) * after[1] else ""
        if after[1] >= files.before:
            lowest = f"no evaluation of {files.last} steps was lower, {after[1]:.4f} at step {after[0]} the nearest"
            return f"{word}: held-out loss {files.before:.4f} before training, {lowest}{rose}"
        change = after[1] / files.before - 1
        where = f"best at step {after[0]} of {files.last}"
        return f"{word}: held-out loss {files.before:.4f} -> {after[1]:.4f} ({change:+.1%}), {where}{rose}"
    if (ends := files.ends()) is not None:
        return f"{word}: training loss {ends[0]:.4f} -> {ends[1]:.4f} (means of the first and the last steps)"
    return f"{word}: {files.last} {'step was' if files.last == 1 else 'steps were'} taken"


# --- how it ended ------------------------------------------------------------------------------------------------------


def _ended(files: Files) -> Finding | None:
    """Before its time, other than by a failure of training; or not yet."""
    if files.summary and not files.searching and not files.process:
        return None
    verb = "tune" if files.searching else "train"
    go_on = shlex.join(["lorafit", verb, "--resume", "--out", str(files.folder)])
    done = files.epochs
    far = f"{files.last} {'step is' if files.last == 1 else 'steps are'} recorded" + (
        f", {done:.2g} of {files.setting('epochs'):g} epochs" if _by_epochs(files) and done else ""
    )
    if files.process:
        what = f"{'the search' if files.searching else 'it'} is still going on (process {files.process})"
        return Finding("going-on", "note", what, far, "what is said here is of what there is so far")
    kind, reason = files.stopped.get("kind"), str(files.stopped.get("reason", ""))
    if kind == "OutOfMemory":
        error = str(files.stopped.get("what") or reason.split(";")[0])
        parts = [error, far]
        if (micro := number(files.steps[-1], "micro_tokens") if files.steps else None) is not None:
            parts.append(f"before that micro-batches of {micro:.0f} tokens fitted")
        if len(lengths := _lengths(files)) > 1:
            low, _, few = lengths[-1]
            parts.append(f"{few} of {sum(rows for *_, rows in lengths)} rows have {low} tokens or more")
        do = "keep less (checkpointing=true costs time and nothing else), or more memory; or shorter rows, anew"
        more = "" if files.config.get("checkpointing") or files.searching else " checkpointing=true"
        return Finding(
            "out-of-memory",
            "fault",
            "memory ran out, with one row at a time",
            "; ".join(parts),
            do,
            go_on + more,
            files.last,
        )
    if kind == "Interrupted":
        return Finding("interrupted", "fault", "it was stopped before its end", far, "go on; nothing is lost", go_on)
    if kind:
        return Finding(
            "broken-off", "fault", "an error ended it", f"{reason[:300]}; {far}", "mend that, then go on", go_on
        )
    what = (
        f"{'the search' if files.searching else 'it'} has no end: it was killed (by hand, by the system for its memory, by a"
        " power cut), or it is still going on, on another machine"
    )
    return Finding("unfinished", "fault", what, far, "if it isn't going on any more, go on with it", go_on)


def _by_epochs(files: Files) -> bool:
    return not files.config.get("steps") and files.setting("epochs") is not None


def _diverged(files: Files) -> Finding | None:
    """The loss isn't a number, ran away, or ended higher than it began."""
    reason = str(files.summary.get("stopped", ""))
    nan = [row["step"] for row in files.steps if "loss" in row and row["loss"] is None]
    nan += [row["step"] for row in files.evaluations if "held_out_loss" in row and row["held_out_loss"] is None]
    ran = "ran away" in reason
    said = ("the loss is" in reason and "gradient" in reason) or "held-out loss is" in reason
    ends = files.ends()
    began = max(files.before or 0.0, files.losses[0][1] if files.losses else 0.0)  # before the first step did anything
    rose = bool(ends and began and ends[1] > 1.15 * began + 0.1)
    if not (nan or ran or said or rose):
        return None
    lr = files.setting("lr")
    norms = [value for row in files.steps if (value := number(row, "grad_norm")) is not None]
    evidence = [reason] if ran or said else []
    evidence += [f"the loss at step {nan[0]:.0f} isn't a number"] if nan and not said else []
    if len(files.losses) > 1:
        first, highest, last = files.losses[0], max(files.losses, key=lambda point: point[1]), files.losses[-1]
        evidence.append(
            f"training loss {first[1]:.3g} at step {first[0]}, {highest[1]:.3g} at its highest (step {highest[0]}),"
            f" {last[1]:.3g} at step {last[0]}, the last"
        )
    evidence += [f"gradient norm {median(norms):.2g} (median), {max(norms):.2g} (highest)"] if norms else []
    evidence += [f"lr={lr:.2g}{_beside_default(files)}"] if lr else []
    at = int(nan[0]) if nan else max(files.losses, key=lambda point: point[1])[0] if files.losses else None
    do = "a lower learning rate and a longer warm-up"
    if nan and files.config.get("precision") == "bf16":
        do += "; precision=fp32 if that isn't enough; or rows that `lorafit check` finds odd"
    return Finding("diverged", "fault", "training ran away", "; ".join(evidence), do, files.again(*calmer(files)), at)


def calmer(files: Files) -> list[str]:
    """The settings to try after a training that ran away: the rate that advice gives, or a fifth of the run's own where that
    is hardly higher; and a longer warm-up."""
    lr, fair = files.setting("lr") or 1e-4, _fair_rate(files)
    longer = ["warmup=0.1"] if (files.setting("warmup") or 0) < 0.1 else []
    return [f"lr={fair if fair and lr > 2 * fair else lr / 5:.2g}", *longer]


def _high_rate(files: Files) -> Finding | None:
    """A rate far over the one that advice gives, though nothing broke."""
    lr, fair = files.setting("lr"), _fair_rate(files)
    if lr is None or fair is None or lr < 8 * fair:
        return None
    evidence = f"lr={lr:.2g}, {lr / fair:.0f} times the {fair:.2g} that advice gives for this base and these steps"
    do = "train with that rate too, and keep the better"
    return Finding(
        "high-rate", "warning", "the learning rate is very high", evidence, do, files.again(f"lr={fair:.2g}")
    )


def _low_rate(files: Files) -> Finding | None:
    """A rate far under the one that advice gives, where there was more to learn."""
    lr, fair, more = files.setting("lr"), _fair_rate(files), _more_to_learn(files)
    if not lr or fair is None or not more or files.config.get("start"):  # an old adapter may want a small one
        return None
    own = settings(METHODS[str(files.config["method"])]).get("alpha", (float, 0))[1]
    scaled = max(
        1.0, (files.setting("alpha") or 0) / own if own else 1.0
    )  # a larger alpha does what a larger rate does
    if lr * scaled > fair / 8:
        return None
    evidence = (
        f"lr={lr:.2g}, and advice gives {fair:.2g} for this base and these steps, {fair / lr:.0f} times that; {more}"
    )
    do = "train with that rate too, and keep the better"
    return Finding("low-rate", "warning", "the learning rate is very low", evidence, do, files.again(f"lr={fair:.2g}"))


def _little_trained(files: Files) -> Finding | None:
    """Far fewer trained numbers than advice chooses, where there was more to learn."""
    trained, fair, more = number(files.summary, "trainable_parameters"), _fair_numbers(files), _more_to_learn(files)
    if not trained or fair is None or not more or files.config.get("start") or trained > fair[1] / 32:
        return None
    r, targets = files.setting("r"), items(files.config, "targets", str)
    named = [f"targets={','.join(targets)}"] if targets else []
    named += [f"r={r:.0f}"] if r is not None else []
    evidence = f"{trained:,.0f} numbers ({', '.join(named)}), and advice trains {fair[1]:,}; {more}"
    changes = ["targets=all-linear"] if targets else []
    changes += [f"r={fair[0]}"] if r is not None and r < fair[0] else []
    return Finding(
        "little-trained", "warning", "very little is trained", evidence, "train as much as advice does, and keep the better",
        files.again(*changes) if changes else "",
    )  # fmt: skip


def _more_to_learn(files: Files) -> str:
    """The figures that say so: the held-out loss hardly fell, or still fell in the last half. Empty where it had come to rest, or
    was at its lowest before."""
    points, gain, best = files.held_out, files.learned, files.best
    if not files.summary or gain is None or gain < HARDLY or best is None or files.before is None:
        return ""
    half = points[-1][0] / 2
    if best[0] < half:
        return ""
    since, then = next(point for point in reversed(points) if point[0] <= half)
    late = (then - best[1]) / (files.before - best[1])
    falling = since > 0 and best[0] >= 1.5 * half and late > 0.1
    if gain >= LITTLE and not falling:
        return ""
    said = f"held-out loss {files.before:.4f} -> {best[1]:.4f} ({-gain:+.1%})"
    return f"{said}, {late:.0%} of that after step {since}" if falling else said


def _spikes(files: Files) -> Finding | None:
    """Single steps with a far higher loss and gradient than those around them."""
    found = []
    rows = [row for row in files.steps if number(row, "loss") is not None and number(row, "grad_norm") is not None]
    for i in range(20, len(rows)):
        around = rows[i - 20 : i]
        loss, norm = rows[i]["loss"], rows[i]["grad_norm"]
        if loss > 1.5 * max(r["loss"] for r in around) and norm > 5 * median(r["grad_norm"] for r in around):
            found.append((rows[i]["step"], loss))
    if not found:
        return None
    step, loss = found[0]
    evidence = (
        f"{len(found)} of {len(rows)} steps; at step {step} loss {loss:.3g}, half as high again as any of the 20 before"
    )
    rate = (files.setting("lr") or 2e-4) / 2
    do = "a lower learning rate; or look at what is odd in the rows, with `lorafit check`"
    return Finding("spikes", "warning", "the loss has spikes", evidence, do, files.again(f"lr={rate:.2g}"), int(step))


# --- did it learn? -----------------------------------------------------------------------------------------------------


def _learned_nothing(files: Files) -> Finding | None:
    """Held-out loss before and after are the same, or it rose; where nothing was held out, training loss at both ends."""
    gain, ends = files.learned, files.ends()
    if not files.summary or (gain is None and ends is None):
        return None
    if gain >= HARDLY if gain is not None else files.fell:
        return None
    evidence = []
    if gain is not None and files.before is not None:
        evidence.append(f"held-out loss {files.before:.4f} before, {files.before * (1 - gain):.4f} at best after")
    if ends:
        evidence.append(f"training loss {ends[0]:.3f} in the first steps, {ends[1]:.3f} in the last (means)")
    evidence.append(f"{files.last} steps")
    why, do, changes = _why_nothing(files, evidence)
    name = "nothing-learned"
    if gain is not None and files.fell and not why.startswith("the learning rate"):
        name, why, changes = "not-general", "the training loss fell, the held-out loss didn't", []
        do = "more rows, and held-out rows of the same kind"
    what = f"nothing was learned{' that holds for other rows' if name == 'not-general' else ''}: {why}"
    return Finding(name, "fault", what, "; ".join(evidence), do, files.again(*changes) if changes else "")


def _why_nothing(files: Files, evidence: list[str]) -> tuple[str, str, list[str]]:
    """The likeliest reason, what to do, and the settings."""
    lr, fair = files.setting("lr"), _fair_rate(files)
    trained, total = number(files.summary, "trainable_parameters"), number(files.summary, "total_parameters")
    if files.before is not None and files.before < 0.3:
        return "the base says these rows by itself", "nothing; or rows that hold something new to it", []
    slow = [f"lr={fair:.2g}"] if lr is not None and fair is not None and lr < fair / 4 else []
    if slow:
        evidence.append(f"lr={lr:.2g}{_beside_default(files)}")
    if trained and total and trained < total * 2e-4 and items(files.config, "targets", str):
        named = ",".join(items(files.config, "targets", str))
        evidence.append(f"{trained:,.0f} of {total:,.0f} numbers are trained (targets={named})")
        return "too little is trained", "all linear layers", ["targets=all-linear", *slow]
    if slow:
        return "the learning rate is too small", "the learning rate that advice gives", slow
    if files.last < 3 * FEW_STEPS:
        return "too few steps", "more steps", [files.longer(max(2.0, 3 * FEW_STEPS / max(1, files.last)))]
    rate = 3 * (lr or 2e-4)
    return "no setting stands out", "a higher learning rate first, then a larger r", [f"lr={rate:.2g}"]


def _still_falling(files: Files) -> Finding | None:
    """The held-out loss was still falling when it ended."""
    points = files.held_out
    if not files.summary or len(points) < 2 or files.before is None or (files.learned or 0) < HARDLY:
        return None
    best, last = files.best, points[-1]
    if best is None or best[0] != last[0]:
        return None
    # What the last quarter of the steps brought, beside all of them.
    since, then = next(point for point in reversed(points[:-1]) if point[0] <= 0.75 * last[0])
    if since < 0.4 * last[0]:  # it wasn't looked at often enough to tell
        return None
    recent, whole = then - last[1], files.before - last[1]
    few = files.last < FEW_STEPS
    if recent < 0.015 * last[1] or (recent < 0.1 * whole and not few):
        return None
    done = files.epochs
    passes = f", {done:.2g} epochs" if done else ""
    evidence = f"held-out loss {then:.4f} at step {since}, {last[1]:.4f} at the last, step {last[0]}, the best{passes}"
    change = files.longer(2.0)
    what = "trained too little: it was still learning at the end"
    return Finding("too-little", "warning", what, evidence, "longer", files.again(change), last[0])


def _few_steps(files: Files) -> Finding | None:
    """Hardly any steps, or a small part of the rows."""
    done = files.epochs
    if not files.summary or files.last == 0 or "all steps done" not in str(files.summary.get("stopped")):
        return None
    if files.last < FEW_STEPS:
        do, change = _more_steps(files)
        evidence = f"{files.last} steps of about {files.setting('batch_tokens') or 0:.0f} tokens"
        if not change:  # advice takes no more of so few rows
            return None
        return Finding(
            "few-steps", "warning", "hardly any steps were taken", evidence, do, files.again(change), files.last
        )
    if done is not None and done < 0.5:
        evidence = f"{done:.2g} of an epoch in {files.last} steps"
        what = f"only {done:.0%} of the rows were seen"
        return Finding(
            "part-of-epoch", "note", what, evidence, "more steps", files.again(files.longer(1 / max(done, 0.01)))
        )
    return None


def _more_steps(files: Files) -> tuple[str, str]:
    """What to do about few steps, and the setting: as many passes as advice takes, then smaller steps. Empty: neither."""
    done = files.setting("epochs") if _by_epochs(files) else files.epochs
    if not done or done < 0:
        return "more passes, or smaller steps", files.longer(3 * FEW_STEPS / files.last)
    epochs = passes(Config.epochs, files.last / done, number(files.data, "held_out_rows") or 0)
    if epochs > 1.2 * done:
        return "more passes", files.longer(epochs / done)
    tokens, rows = files.setting("batch_tokens") or 0, sum(number(files.data, key) or 0 for key in ROWS)
    least = max(LEAST_TOKENS, TOGETHER * (number(files.data, "tokens") or 0) / max(1, rows))  # as advice keeps
    smaller = max(least, sum(number(row, "tokens") or 0 for row in files.steps) / FEW_STEPS)
    return ("smaller steps", f"batch_tokens={smaller:.0f}") if 1.2 * smaller < tokens else ("", "")


def _overfitting(files: Files) -> Finding | None:
    """The held-out loss rises while the training loss falls."""
    best, ends = files.best, files.ends()
    if best is None or ends is None or len(files.held_out) < 3 or (files.learned or 0) <= 0:
        return None
    last = files.held_out[-1]
    rise = last[1] / best[1] - 1 if best[1] else 0.0
    before = [value for step, value in files.losses if step <= best[0]]
    after = [value for step, value in files.losses if step > best[0]]
    falling = bool(before and after) and fmean(after[-max(2, len(after) // 4) :]) < fmean(
        before[-max(2, len(before) // 4) :]
    )
    if rise < HARDLY or not falling or best[0] >= last[0]:
        return None
    share = best[0] / max(1, last[0])
    bad = rise > 0.05 or ends[1] < 0.1 * last[1]
    evidence = (
        f"held-out loss {best[1]:.4f} at step {best[0]}, {last[1]:.4f} at step {last[0]} ({rise:+.0%}), while the training"
        f" loss went on to {ends[1]:.3f}"
    )
    rows = number(files.data, "train_rows")
    evidence += f"; {rows:.0f} rows, {files.epochs:.2g} epochs" if rows and files.epochs else ""
    what = "overfitting: from there on it learned its rows by heart"
    kept = f"the adapter of step {best[0]} is the one that was kept; " if files.summary else ""
    do = f"{kept}a shorter run whose learning rate falls in time is often a little better, so are more rows"
    change = (
        f"steps={max(FEW_STEPS, int(best[0]))}"
        if files.setting("steps") or not files.epochs
        else files.longer(max(0.05, files.epochs * share / (files.setting("epochs") or 3)))
    )
    return Finding("overfitting", "warning" if bad else "note", what, evidence, do, files.again(change), best[0])


# --- the rows ----------------------------------------------------------------------------------------------------------


def _no_end(files: Files) -> Finding | None:
    """Whether what ends an answer is among what is learned."""
    pieces = items(files.data, "text_example", list, 2)
    stops = [str(stop["text"]) for stop in items(files.chat, "stop", dict) if stop.get("text")]
    learned = [str(text) for text, on in pieces if on]
    cut = number(files.data, "truncated_end") or 0
    rows = (number(files.data, "train_rows") or 0) + (number(files.data, "held_out_rows") or 0)
    if rows and cut > 0.2 * rows:
        longest = files.setting("max_tokens") or 0
        evidence = f"{cut:.0f} of {rows:.0f} rows are cut inside an answer (long=truncate, max_tokens={longest:.0f})"
        what = "many answers are learned without their end, so the model may not stop"
        do, command = _ends_again(files, rows)
        return Finding("no-end", "fault" if cut > 0.5 * rows else "warning", what, evidence, do, command)
    if not learned or not stops or (cut and learned[-1] == str(pieces[-1][0])):
        return None
    if any(stop in text for text in learned for stop in stops):
        return None
    if not any(stop in str(text) for text, _ in pieces for stop in stops):
        why = "the chat template puts none after an answer"
        do = (
            "a template that ends an answer with a stop token; or name that token as eos_token in the model's tokenizer"
        )
    else:
        why, do = f"learn={files.config.get('learn')} leaves it out", "learn=assistant learns the end of each answer"
    evidence = (
        f"stop tokens {', '.join(map(repr, stops))}; the first row's learned part ends with {learned[-1][-30:]!r}"
    )
    return Finding("no-end", "fault", f"the end of an answer is never learned: {why}", evidence, do)


def _ends_again(files: Files, rows: float) -> tuple[str, str]:
    """What to do about answers without an end, and the command: to leave such rows out only where that leaves most of them."""
    left = rows - (number(files.data, "truncated") or 0)
    if left >= rows / 2:
        return "leave such rows out, or allow longer ones", files.again("long=skip")
    few = f"long=skip would leave {max(0, left):.0f} of {rows:.0f} rows"
    if (most := _whole(files)) is not None:
        return f"allow longer ones, as far as memory allows it: {few}", files.again(f"max_tokens={most}")
    return f"shorter rows: {few}, and the base takes no longer ones", ""


def _whole(files: Files) -> int | None:
    """The max_tokens that cuts no row, or none but those over the base's context; None where that is no more than it was."""
    lengths, shape = _lengths(files), _shape(files)
    high = lengths[-1][1] if lengths else 0
    context = number(shape, "max_position_embeddings") or number(shape, "n_positions")
    high = min(high, int(context)) if context else high
    return high if high > (files.setting("max_tokens") or 0) else None


def _lengths(files: Files) -> list[tuple[int, int, int]]:
    """(low, high, rows): so many rows, of at least `low` and fewer than `high` tokens before any were cut; shorter ones first."""
    found = [
        row for row in items(files.data, "lengths", list, 3) if all(type(n) is int and 0 <= n < 1 << 53 for n in row)
    ]
    return sorted((low, high, rows) for low, high, rows in found if rows)


def _placeholders(files: Files) -> Finding | None:
    """Answers with {{name}} and the like, which nobody has filled in."""
    notes = items(files.data, "notes", dict)
    note = next((note for note in notes if str(note.get("reason")).startswith(PLACEHOLDERS)), None)
    if note is None:
        return None
    rows, of, line = number(note, "rows"), number(files.data, "rows"), number(note, "line")
    parts = [f"{rows:.0f} of {of:.0f} rows"] if rows and of else []
    parts += [f"the first at line {line:.0f} of {files.data.get('path')}"] if line else []
    what = "answers hold placeholders such as {{name}}, and it learns to say them"
    do = "put in what they stand for (`lorafit check` names the lines), then train again"
    return Finding("placeholders", "warning", what, ", ".join(parts), do)


def _cut_rows(files: Files) -> Finding | None:
    """Rows that were cut or left out."""
    cut, skipped = number(files.data, "truncated") or 0, number(files.data, "skipped") or 0
    faults = len(items(files.data, "faults", dict))
    rows = number(files.data, "rows") or 0
    if not rows or cut + skipped + faults == 0:
        return None
    longest = files.setting("max_tokens") or 0
    parts = [f"{cut:.0f} cut to {longest:.0f} tokens"] if cut else []
    parts += [f"{skipped:.0f} over {longest:.0f} tokens left out"] if skipped else []
    parts += [f"{faults} bad ones left out"] if faults else []
    most = _whole(files) if cut + skipped else None
    command = files.again(f"max_tokens={most}") if most else ""
    do = (
        "a larger max_tokens, where the model's context and memory allow it"
        if cut + skipped
        else "mend them: `lorafit check` lists them"
    )
    level: Level = "warning" if cut + skipped + faults > 0.1 * rows else "note"
    return Finding(
        "cut-rows", level, "not every row was used whole", f"of {rows:.0f} rows: {', '.join(parts)}", do, command
    )


def _few_rows(files: Files) -> Finding | None:
    """Too few rows to learn from, or to tell by."""
    rows, held = number(files.data, "train_rows"), number(files.data, "held_out_rows")
    if rows is None or held is None:
        return None
    twins = len(items(files.data, "duplicates", list))
    split = files.setting("held_out_share") != 0 and not files.config.get("held_out")
    if held == 0 and twins and rows >= SMALLEST and split:
        evidence = f"{rows:.0f} rows to train on, {twins} of them repeat another; rows that repeat are never held out"
        what = "nothing was held out, since the rows repeat each other, so nobody knows how well it learned"
        return Finding(
            "few-rows", "warning", what, evidence, "leave the repetitions out; or rows of your own with --held-out"
        )
    if rows < FEW_ROWS or held == 0:
        evidence = f"{rows:.0f} rows to train on, {held:.0f} held out"
        evidence += f"; {twins} rows of the file repeat another" if twins else ""
        what = "few rows: it can learn a manner from them, hardly facts"
        if held == 0:
            what = "nothing was held out, so nobody knows how well it learned, and nothing stops it in time"
        do = "more rows (hundreds for a manner, thousands for more)" + (
            "; or rows of your own with --held-out" if held == 0 else ""
        )
        return Finding("few-rows", "warning" if held == 0 else "note", what, evidence, do)
    return None


def _repeated_rows(files: Files) -> Finding | None:
    """Duplicates, and held-out rows that share their prompt with a training row."""
    rows, twins = number(files.data, "rows") or 0, len(items(files.data, "duplicates", list))
    same, held = len(items(files.data, "same_prompt", list)), number(files.data, "held_out_rows") or 0
    if held and same > 0.2 * held:
        what = "held-out rows share their prompt with training rows, so the held-out loss flatters"
        return Finding(
            "same-prompts",
            "warning",
            what,
            f"{same} of {held:.0f}",
            "held-out rows with prompts of their own, with --held-out",
        )
    if rows and twins > 0.1 * rows:
        what = "many rows are there more than once, and weigh as often"
        return Finding("duplicates", "note", what, f"{twins} of {rows:.0f} rows", "leave the repetitions out")
    return None


# --- the machine -------------------------------------------------------------------------------------------------------


def _memory(files: Files) -> Finding | None:
    """Steps that had to be repeated in smaller pieces."""
    short = [row for row in files.steps if (sizes := items(row, "too_large", int)) and max(sizes) < 1 << 53]
    tried = [size for row in short for size in row["too_large"] if isinstance(size, int)]
    sizes = [value for row in files.steps if (value := number(row, "micro_tokens")) is not None]
    if not tried or not sizes or files.stopped.get("kind") == "OutOfMemory":
        return None
    evidence = (
        f"micro-batches of {max(tried)} tokens didn't fit; after {len(tried)} attempts {sizes[-1]:.0f} tokens did"
    )
    do = "nothing: the result is the same but for rounding; checkpointing=true, quant=nf4 or more memory make room"
    return Finding("memory", "note", "memory was short", evidence, do, "", int(short[0]["step"]))


def _shape(files: Files) -> dict[str, Any]:
    """The base's config, of its part for text; empty where it isn't there any more."""
    shape = read_json(Path(str(files.summary.get("base_path", ""))) / "config.json") if files.summary else {}
    inner = shape.get("text_config")
    return inner if isinstance(inner, dict) and inner else shape


def _fair_rate(files: Files) -> float | None:
    """The rate that advice gives this run's base and steps; None where the base's config isn't there any more."""
    shape = _shape(files)
    width, tokens = number(shape, "hidden_size") or number(shape, "n_embd") or 0, files.setting("batch_tokens") or 0
    kind = METHODS.get(str(files.config.get("method")))
    if width < 1 or tokens < 1 or kind is None:
        return None
    return rate_for(int(width), str(shape.get("model_type")), int(tokens)) * kind.lr_factor


def _fair_numbers(files: Files) -> tuple[int, int] | None:
    """(r, numbers) that advice trains of this run's base, at least; None as for the rate, and for a method that isn't as LoRA."""
    shape = _shape(files)

    def size(*keys: str) -> int:
        return int(next((found for key in keys if (found := number(shape, key))), 0))

    h, layers = size("hidden_size", "n_embd"), size("num_hidden_layers", "n_layer")
    if min(h, layers, size("num_attention_heads", "n_head")) < 1 or files.config.get("method") not in AS_LORA:
        return None
    widths = sides(h, size)
    r = min(RANK, *widths)
    return r, r * numbers_of(layers, *widths)


def _beside_default(files: Files) -> str:
    fair = _fair_rate(files)
    return f" (advice: {fair:.2g})" if fair and not math.isclose(fair, files.setting("lr") or 0, rel_tol=0.05) else ""


_CHECKS: tuple[Callable[[Files], Finding | None], ...] = (
    _ended,
    _diverged,
    _high_rate,
    _low_rate,
    _little_trained,
    _learned_nothing,
    _no_end,
    _placeholders,
    _still_falling,
    _few_steps,
    _overfitting,
    _spikes,
    _cut_rows,
    _few_rows,
    _repeated_rows,
    _memory,
)

# A finding isn't shown beside one of these, which is the reason of it.
_HIDES: dict[str, set[str]] = {
    "high-rate": {"diverged"},
    "low-rate": {"diverged", "going-on"},
    "little-trained": {"diverged", "going-on"},
    "nothing-learned": {"diverged", "high-rate", "going-on"},
    "not-general": {"diverged"},
    "too-little": {"nothing-learned", "few-steps", "low-rate", "little-trained", "going-on"},
    "few-steps": {"nothing-learned", "going-on"},
    "part-of-epoch": {"too-little", "nothing-learned", "going-on"},
    "overfitting": {"diverged"},
    "spikes": {"diverged"},
}

"""What a search tried, as rows and pictures, from its tune.json: for report.html, for tune.svg, for the terminal."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorafit import charts
from lorafit.log import many

ORDINALS = ("first", "second")  # comparisons
NEAR = 0.01  # of the winner's score, that another one is off by where noise may have decided
COLOURS = ("#2166c0", "#c8590a", "#15803d", "#8b3fb0", "#b42318", "#0f766e")
ON_DARK = ("#6aa9f4", "#f29a52", "#57c785", "#c792ea", "#f47c6c", "#4fd1c5")
HIGH = 300


def style(rule: str, colours: Sequence[str] = COLOURS) -> str:
    """A rule of a style sheet for each colour, with {0} its class and {1} itself."""
    return " ".join(rule.format(f"c{i}", colour) for i, colour in enumerate(colours))


@dataclass(frozen=True)
class Comparison:
    """One of the moments at which candidates are compared, counted from 0. `step`: after which; None where that isn't the same
    for all, or a tune.json of an earlier version doesn't say."""

    number: int
    step: int | None

    def words(self) -> str:
        """When it was."""
        return f"after {many(self.step, 'step')}" if self.step else f"at the {ORDINALS[self.number]} comparison"

    def head(self) -> str:
        """Of a column."""
        return self.words().capitalize() if self.step else f"{ORDINALS[self.number]} comparison".capitalize()

    def loss(self, c: dict[str, Any]) -> float | None:
        """A candidate's held-out loss there; None: it didn't get there, or failed."""
        loss = c["losses"][self.number] if self.number < len(c["losses"]) else None
        return loss if loss is None else float(loss)

    def when(self, c: dict[str, Any]) -> str:
        """After which of its steps a candidate's loss there was measured; one whose training had ended has its best loss."""
        if not c.get("rungs"):
            return ""
        step, ended = c["rungs"][self.number], c["taken"]
        return f"step {step}" if step <= ended else f"ended at {ended}"


def comparisons(these: Sequence[dict[str, Any]]) -> list[Comparison]:
    """Those of a search; one where the second is at the step of the first for all."""
    rungs = [tuple(c.get("rungs") or ()) for c in these]
    if not all(rungs):
        return [Comparison(number, None) for number in range(len(ORDINALS))]
    one = all(len(set(steps)) == 1 for steps in rungs)
    each = [{steps[number] for steps in rungs} for number in range(1 if one else len(ORDINALS))]
    return [Comparison(number, min(steps) if len(steps) == 1 else None) for number, steps in enumerate(each)]


def heads(found: dict[str, Any]) -> list[str]:
    """Of the columns of `rows`."""
    compared = [one.head() for one in comparisons(candidates(found))]
    answers = f" of {found['answers']}" if found.get("answers") else ""
    decides = [] if _by_loss(found) else [f"{found['objective']}{answers}"]
    return ["", "Settings", "Learning rate", *compared, "Best loss", *decides, "Outcome"]


def rows(found: dict[str, Any]) -> list[list[str]]:
    """A row for each candidate, best first; those that went farther before the others."""
    compared = comparisons(candidates(found))
    return [
        [
            f"#{c['number']}",
            words(c["values"]) or "as they were",
            f"{c['settings']['lr']:.3g}",
            *(_compared(c, one) for one in compared),
            _figure(c["best_loss"]) if c["best_step"] else "",
            *([] if _by_loss(found) else [_figure(c.get("score"))]),
            "the winner" if c["winner"] else c["why"] or ("trained to its end" if c["state"] == "done" else c["state"]),
        ]
        for c in order(found)
    ]


def _compared(c: dict[str, Any], one: Comparison) -> str:
    """A loss, with its step where that isn't the column's."""
    loss, when = one.loss(c), one.when(c)
    return _figure(loss) + (f" ({when})" if loss is not None and when not in ("", f"step {one.step}") else "")


def _by_loss(found: dict[str, Any]) -> bool:
    return str(found.get("objective", "loss")) == "loss"


def winner(found: dict[str, Any]) -> str:
    """Who has won, by what, and by how little where that is so."""
    parts = [f"#{found['winner']}: {found['winner_settings'] or 'the settings as they were'}"]
    scores = {c["number"]: c["score"] for c in candidates(found) if c.get("score") is not None}
    best = scores.pop(found["winner"], None)
    if best is not None and not _by_loss(found):
        parts.append(f"{found['objective']} {best:.2f}{_answers(found)}")
    if near := [n for n, score in scores.items() if best is not None and abs(score - best) <= NEAR * abs(best)]:
        parts.append(f"within {100 * NEAR:g} % of {' and '.join(f'#{n}' for n in near)}: noise may decide")
    return "; ".join(parts)


def budget(found: dict[str, Any]) -> str:
    """What the budget was enough for, where it was a time or something was left untried; otherwise nothing."""
    number, untried, timed = len(candidates(found)), found.get("untried"), not str(found.get("budget", "8")).isdigit()
    enough = f"the time was enough for {'all ' * bool(found.get('all'))}{many(number, 'candidate')}"
    parts = [enough] * timed
    if untried:
        why = "no time" if timed else f"the budget of {found['budget']} was used up"
        parts.append(f"{' and '.join(untried)} {'was' if len(untried) == 1 else 'were'} not tried: {why}")
    return "; ".join(parts)


def _answers(found: dict[str, Any]) -> str:
    number = found.get("answers")
    return f" of {many(number, 'answer')}" if number else ""


def candidates(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of a tune.json; none where it isn't one."""
    these = found.get("candidates")
    return [c for c in these if isinstance(c, dict)] if isinstance(these, list) else []


def order(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The winner first, then finalists by what decided, then by how far they came, and by loss."""
    sign = 1 if _by_loss(found) else -1

    def key(c: dict[str, Any]) -> tuple[Any, ...]:
        losses, score = [loss for loss in c["losses"] if loss is not None], c.get("score")
        if _by_loss(found) and c.get("taken") == c.get("steps"):  # those cut at their end have no score
            score = c["best_loss"]
        far = (-len(losses), losses[-1] if losses else math.inf)
        return (
            not c["winner"],
            c["state"] == "failed",
            math.inf if score is None else sign * score,
            *far,
            c["number"],
        )

    return sorted(candidates(found), key=key)


def words(values: dict[str, Any]) -> str:
    """Settings as they are written."""
    return " ".join(f"{key}={_word(value)}" for key, value in values.items())


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "default"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def pictures(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(title, SVG): the loss against the learning rate by rank, at each comparison and at the end; and how the settings went
    together."""
    these, drawn = candidates(found), []
    compared = comparisons(these)
    decided = "" if _by_loss(found) else f"; {found['objective']}{_answers(found)} decided"
    judged = [c for c in these if compared[0].loss(c) is not None]
    names = _names(these)
    seen = []
    for title, points in [*((f"Held-out loss {one.words()}", _there(these, one)) for one in compared), _ends(these)]:
        points = [point for point in points if point.candidate["settings"]["lr"] > 0]  # the others have no logarithm
        shown = {(point.candidate["number"], point.loss, point.step) for point in points}
        if len(points) > 1 and any(math.isfinite(point.loss) for point in points) and shown not in seen:
            seen.append(shown)  # in short trainings a comparison is after the same steps as the next, or as the end
            drawn.append((f"{title}, by learning rate{decided}", _scatter(points, names, these, title)))
    keys = [key for key in found.get("searched", []) if len({_word(c["settings"].get(key)) for c in judged}) > 1]
    if keys and len(judged) > 1:
        out = len(these) - len(judged)
        left = f"; {out} that failed before {'is' if out == 1 else 'are'} left out" if out else ""
        title = f"How settings went together, and the loss {compared[0].words()}; the winner is the thick line"
        drawn.append((f"{title}{decided}{left}", _parallel(judged, keys, compared[0])))
    return drawn


@dataclass(frozen=True)
class Point:
    """A candidate in a picture, with its loss there, infinite where it failed, the words for where that is, and its step."""

    candidate: dict[str, Any]
    loss: float
    when: str
    step: int | None = None

    def title(self) -> str:
        """What it tells when it is pointed at."""
        c = self.candidate
        won = ", the winner," if c["winner"] else ""
        loss = f"{self.loss:.4f}" if math.isfinite(self.loss) else f"failed, {c.get('why') or 'without a loss'}"
        return html.escape(f"#{c['number']}{won} {words(c['values']) or 'as they were'}{self.when}: {loss}")


def _there(these: Sequence[dict[str, Any]], one: Comparison) -> list[Point]:
    """Those that came to a comparison, or failed on the way to it from the one before."""
    found = []
    for c in these:
        loss, when = one.loss(c), one.when(c)
        if loss is not None:
            step = min(c["rungs"][one.number], c["taken"]) if c.get("rungs") else None
            found.append(Point(c, loss, f" {when}" if when else "", step))
        elif c.get("state") == "failed" and len(c["losses"]) <= one.number and (not one.number or c["losses"]):
            found.append(Point(c, math.inf, ""))
    return found


def _ends(these: Sequence[dict[str, Any]]) -> tuple[str, list[Point]]:
    """Those that were trained to their ends, wherever they came in."""
    ended = [
        c
        for c in these
        if c.get("best_loss") is not None
        and (c.get("state") == "done" or (c.get("state") == "cut" and c["taken"] >= c["steps"]))
    ]
    points = [
        Point(
            c,
            c["best_loss"],
            f" best at step {c['best_step']}" if c.get("best_step") else " at its best",
            c.get("best_step"),
        )
        for c in ended
    ]
    return "Held-out loss at the best step of those trained to their ends", points


def _scatter(points: Sequence[Point], names: dict[int, str], these: Sequence[dict[str, Any]], title: str) -> str:
    rates = [c["settings"]["lr"] for c in these if c["settings"]["lr"] > 0]
    ordered = sorted(set(names.values()), key=lambda name: (len(name), name))
    series = [
        (html.escape(name), f"c{i % len(COLOURS)}", [_dot(p) for p in points if names[p.candidate["number"]] == name])
        for i, name in enumerate(ordered)  # the same colours in all pictures
    ]
    won = next((p for p in points if p.candidate["winner"]), None)
    ring = None if won is None else (*_dot(won)[:2], f"#{won.candidate['number']}, the winner")
    return charts.scatter(series, title, "learning rate", HIGH, (min(rates), max(rates)), ring)


def _dot(point: Point) -> tuple[float, float, str]:
    return point.candidate["settings"]["lr"], point.loss, point.title()


def svg(found: dict[str, Any]) -> str:
    """The pictures as one file."""
    sheet = style("path.{0}{{stroke:{1}}}tspan.{0}{{fill:{1}}}circle.{0}{{fill:{1}}}") + (
        "svg{font:12px sans-serif}text{fill:#444}path{fill:none;stroke-width:2}path.grid{stroke:#ddd;stroke-width:1}"
        "path.cut{stroke:#98a2ab;stroke-width:1}path.won{stroke:#15803d;stroke-width:3}"
        "circle.open{fill:#fff;stroke:#444;stroke-width:1.5}circle.ring{fill:none;stroke:#15803d;stroke-width:2}text.on{paint-order:stroke;stroke:#fff;stroke-width:4px}"
    )
    return charts.alone([(html.escape(title), drawn) for title, drawn in pictures(found)], sheet)


def _names(these: Sequence[dict[str, Any]]) -> dict[int, str]:
    """By number, what candidates are told apart by: their ranks, and methods and sites where there are several."""
    several = [key for key in ("method", "targets") if len({_word(c["settings"].get(key)) for c in these}) > 1]
    found = {}
    for c in these:
        settings = c["settings"]
        parts = [f"r={settings['r']}"] if settings.get("r") is not None else []
        parts += [_word(settings.get(key) or "") for key in several]
        found[c["number"]] = " ".join(filter(None, parts)) or str(settings.get("method"))
    return found


def _parallel(these: Sequence[dict[str, Any]], keys: Sequence[str], one: Comparison) -> str:
    axes, places = [], []
    for key in keys:
        marks, at = _axis([c["settings"].get(key) for c in these], key == "lr")
        axes.append(charts.Axis(html.escape(key), [(share, html.escape(text)) for share, text in marks]))
        places.append(at)
    points = _there(these, one)
    losses = [point.loss for point in points]
    most = charts.far(losses)
    marks, at = _axis([min(loss, most) for loss in losses], False)
    if max(losses) > most:
        marks = [(share, text) for share, text in marks if share < 0.94] + [(1.0, f"≥ {most:.3g}")]
    axes.append(charts.Axis(f"loss {one.words()}" if one.step else one.head().lower(), marks))
    places.append(at)
    lines = [
        (point.title(), "won" if point.candidate["winner"] else "cut", [each[i] for each in places])
        for i, point in sorted(enumerate(points), key=lambda item: item[1].candidate["winner"])
    ]
    return charts.parallel(axes, lines, "settings and loss of each candidate", HIGH)


def _axis(values: Sequence[Any], log: bool) -> tuple[list[tuple[float, str]], list[float]]:
    """The marks of an axis, and where each of these values lies on it."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        log = log and min(values) > 0
        scaled = [math.log10(value) if log else float(value) for value in values]
        low, span = min(scaled), (max(scaled) - min(scaled)) or 1.0
        at = [(value - low) / span for value in scaled]
        marks = {share: f"{value:.3g}" for share, value in zip(at, values, strict=True)}
        kept: list[tuple[float, str]] = []
        for share, text in sorted(marks.items()):  # none that would lie on another
            if not kept or share - kept[-1][0] > 0.06:
                kept.append((share, text))
        return kept, at
    named = [_word(value) if value not in (None, []) else "default" for value in values]
    texts = list(dict.fromkeys(named))
    shares = {text: i / max(1, len(texts) - 1) for i, text in enumerate(texts)}
    return [(share, text) for text, share in shares.items()], [shares[text] for text in named]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"

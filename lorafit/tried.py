"""What a search tried, as rows and pictures, from its tune.json: for report.html, for tune.svg, for the terminal."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from lorafit import charts

HEADS = ["", "Settings", "Learning rate", "After 1/8", "After 3/8", "Best", "Outcome"]
COLOURS = ("#2166c0", "#c8590a", "#15803d", "#8b3fb0", "#b42318", "#0f766e")
ON_DARK = ("#6aa9f4", "#f29a52", "#57c785", "#c792ea", "#f47c6c", "#4fd1c5")
HIGH = 300


def style(rule: str, colours: Sequence[str] = COLOURS) -> str:
    """A rule of a style sheet for each colour, with {0} its class and {1} itself."""
    return " ".join(rule.format(f"c{i}", colour) for i, colour in enumerate(colours))


def rows(found: dict[str, Any]) -> list[list[str]]:
    """A row for each candidate, best first; those that went farther before the others."""
    return [
        [
            f"#{c['number']}",
            words(c["values"]) or "as they were",
            f"{c['settings']['lr']:.3g}",
            *(_figure(c["losses"][i] if i < len(c["losses"]) else None) for i in (0, 1)),
            _figure(c["best_loss"]) if c["best_step"] else "",
            "the winner" if c["winner"] else c["why"] or ("trained to its end" if c["state"] == "done" else c["state"]),
        ]
        for c in order(candidates(found))
    ]


def candidates(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of a tune.json; none where it isn't one."""
    these = found.get("candidates")
    return [c for c in these if isinstance(c, dict)] if isinstance(these, list) else []


def order(these: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The winner first, then by how far they came, and by loss."""

    def key(c: dict[str, Any]) -> tuple[Any, ...]:
        losses = [loss for loss in c["losses"] if loss is not None]
        return not c["winner"], c["state"] == "failed", -len(losses), losses[-1] if losses else math.inf, c["number"]

    return sorted(these, key=key)


def words(values: dict[str, Any]) -> str:
    """Settings as they are written."""
    return " ".join(f"{key}={_word(value)}" for key, value in values.items())


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "default"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def pictures(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(title, SVG): the loss against the learning rate by rank, at each rung; and how the settings went together."""
    these, drawn = candidates(found), []
    judged = [c for c in these if c["losses"] and c["losses"][0] is not None]
    rates, names = [c["settings"]["lr"] for c in judged], _names(judged)
    ordered = sorted(set(names.values()), key=lambda name: (len(name), name))
    styles = {name: f"c{i % len(COLOURS)}" for i, name in enumerate(ordered)}  # the same in both pictures
    for rung, part in enumerate(("an eighth", "three eighths")):
        there = [c for c in judged if rung < len(c["losses"]) and c["losses"][rung] is not None]
        if len(there) > 1:
            title = f"Held-out loss after {part} of training, by learning rate"
            points = [(html.escape(name), kind, _points(there, names, name, rung)) for name, kind in styles.items()]
            drawn.append((title, charts.scatter(points, title, "learning rate", HIGH, (min(rates), max(rates)))))
    keys = [key for key in found.get("searched", []) if len({_word(c["settings"].get(key)) for c in judged}) > 1]
    if keys and len(judged) > 1:
        drawn.append(("How settings went together; the winner is the thick line", _parallel(judged, keys)))
    return drawn


def svg(found: dict[str, Any]) -> str:
    """The pictures as one file."""
    sheet = style("path.{0}{{stroke:{1}}}tspan.{0}{{fill:{1}}}circle.{0}{{fill:{1}}}") + (
        "svg{font:12px sans-serif}text{fill:#444}path{fill:none;stroke-width:2}path.grid{stroke:#ddd;stroke-width:1}"
        "path.cut{stroke:#98a2ab;stroke-width:1}path.won{stroke:#15803d;stroke-width:3}"
        "circle.open{fill:#fff;stroke:#444;stroke-width:1.5}text.on{paint-order:stroke;stroke:#fff;stroke-width:4px}"
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


def _points(
    these: Sequence[dict[str, Any]], names: dict[int, str], name: str, rung: int
) -> list[tuple[float, float, str]]:
    """Rate, loss and title of those with this name."""
    return [
        (
            c["settings"]["lr"],
            c["losses"][rung],
            html.escape(f"#{c['number']} {words(c['values'])}: {c['losses'][rung]:.4f}"),
        )
        for c in these
        if names[c["number"]] == name
    ]


def _parallel(these: Sequence[dict[str, Any]], keys: Sequence[str]) -> str:
    axes, places = [], []
    for key in keys:
        marks, at = _axis([c["settings"].get(key) for c in these], key == "lr")
        axes.append(charts.Axis(html.escape(key), [(share, html.escape(text)) for share, text in marks]))
        places.append(at)
    losses = [c["losses"][0] for c in these]
    most = charts.far(losses)
    marks, at = _axis([min(loss, most) for loss in losses], False)
    if max(losses) > most:
        marks = [(share, text) for share, text in marks if share < 0.94] + [(1.0, f"≥ {most:.3g}")]
    axes.append(charts.Axis("loss after 1/8", marks))
    places.append(at)
    lines = [
        (
            html.escape(f"#{c['number']} {words(c['values'])}: {c['losses'][0]:.4f}"),
            "won" if c["winner"] else "cut",
            [each[i] for each in places],
        )
        for i, c in sorted(enumerate(these), key=lambda item: item[1]["winner"])
    ]
    return charts.parallel(axes, lines, "settings and loss of each candidate", HIGH)


def _axis(values: Sequence[Any], log: bool) -> tuple[list[tuple[float, str]], list[float]]:
    """The marks of an axis, and where each of these values lies on it."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
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

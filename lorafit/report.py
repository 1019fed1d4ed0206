"""A run as one HTML page that opens offline: did it learn, the curves, what it says now, the data, the settings.

Everything in the page comes from the files of the run folder. They hold rows of somebody's data and answers of a model,
so all of it is escaped, and the page forbids itself scripts and outside resources.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lorafit import charts, doctor, tried
from lorafit.charts import Point
from lorafit.config import read_yaml
from lorafit.doctor import Finding, items, number
from lorafit.errors import RunError
from lorafit.files import read_json, read_json_lines, write_text
from lorafit.log import count, duration, size

MOST_ROWS = 20  # of a list of faults or duplicates


def write(run: Path) -> Path:
    """Writes `report.html` into a run folder and returns its path. Only config.yaml must be there."""
    if not (run / "config.yaml").is_file():
        raise RunError(f"{run} is not a run folder: it has no config.yaml")
    settings = read_yaml(run / "config.yaml")
    steps = doctor.by_step(read_json_lines(run / "metrics.jsonl"))
    evaluations = doctor.by_step(read_json_lines(run / "evaluations.jsonl"))
    data, summary = read_json(run / "data.json"), read_json(run / "summary.json")
    findings = doctor.examine(run, ending=True)
    best = _best(evaluations, summary)
    body = "".join(
        f"<section><h2>{title}</h2>{content}</section>"
        for title, content in (
            ("Verdict", _verdict(steps, evaluations, summary, best, findings)),
            ("Diagnosis", _diagnosis(findings)),
            ("Curves", _curves(steps, evaluations, best, findings)),
            ("Search", _search(read_json(run / "tune.json"))),
            ("Samples", _samples(evaluations, best)),
            ("Data", _data(data)),
            ("Summary", _summary(summary)),
            ("Settings", _pairs((key, _plain(value)) for key, value in settings.items())),
        )
        if content
    )
    write_text(run / "report.html", _page(f"Training run {_escape(run.resolve().name)}", body), again="")
    return run / "report.html"


def adapter(name: str, facts: Iterable[tuple[str, str]], norms: dict[str, dict[str, float]]) -> str:
    """An adapter as a page of its own: facts by label, and a picture of the norms of each grouping."""
    figures = "".join(
        charts.columns([(_escape(label), value) for label, value in group.items()], f"‖ΔW‖ by {_escape(title)}")
        for title, group in norms.items()
        if group
    )
    body = f"<section><h2>What it is</h2>{_pairs(facts)}</section><section><h2>What it adds</h2>{figures}</section>"
    return _page(f"Adapter {_escape(name)}", body)


# --- the files


def _points(rows: list[dict[str, Any]], key: str) -> list[Point]:
    return [(row["step"], value) for row in rows if (value := number(row, key)) is not None]


def _best(evaluations: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any] | None:
    measured = [row for row in evaluations if number(row, "held_out_loss") is not None]
    chosen = [row for row in measured if row["step"] == summary.get("best_step")]
    chosen = chosen or [row for row in measured if row.get("best") is True][-1:]
    return chosen[0] if chosen else min(measured, key=lambda row: float(row["held_out_loss"]), default=None)


# --- the sections


def _verdict(
    steps: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    summary: dict[str, Any],
    best: dict[str, Any] | None,
    findings: list[Finding],
) -> str:
    held_out = _points(evaluations, "held_out_loss")
    before, after = number(summary, "held_out_loss_before"), number(summary, "held_out_loss_after")
    if before is None and held_out:
        before = held_out[0][1]
    if after is None and best is not None and len(held_out) > 1:
        after = float(best["held_out_loss"])
    notes = [] if summary else ["The run has no summary yet: it is still going on, or it was cut off."]
    if summary and findings and findings[0].level != "note":  # what to do is said by the findings alone
        notes.append(f"{findings[0].what[:1].upper()}{findings[0].what[1:]}. What to change is under Diagnosis.")
    if before is None or after is None:
        losses = [value for _, value in _points(steps, "loss")]
        if len(losses) > 1:
            tenth = max(1, len(losses) // 10)
            first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
            notes.append(
                f"The training loss went from {first:.3f} to {last:.3f}, means of the first and the last steps."
            )
        word, tone = "Can't tell: the loss on held-out rows wasn't measured before and after.", "so-so"
        return f'<p class="verdict {tone}">{word}</p>' + "".join(f"<p>{note}</p>" for note in notes)
    change = after / before - 1 if before else 0.0
    lowest = float(best["held_out_loss"]) if best is not None else after
    rose = bool(held_out) and held_out[-1][1] > 1.02 * lowest
    if change < -0.02:
        word, tone = "It learned.", "good"
        times = math.exp(min(before - after, 50))
        notes.insert(
            0, f"A token of a held-out answer became {times:.{1 if times < 100 else 0}f} times as likely on average."
        )
    elif change <= 0.02 and not rose:
        word, tone = "It hardly learned: the held-out loss stayed where it was.", "so-so"
    else:
        word, tone = "It didn't learn: the held-out loss rose.", "bad"
    if best is not None and rose:
        where = "before training" if best["step"] == 0 else f"at step {_plain(best['step'])}"
        heart = any(one.name == "overfitting" for one in findings)
        notes.append(
            f"The held-out loss was lowest {where} and rose to {held_out[-1][1]:.3f} at step {_plain(held_out[-1][0])}"
            + (": from there on the training rows were being memorised." if heart else ".")
        )
    at = f" at step {_plain(best['step'])}, the best" if best is not None else ""
    figures = f"Held-out loss <b>{before:.3f}</b> before training → <b>{after:.3f}</b>{at} ({change:+.0%})"
    return f'<p class="verdict {tone}">{word}</p><p>{figures}</p>' + "".join(f"<p>{note}</p>" for note in notes)


def _curves(
    steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], best: dict[str, Any] | None, findings: list[Finding]
) -> str:
    loss, rate, held_out = _points(steps, "loss"), _points(steps, "lr"), _points(evaluations, "held_out_loss")
    if not loss and not held_out:
        return ""
    mark = [(best["step"], float(best["held_out_loss"]))] if best else []
    series = [
        charts.Series("training loss", "raw", charts.thin(loss)),
        charts.Series("training loss, smoothed", "smooth", charts.thin(charts.smooth(loss)), hover=True),
        charts.Series("held-out loss", "held", held_out, line=len(held_out) > 1, dots=True),
        charts.Series("best", "best", mark, line=False, dots=True),
        charts.Series("trouble", "trouble", _troubles(findings, loss), line=False, dots=True),
    ]
    xs = [step for step, _ in loss + rate + held_out]
    span = min(xs), max(xs)  # one for both charts, so that steps are above each other
    drawn = charts.chart(series, "loss", 300, span)
    if len(rate) > 1:
        drawn += charts.chart(
            [charts.Series("learning rate", "rate", charts.thin(rate), hover=True)], "learning rate", 150, span
        )
    return drawn


def _troubles(findings: list[Finding], loss: list[Point]) -> list[Point]:
    """Where in the training loss faults and warnings show."""
    at = dict(loss)
    steps = {one.step for one in findings if one.step is not None and one.level != "note"}
    return [(step, at[step]) for step in sorted(steps) if step in at]


def _diagnosis(findings: list[Finding]) -> str:
    rows = [
        [one.level, f"{one.what}: {one.evidence}", "\n".join(filter(None, (one.do, one.command)))] for one in findings
    ]
    return _table(["", "What", "What to change"], rows, "levels") if rows else ""


def _samples(evaluations: list[dict[str, Any]], best: dict[str, Any] | None) -> str:
    answered = [row for row in evaluations if items(row, "samples", dict)]
    if not answered:
        return ""
    main = best if best in answered else answered[-1]
    first = answered[0]
    old = {_plain(s.get("prompt")): s.get("answer") for s in first["samples"] if isinstance(s, dict)}
    heads = ["Prompt", "Expected", "Answer at step " + _plain(main["step"])]
    if first is not main:
        heads.insert(2, "Before training" if first["step"] == 0 else f"Step {_plain(first['step'])}")
    rows = []
    for sample in items(main, "samples", dict):
        cells = [sample.get("prompt"), sample.get("expected"), sample.get("answer")]
        if first is not main:
            cells.insert(2, old.get(_plain(sample.get("prompt"))))
        rows.append(list(map(_plain, cells)))
    others = "".join(
        f"<h3>Step {_escape(_plain(row['step']))}</h3>"
        + _table(
            ["Prompt", "Answer"],
            [[_plain(s.get("prompt")), _plain(s.get("answer"))] for s in items(row, "samples", dict)],
        )
        for row in answered
        if row is not main
    )
    return _table(heads, rows) + (f"<details><summary>Other evaluations</summary>{others}</details>" if others else "")


def _search(found: dict[str, Any]) -> str:
    """What `lorafit tune` tried, for a run that is its winner."""
    try:
        rows, pictures, heads = tried.rows(found), list(tried.pictures(found)), tried.heads(found)
        said = [f"Winner {tried.winner(found)}" if found.get("winner") else "", tried.budget(found).capitalize()]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # somebody has changed a value in it
        return "<p>tune.json is damaged, so what was tried can't be shown.</p>"
    if not rows:
        return ""
    drawn = "".join(f"<h3>{_escape(title)}</h3><figure>{svg}</figure>" for title, svg in pictures)
    won = "".join(f"<p>{_escape(line)}</p>" for line in said if line)
    return won + _table(heads, rows, "tried") + drawn


def _data(data: dict[str, Any]) -> str:
    if not data:
        return ""
    formats = data.get("by_format")
    facts = [("File", _plain(data["path"]))] if "path" in data else []
    for key, label in _DATA_FACTS.items():
        if (value := number(data, key)) is not None:
            facts.append((label, f"{value:.1%}" if key == "share" else count(int(value))))
    if isinstance(formats, dict):
        facts.append(("Formats", ", ".join(f"{name} {_plain(number)}" for name, number in formats.items())))
    parts = [_pairs(facts)]
    if lengths := [(a, b, c) for a, b, c in items(data, "lengths", list, 3) if all(map(_is_amount, (a, b, c)))]:
        parts.append(charts.histogram(lengths))
    if example := items(data, "text_example", list, 2):
        marked = "".join(f"<mark>{_escape(text)}</mark>" if on else _escape(text) for text, on in example)
        parts.append(
            f'<h3>One row as the model sees it; <mark>marked</mark> is learned</h3><pre dir="auto">{marked}</pre>'
        )
    for key, title in (("faults", "Rows that can't be used"), ("notes", "Rows to look at")):
        if found := items(data, key, dict):
            rows = [[_plain(item.get("line")), _plain(item.get("reason"))] for item in found]
            parts.append(f"<h3>{title} ({count(len(rows))})</h3>" + _table(["Line", "Reason"], rows, "lines"))
    if twins := items(data, "duplicates", list, 2):
        rows = [[_plain(line), _plain(first)] for line, first in twins]
        parts.append(f"<h3>Duplicates ({count(len(rows))})</h3>" + _table(["Line", "Same as line"], rows, "lines"))
    return "".join(parts)


_DATA_FACTS = {
    "rows": "Rows",
    "train_rows": "Training rows",
    "held_out_rows": "Held-out rows",
    "tokens": "Tokens",
    "target_tokens": "Learned tokens",
    "share": "Share learned",
    "truncated": "Rows truncated",
    "skipped": "Rows skipped",
}


def _summary(summary: dict[str, Any]) -> str:
    facts = []
    for key, (label, show) in _SUMMARY_FACTS.items():
        if (value := number(summary, key)) is not None:
            facts.append((label, show(value)))
        elif isinstance(summary.get(key), str):
            facts.append((label, summary[key]))
    learned, total = number(summary, "trainable_parameters"), number(summary, "total_parameters")
    if learned is not None and total:
        facts.append(("Share trained", f"{learned / total:.2%}"))
    return _pairs(facts) if facts else ""


def _whole_count(value: float) -> str:
    return count(int(value))


_SUMMARY_FACTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "base": ("Base model", str),
    "method": ("Method", str),
    "stopped": ("Stopped", str),
    "seconds": ("Time", duration),
    "tokens_per_second": ("Tokens per second", _whole_count),
    "peak_rss_bytes": ("Peak memory", size),
    "peak_gpu_bytes": ("Peak memory of the GPU", size),
    "adapter_bytes": ("Adapter size", size),
    "best_step": ("Best step", _whole_count),
    "held_out_loss_before": ("Held-out loss before training", "{:.3f}".format),
    "held_out_loss_after": ("Held-out loss at the best step", "{:.3f}".format),
    "trainable_parameters": ("Trained parameters", _whole_count),
    "total_parameters": ("All parameters", _whole_count),
}


# --- HTML


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "–"
    if isinstance(value, dict):
        return ", ".join(f"{key}={_plain(item)}" for key, item in value.items()) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _escape(value: Any) -> str:
    # HTML has no way to write most control characters, escaped or not.
    text = "".join(
        c if c in "\n\t" or c.isprintable() or not c.isascii() else "\N{REPLACEMENT CHARACTER}" for c in str(value)
    )
    return html.escape(text)


def _pairs(facts: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f'<div><dt>{_escape(key)}</dt><dd dir="auto">{_escape(value)}</dd></div>' for key, value in facts)
    return f"<dl>{rows}</dl>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "even") -> str:
    head = "".join(f"<th>{_escape(cell)}</th>" for cell in heads)
    body = "".join(
        "<tr>" + "".join(f'<td dir="auto">{_escape(cell)}</td>' for cell in row) + "</tr>" for row in rows[:MOST_ROWS]
    )
    more = f"<p>and {count(len(rows) - MOST_ROWS)} more</p>" if len(rows) > MOST_ROWS else ""
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}'


_SEARCHED = "path.{0} {{ stroke: {1}; }} svg tspan.{0} {{ fill: {1}; }} circle.{0} {{ fill: {1}; }}"
_STYLE = (
    """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1d2126; --soft: #667079; --rule: #e3e5e8;
  --blue: #2166c0; --orange: #c8590a; --green: #15803d; --red: #b42318; --mark: #cfe6d4; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --ink: #e4e7ea; --soft: #98a2ab;
  --rule: #31373d; --blue: #6aa9f4; --orange: #f29a52; --green: #57c785; --red: #f47c6c; --mark: #24512f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; } h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 .4rem; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 1rem 1.2rem;
  margin: 0 0 1rem; overflow-x: auto; }
p { margin: .3rem 0; }
.verdict { font-size: 1.25rem; font-weight: 600; } .good { color: var(--green); } .bad { color: var(--red); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .3rem 1.5rem; margin: 0; }
dl div { border-bottom: 1px solid var(--rule); padding: .2rem 0; display: flex; gap: 1rem;
  justify-content: space-between; }
dt { color: var(--soft); } dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
.lines th:first-child, .levels th:first-child { width: 7rem; }
.tried th:first-child { width: 3rem; } .tried th:nth-child(2) { width: 18%; } .tried th:last-child { width: 28%; }
th { text-align: left; color: var(--soft); font-weight: 600; }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
td, pre { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { background: var(--page); padding: .7rem .9rem; border-radius: 6px; margin: 0; font-size: 13px; }
mark { background: var(--mark); color: inherit; border-radius: 2px; }
summary { cursor: pointer; margin-top: .7rem; color: var(--soft); }
figure { margin: 0 0 .8rem; } dl + figure { margin-top: 1.2rem; }
figcaption { color: var(--soft); font-size: 13px; margin-bottom: .2rem; }
figcaption span { margin-right: 1.2rem; } figcaption span::before { content: "●"; margin-right: .35rem; }
span.raw::before { color: var(--blue); opacity: .35; } span.smooth::before, span.rate::before { color: var(--blue); }
span.held::before { color: var(--orange); } span.best::before { color: var(--green); }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
path { fill: none; stroke-width: 2; stroke-linejoin: round; } path.grid { stroke: var(--rule); stroke-width: 1; }
path.raw { stroke: var(--blue); stroke-width: 1; opacity: .45; } path.smooth, path.rate { stroke: var(--blue); }
path.held { stroke: var(--orange); stroke-width: 1.2; stroke-dasharray: 4 3; } circle.held { fill: var(--orange); }
circle.best { fill: var(--green); stroke: var(--card); stroke-width: 1.5; }
circle.trouble { fill: var(--red); stroke: var(--card); stroke-width: 1.5; } span.trouble::before { color: var(--red); }
"""
    + tried.style(_SEARCHED)
    + f"@media (prefers-color-scheme: dark) {{ {tried.style(_SEARCHED, tried.ON_DARK)} }}"
    + """
path.cut { stroke: var(--soft); stroke-width: 1; opacity: .5; } path.won { stroke: var(--green); stroke-width: 3; }
circle.ring { fill: none; stroke: var(--green); stroke-width: 2; }
circle.open { fill: var(--card); stroke: var(--soft); stroke-width: 1.5; }
svg text.on { paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
circle.ghost { fill: transparent; } circle.ghost:hover { fill: var(--blue); } .bar { fill: var(--blue); opacity: .8; }
"""
)


def _page(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title} – lorafit</title><style>{_STYLE}</style></head>
<body><h1>{title}</h1>{body}</body></html>
"""

"""Curves, bars and histograms as inline SVG, without scripts. Labels must be plain text of lorafit's own; nothing is escaped."""

from __future__ import annotations

import itertools
import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]
MOST_POINTS = 600  # of a curve; more can't be told apart on a screen


@dataclass(frozen=True)
class Series:
    """A curve: `style` is its class in the style sheet, `hover` gives its points titles without drawing them."""

    name: str
    style: str
    points: Sequence[Point]
    line: bool = True
    dots: bool = False
    hover: bool = False


APART = 6  # units between the centres of two dots that hide each other
ENOUGH, FAR = 5, 10  # values, of which one so many times as far off as the middle isn't drawn where it is
LETTER = 6.2  # units that a letter takes, about
WIDE, LEFT, RIGHT, TOP, BOTTOM = 760, 60, 14, 10, 40  # of a chart, in its own units


def chart(series: Sequence[Series], label: str, high: int, span: Point) -> str:
    """Curves over steps `span`, `high` units tall, with axes, a legend and hover titles."""
    series = [one for one in series if one.points]
    ys = [value for one in series for _, value in one.points]
    left, right = span[0], max(span[1], span[0] + 1)
    x_ticks, y_ticks = ticks(left, right, 8, whole=True), ticks(min(ys), max(ys), high // 50)
    floor, top = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def x(value: float) -> str:
        return f"{LEFT + (value - left) / (right - left) * (WIDE - LEFT - RIGHT):.1f}"

    def y(value: float) -> str:
        return f"{high - BOTTOM - (value - floor) / (top - floor) * (high - TOP - BOTTOM):.1f}"

    parts = _axes([(x(v), _tick(v)) for v in x_ticks if left <= v <= right], [(y(v), _tick(v)) for v in y_ticks], high)
    parts.append(f'<text x="{WIDE - RIGHT}" y="{high - 4}" text-anchor="end">step</text>')
    for one in series:
        places = [(x(a), y(b)) for a, b in one.points]
        if one.line and len(places) > 1:
            path = "L".join(f"{a} {b}" for a, b in places)
            parts.append(f'<path class="{one.style}" d="M{path}"/>')
        if one.dots or one.hover:
            style, radius = (one.style, 5 if one.style == "best" else 3.5) if one.dots else ("ghost", 6)
            parts += [
                f'<circle class="{style}" cx="{a}" cy="{b}" r="{radius}">'
                f"<title>{one.name} {figure(value)} at step {step:.0f}</title></circle>"
                for (a, b), (step, value) in zip(places, one.points, strict=True)
            ]
    keys = "".join(f'<span class="{one.style}">{one.name}</span>' for one in series)
    return f"<figure><figcaption>{keys}</figcaption>{_svg(parts, high, label)}</figure>"


def histogram(lengths: Sequence[tuple[float, float, float]]) -> str:
    """Bars for (low, high, rows)."""
    bars = [
        (f"{low:.0f}–{up:.0f}", f"{low:.0f} to {up:.0f} tokens: {number:.0f} rows", number)
        for low, up, number in lengths
    ]
    return _bars(bars, "Rows by length in tokens", "rows by length", whole=True, unit="tokens")


def columns(bars: Sequence[tuple[str, float]], caption: str) -> str:
    """A bar for each (label, value ≥ 0)."""
    return _bars([(label, f"{label}: {value:.4g}", value) for label, value in bars], caption, caption)


@dataclass(frozen=True)
class Axis:
    """An upright axis of `parallel`: its name, and marks as (0 to 1 from below, label)."""

    name: str
    marks: Sequence[tuple[float, str]]


def far(values: Sequence[float]) -> float:
    """Above it a value would leave the others no room: more than FAR times as far from the lowest as the one in the middle, where
    there are enough to tell. Infinite where none is."""
    low, middle = min(values), statistics.median(values)
    near = [value for value in values if value <= low + FAR * (middle - low)]
    if len(values) < ENOUGH or len(near) == len(values):
        return math.inf
    return max(low + 3 * (middle - low), *near)


def scatter(
    series: Sequence[tuple[str, str, Sequence[tuple[float, float, str]]]],
    label: str,
    x_label: str,
    high: int,
    span: Point,
    ring: tuple[float, float, str] | None = None,
) -> str:
    """Points (x > 0, y, title) of each (name, style), x from `span` by its logarithm; those of a series are joined. Those that
    are too high for the others are open circles on the upper edge, as are those that are infinite: they failed. Of dots on one
    place the first is the largest, so that each can be pointed at. `ring` is drawn around such a point."""
    series = [one for one in series if one[2]]
    ys = [b for _, _, points in series for _, b, _ in points if math.isfinite(b)]
    most = far(ys)
    low, up = (math.log10(end) for end in span)
    beside = max(0.1, (0.8 - (up - low)) / 2)  # so that there is a round number in between
    left, right = low - beside, up + beside
    y_ticks = ticks(min(ys), min(most, max(ys)), high // 50)
    floor, top = min(y_ticks[0], min(ys)), max(y_ticks[-1], min(most, max(ys)))

    def x(value: float) -> str:
        return f"{LEFT + (math.log10(value) - left) / (right - left) * (WIDE - LEFT - RIGHT):.1f}"

    def y(value: float) -> str:
        return f"{high - BOTTOM - (min(value, top) - floor) / (top - floor) * (high - TOP - BOTTOM):.1f}"

    def beside_it(a: str, b: str, other: tuple[str, ...]) -> bool:
        return math.hypot(float(a) - float(other[0]), float(b) - float(other[1])) < APART

    rates = [m * 10.0**p for p in range(math.floor(left), math.ceil(right) + 1) for m in (1, 2, 5)]
    marks = [rate for rate in rates if left <= math.log10(rate) <= right]
    parts = _axes(
        [(x(v), f"{v:.0e}".replace("e-0", "e-")) for v in marks[:: -(-len(marks) // 10)]],
        [(y(v), _tick(v)) for v in y_ticks],
        high,
    )
    parts.append(f'<text x="{WIDE - RIGHT}" y="{high - 4}" text-anchor="end">{x_label}</text>')
    dots: list[tuple[str, str, str, str]] = []
    for _, style, points in series:
        joined = [f"{x(a)} {y(b)}" for a, b, _ in sorted(points) if math.isfinite(b)]
        if len(joined) > 1:
            parts.append(f'<path class="{style}" d="M{"L".join(joined)}"/>')
        dots += [(x(a), y(b), "open" if b > top else style, title) for a, b, title in sorted(points)]
    radii = [4 + 2.5 * sum(beside_it(*dot[:2], other) for other in dots[i + 1 :]) for i, dot in enumerate(dots)]
    parts += [
        f'<circle class="{kind}" cx="{a}" cy="{b}" r="{radius:g}"><title>{title}</title></circle>'
        for (a, b, kind, title), radius in zip(dots, radii, strict=True)
    ]
    keys = [(f"● {name}", style) for name, style, _ in series]
    failed = any(not math.isfinite(b) for _, _, points in series for _, b, _ in points)
    if high_up := ["higher than drawn"] * (max(ys) > top) + ["failed"] * failed:
        keys.append((f"○ {' or '.join(high_up)}", ""))
    if ring is not None:
        a, b = x(ring[0]), y(ring[1])
        around = max((r for r, dot in zip(radii, dots, strict=True) if beside_it(a, b, dot)), default=0) + 4
        parts.append(f'<circle class="ring" cx="{a}" cy="{b}" r="{around:g}"><title>{ring[2]}</title></circle>')
        keys.append((f"◎ {ring[2]}", ""))
    lines = _lines(keys, (WIDE - LEFT - RIGHT) // 8 - len(x_label))
    parts += [f'<text x="{LEFT - 12}" y="{high - 4 + 16 * i}">{line}</text>' for i, line in enumerate(lines)]
    return _svg(parts, high + 16 * (len(lines) - 1), label)


def _lines(keys: Sequence[tuple[str, str]], long: int) -> list[str]:
    """(text, style) after each other, in lines of about so many letters."""
    lines, used = [""], 0
    for key, style in keys:
        if used and used + len(key) > long:
            lines.append("")
            used = 0
        lines[-1] += f'<tspan class="{style}" dx="12">{key}</tspan>'
        used += len(key) + 2
    return lines


def parallel(axes: Sequence[Axis], lines: Sequence[tuple[str, str, Sequence[float]]], label: str, high: int) -> str:
    """A line for each (title, style, where it crosses each axis, 0 to 1 from below); later lines lie on earlier ones."""
    top, foot, gap = TOP + 22, high - 14, (WIDE - 2 * LEFT) / max(1, len(axes) - 1)

    def place(i: int, share: float) -> tuple[str, str]:
        return f"{LEFT + i * gap:.1f}", f"{foot - share * (foot - top):.1f}"

    parts = [f'<path class="grid" d="M{place(i, 0)[0]} {top}V{foot}"/>' for i in range(len(axes))]
    for title, style, shares in lines:
        path = "L".join(" ".join(place(i, share)) for i, share in enumerate(shares))
        parts.append(f'<path class="{style}" d="M{path}"><title>{title}</title></path>')
    for i, axis in enumerate(axes):  # on the lines, with a rim
        at, anchor = place(i, 0)[0], "middle"
        if i in (0, len(axes) - 1) and len(axis.name) * LETTER / 2 > LEFT:  # it would be cut off
            at, anchor = ("4", "start") if i == 0 else (f"{WIDE - 4}", "end")
        parts.append(f'<text x="{at}" y="{TOP + 4}" text-anchor="{anchor}">{axis.name}</text>')
        dx, side = (-6, "end") if i == 0 else (6, "start")
        parts += [
            f'<text class="on" x="{place(i, 0)[0]}" y="{place(i, share)[1]}" dx="{dx}" dy=".35em"'
            f' text-anchor="{side}">{text}</text>'
            for share, text in axis.marks
        ]
    return _svg(parts, high, label)


def alone(drawn: Sequence[tuple[str, str]], style: str) -> str:
    """Charts (title, SVG) below each other as one SVG file with a style sheet of its own."""
    parts, at = [], 0
    for title, svg in drawn:
        high = int(svg.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split()[1])
        lines = textwrap.wrap(title, int((WIDE - LEFT) / LETTER))
        parts += [f'<text x="{LEFT}" y="{at + 18 + 16 * i}">{line}</text>' for i, line in enumerate(lines)]
        at += 16 * (len(lines) - 1)
        parts.append(svg.replace("<svg ", f'<svg y="{at + 26}" width="{WIDE}" height="{high}" ', 1))
        at += high + 34
    sheet = f"<style>{style}</style>" + f'<rect width="{WIDE}" height="{at}" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {at}">{sheet}{"".join(parts)}</svg>\n'


def _bars(bars: Sequence[tuple[str, str, float]], caption: str, label: str, whole: bool = False, unit: str = "") -> str:
    """A bar for each (label, hover title, value); `whole`: values are counts."""
    high = 190
    most = max(1 if whole else 0, *(value for _, _, value in bars))
    y_ticks = ticks(0, most, 4, whole=whole)
    slot = (WIDE - LEFT - RIGHT) / len(bars)

    def y(value: float) -> float:
        return high - BOTTOM - value / max(most, y_ticks[-1]) * (high - TOP - BOTTOM)

    every = math.ceil(len(bars) / 12)
    marks = [(f"{LEFT + (i + 0.5) * slot:.1f}", name) for i, (name, _, _) in enumerate(bars)]
    parts = _axes(marks[::every], [(f"{y(v):.1f}", _tick(v)) for v in y_ticks], high)
    if unit:
        parts.append(f'<text x="{WIDE - RIGHT}" y="{high - 4}" text-anchor="end">{unit}</text>')
    for i, (_, title, value) in enumerate(bars):
        parts.append(
            f'<rect class="bar" x="{LEFT + i * slot + 1:.1f}" y="{y(value):.1f}" width="{max(1.0, slot - 2):.1f}" '
            f'height="{high - BOTTOM - y(value):.1f}"><title>{title}</title></rect>'
        )
    return f"<figure><figcaption>{caption}</figcaption>{_svg(parts, high, label)}</figure>"


def _axes(xs: Sequence[tuple[str, str]], ys: Sequence[tuple[str, str]], high: int) -> list[str]:
    parts = [f'<path class="grid" d="M{LEFT} {at}H{WIDE - RIGHT}"/>' for at, _ in ys]
    parts += [f'<text x="{LEFT - 8}" y="{at}" dy=".35em" text-anchor="end">{text}</text>' for at, text in ys]
    parts += [f'<text x="{at}" y="{high - BOTTOM + 18}" text-anchor="middle">{text}</text>' for at, text in xs]
    return parts


def _svg(parts: Sequence[str], high: int, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDE} {high}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) that cover low..high, about `most` of them."""
    if high <= low:
        high = low + (abs(low) * 0.1 or 1.0)
    rough = (high - low) / max(1, most)
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next((times * power for times in (1, 2, 5) if times * power >= rough * 0.999), 10 * power)
    gap = max(gap, 1.0) if whole else gap
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [float(f"{i * gap:.12g}") for i in range(first, last + 1)]


def _tick(value: float) -> str:
    if value and (abs(value) < 0.001 or abs(value) >= 1e7):
        number, power = f"{value:e}".split("e")
        return f"{float(number):g}e{int(power)}"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1000 else f"{value:g}"


def figure(value: float) -> str:
    """A loss or rate in few digits."""
    return f"{value:.2e}" if value and abs(value) < 0.01 else f"{value:.3f}"


def smooth(points: Sequence[Point]) -> list[Point]:
    """A running mean."""
    # The mean of a window around each point, cut evenly at the ends: it doesn't lag behind the curve.
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    last, half = len(points) - 1, len(points) // 40
    smoothed = []
    for i, (step, _) in enumerate(points):
        reach = min(half, i, last - i)
        smoothed.append((step, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return smoothed


def thin(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS points, the first and the last among them."""
    every = math.ceil(len(points) / MOST_POINTS)
    return [*points[: -1 : max(1, every)], *points[-1:]]

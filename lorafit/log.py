"""The terminal: plain lines, one live line while training, a spinner for what takes long, tables and units.

Progress goes to stderr, so that stdout holds nothing but results. On a terminal the live line is drawn by rich, which
is imported only then; in a pipe or a log file the same figures appear as plain lines, a few seconds apart.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

SPINNER_AFTER = 0.5  # seconds; what is faster than this needs no spinner
LINE_AFTER = 2.0  # seconds; the same without a terminal
LINE_AGAIN = 30.0
NARROW = 20  # columns: nothing is broken into shorter lines, however narrow the terminal
PLAIN_EVERY = 5.0  # seconds between progress lines without a terminal

# Text from data files and models is printed as it is: it must not be able to move the cursor or recolour the terminal.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_CONTROLS[ord("\r")] = ""


def say(text: str = "", *, err: bool = False) -> None:
    """A plain line on stdout, or on stderr for anything that isn't a result."""
    _print(text, sys.stderr if err else sys.stdout)


class Terminal:
    """Where progress is shown. `quiet` shows none. One live line is drawn at a time: that of what was begun last."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self.stream = stream if stream is not None else sys.stderr
        self.live = not quiet and self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn: Live | None = None
        self._lines: list[Callable[[int], str]] = []  # the last is drawn
        self._lock = threading.RLock()

    def say(self, text: str = "") -> None:
        """A permanent line; above the live line if there is one."""
        if self.quiet:
            return
        with self._lock:
            if self._drawn is None:
                _print(text, self.stream)
            else:
                from rich.text import Text

                self._drawn.console.print(Text(text.translate(_CONTROLS)), soft_wrap=True)

    def progress(self) -> Progress:
        """The progress of a training run, to use in `with`."""
        return Progress(self)

    def working(self, text: str) -> Working:
        """A sign of life for something that may take more than two seconds, to use in `with`."""
        return Working(text, self)

    def draw(self, line: Callable[[int], str]) -> bool:
        """Begins a live line, in the place of one that is there until it is erased; `line` makes its text for a width. False
        if it can't be drawn."""
        with self._lock:
            if not self.live:
                return False
            if line not in self._lines:
                self._lines.append(line)
            if self._drawn is None:
                self._begin()
            return True

    def _begin(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        console = Console(file=self.stream, highlight=False)

        def render() -> Text:
            text = "".join(line(console.width - 1) for line in self._lines[-1:])
            return Text(text, no_wrap=True, overflow="crop")

        # Lines that others print to the terminal are put above ours, but stdout in a file must stay untouched.
        self._drawn = Live(console=console, get_renderable=render, transient=True, redirect_stdout=sys.stdout.isatty())
        self._drawn.start(refresh=True)

    def erase(self, line: Callable[[int], str]) -> None:
        """Ends a live line: the one before it is drawn again, or there is none on the screen."""
        with self._lock:
            self._lines = [other for other in self._lines if other != line]
            if self._lines:
                return
            drawn, self._drawn = self._drawn, None
        if drawn is not None:  # outside the lock: stop() waits for rich's thread
            drawn.stop()


class Eta:
    """Seconds left, from a moving average of the seconds a step takes. The first step only starts the clock."""

    def __init__(self, weight: float = 0.1) -> None:
        self._weight = weight
        self._sum = self._total = 0.0
        self._last: tuple[float, float] | None = None

    def update(self, step: float, now: float) -> None:
        """Takes in that `step` (parts of one count too) was done at `now`, in seconds of any clock."""
        if self._last is not None and step > self._last[0]:
            done = step - self._last[0]
            keep = (1 - self._weight) ** done
            # Both sums fade alike, so their ratio is unbiased from the very first step on.
            self._sum = keep * self._sum + (1 - keep) * (now - self._last[1]) / done
            self._total = keep * self._total + (1 - keep)
        if self._last is None or step != self._last[0]:
            self._last = (step, now)

    def pause(self, seconds: float) -> None:
        """Something else than a step has just taken so long."""
        if self._last is not None:
            self._last = (self._last[0], self._last[1] + seconds)

    def left(self, steps: float, now: float) -> float | None:
        """Seconds until `steps` are done; None before two steps were seen."""
        if self._last is None or not self._total:
            return None
        step, then = self._last
        each = self._sum / self._total
        return max(0.0, each * (steps - step) - min(each, now - then))  # a long step doesn't eat up those after it


class Progress:
    """The progress of a training run: one live line on a terminal, else a plain line every few seconds and the last."""

    def __init__(
        self, terminal: Terminal | None = None, every: float = PLAIN_EVERY, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._terminal = terminal or Terminal()
        self._every, self._clock = every, clock
        self._eta = Eta()
        self._step: float = 0
        self._steps: float = 0
        self._pauses = 0.0
        self._figures: dict[str, float] = {}
        self._state = ""
        self._printed = -math.inf
        self._pending = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._terminal.erase(self.line)
        if self._pending:
            self._plain()

    def pause(self, seconds: float) -> None:
        """Something else than a step has just taken so long."""
        self._eta.pause(seconds)

    def update(
        self, step: float, steps: float, state: str = "", *, pauses: float | None = None, **figures: float | None
    ) -> None:
        """Shows that `step` of `steps` is done. A figure that is None keeps its last value. With a `state` in words that is
        shown instead of the step. `pauses`: seconds of what is still to come between the steps; None: as before.

        Figures: loss, held_out_loss, tokens_per_second, memory_bytes.
        """
        unknown = set(figures) - set(_FIGURES)
        if unknown:
            raise TypeError(f"unknown figures: {', '.join(sorted(unknown))}; known: {', '.join(_FIGURES)}")
        now = self._clock()
        self._eta.update(step, now)
        self._step, self._steps, self._state = step, steps, state
        self._pauses = self._pauses if pauses is None else pauses
        self._figures = {**self._figures, **{name: value for name, value in figures.items() if value is not None}}
        self._pending = True
        if not self._terminal.live:
            if now - self._printed >= self._every:
                self._plain()
        else:
            self._terminal.draw(self.line)  # does nothing when the line is drawn already

    def say(self, text: str = "") -> None:
        """A permanent line above the live line."""
        self._terminal.say(text)

    def line(self, width: int | None = None) -> str:
        """The figures as one line: all of them, or with a `width` a bar and as many as fit, by importance."""
        left = None if self._step >= self._steps else self._eta.left(self._steps, self._clock())
        parts = [self._state or f"step {self._step}/{self._steps}"]
        parts += [label(self._figures[name]) for name, label in _FIGURES.items() if name in self._figures]
        if left is not None:
            parts.insert(2, f"{duration(left + self._pauses)} left")
        if width is None:
            return "  ".join(parts)
        while len(parts) > 1 and len("  ".join(parts)) > width:
            parts.pop()
        room = min(30, width - len("  ".join(parts)) - 2)
        if room >= 6:
            parts.insert(1, _bar(self._step, self._steps, room, self._terminal.stream))
        return "  ".join(parts)

    def _plain(self) -> None:
        self._terminal.say(self.line())
        self._printed, self._pending = self._clock(), False


class Working:
    """A spinner with the seconds so far, drawn after half a second; without a terminal a line after two seconds, and one every
    half minute."""

    def __init__(self, text: str, terminal: Terminal | None = None) -> None:
        self._terminal = terminal or Terminal()
        self._text, self._amount = text, ""
        self._begin = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Working:
        self._begin = time.monotonic()
        if not self._terminal.quiet:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()

    def update(self, done: int, total: int | None = None) -> None:
        """Shows how much is done, and of how much if that is known."""
        self._amount = f"  {count(done)}" + (f" of {count(total)} ({done / total:.0%})" if total else "")

    def rename(self, text: str) -> None:
        """Shows what is being done now, of which nothing is done yet."""
        self._text, self._amount = text, ""

    def _watch(self) -> None:
        if self._terminal.live:
            if not self._done.wait(SPINNER_AFTER) and self._terminal.draw(self._line):
                self._done.wait()
                self._terminal.erase(self._line)
        elif not self._done.wait(LINE_AFTER):
            self._terminal.say(f"{self._text} ...")
            while not self._done.wait(LINE_AGAIN):
                amount = f"{self._amount.strip()}, " if self._amount else ""
                self._terminal.say(f"{self._text} ... {amount}{time.monotonic() - self._begin:.0f} s")

    def _line(self, width: int) -> str:
        seconds = time.monotonic() - self._begin
        sign = _marks("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "|/-\\", self._terminal.stream)
        tail = f"{self._amount}  {seconds:.0f} s"
        return f"{sign[int(seconds * 4) % len(sign)]} {cut(self._text, width - 2 - len(tail))}{tail}"


def working(text: str, terminal: Terminal | None = None) -> Working:
    """A sign of life on `terminal` (default: stderr) for what may take more than two seconds, to use in `with`."""
    return Working(text, terminal)


def table(
    headers: Sequence[str], rows: Sequence[Sequence[Any]], align: Sequence[str] | None = None, fit: int | None = None
) -> str:
    """An aligned text table. `align` holds 'l' or 'r' for each column, as in "lrr"; default: numbers to the right.

    Where it is wider than `fit`, its last column is broken into lines under each other; where that isn't enough it becomes
    several tables below each other, all with the first column.
    """
    cells = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    cells = [row + [""] * (len(headers) - len(row)) for row in cells]
    columns = list(zip(*cells, strict=True)) if cells else [()] * len(headers)
    align = align or ["r" if any(column) and all(map(_numeric, column)) else "l" for column in columns]
    if fit is None:
        return _lined(headers, cells, align)
    widths = [max(map(width, (head, *column))) for head, column in zip(headers, columns, strict=True)]
    parts = []
    for block in _blocks(widths, fit):
        room = max(NARROW, fit - sum(widths[i] + 2 for i in block[:-1]))
        broken = [line for row in cells for line in _broken([row[i] for i in block], room)]
        parts.append(_lined([headers[i] for i in block], broken, [align[i] for i in block]))
    return "\n\n".join(parts)


def _lined(headers: Sequence[str], cells: Sequence[Sequence[str]], align: Sequence[str]) -> str:
    """Headers, a rule and rows, each on its line."""
    widths = [max(map(width, column)) for column in zip(headers, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        gaps = [" " * (wide - width(cell)) for cell, wide in zip(row, widths, strict=True)]
        return "  ".join(g + c if a == "r" else c + g for c, g, a in zip(row, gaps, align, strict=True)).rstrip()

    return "\n".join(map(line, [headers, ["-" * wide for wide in widths], *cells]))


def _blocks(widths: Sequence[int], fit: int) -> list[list[int]]:
    """Which columns stand beside each other: the first and as many as fit, of which the last may be broken."""
    blocks = [[0]]
    for i, wide in enumerate(widths[1:], 1):
        least = min(wide, NARROW) if i == len(widths) - 1 else wide
        if len(blocks[-1]) > 1 and sum(widths[j] + 2 for j in blocks[-1]) + least > fit:
            blocks.append([0])
        blocks[-1].append(i)
    return blocks


def _broken(row: list[str], columns: int) -> list[list[str]]:
    """A table's row with its last cell on lines of that many columns."""
    first, *others = wrap(row[-1], columns)
    return [[*row[:-1], first], *([""] * (len(row) - 1) + [line] for line in others)]


def wrap(text: str, columns: int) -> list[str]:
    """`text` in lines of at most so many `columns`, at least one: broken between words, and within what is wider than a line,
    as Chinese sentences are."""
    lines, line = [], ""
    for word in text.split():
        if line and width(line) + 1 + width(word) > columns:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while width(line) > columns:
            end = max(1, next(i for i in range(len(line)) if width(line[: i + 1]) > columns))
            lines.append(line[:end])
            line = line[end:]
    return [*lines, line] if line or not lines else lines


def terminal_columns() -> int | None:
    """How wide the terminal is that stdout goes to; None for a pipe or a file, where lines may be of any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def width(text: str) -> int:
    """The columns that `text` takes on a terminal: two for a Chinese character, none for a combining mark."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def cut(text: str, columns: int) -> str:
    """`text` on one line of at most `columns` columns, with '...' at the end if something had to go."""
    text = " ".join(text.split())
    if width(text) <= columns:
        return text
    while text and width(text) > columns - 3:
        text = text[:-1]
    return (text + "...")[: max(0, columns)]


def size(amount: float) -> str:
    """Bytes for people, in powers of 1000: "1.2 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(amount) < 999.5:
            return f"{amount:.0f} {unit}" if unit == "B" or abs(amount) >= 99.95 else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def duration(seconds: float) -> str:
    """A time span for people, in its two largest units: "2 min 3 s"."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, name, small, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            rest = whole % unit // small
            return f"{whole // unit} {name}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def count(number: int) -> str:
    """A whole number with its thousands set apart: "1,234,567"."""
    return f"{number:,}"


def many(number: int, what: str) -> str:
    """So many of a thing: "1 row", "1,200 rows"."""
    return f"{count(number)} {what}{'' if number == 1 else 's'}"


_FIGURES: dict[str, Callable[[float], str]] = {  # by importance: the last is the first to go on a narrow terminal
    "loss": lambda value: f"loss {value:.3f}",
    "held_out_loss": lambda value: f"held-out {value:.3f}",
    "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
    "memory_bytes": size,
}


def _print(text: str, stream: TextIO) -> None:
    text = text.translate(_CONTROLS) + "\n"
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "replace").decode(encoding))
    stream.flush()


def _marks(wanted: str, plain: str, stream: TextIO) -> str:
    try:
        wanted.encode(getattr(stream, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return plain
    return wanted


def _bar(step: float, steps: float, room: int, stream: TextIO) -> str:
    marks = _marks("━╌", "#-", stream)
    done = round(room * min(1.0, step / steps)) if steps else 0
    return marks[0] * done + marks[1] * (room - done)


def _numeric(cell: str) -> bool:
    return not cell or cell.strip("+-%").replace(",", "").replace(".", "", 1).isdigit()

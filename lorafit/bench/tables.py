"""What was measured as tables, for the terminal and for a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.bench.harness import OURS, Runs, median, ratios
from lorafit.bench.work import UNMATCHED
from lorafit.log import count, size, table


@dataclass(frozen=True)
class Table:
    """A table, its title, and a line that says how to read it."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def text(self) -> str:
        """For the terminal."""
        align = "l" + "r" * (len(self.headers) - 1)
        return "\n".join([self.title, table(self.headers, self.rows, align), *([self.note] if self.note else [])])

    def markdown(self) -> str:
        """For a page."""
        return "\n\n".join(
            [f"**{self.title}**", markdown(self.headers, self.rows), *([self.note] if self.note else [])]
        )


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table for a page; so many columns are words, the others figures."""
    lines = [headers, [*["---"] * left, *["---:"] * (len(headers) - left)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def put(page: Path, begin: str, body: str, end: str) -> None:
    """Replace what stands between two markers of a page. SystemExit where it hasn't them."""
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{page} has no line '{begin}'")
    page.write_text(pattern.sub(lambda _: f"{begin}\n\n{body}\n\n{end}", text), encoding="utf-8")


def tables(found: dict[str, Any]) -> list[Table]:
    """Every table that these results can fill."""
    asked = found["settings"]["cases"]
    made = []
    if "trained" in found:
        runs = found["trained"]
        made += [make(runs) for name, make in (("speed", speed), ("memory", memory), ("loss", loss)) if name in asked]
    if "cases" in found:
        made.append(grid(found["cases"]))
    if "limit" in found:
        made.append(limit(found["limit"]))
    made += [profile(part) for part in found.get("profile", [])]
    if "start" in found:
        made.append(start(found["start"]))
    return made


def method(found: dict[str, Any]) -> str:
    """How it was measured, in two lines."""
    on, what, asked = found["machine"], found["documents"], found["settings"]
    source = f"rows of {what['data']}" if what["data"] else "documents with lengths like Alpaca's"
    quant = asked.get("quant", "none")
    where = "on our side, as it comes on theirs" if quant in UNMATCHED else "on both sides"
    stored = "" if quant == "none" else f", the base in {quant} {where}"
    versions = ", ".join(f"{name} {on[name]}" for name in ("torch", "transformers", "peft", "trl") if on.get(name))
    return (
        f"{what['rows']} {source}, {count(what['tokens'])} real tokens, 8 rows a step, LoRA r={asked['r']} on all linear"
        f" layers, every token learned, {found['precision']}{stored}; each figure the median of {asked['repeats']} runs in"
        f" processes of their own, the sides in turn; ratios are taken between neighbouring runs.\n"
        f"{on['cpu']}, {on['threads']} threads, {on['capability']}{' with AMX' if on['amx'] else ''},"
        f" {size(on['memory_bytes'])}; {versions}."
    )


def speed(runs: Runs) -> Table:
    """Real tokens a second."""
    rows = [
        [
            name,
            _number(median(each, "tokens_per_second")),
            _number(median(each, "tokens_per_second_whole")),
            _ratio(runs, name, "tokens_per_second"),
            _spread(runs, name, "tokens_per_second"),
        ]
        for name, each in runs.items()
    ]
    note = "Real tokens, padding not counted. 'After warm-up' leaves the first step out. Ratio: ours over theirs."
    for run in runs[OURS.name]:
        if "tokens_through" in run and (spared := 1 - run["tokens_through"] / run["tokens"]):
            note += (
                f" Ours computes what rows of a step begin with once: {spared:.1%} fewer tokens go through the model."
            )
            break
    medians = {name: found for name, each in runs.items() if (found := median(each, "tokens_per_second"))}
    if len(others := {name: found for name, found in medians.items() if name != OURS.name}) > 1:
        note += f" The fastest of theirs: {max(others, key=lambda name: others[name])}."
    return Table("Training speed", ["side", "tokens/s after warm-up", "tokens/s whole", "ratio", "spread"], rows, note)


def memory(runs: Runs) -> Table:
    """Peak memory."""
    rows = [
        [name, _bytes(median(each, "peak_rss_bytes")), _ratio(runs, name, "peak_rss_bytes")]
        for name, each in runs.items()
    ]
    note = "Peak resident memory of the whole process, the same rows a step (trlpack: rows of 2048 tokens of its own)."
    return Table("Peak memory", ["side", "peak", "ratio"], rows, note)


def loss(runs: Runs) -> Table:
    """Held-out loss after the same steps."""
    ours = median(runs[OURS.name], "held_out_loss")
    rows = []
    for name, each in runs.items():
        found = median(each, "held_out_loss")
        apart = f"{ours / found - 1:+.2%}" if ours and found and name != OURS.name else ""
        rows.append([name, f"{found:.4f}" if found else "-", apart])
    note = "Same start, rows, order, steps, learning rate and schedule (trlpack: steps of its own)."
    return Table("Held-out loss", ["side", "loss", "ours against it"], rows, note)


def grid(cases: Sequence[dict[str, Any]]) -> Table:
    """Every case against the first peer."""
    rows = []
    for case in cases:
        runs: Runs = case["runs"]
        others = [name for name in runs if name != OURS.name]
        rows.append(
            [
                case["name"],
                case["precision"],
                count(case["tokens_a_step"]),
                _number(median(runs[OURS.name], "tokens_per_second")),
                *(_number(median(runs[name], "tokens_per_second")) for name in others),
                *(_ratio(runs, name, "tokens_per_second") for name in others),
                *(_ratio(runs, name, "peak_rss_bytes") for name in others),
            ]
        )
    names = [name for name in cases[0]["runs"] if name != OURS.name] if cases else []
    headers = ["case", "type", "tokens a step", "ours tokens/s", *(f"{n} tokens/s" for n in names)]
    headers += [*("speed ratio" for _ in names), *("memory ratio" for _ in names)]
    failed = {
        f"{case['name']}, {name}: {run['error']}"
        for case in cases
        for name, each in case["runs"].items()
        for run in each
        if "error" in run
    }
    return Table("Other cases", headers, rows, "; ".join(sorted(failed)))


def limit(found: Sequence[dict[str, Any]]) -> Table:
    """The share of the machine's limit."""
    rows = []
    for part in found:
        runs, steps = part["runs"], part["steps"]
        each = [
            {
                "step": run["seconds_timed"] / steps,
                "before": run["products_before"] / steps,
                "after": run["products_after"] / steps,
                "share": (run["products_before"] + run["products_after"]) / 2 / run["seconds_timed"],
                "rate": 2 * run["products_flop"] / (run["products_before"] + run["products_after"]) / 1e12,
            }
            for run in runs
        ]
        middle = {key: median(each, key) or 0.0 for key in each[0]}
        rows.append(
            [
                part["precision"],
                f"{middle['before']:.3f} s",
                f"{middle['after']:.3f} s",
                f"{middle['rate']:.2f}",
                f"{middle['step']:.3f} s",
                f"{middle['share']:.1%}",
            ]
        )
    note = (
        "Products: every frozen matrix forward and backward, and the output head on the learned tokens, each layer with"
        " its own weights, at each timed step's own number of tokens; before and after the steps, in the same process."
    )
    headers = ["type", "products before", "after", "TFLOP/s", "step", "share of the limit"]
    return Table("The machine's limit", headers, rows, note)


def profile(part: dict[str, Any]) -> Table:
    """Where a step's time goes."""
    wall = part["wall"]
    rows = [[name, f"{1000 * s:.1f} ms", f"{s / wall:.1%}"] for name, s in part["parts"].items() if s / wall >= 0.0005]
    rows.append(["the step", f"{1000 * wall:.1f} ms", "100.0%"])
    note = f"One step of {count(part['tokens'])} tokens under torch's profiler, which slows it a little."
    return Table(f"Where a step's time goes, {part['precision']}", ["kind", "own time", "share"], rows, note)


def start(found: dict[str, list[dict[str, float]]]) -> Table:
    """From the command to the first step, begun and done."""
    names = {"cold": "lorafit train, nothing built yet", "warm": "lorafit train", "trainer": "trainer"}
    rows = [
        [names[name], *(f"{median(each, key):.1f} s" for key in ("begins", "ends"))] for name, each in found.items()
    ]
    note = (
        "Medians of the wall time since the process was started. 'lorafit train' reads and tokenises the rows of a file; the"
        " others are scripts that are given token ids."
    )
    return Table("From the command to the first step", ["command", "first step begins", "first step ends"], rows, note)


def _number(value: float | None) -> str:
    return "failed" if value is None else count(round(value))


def _bytes(value: float | None) -> str:
    return "failed" if value is None else size(value)


def _ratio(runs: Runs, name: str, key: str) -> str:
    found = median([{key: value} for value in ratios(runs, name, key)], key) if name != OURS.name else None
    return f"{found:.2f}x" if found else ""


def _spread(runs: Runs, name: str, key: str) -> str:
    found = ratios(runs, name, key) if name != OURS.name else []
    return f"{min(found):.2f}-{max(found):.2f}" if found else ""

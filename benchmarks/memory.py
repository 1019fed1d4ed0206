"""What `lorafit plan` says beside what `lorafit train` takes, and which model fits which machine.

    python benchmarks/memory.py --models DIR --out memory.json             measure every point, each in a process of its own
    python benchmarks/memory.py --models DIR --table                       the planner's table for models of many sizes
    python benchmarks/memory.py --models DIR --from memory.json --write docs/memory.md docs/zh/memory.md
    python benchmarks/memory.py --time                                     seconds of a step, as planned and as taken

Models of other shapes than the embedded one are written into DIR by benchmarks/shaped.py, with random weights: a measured
point needs them whole (7B: 13.5 GB), the table their config.json alone.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lorafit.bench.tables import put
from lorafit.log import count, size

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
ROW = 256  # tokens, about
POINTS: list[tuple[str, str, int, dict[str, str]]] = [  # name, model, tokens a step, settings
    ("LoRA", "smollm2", 256, {}),
    ("LoRA, evaluations and answers", "smollm2", 256, {"held_out_share": "0.3", "learn": "assistant"}),
    (
        "EVA, evaluations and answers",
        "smollm2",
        256,
        {"held_out_share": "0.3", "learn": "assistant", "method": "eva", "tau": "0.5"},
    ),
    ("LoRA", "smollm2", 2048, {}),
    ("LoRA, checkpointing", "smollm2", 2048, {"checkpointing": "true"}),
    ("LoRA", "smollm2", 8192, {}),
    ("LoRA, r=128", "smollm2", 1024, {"r": "128"}),
    ("LoRA, fp32", "smollm2", 1024, {"precision": "fp32"}),
    ("LoRA, dropout 0.1", "smollm2", 1024, {"dropout": "0.1"}),
    ("QLoRA", "smollm2", 2048, {"quant": "nf4"}),
    ("QLoRA, checkpointing", "smollm2", 2048, {"quant": "nf4", "checkpointing": "true"}),
    ("full", "smollm2", 1024, {"method": "full"}),
    ("LoRA", "qwen2.5-1.5b", 512, {}),
    ("QLoRA", "qwen2.5-1.5b", 1024, {"quant": "nf4"}),
    ("QLoRA, checkpointing", "qwen2.5-1.5b", 4096, {"quant": "nf4", "checkpointing": "true"}),
    ("QLoRA", "llama2-7b", 512, {"quant": "nf4"}),
    ("QLoRA, checkpointing", "llama2-7b", 512, {"quant": "nf4", "checkpointing": "true"}),
]
WAYS: list[tuple[str, dict[str, str]]] = [
    ("full", {"method": "full"}),
    ("LoRA", {}),
    ("LoRA, checkpointing", {"checkpointing": "true"}),
    ("QLoRA", {"quant": "nf4"}),
    ("QLoRA, checkpointing", {"quant": "nf4", "checkpointing": "true"}),
]
TABLE = ("smollm2", "qwen2.5-1.5b", "llama2-7b", "llama3-8b", "llama3-70b")
WORDS = [
    "the",
    "model",
    "answers",
    "every",
    "question",
    "in",
    "a",
    "few",
    "plain",
    "words",
    "and",
    "then",
    "it",
    "stops",
    "here",
]


TIMES = [(512, "none"), (2048, "none"), (512, "nf4"), (2048, "nf4")]  # tokens a step, how the base is stored
TIMED = 8  # steps


def rows(path: Path, tokens: int, answers: bool = False, steps: int = 3) -> Path:
    """A file of texts, some steps of them; a step of `tokens` tokens has texts of about ROW. Or of questions and answers, so many
    that some can be held out."""
    number = steps * max(1, tokens // ROW) + (30 if answers else 2)
    # In an order of their own: rows that begin alike would share the memory of that.
    texts = [" ".join(random.Random(i).choices(WORDS, k=ROW)) for i in range(number)]
    made = [{"prompt": text[:100], "completion": text[100:]} if answers else {"text": text} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def words(data: Path, model: str, tokens: int, settings: dict[str, str]) -> list[str]:
    """The arguments that plan and train have in common."""
    given = {"batch_tokens": str(tokens), "steps": "2", "held_out_share": "0", "device": "cpu", "learn": "all"}
    given |= {"max_tokens": "300", "long": "truncate", **settings}
    return [str(data), "--model", model, *(f"{key}={value}" for key, value in given.items())]


def lorafit(*arguments: str) -> dict[str, Any]:
    """A verb's JSON; its own message where it failed."""
    done = subprocess.run([sys.executable, "-m", "lorafit", *arguments, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"lorafit {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def place_of(model: str, folder: Path) -> str:
    """The embedded model by its name, others by their folder."""
    return model if model == "smollm2" else str(folder / model)


def measure(folder: Path, only: str) -> list[dict[str, Any]]:
    """Every point whose model is there."""
    found = []
    for name, model, tokens, settings in POINTS:
        place = place_of(model, folder)
        if only and only not in f"{name} {model} {tokens}":
            continue
        if model != "smollm2" and not any(Path(place).glob("*.safetensors")):
            print(f"{model}: left out, {place} has no weights", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as scratch:
            made = rows(Path(scratch) / "rows.jsonl", tokens, "held_out_share" in settings)
            given = words(made, place, tokens, settings)
            said = lorafit("plan", *given, "--no-time", "--for", "1000G")
            run = Path(scratch) / "run"
            if settings.get("quant"):  # what is quantised for the first time isn't measured with it
                lorafit("train", *given, "--out", str(run))
                shutil.rmtree(run)
            done = lorafit("train", *given, "--out", str(run))
        point = {"name": name, "model": model, "tokens": tokens, "predicted": said["peak_bytes"]}
        point |= {"measured": done["peak_rss_bytes"], "trained": said["trainable_parameters"]}
        point |= {key: said[key] for key in ("runtime", "weights", "adapter", "activations", "logits")}
        found.append(point)
        off = point["predicted"] / point["measured"] - 1
        print(f"{name} {model} {tokens}: {size(point['predicted'])} {size(point['measured'])} {off:+.0%}", flush=True)
    return found


def timed() -> list[dict[str, Any]]:
    """Seconds of a step of SmolLM2, as planned and as a training then took, the first step apart."""
    found = []
    for tokens, quant in TIMES:
        with tempfile.TemporaryDirectory() as scratch:
            made = rows(Path(scratch) / "rows.jsonl", tokens, steps=TIMED)
            given = words(made, "smollm2", tokens, {"quant": quant, "steps": str(TIMED)})
            began = time.perf_counter()
            said = lorafit("plan", *given)
            took = time.perf_counter() - began
            run = Path(lorafit("train", *given, "--out", f"{scratch}/run")["run"])
            steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()][1:]
        point = {"tokens": tokens, "quant": quant, "off": said["seconds_off"], "plan_took": took}
        point["predicted"] = said["seconds_of"]["steps"] / TIMED
        point["measured"] = statistics.fmean(step["seconds"] for step in steps)
        found.append(point)
        ratio = point["predicted"] / point["measured"]
        print(
            f"{tokens} {quant}: {point['predicted']:.2f} ±{point['off']:.0%} {point['measured']:.2f} s a step, ratio"
            f" {ratio:.2f}; the whole plan took {took:.0f} s",
            flush=True,
        )
    return found


def planned(folder: Path) -> list[dict[str, Any]]:
    """The planner's peaks at 2048 tokens a step."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in TABLE:
            place = place_of(model, folder)
            for name, settings in WAYS:
                given = words(rows(Path(scratch) / "rows.jsonl", 2048), place, 2048, {"precision": "bf16", **settings})
                said = lorafit("plan", *given, "--no-time", "--for", "1000G")
                found.append(
                    {
                        "model": model,
                        "way": name,
                        "peak": said["peak_bytes"],
                        "total": said["total_parameters"],
                        "weights": said["weights"],
                    }
                )
    return found


def tables(found: dict[str, Any]) -> str:
    """In Markdown."""
    blocks = []
    if points := found.get("points"):
        lines = ["| model | what | tokens at once | predicted | measured | off |", "|---|---|---:|---:|---:|---:|"]
        for p in points:
            off = p["predicted"] / p["measured"] - 1
            lines.append(
                f"| {p['model']} | {p['name']} | {count(p['tokens'])} | {size(p['predicted'])} | {size(p['measured'])}"
                f" | {off:+.0%} |"
            )
        blocks.append("\n".join(lines))
    if table := found.get("table"):
        ways = [name for name, _ in WAYS]
        lines = [f"| model | parameters | {' | '.join(ways)} |", "|---|---:" + "|---:" * len(ways) + "|"]
        for model in dict.fromkeys(row["model"] for row in table):
            own = [row for row in table if row["model"] == model]
            peaks = " | ".join(f"{size(row['peak'])}" for row in own)
            lines.append(f"| {model} | {own[0]['total'] / 1e9:.2f} B | {peaks} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def main() -> None:
    """Measure or read, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models"), metavar="DIR")
    parser.add_argument("--only", default="", help="points whose name, model or tokens contain this")
    parser.add_argument("--time", action="store_true", help="only the seconds of a step")
    parser.add_argument("--table", action="store_true", help="only the table of what fits")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="results measured before")
    parser.add_argument("--write", type=Path, nargs="*", default=[], metavar="PAGE")
    args = parser.parse_args()
    if args.time:
        timed()
        return
    found: dict[str, Any] = json.loads(args.source.read_text(encoding="utf-8")) if args.source else {}
    if not args.source:
        if not args.table:
            found["points"] = measure(args.models, args.only)
        if not args.only:
            found["table"] = planned(args.models)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    body = tables(found)
    print(body)
    for page in args.write:
        put(page, BEGIN, body, END)


if __name__ == "__main__":
    main()

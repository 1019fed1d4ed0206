"""Methods beside each other on one task, each at the best of its own learning rates.

    python benchmarks/methods.py DATA --out methods.json --write docs/methods.md docs/zh/methods.md
    python benchmarks/methods.py DATA --out methods.json --cost          seconds and memory, each alone: nothing else may run
    python benchmarks/methods.py DATA --from methods.json --write …      the table and the picture again

DATA is split: the last --test rows are scored once, by the adapter of the rate whose loss on the --held-out rows before them was
lowest; the others are trained on. Each method begins with four rates, each twice the one before, around its default; while the
best is the first or the last of them, one more is tried beyond it. All take the same steps over the same rows. --jobs runs so
many side by side, where there are processors for it; seconds and memory are measured by --cost alone. The table's seconds are of
all --steps of --tokens tokens at that rate.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lorafit.bench.tables import markdown, put
from lorafit.log import count, size

BEGIN, END = "<!-- comparison: begin -->", "<!-- comparison: end -->"
WAYS: dict[str, list[str]] = {  # settings by name
    "LoRA": [],
    "QLoRA": ["quant=nf4"],
    "DoRA": ["method=dora"],
    "LoRA+": ["method=lora+"],
    "AdaLoRA": ["method=adalora"],
    "QR-LoRA": ["method=qrlora"],
    "PiSSA": ["method=pissa"],
    "full": ["method=full"],
}
FACTORS = (0.5, 1.0, 2.0, 4.0)  # of a method's default rate
BEYOND = 2  # more rates at most
SETTINGS = ["samples=0", "long=truncate", "patience=0"]


def split(args: argparse.Namespace, scratch: Path) -> tuple[Path, Path, Path]:
    """Files of the rows to train on, to choose by, and to score."""
    rows = json.loads(args.data.read_text(encoding="utf-8"))
    rows = rows[-(args.rows + args.held_out + args.test) :]
    cuts = [rows[: -args.held_out - args.test], rows[-args.held_out - args.test : -args.test], rows[-args.test :]]
    files = tuple(scratch / f"{name}.json" for name in ("train", "held_out", "test"))
    for file, part in zip(files, cuts, strict=True):
        file.write_text(json.dumps(part), encoding="utf-8")
    return files  # type: ignore[return-value]


def lorafit(*words: Any) -> dict[str, Any]:
    """A command's JSON. RuntimeError with what it said otherwise."""
    command = [sys.executable, "-m", "lorafit", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-400:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def trained(args: argparse.Namespace, files: tuple[Path, Path, Path], out: Path, settings: list[str]) -> dict[str, Any]:
    """The summary of a run."""
    words = [files[0], "--held-out", files[1], "--model", args.model, "--out", out, f"seed={args.seed}", *SETTINGS]
    given = [f"steps={args.steps}", f"batch_tokens={args.tokens}", f"eval_every={args.steps}", f"device={args.device}"]
    return lorafit("train", *words, *given, *settings)


def searched(args: argparse.Namespace, files: tuple[Path, Path, Path], scratch: Path) -> dict[str, Any]:
    """The runs of each way by rate, and what its best scores on rows that nothing was chosen by."""
    ways = {name: WAYS[name] for name in args.ways.split(",")} if args.ways else WAYS
    found: dict[str, dict[str, Any]] = {name: {"default": default_rate(args, WAYS[name]), "runs": []} for name in ways}

    def one(task: tuple[str, float]) -> None:
        name, factor = task
        rate = float(f"{found[name]['default'] * factor:.3g}")
        out = scratch / re.sub(r"\W", "_", f"{name}-{factor}")
        try:
            summary = trained(args, files, out, [*WAYS[name], f"lr={rate}"])
        except RuntimeError as error:  # it diverged
            found[name]["runs"].append({"factor": factor, "lr": rate, "loss": None, "failed": str(error)})
        else:
            loss = summary["held_out_loss_after"] if summary["best_step"] else summary["held_out_loss_before"]
            numbers = {key: summary[key] for key in ("trainable_parameters", "adapter_bytes")}
            found[name]["runs"].append({"factor": factor, "lr": rate, "loss": loss, "out": str(out), **numbers})
        print(f"{name}: {found[name]['runs'][-1]}", file=sys.stderr, flush=True)

    tasks = [(name, factor) for factor in FACTORS for name in ways]
    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in range(1 + BEYOND):
            list(pool.map(one, tasks))
            tasks = [(name, factor) for name in ways if (factor := beyond(found[name]["runs"])) is not None]
            args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")  # in case what follows fails

        def scored(name: str) -> None:
            best = min((run for run in found[name]["runs"] if run["loss"] is not None), key=lambda run: run["loss"])
            words = ["eval", best["out"], files[2], "--answers", "--max-new", args.max_new, "--device", args.device]
            scores = lorafit(*words)["scores"]
            ours = next(score for key, score in scores.items() if key != "base")
            found[name] |= {"best": best, "base": scores["base"], "test": ours}

        list(pool.map(scored, ways))
    for way in found.values():
        way["runs"].sort(key=lambda run: run["factor"])
    return found


def default_rate(args: argparse.Namespace, settings: list[str]) -> float:
    """Of a method for this model."""
    from transformers import AutoConfig

    from lorafit.advice import default_lr
    from lorafit.methods import find
    from lorafit.model.load import locate

    method = next((word.partition("=")[2] for word in settings if word.startswith("method=")), "lora")
    shape = AutoConfig.from_pretrained(locate(args.model), local_files_only=True)
    return default_lr(shape, args.tokens) * find(method).lr_factor


def beyond(runs: list[dict[str, Any]]) -> float | None:
    """The next rate's factor where the best is at an end, None where it isn't."""
    worked = sorted((run for run in runs if run["loss"] is not None), key=lambda run: run["factor"])
    tried = {run["factor"] for run in runs}
    best = min(worked, key=lambda run: run["loss"])["factor"]
    wanted = best * 2 if best == max(tried) else best / 2 if best == min(tried) else None
    return wanted


def cost(args: argparse.Namespace, files: tuple[Path, Path, Path], scratch: Path, found: dict[str, Any]) -> None:
    """Seconds of all steps and the peak of memory, from a few steps of each way alone on a processor."""
    short = argparse.Namespace(**{**vars(args), "steps": args.cost_steps, "device": "cpu"})
    for name, way in found.items():
        out = scratch / re.sub(r"\W", "_", f"cost-{name}")
        summary = trained(short, files, out, [*WAYS[name], f"lr={way['best']['lr']}"])
        way["cost"] = {key: summary[key] for key in ("tokens_per_second", "peak_rss_bytes")}
        print(f"{name}: {way['cost']}", file=sys.stderr, flush=True)


def table(results: dict[str, Any], chinese: bool = False) -> str:
    """As Markdown."""
    head = (
        ["方法", "学习率（试过的最好的）", "测试损失", "F1", "训练的参数", "秒", "token/秒", "内存", "文件"]
        if chinese
        else [
            "method",
            "best rate of those tried",
            "test loss",
            "F1",
            "trained",
            "seconds",
            "tokens/s",
            "memory",
            "file",
        ]
    )
    ways = results["ways"]
    base = next(iter(ways.values()))["base"]
    rows = [[("基座" if chinese else "base"), "", f"{base['loss']:.3f}", f"{base['token_f1']:.1%}", *[""] * 5]]
    for name, way in ways.items():
        rates = ", ".join(f"**{r['lr']:g}**" if r["lr"] == way["best"]["lr"] else f"{r['lr']:g}" for r in way["runs"])
        cells = [""] * 3
        if spent := way.get("cost"):
            rate = spent["tokens_per_second"]
            cells = [f"{results['steps'] * results['tokens'] / rate:.0f}", f"{rate:.0f}", size(spent["peak_rss_bytes"])]
        best, score = way["best"], way["test"]
        numbers = [count(best["trainable_parameters"]), *cells, size(best["adapter_bytes"])]
        rows.append([name, rates, f"{score['loss']:.3f}", f"{score['token_f1']:.1%}", *numbers])
    return markdown(head, rows, left=2)


def picture(results: dict[str, Any]) -> str:
    """An SVG: a row for each way, a dot for each rate it was tried with; what diverged or is far off lies at the edge."""
    ways = results["ways"]
    losses = [run["loss"] for way in ways.values() for run in way["runs"] if run["loss"] is not None]
    low = min(losses)
    high = min(max(losses), low + 4 * max(0.01, max(way["best"]["loss"] for way in ways.values()) - low))
    wide, left, step, top = 720, 90, 30, 34
    tall = top + step * len(ways) + 30

    def x(loss: float | None) -> float:
        share = 1.0 if loss is None else min(1.0, (loss - low) / max(high - low, 1e-9))
        return left + 10 + share * (wide - left - 40)

    parts = [f'<text x="{left}" y="16">held-out loss at each learning rate tried, the best filled</text>']
    for i in range(5):
        loss = low + (high - low) * i / 4
        parts.append(f'<path stroke="#ddd" d="M{x(loss):.1f} {top - 8}V{tall - 24}"/>')
        parts.append(f'<text x="{x(loss):.1f}" y="{tall - 8}" text-anchor="middle" fill="#666">{loss:.3f}</text>')
    for row, (name, way) in enumerate(ways.items()):
        y = top + step * row + step / 2
        parts.append(f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{name}</text>')
        for run in way["runs"]:
            best = run["lr"] == way["best"]["lr"]
            said = "diverged" if run["loss"] is None else f"{run['loss']:.4f}"
            parts.append(
                f'<circle cx="{x(run["loss"]):.1f}" cy="{y:.1f}" r="5" stroke="#2563eb" fill="{"#2563eb" if best else "#fff"}">'
                f"<title>{name}, rate {run['lr']:g}: {said}</title></circle>"
            )
    style = "font-family:sans-serif;font-size:12px;background:#fff"
    body = "".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" style="{style}">{body}</svg>\n'


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a JSON list of rows")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ways", help=f"of {', '.join(WAYS)}; all by default")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--rows", type=int, default=10**9, help="to train on, at most")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--test", type=int, default=64)
    parser.add_argument("--max-new", type=int, default=64, help="tokens of an answer, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cost", action="store_true", help="add seconds and memory to --out")
    parser.add_argument("--cost-steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("methods.json"))
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="measure nothing")
    parser.add_argument(
        "--write", nargs="*", type=Path, default=[], metavar="PAGE", help="pages whose table to replace"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.svg")
    args = parser.parse_args()
    if args.source:
        results = json.loads(args.source.read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            files = split(args, scratch)
            if args.cost:
                results = json.loads(args.out.read_text(encoding="utf-8"))
                cost(args, files, scratch, results["ways"])
            else:
                given = {key: getattr(args, key) for key in ("model", "steps", "tokens", "held_out", "test", "seed")}
                results = {"data": args.data.name, **given, "ways": searched(args, files, scratch)}
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    if args.picture:
        args.picture.write_text(picture(results), encoding="utf-8")
    for page in args.write:
        put(page, BEGIN, table(results, "zh" in page.parts), END)


if __name__ == "__main__":
    main()

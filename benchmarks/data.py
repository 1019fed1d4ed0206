"""Preparation of a data file: lorafit beside `datasets.load_dataset("json")` and `.map(num_proc=…)`.

    python benchmarks/data.py --data rows.json --rows 100000

The rows are those of FILE, varied until there are enough (a number is put in front of each question, so that none is there
twice), written as JSON Lines of {"prompt", "completion"}. Every measurement is a process of its own, with an empty cache
folder of its own unless it is the second run; the clock starts after the imports and when the tokenizer is loaded. Kinds of
run alternate, and the best of `--repeats` counts.

ours      `lorafit.data.prepare`: every row checked, rendered with the chat template, tokenised, cut at max_tokens, its mask
          made; duplicates, leaks and the split found, the report written.
datasets  `load_dataset`, then a map that gives each row's messages to `tokenizer.apply_chat_template`, which renders and
          tokenises, and cuts at max_tokens. No mask.
  + mask  the same twice for each row, as TRL does for prompt and completion: the prompt alone, with the generation prompt,
          tells where the learned part of the whole begins.

The second run is timed with the cache that the first has left. lorafit reads the file and the cache to see that both are
what they were; datasets trusts the file's name and time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = {"ours": "lorafit", "plain": "datasets", "mask": "datasets + mask"}


def main() -> None:
    """Measure, or with --child be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FILE", help="rows to vary: any file that lorafit reads")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--model", default="smollm2", help="whose tokenizer and chat template")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--processes", type=int, default=2, help="num_proc of datasets; lorafit takes a processor each")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args)))
        return
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "rows.jsonl"
        vary(args.data, args.rows, path)
        print(
            f"{args.rows} rows, {path.stat().st_size / 1e6:.0f} MB, {args.processes} processes, {os.cpu_count()} CPUs"
        )
        kinds = args.kinds.split(",")
        found: dict[str, list[list[dict[str, Any]]]] = {kind: [] for kind in kinds}
        for number in range(args.repeats):
            for kind in kinds:
                cache = Path(place) / f"{kind}-{number}"
                found[kind].append([run(kind, path, cache, args) for _ in range(2)])
        table(found)


def vary(source: str, count: int, path: Path) -> None:
    """Write `count` different rows made from those of a file."""
    from lorafit.data import Example, read

    examples = [item for item in read(source) if isinstance(item, Example) and len(item.messages) > 1]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt, answer = examples[number % len(examples)].messages[-2:]
            question = prompt.content if number < len(examples) else f"{number}: {prompt.content}"
            file.write(json.dumps({"prompt": question, "completion": answer.content}, ensure_ascii=False) + "\n")


def run(kind: str, path: Path, cache: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One measurement in a process of its own."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "BENCH_CACHE": str(cache)}
    words = ["--data", path, "--model", args.model, "--max-tokens", args.max_tokens, "--processes", args.processes]
    command = [sys.executable, __file__, "--child", kind, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{KINDS[kind]} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and growth of resident memory, of one kind."""
    from lorafit.model.load import load_tokenizer, locate, stop_ids

    model = locate(args.model, lambda text: None)
    tokenizer = load_tokenizer(model)
    if kind == "ours":
        import lorafit.data
        from lorafit.data import Chat, cache

        cache.folder = lambda: Path(os.environ["BENCH_CACHE"])  # the model stays in the user's
        chat = Chat.of(tokenizer, generation_eos=stop_ids(model))
        before, began = resident(), time.perf_counter()
        data = lorafit.data.prepare(args.data, chat, max_tokens=args.max_tokens, long="truncate")
        seconds = time.perf_counter() - began
        rows, tokens = len(data.train) + len(data.held_out), data.report.tokens
    else:
        import datasets

        datasets.disable_progress_bars()
        before, began = resident(), time.perf_counter()
        loaded = datasets.load_dataset("json", data_files=args.data, split="train")
        made = loaded.map(
            masked if kind == "mask" else plain,
            fn_kwargs={"tokenizer": tokenizer, "most": args.max_tokens},
            num_proc=args.processes,
            remove_columns=loaded.column_names,
        )
        seconds = time.perf_counter() - began
        rows, tokens = len(made), 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": seconds, "rows": rows, "tokens": tokens, "grown": resident() - before, "peak": peak - before}


def plain(row: dict[str, str], tokenizer: Any, most: int) -> dict[str, list[int]]:
    """A row as TRL tokenises a conversation."""
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    return {"input_ids": ids[:most]}


def masked(row: dict[str, str], tokenizer: Any, most: int) -> dict[str, list[int]]:
    """A row as TRL tokenises prompt and completion, with the mask of the completion."""
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    mask = [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    return {"input_ids": ids[:most], "completion_mask": mask[:most]}


def resident() -> int:
    """Resident memory of this process in bytes."""
    from lorafit.machine import memory

    return memory()


def table(found: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Print the best of every kind, and how many times as long it took as ours."""
    best = {
        kind: [min((pair[at] for pair in pairs), key=lambda one: one["seconds"]) for at in (0, 1)]
        for kind, pairs in found.items()
    }
    print(f"{'':18}{'first run':>12}{'ratio':>8}{'second run':>12}{'ratio':>8}{'memory grown':>14}{'peak':>8}")
    for kind, (first, second) in best.items():
        cells = []
        for at, one in enumerate((first, second)):
            ours = best["ours"][at]["seconds"] if "ours" in best else one["seconds"]
            cells.append(f"{one['seconds']:>10.2f} s{one['seconds'] / ours:>7.2f}x")
        print(f"{KINDS[kind]:18}{''.join(cells)}{first['grown'] / 1e6:>11.0f} MB{first['peak'] / 1e6:>5.0f} MB")


if __name__ == "__main__":
    main()

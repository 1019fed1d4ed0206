"""`lorafit plan`."""

from __future__ import annotations

import argparse

from lorafit.verbs.common import add_json, given, importing, print_json, terminal

ABOUT = "estimate the memory of a training run before any weights are read"
EXAMPLE = """\
  lorafit plan data.jsonl --model DIR
  lorafit plan data.jsonl --model DIR checkpointing=true batch_tokens=512 --json"""


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments: as of train."""
    parser.add_argument("source", metavar="DATA|CONFIG.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting of train")
    parser.add_argument(
        "--model", metavar="M", help="Hugging Face folder, GGUF file or hub id; default: the embedded model"
    )
    parser.add_argument("--map", metavar="user=COL,assistant=COL", help="which columns hold what")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out rows that can't be used")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Print the parts and the sum."""
    from lorafit.log import count, size, table

    with importing():
        from lorafit.fit import read_config, read_data
        from lorafit.plan import estimate

    config = read_config(args.source, given(args))
    path, _, data = read_data(config, terminal())
    made = estimate(config, path, data.train)
    if args.json:
        print_json(made.to_json())
        return
    parts = ["weights", "adapter", "gradients", "optimizer", "activations", "logits", "runtime"]
    print(
        table(
            ["memory", "bytes"],
            [[part, size(getattr(made, part))] for part in parts] + [["peak", size(made.peak_bytes)]],
        )
    )
    print(
        f"{count(made.trainable_parameters)} of {count(made.total_parameters)} parameters trained, {made.precision},"
        f" {made.steps} steps, at most {count(made.micro_batch_tokens)} tokens at once"
    )
    print("too much? accumulate=4 or checkpointing=true take less")

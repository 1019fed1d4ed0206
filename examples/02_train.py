"""Train an adapter from Python: settings in, run folder out. Later examples take this folder.

    python examples/02_train.py runs/library

The same on the command line: lorafit train examples/data/library.jsonl steps=20 --out runs/library
"""

import argparse
import json
from pathlib import Path

from lorafit import fit

parser = argparse.ArgumentParser()
parser.add_argument("run", nargs="?", default="runs/library")
parser.add_argument("--model", default="smollm2")
parser.add_argument("--steps", default=20, type=int)
args = parser.parse_args()

data = Path(__file__).parent / "data" / "library.jsonl"
settings = {"out": args.run, "model": args.model, "steps": args.steps, "samples": 1}
run = fit.fit(fit.read_config(str(data), settings))  # any setting of `lorafit train --help-settings` can stand here

summary = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
print(f"held-out loss {summary['held_out_loss_before']:.3f} -> {summary['held_out_loss_after']:.3f}")
print(f"{summary['trainable_parameters']:,} trainable numbers beside {summary['total_parameters']:,} frozen ones")
print(f"the adapter is in {run.adapter}")

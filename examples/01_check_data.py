"""Look at a data file before training: how it is read, what is learned, and every bad row by its line.

    python examples/01_check_data.py

Only the tokenizer is loaded. `lorafit check FILE` prints the same and more.
"""

import argparse
from pathlib import Path

from lorafit.data import Chat, prepare
from lorafit.model.load import load_tokenizer, locate

DATA = Path(__file__).parent / "data"

parser = argparse.ArgumentParser()
parser.add_argument("files", nargs="*", default=[DATA / "library.jsonl", DATA / "faulty.jsonl"])
parser.add_argument("--model", default="smollm2")
args = parser.parse_args()

chat = Chat.of(load_tokenizer(locate(args.model)))
for file in args.files:
    report = prepare(file, chat, strict=False).report  # strict=False: report bad rows, don't raise
    print(f"{Path(file).name}: {report.rows} rows, {report.train_rows} to train on, {report.held_out_rows} held out")
    print(f"  formats: {report.by_format}")
    print(f"  {report.tokens} tokens, {report.share:.0%} of them learned")
    print("  first row: " + repr("".join(f"[[{text}]]" if learned else text for text, learned in report.text_example)))
    for fault in report.faults:
        print(f"  line {fault.line} can't be used: {fault.reason}")

"""Score the adapter beside its base on the run's held-out rows: loss, exact match and word F1 of the answers.

    python examples/04_evaluate.py runs/library

On the command line, with a file of your own: lorafit eval runs/library FILE --answers
"""

import argparse
from pathlib import Path

from lorafit.evaluate import evaluate, score_answers
from lorafit.fit import held_out_rows
from lorafit.session import open_session

parser = argparse.ArgumentParser()
parser.add_argument("run", nargs="?", default="runs/library")
parser.add_argument("--max-new", default=40, type=int)
args = parser.parse_args()

session = open_session([args.run])
(name,) = session.host.adapters
chat = session.chat(name)
rows = held_out_rows(Path(args.run), chat)  # the same rows that training set aside
for who in (None, name):
    scores = evaluate(session.host, rows, who)
    exact, f1, n = score_answers(session.host, chat, rows, who, max_new=args.max_new)
    print(f"{who or 'base':<8} loss {scores.loss:.3f}  exact {exact:.0%}  F1 {f1:.0%}  ({n} answers)")

"""`lorafit demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorafit.verbs.common import importing, terminal

ABOUT = "the whole way on data of its own: fit an adapter, show what changed"
EXAMPLE = """\
  lorafit demo
  lorafit demo --out runs/mine"""

PROMPTS = ("Who are you?", "你是谁？", "How do I boil an egg?")


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.add_argument("--out", metavar="RUN", help="run folder; default runs/demo-<number>")


def run(args: argparse.Namespace) -> None:
    """Fit the embedded model to the project's own rows and answer three prompts before and after."""
    import json

    from lorafit.verbs.train import described

    with importing():
        from lorafit import fit
        from lorafit.data import Message
        from lorafit.generate import answer
        from lorafit.session import open_session

    out = terminal()
    data = Path(__file__).parent.parent / "demo.jsonl"
    given = {"epochs": 3, "batch_tokens": 512, "lr": 1e-3, "samples": 1, "eval_every": 13}
    if args.out:
        given["out"] = args.out
    out.say("The data: about 100 short conversations that make the model Pip, a lighthouse keeper's helper,")
    out.say("who answers in a sentence or two and signs off with 'Fair winds!' (in Chinese 一路顺风！).")
    made = fit.fit(fit.read_config(str(data), given), out)
    with out.working("answering with and without the adapter"):
        session = open_session([str(made.folder)])
        (name,) = session.host.adapters
        chat = session.chat(name)
        print()
        for prompt in PROMPTS:
            ids = chat.prompt_ids([Message("user", prompt)])
            print(f"  {prompt}")
            for label, spec in (("base", None), ("adapter", name)):
                text = " ".join(answer(session.host, chat, ids, spec, max_new=48).split())
                print(f"    {label:<8} {text}")
    print()
    print(
        described(str(made.folder), json.loads((made.folder / "summary.json").read_text(encoding="utf-8"))).replace(
            " DATA", f" {data}"
        )
    )

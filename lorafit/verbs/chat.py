"""`lorafit chat`."""

from __future__ import annotations

import argparse

from lorafit.verbs.common import add_json, add_model, importing, opened, print_json, terminal

ABOUT = "talk to adapters on one loaded base"
EXAMPLE = """\
  lorafit chat runs/mine
  lorafit chat runs/mine --compare --prompt "Who are you?"
  lorafit chat runs/mine runs/other            /adapter other switches, /help lists the rest
  lorafit chat runs/mine runs/other --stack    both at once, their deltas added"""


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="runs or adapter folders; none: the base alone")
    add_model(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit")
    parser.add_argument("--system", metavar="TEXT", help="system prompt, instead of the one trained with")
    parser.add_argument("--compare", action="store_true", help="the base's answer beside the adapter's")
    parser.add_argument("--stack", action="store_true", help="answer with all of them at once: their deltas are added")
    parser.add_argument("--max-new", type=int, default=256, metavar="N", help="longest answer, in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """One prompt, or a conversation."""
    from lorafit.errors import ConfigError

    with importing():
        from lorafit.talk import Talk

    if args.json and args.prompt is None:
        raise ConfigError("--json needs --prompt")
    out = terminal()
    session = opened(args, out)
    talk = Talk(
        session,
        compare=args.compare,
        stacked=args.stack,
        system=args.system,
        options={"max_new": args.max_new, "temperature": args.temperature, "top_p": args.top_p, "seed": args.seed},
    )
    if args.json:
        print_json({"prompt": args.prompt, "answers": talk.answers(args.prompt)})
    elif args.prompt is not None:
        talk.say(args.prompt)
    else:
        talk.loop()

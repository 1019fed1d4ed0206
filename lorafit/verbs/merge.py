"""`lorafit merge`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorafit.verbs.common import add_json, importing, print_json, terminal

ABOUT = "add an adapter into its base: a standard Hugging Face folder, checked against the unmerged model"
EXAMPLE = """\
  lorafit merge runs/mine merged/"""

PROMPTS = ("Hello", "The capital of France is", "def add(a, b):", "1, 2, 3, 4,", "你好")


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.add_argument("run", metavar="RUN", help="run or adapter folder")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--model", metavar="M", help="the base, if the adapter doesn't name it")
    parser.add_argument(
        "--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto: as the base is stored"
    )
    parser.add_argument(
        "--into",
        choices=["original", "dequantised"],
        default="original",
        help="of an adapter trained with quant: add it to the original weights, or to those that it was trained on",
    )
    parser.add_argument("--tolerance", type=float, help="largest logit difference allowed")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Merge, prove, print the proof."""
    with importing():
        import torch

        from lorafit.export.merge import merge
        from lorafit.model.load import stored_dtype
        from lorafit.session import open_session

    out = terminal()
    with out.working("loading the base in fp32") as spinner:
        session = open_session(
            [args.run],
            model=args.model,
            quant="none" if args.into == "original" else None,
            restored=True,
            precision="fp32",
            device="cpu",
            say=out.say,
            working=spinner.rename,
        )
        host = session.host
        (name,) = host.adapters
        names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = names.get(args.dtype) or stored_dtype(host.base.path)
        proof = merge(
            host,
            name,
            Path(args.out),
            prompts(args.run, session.chat(name)),
            dtype=dtype,
            tolerance=args.tolerance,
            working=spinner.rename,
            chat=session.chat(name),
        )
    system = session.chat(name).system
    if system:
        out.say(
            f"trained with the system prompt {system!r}; a model folder can't carry it, so send it with each conversation"
        )
    if args.json:
        print_json({"out": args.out, **proof.to_json()})
        return
    print(f"merged     {args.out} ({proof.dtype})")
    print(
        f"checked    {proof.positions} positions: largest logit difference {proof.largest:.3g}, mean {proof.mean:.2g}"
        f" (allowed {proof.tolerance:.3g}; the logits spread by {proof.spread:.3g})"
    )
    print(f"           {proof.lost:.2%} of what the adapter changes is lost to rounding")
    print(f"           divergence {proof.kl:.1e} nats, same best token at {proof.agree:.1%}")


def prompts(run: str, chat: object) -> list[list[int]]:
    """Held-out prompts with their answers, from the run's data if it is still there; else a few fixed ones."""
    from lorafit.data import Chat, Message
    from lorafit.errors import LorafitError
    from lorafit.fit import held_out_rows

    assert isinstance(chat, Chat)
    try:
        found = [row.ids.tolist()[:256] for row in held_out_rows(Path(run), chat)[:8]]
    except LorafitError:
        found = []
    return found or [chat.prompt_ids([Message("user", text)]) for text in PROMPTS]

"""`lorafit merge`."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.errors import ConfigError
from lorafit.files import free
from lorafit.log import table
from lorafit.verbs.common import add_json, importing, print_json, terminal

if TYPE_CHECKING:
    from lorafit.export.merge import Proof

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
        choices=["original", "dequantised", "quantised"],
        default="original",
        help="of an adapter trained with quant: add it to the original weights, to those that it was trained on, or round to"
        " 4 or 8 bits again (with --force)",
    )
    parser.add_argument(
        "--force", action="store_true", help="with --into quantised, which loses most of a small change"
    )
    parser.add_argument("--tolerance", type=float, help="largest logit difference that rounding may make")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Merge, prove, print the proof."""
    if args.force and args.into != "quantised":
        raise ConfigError("--force only goes with --into quantised")
    to = free(Path(args.out))  # before the base is read, which takes long
    with importing():
        import torch

        from lorafit.export.merge import merge
        from lorafit.export.requantise import requantise, roundable
        from lorafit.model.load import stored_dtype
        from lorafit.session import adapter_folder, open_session, quant_of

    stored = quant_of(adapter_folder(args.run))
    if args.into == "quantised":
        roundable(stored)
        if not args.force:
            raise ConfigError(
                "--into quantised rounds the sum to 4 or 8 bits again, and of a change of 2% of the weights or less nothing"
                " but noise of its size is left in 4; leave it out, or see how much is lost with --force"
            )
    out = terminal()
    with out.working("opening the base") as spinner:
        session = open_session(
            [args.run],
            model=args.model,
            quant="none" if args.into == "original" else None,
            streamed=args.into != "quantised",
            precision="fp32",
            device="cpu",
            say=out.say,
            working=spinner.rename,
        )
        host = session.host
        (name,) = host.adapters
        names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = names.get(args.dtype) or stored_dtype(host.base.path)
        chat = session.chat(name)
        rows = prompts(args.run, chat)
        if args.into == "quantised":
            proof = requantise(host, name, to, rows, dtype=dtype, chat=chat, working=spinner.rename)
        else:
            trained = None
            if args.into == "original" and stored is not None:
                spinner.rename("opening the base as it was trained on")
                trained = open_session(
                    [args.run], model=args.model, streamed=True, precision="fp32", device="cpu", working=spinner.rename
                ).host
            proof = merge(
                host,
                name,
                to,
                rows,
                dtype=dtype,
                tolerance=args.tolerance,
                trained=trained,
                working=spinner.rename,
                chat=chat,
            )
    if chat.system:
        out.say(
            f"trained with the system prompt {chat.system!r}; a model folder can't carry it, so send it with each conversation"
        )
    if proof.as_trained is not None and proof.as_trained.differs:
        out.say(
            f"this isn't the model that was trained: the original weights differ from {proof.as_trained.quant} by more than"
            f" the adapter does. It may be the better one all the same: `lorafit eval base DATA --model {args.out}` beside"
            f" `lorafit eval {args.run} DATA` tells; --into dequantised makes exactly what was trained"
        )
    if args.json:
        print_json({"out": args.out, **proof.to_json()})
    else:
        print(described(args.out, proof))
        if proof.error is None:  # a folder of codes is for bitsandbytes
            print(f"\nnext:\n  lorafit chat --model {shlex.quote(str(args.out))}")


def described(out: str, proof: Proof) -> str:
    """A merge in lines for people."""
    allowed = f"allowed {proof.tolerance:.3g}; " if math.isfinite(proof.tolerance) else ""
    lines = [f"merged     {out} ({proof.dtype})"]
    if (exact := proof.exact) is not None:
        lines += [
            f"sums       are right: in fp32 the logits of base and adapter, within {exact.formula:.1e} (allowed"
            f" {exact.allowed:.1e})",
            f"folder     is right: each number is its sum in {proof.dtype}, each other one the base's; their logits, within"
            f" {exact.folder:.1e}",
        ]
    lines += [
        f"{'rounding' if exact else 'checked '}   {proof.positions} positions: largest logit difference {proof.largest:.3g},"
        f" mean {proof.mean:.2g} ({allowed}the logits spread by {proof.spread:.3g})",
        f"           {proof.lost:.2%} of what the adapter changes is lost to rounding",
        f"           divergence {proof.kl:.1e} nats, same best token at {proof.agree:.1%}",
    ]
    if (shift := proof.as_trained) is not None:
        lines += [
            f"as trained on {shift.quant}: largest logit difference {shift.largest:.3g}, mean {shift.mean:.2g}; the adapter"
            f" itself changes them by {shift.effect:.2g} there; same best token at {shift.agree:.1%}",
            f"           what {shift.quant} took from the weights, beside what the adapter adds to them:",
            _extremes(shift.unseen),
        ]
    if proof.error is not None:
        lines += [
            "           what rounding did to the sums, beside what the adapter adds to them:",
            _extremes(proof.error),
        ]
    return "\n".join(lines)


def _extremes(ratios: Mapping[str, float]) -> str:
    """The smallest, the median and the largest of the layers' ratios."""
    if not ratios:
        return "           (no layer of the adapter is quantised)"
    order = sorted(ratios, key=ratios.__getitem__)
    picked = {"smallest": order[0], "median": order[len(order) // 2], "largest": order[-1]}
    rows = [[word, f"{ratios[path]:.3g}", path] for word, path in picked.items()]
    made = table(["", "ratio", "layer"], rows, "lrl")
    return "\n".join(f"           {line}" for line in made.splitlines())


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

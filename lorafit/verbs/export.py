"""`lorafit export`."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import ConfigError
from lorafit.export import FORMATS, MERGED, TYPES, find, free
from lorafit.export import export as write
from lorafit.verbs.common import add_json, importing, print_json, terminal

if TYPE_CHECKING:
    from lorafit.export.base import Done

ABOUT = "write an adapter, or its base with it, for another program; read back and compared before it counts"
EXAMPLE = """\
  lorafit export runs/mine mine.gguf --format gguf --type q8_0
  lorafit export runs/mine mine-vllm --format peft-portable
  lorafit export base base.gguf --format gguf --model DIR     the base alone, for adapters of gguf-adapter

formats:
""" + "\n".join(f"  {name:14} {kind.about}" for name, kind in FORMATS.items())


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.add_argument("run", metavar="RUN", help="run or adapter folder; or the word base: the base alone, as gguf")
    parser.add_argument("out", metavar="OUT", help="folder or file to write")
    parser.add_argument("--format", required=True, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--type", choices=TYPES, help="of a merged GGUF file's weights; default f16")
    parser.add_argument(
        "--model",
        metavar="M",
        help="the base, if the adapter doesn't name it; of base alone by default the embedded model",
    )
    parser.add_argument(
        "--into",
        choices=["original", "dequantised"],
        help="of an adapter trained with quant, where it is merged: into the original weights (the default), or into those"
        " that it was trained on",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Write, compare, say how it is used."""
    kind, to = find(args.format), free(args.format, Path(args.out))
    alone = args.run == "base"  # as in eval and chat
    if alone and args.format != "gguf":
        raise ConfigError(f"the base alone is written as --format gguf, not {args.format}; a run named so is ./base")
    merged = args.format in MERGED
    if args.type is not None and kind.module not in ("gguf_model", "ollama"):
        raise ConfigError(f"--type is for --format gguf and ollama, not {args.format}")
    if args.into is not None and (alone or not merged):
        raise ConfigError(f"--into is for an adapter that is merged (--format {', '.join(MERGED)})")
    with importing():
        from lorafit.export.base import Job
        from lorafit.model import gguf
        from lorafit.model.load import stored_dtype
        from lorafit.session import adapter_folder, open_session, quant_of
        from lorafit.verbs.merge import prompts

    out = terminal()
    runs = [] if alone else [args.run]
    folder = to if alone else adapter_folder(args.run)
    quant, into = None if alone else quant_of(folder), args.into or "original"
    options: dict[str, Any] = dict(model=args.model, streamed=True, precision="fp32", device="cpu")
    with out.working("opening the base") as spinner:
        session = open_session(
            runs, **options, quant="none" if into == "original" else None, say=out.say, working=spinner.rename
        )
        trained = None
        if args.format == "hf" and into == "original" and quant is not None:
            spinner.rename("opening the base as it was trained on")
            trained = open_session([args.run], **options, working=spinner.rename).host
        name = next(iter(session.host.adapters), "base")
        chat, base = session.chat(None if alone else name), session.host.base
        job = Job(
            session.host,
            name,
            folder,
            chat,
            prompts(args.run, chat),
            dtype=stored_dtype(base.path),
            type=args.type or TYPES[0],
            trained=trained,
            alone=alone,
            working=spinner.rename,
        )
        place = str(gguf.origin(base.path))
        done = write(args.format, job, to)
    notes = list(done.notes)
    if quant is not None and merged:
        weights = (
            "the original weights, not the ones it was trained on"
            if into == "original"
            else "the weights it was trained on"
        )
        notes.append(f"trained on a base in {quant}; it was merged into {weights}" + _other(into))
    elif quant is not None:
        notes.append(
            f"trained on a base in {quant}; on another base, 16 bits or otherwise quantised, answers differ somewhat"
        )
    if chat.system and args.format != "ollama":
        notes.append(f"trained with the system prompt {chat.system!r}, which this format can't carry; send it along")
    use = _filled(done.use, args.out, place)
    if args.json:
        print_json(
            {
                "out": args.out,
                "format": args.format,
                "checked": done.checked,
                **done.figures,
                "notes": notes,
                "use": use,
            }
        )
    else:
        print(described(args.out, args.format, done, notes, use))


def _filled(use: str, out: str, place: str) -> str:
    """With the places put in: for a shell, or, between quotes, for Python."""
    names = {"OUT": out, "BASE": place}
    return re.sub(r"'(OUT)'|\b(OUT|BASE)\b", lambda m: repr(names[m[1]]) if m[1] else shlex.quote(names[m[2]]), use)


def _other(into: str) -> str:
    return " (--into dequantised makes exactly what was trained)" if into == "original" else ""


def described(out: str, name: str, done: Done, notes: list[str], use: str) -> str:
    """An export in lines for people."""
    lines = [f"exported   {out} ({name})", f"checked    {done.checked}", f"           {_figures(done.figures)}"]
    lines += [f"note       {note}" for note in notes]
    return "\n".join([*lines, "", "next:", f"  {use}"])


_SHOWN = {
    "largest": "largest difference",
    "tolerance": "allowed",
    "mean": "mean",
    "effect": "the adapter itself",
    "agree": "same best token",
    "positions": "positions",
    "layers": "layers",
    "rank": "rank",
    "rounding": "rounding",
}


def _figures(values: Mapping[str, Any]) -> str:
    found = {word: values[key] for key, word in _SHOWN.items() if values.get(key) not in (None, float("inf"))}
    return ", ".join(
        f"{word} {value:.1%}" if word == "same best token" else f"{word} {value:.3g}" for word, value in found.items()
    )

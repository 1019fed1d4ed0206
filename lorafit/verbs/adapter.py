"""`lorafit adapter`: what can be done with adapters once they are trained. Each way is a verb of its own."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import AdapterError, ConfigError
from lorafit.files import free
from lorafit.log import count, size, table
from lorafit.verbs.common import add_json, importing, print_json, terminal

if TYPE_CHECKING:
    from lorafit.adapters.opened import Opened

ABOUT = "look at adapters, compare, check, combine, compress and convert them"
EXAMPLE = """\
  lorafit adapter info runs/a
  lorafit adapter diff runs/a runs/b
  lorafit adapter verify runs/a
  lorafit adapter combine both runs/a runs/b:0.5 --how svd --rank 16
  lorafit adapter compress runs/a small --energy 0.99
  lorafit adapter convert runs/a for-mlx --to mlx"""

MUCH = 0.1  # of ‖ΔW‖²: a loss that is warned of
HOWS = ("cat", "linear", "svd", "ties", "dare")
WAYS = {
    "info": ("method, ranks, ‖ΔW‖ by layer, base and lineage", "  lorafit adapter info runs/a --html a.html"),
    "diff": (
        "two adapters: base, settings, and how far apart they are, site by site",
        "  lorafit adapter diff runs/a runs/b",
    ),
    "verify": ("an adapter against its base: fits, finite, and changes something", "  lorafit adapter verify runs/a"),
    "combine": (
        "several adapters as one",
        "  lorafit adapter combine both runs/a runs/b               the exact sum\n"
        "  lorafit adapter combine both runs/a:0.7 runs/b:0.3 --how svd --rank 16\n"
        "  lorafit adapter combine both runs/a runs/b --how ties --density 0.2",
    ),
    "compress": (
        "a smaller adapter, with what that loses",
        "  lorafit adapter compress runs/a small --energy 0.99\n"
        "  lorafit adapter compress runs/a small --size 2M\n"
        "  lorafit adapter compress runs/a small --int8",
    ),
    "convert": (
        "from mlx-lm, MiniMind or int8 to PEFT's format, and to mlx-lm",
        "  lorafit adapter convert adapters_mlx mine --model DIR\n"
        "  lorafit adapter convert lora_identity_768.pth mine --model DIR\n"
        "  lorafit adapter convert runs/a for-mlx --to mlx",
    ),
}


def add(parser: argparse.ArgumentParser) -> None:
    """The ways and their arguments."""
    ways = parser.add_subparsers(dest="way", metavar="WAY", required=True)
    made = {
        name: ways.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"example:\n{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, (about, example) in WAYS.items()
    }
    made["info"].add_argument("adapter", metavar="ADAPTER", help="run or adapter folder")
    made["info"].add_argument("--html", metavar="FILE", help="also write it as a page with pictures")
    made["info"].add_argument("--sites", action="store_true", help="list every site")
    made["diff"].add_argument("adapters", nargs=2, metavar="ADAPTER", help="two runs or adapter folders")
    made["diff"].add_argument("--sites", action="store_true", help="list every site, not the farthest ten")
    made["verify"].add_argument("adapter", metavar="ADAPTER", help="run or adapter folder")
    combine = made["combine"]
    combine.add_argument("out", metavar="OUT", help="folder to write")
    combine.add_argument(
        "adapters", nargs="+", metavar="ADAPTER[:WEIGHT]", help="runs or adapter folders; weight 1 if none"
    )
    combine.add_argument("--how", choices=HOWS, default="cat", help="default: cat, the exact sum")
    combine.add_argument(
        "--rank", type=int, metavar="N", help="of the result; svd: the largest of theirs, ties and dare: their sum"
    )
    combine.add_argument("--density", type=float, metavar="D", help="share of numbers kept; ties: 0.2, dare: 0.5")
    combine.add_argument("--seed", type=int, default=0, help="of dare's choice")
    compress = made["compress"]
    compress.add_argument("adapter", metavar="ADAPTER", help="run or adapter folder")
    compress.add_argument("out", metavar="OUT", help="folder to write")
    amount = compress.add_mutually_exclusive_group()
    amount.add_argument("--energy", type=float, metavar="E", help="keep this share of each site's ‖ΔW‖², such as 0.99")
    amount.add_argument("--size", metavar="5M", help="the file's bytes, spent where they hold most of ‖ΔW‖²")
    amount.add_argument("--rank", type=int, metavar="N", help="this rank at every site")
    compress.add_argument("--int8", action="store_true", help="8 bits a number, in a file that lorafit alone reads")
    compress.add_argument("--text", metavar="FILE", help="compare answers on this text; default: held-out rows")
    convert = made["convert"]
    convert.add_argument("source", metavar="IN", help="adapter of any known format; or MiniMind's weights (.pth)")
    convert.add_argument("out", metavar="OUT", help="folder to write")
    convert.add_argument("--to", choices=["peft", "mlx"], default="peft", help="default: peft")
    convert.add_argument("--tokenizer", metavar="DIR", help="of MiniMind's weights: the folder with its tokenizer.json")
    for way in made.values():
        way.add_argument("--model", metavar="M", help="the base, instead of the one that the adapter names")
        add_json(way)


def run(args: argparse.Namespace) -> None:
    """One of the ways."""
    with importing():
        from lorafit.adapters import opened

        del opened
    {"info": _info, "diff": _diff, "verify": _verify, "combine": _combine, "compress": _compress, "convert": _convert}[
        args.way
    ](args)


def _opened(args: argparse.Namespace, *given: str) -> list[Opened]:
    from lorafit.adapters.opened import open_adapter
    from lorafit.peft_files import passed_over

    out = terminal()
    with out.working("reading") as spinner:
        found = [open_adapter(path, args.model, spinner.rename) for path in given]
    for one in found:
        if one.base is None:
            out.say(
                f"the base of {one.given} ({one.base_name or 'not named'}) isn't here; going by the adapter's own shapes"
            )
        elif not one.notes.get("fingerprint"):
            out.say(f"{one.given} doesn't say which weights it was made for; only names and shapes were checked")
        for line in passed_over(one.folder):
            out.say(line)
    return found


# --- looking -----------------------------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> None:
    from lorafit import report
    from lorafit.adapters.compare import info
    from lorafit.files import write_text

    (one,) = _opened(args, args.adapter)
    found = info(one)
    facts, kinds = _facts(found), _by_kind(found["sites"])
    if args.html:
        page = report.adapter(
            args.adapter, facts, {"layer": found["layers"], "kind of weight": {k: v["norm"] for k, v in kinds.items()}}
        )
        write_text(Path(args.html), page, again="")
    if args.json:
        print_json(found)
        return
    wide = max(len(label) for label, _ in facts)
    print("\n".join(f"{label:<{wide}}  {value}" for label, value in facts))
    print()
    if args.sites:
        rows = [[s["path"], _times(s["shape"]), _or(s["rank"]), _or(s["scale"], ".4g"), _or(s["needed"]), f"{s['norm']:.4g}"]
                for s in found["sites"]]  # fmt: skip
        print(table(["site", "shape", "rank", "scale", "for 99 %", "‖ΔW‖"], rows, "llrrrr"))
        return
    rows = [[kind, v["sites"], v["ranks"], v["needed"], f"{v['norm']:.4g}"] for kind, v in kinds.items()]
    print(table(["weights", "sites", "rank", "for 99 %", "‖ΔW‖"], rows, "lrrrr"))
    print()
    most = max(found["layers"].values(), default=0.0)
    lines = [[name, f"{norm:.4g}", _bar(norm / most if most else 0.0)] for name, norm in found["layers"].items()]
    print(table(["", "‖ΔW‖", ""], lines, "lrl"))
    if args.html:
        print(f"\nwritten    {args.html}")


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    stored = found["stored_as"]
    base = f"{found['base'] or 'not named'}{'' if found['base_is_here'] else ', which is not here'}"
    facts = [
        ("adapter", found["adapter"]),
        ("method", _method(found) + (f", stored as {_method(stored)}" if stored else "")),
        ("base", base + (f", trained in {found['quant']}" if found["quant"] != "none" else "")),
        ("fingerprint", found["fingerprint"] or "none"),
        ("size", f"{size(found['bytes'])}, {count(found['parameters'])} numbers{' in int8' if found['int8'] else ''}"),
        ("‖ΔW‖", f"{found['norm']:.4g}"),
    ]
    return [*facts, *(("from", line) for line in _lineage(found["lineage"]))]


def _method(found: dict[str, Any]) -> str:
    return " ".join([found["method"], *(f"{key}={value}" for key, value in found["options"].items())])


def _lineage(lineage: dict[str, Any] | None, depth: int = 0) -> list[str]:
    """A line for each step back."""
    if not lineage:
        return []
    settings = " ".join(f"{k}={v}" for k, v in lineage.items() if k not in ("made", "of", "weights") and v is not None)
    weights = lineage.get("weights") or [1] * len(lineage.get("of", []))
    of = [
        str(one["adapter"]) + (f":{w:g}" if w != 1 else "")
        for one, w in zip(lineage.get("of", []), weights, strict=False)
    ]
    lines = ["  " * depth + " ".join(filter(None, [lineage.get("made", "?"), settings, "of", ", ".join(of)]))]
    for one in lineage.get("of", []):
        lines += _lineage(one.get("lineage"), depth + 1)
    return lines


def _by_kind(sites: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sites by the last part of their path, with what they have in common."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for site in sites:
        groups.setdefault(site["path"].rsplit(".", 1)[-1], []).append(site)
    return {
        kind: {
            "sites": len(group),
            "ranks": _span([s["rank"] for s in group]),
            "needed": _span([s["needed"] for s in group]),
            "norm": sum(s["norm"] ** 2 for s in group) ** 0.5,
        }
        for kind, group in groups.items()
    }


def _diff(args: argparse.Namespace) -> None:
    from lorafit.adapters.compare import diff

    one, other = _opened(args, *args.adapters)
    found = diff(one, other)
    if args.json:
        print_json(found)
        return
    same = {True: "the same", False: "different ones", None: "not known to be the same"}[found["same_base"]]
    print(f"bases      {same} ({', '.join(name or 'not named' for name in dict.fromkeys(found['bases']))})")
    print(f"together   distance {found['distance']:.4f} of the larger, cosine {found['cosine']:.4f}")
    for name, only in zip(found["adapters"], found["only_in"], strict=True):
        if only:
            print(f"only in {name}: {len(only)} sites, such as {only[0]}")
    if found["different"]:
        rows = [[key, *(_short(value) for value in pair)] for key, pair in found["different"].items()]
        print("\n" + table(["setting", *found["adapters"]], rows, "lll"))
    sites = sorted(found["sites"], key=lambda s: -s["distance"])
    shown = found["sites"] if args.sites else sites[:10]
    rows = [[s["path"], *(f"{n:.4g}" for n in s["norms"]), f"{s['distance']:.4f}", f"{s['cosine']:.4f}"] for s in shown]
    print("\n" + table(["site", "‖ΔA‖", "‖ΔB‖", "distance", "cosine"], rows, "lrrrr"))
    if len(shown) < len(sites):
        print(f"the farthest {len(shown)} of {len(sites)} sites; --sites lists all")


def _verify(args: argparse.Namespace) -> None:
    from lorafit.adapters.opened import open_adapter
    from lorafit.export.merge import finite_effect
    from lorafit.session import open_session
    from lorafit.verbs.merge import prompts

    out = terminal()
    with out.working("reading") as spinner:
        one = open_adapter(args.adapter, args.model, spinner.rename)
        if one.base is None:
            raise AdapterError(
                f"the base of {args.adapter} ({one.base_name or 'not named'}) isn't here; name it with --model"
            )
        spinner.rename("loading the base")
        session = open_session(  # in fp32: in 16 bits a small change may be no change
            [args.adapter],
            model=args.model,
            streamed=True,
            precision="fp32",
            device="cpu",
            say=out.say,
            working=spinner.rename,
        )
        (name,) = session.host.adapters
        rows = prompts(args.adapter, session.chat(name))
        spinner.rename("comparing with the base")
        want, effect = finite_effect(session.host, name, rows)
    spread = float(want.std())
    if not effect:
        raise AdapterError(f"{args.adapter} changes nothing: the logits are those of {session.host.base.name} alone")
    made_for = one.notes.get("fingerprint", "")
    if args.json:
        print_json({"adapter": args.adapter, "base": session.host.base.name, "fingerprint": made_for, "sites": len(one.paths),
                    "effect": effect, "spread": spread})  # fmt: skip
        return
    print(
        f"base       {session.host.base.name}: {'its fingerprint' if made_for else 'names and shapes; no fingerprint to check'}"
    )
    print(f"tensors    {len(one.paths)} sites, all there, of their shapes, finite")
    print(f"effect     it moves the logits by {effect:.3g} on average (they spread by {spread:.3g})")


# --- making ------------------------------------------------------------------------------------------------------------


def _weighted(word: str) -> tuple[str, float]:
    """A path and its weight, `runs/a:0.5`."""
    path, colon, weight = word.rpartition(":")
    if not colon or Path(word).exists():
        return word, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise ConfigError(f"{word}: '{weight}' isn't a weight; write for example {path}:0.5") from None


def _combine(args: argparse.Namespace) -> None:
    from math import isfinite

    from lorafit.adapters.combine import combine
    from lorafit.adapters.opened import base_folder, differences, write

    to = free(Path(args.out))
    pairs = [_weighted(word) for word in args.adapters]
    for path, weight in pairs:
        if not isfinite(weight):
            raise ConfigError(f"{path}:{weight}: the weight must be a finite number")
    sources, out = _opened(args, *(path for path, _ in pairs)), terminal()
    for line in differences(sources):
        out.say(line)
    with out.working("combining") as spinner:
        made = combine(
            sources,
            [weight for _, weight in pairs],
            args.how,
            rank=args.rank,
            density=args.density,
            seed=args.seed,
            progress=spinner.update,
        )
        sites = {path: site for one in reversed(sources) for path, site in one.sites.items()}
        write(made.adapter, to, sites, base_folder(sources[0]), sources[0].modules)
    weights = (to / "adapter_model.safetensors").stat().st_size
    kept, nothing = made.sites, bool(made.sites) and not any(one.energy for one in made.sites.values())
    if args.json:
        print_json({"out": args.out, "how": args.how, "lost": made.lost, "bytes": weights,
                    "sites": {p: {"rank": k.rank, "lost": k.lost} for p, k in kept.items()}})  # fmt: skip
        return
    print(f"combined   {args.out} ({args.how}; {len(kept) or len(sources[0].paths)} sites, {size(weights)})")
    _print_lost(kept, made.lost, "--how cat is exact" if args.how != "svd" else "try a larger --rank")
    if nothing:
        print("warning    the adapters cancel out: this one changes nothing")
    print(f"\nnext:\n  lorafit chat {shlex.quote(args.out)}")


def _print_lost(kept: dict[str, Any], lost: float, hint: str) -> None:
    """The ranks, and where most was lost; `hint`: how less is."""
    if not kept:
        return
    print(f"rank       {_span([one.rank for one in kept.values()])}")
    print(f"lost       {lost:.3%} of ‖ΔW‖² (a relative error of {lost**0.5:.3g})")
    if lost > MUCH:
        print(f"warning    more than a tenth of what was to be added is gone; {hint}")
    worst = sorted(kept, key=lambda path: -kept[path].lost)[:5]
    if kept[worst[0]].lost > 1e-9:
        print(
            "\n"
            + table(["most lost at", "rank", "lost"], [[p, kept[p].rank, f"{kept[p].lost:.3%}"] for p in worst], "lrr")
        )


def _compress(args: argparse.Namespace) -> None:
    from lorafit.adapters.compress import compress, rounded
    from lorafit.adapters.opened import base_folder, open_adapter, write
    from lorafit.config import byte_count
    from lorafit.files import need_data

    if args.rank is None and args.energy is None and args.size is None and not args.int8:
        raise ConfigError("say how small: --energy 0.99, --size 5M, --rank 4 or --int8")
    if args.text:
        need_data(args.text)
    to = free(Path(args.out))
    most = byte_count("--size", args.size, least=1e3) if args.size is not None else None
    (one,) = _opened(args, args.adapter)
    out = terminal()
    with out.working("compressing") as spinner:
        made = compress(one, rank=args.rank, energy=args.energy, size=most, int8=args.int8, progress=spinner.update)
        write(made.adapter, to, one.sites, base_folder(one), one.modules, int8=args.int8)
    weights = (to / "adapter_model.safetensors").stat().st_size
    lost = rounded(one, open_adapter(args.out, args.model)) if args.int8 else made.lost
    judged = _beside(args, one, out)
    if args.json:
        print_json({"out": args.out, "lost": lost, "bytes": weights, "bytes_before": one.bytes, "answers": judged,
                    "sites": {p: {"rank": k.rank, "lost": k.lost} for p, k in made.sites.items()}})  # fmt: skip
        return
    print(f"compressed {args.out}: {size(one.bytes)} -> {size(weights)}{' in int8' if args.int8 else ''}")
    if weights >= one.bytes:
        print(f"warning    that is no smaller: what {one.adapter.method} stores takes less than these factors of ΔW")
    _print_lost(made.sites, lost, "try --energy 0.99, which takes the ranks that it needs")
    if judged is not None:
        print(
            f"answers    same best token at {judged['agree']:.1%} of {judged['positions']} positions; logits off by"
            f" {judged['mean']:.2g} on average, the adapter itself moves them by {judged['effect']:.2g}"
        )
    if args.int8:
        print(f"\nPEFT doesn't read int8; for it:\n  lorafit adapter convert {shlex.quote(args.out)} OUT")


def _beside(args: argparse.Namespace, one: Opened, out: Any) -> dict[str, Any] | None:
    """The compressed adapter's logits beside the original's; None where the base isn't here."""
    if one.base is None:
        out.say("the base isn't here, so answers aren't compared")
        return None
    import torch

    from lorafit.export.merge import compare, effect_of, logits_of
    from lorafit.session import open_session
    from lorafit.verbs.merge import prompts

    with out.working("comparing answers") as spinner:
        session = open_session(
            [str(one.folder), args.out],
            model=args.model,
            streamed=True,
            precision="fp32",
            device="cpu",
            working=spinner.rename,
        )
        before, after = session.host.adapters
        rows = _text_rows(args.text, session.host.base) if args.text else prompts(args.adapter, session.chat(before))
        want, effect = effect_of(session.host, before, rows)
        found = compare(want, logits_of(session.host, after, rows), effect, torch.float32, None)
    return {key: getattr(found, key) for key in ("agree", "kl", "mean", "largest", "effect", "positions")}


def _text_rows(path: str, base: Any) -> list[list[int]]:
    """A text's tokens in pieces of 256. DataError where there is no such text."""
    from lorafit.errors import DataError
    from lorafit.files import need_data

    need_data(path)
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path} isn't text in UTF-8") from None
    ids = base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: 256 * 16]
    if not ids:
        raise DataError(f"{path} is empty")
    return [ids[at : at + 256] for at in range(0, len(ids), 256)]


def _convert(args: argparse.Namespace) -> None:
    from lorafit.adapters import convert, minimind
    from lorafit.adapters.opened import base_folder, carried, open_adapter, write

    to, source = free(Path(args.out)), Path(args.source)
    if source.is_file() and minimind.is_base(tensors := convert.read_tensors(source)):
        if args.to != "peft":
            raise ConfigError(f"{source} is a whole model; --to goes with adapters")
        if args.tokenizer is None:
            raise ConfigError(f"{source} is a model without its tokenizer; name the folder of that with --tokenizer")
        with terminal().working("writing"):
            figures = minimind.write(tensors, source, Path(args.tokenizer), to)
        if args.json:
            print_json({"out": args.out, "format": "Hugging Face, Qwen 3", **figures})
            return
        shape = f"{figures['layers']} layers of {figures['width']}, {count(figures['parameters'])} numbers"
        print(f"converted  {args.out}: Qwen 3, {shape}")
        print(f"\nnext:\n  lorafit chat --model {shlex.quote(args.out)}")
        return
    if args.tokenizer is not None:
        raise ConfigError("--tokenizer goes with MiniMind's weights; an adapter uses its base's")
    other = convert.foreign(source)
    if other is not None:
        if args.to != "peft":
            raise ConfigError(f"{source} is {other.format}'s; convert it to peft first")
        made = convert.taken(other, args.source, args.model)
        off = convert.proved(convert.off(other.formulas, made.adapter))
        write(made.adapter, to, made.sites, made.name if made.base is None else str(made.base), made.modules)
        sites, kind = len(other.deltas), other.format
        made_for = made.name
    else:
        (one,) = _opened(args, args.source)
        sites, kind, made_for = len(one.paths), one.adapter.method, one.base_name
        if args.to == "mlx":
            off = convert.write_mlx(one, to)
        else:
            one.adapter.notes = carried([one], made="convert")
            write(one.adapter, to, one.sites, base_folder(one), one.modules)
            off = 0.0
    if args.to == "peft":
        from lorafit.adapters.compare import unlike

        back = open_adapter(args.out, args.model)
        if other is None:
            off = unlike(one, back)
    if args.json:
        print_json({"out": args.out, "from": kind, "to": args.to, "base": made_for, "sites": sites, "off": off})
        return
    print(f"converted  {args.out} ({kind} to {args.to}; {sites} sites, base {made_for or 'not named'})")
    print(f"checked    what it adds differs from the source's formula by {off:.1e} of its largest number")


# --- words -------------------------------------------------------------------------------------------------------------


def _span(values: Sequence[int | None]) -> str:
    there = sorted({value for value in values if value is not None})
    return "full" if not there else str(there[0]) if len(there) == 1 else f"{there[0]}–{there[-1]}"


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _or(value: float | None, form: str = "") -> str:
    return "full" if value is None else format(value, form)


def _short(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _bar(share: float, most: int = 40) -> str:
    """A bar in eighths of a character."""
    eighths = round(share * most * 8)
    return "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")

"""What several verbs share."""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.config import choices
from lorafit.errors import ConfigError
from lorafit.log import Terminal

if TYPE_CHECKING:
    from lorafit.config import Config
    from lorafit.data import Chat, Dataset
    from lorafit.places import Place
    from lorafit.session import Session

SAMPLES = 9  # in a tenth of a second

# How often a thread of ours looks whether the others are done before it sleeps, where programs compete for processors. By
# default it looks for some 15 ms, which then are lost to whoever it waits for; on an idle machine sleeping costs a tenth.
BRIEFLY = "1000"


def add_base(parser: argparse.ArgumentParser) -> None:
    """--model."""
    parser.add_argument(
        "--model", metavar="M", help="Hugging Face folder, GGUF file or hub id; default: the embedded model"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model, --precision, --quant, --device."""
    add_base(parser)
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="of the base")
    parser.add_argument("--quant", choices=choices("quant"), help="how the base is stored; default: as trained")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")


def add_rows(parser: argparse.ArgumentParser) -> None:
    """--held-out, --map, --skip-bad-rows: which rows, beside DATA."""
    parser.add_argument("--held-out", metavar="FILE", help="held-out rows, instead of a split of DATA")
    parser.add_argument("--map", metavar="user=COL,assistant=COL", help="which columns hold what")
    parser.add_argument(
        "--skip-bad-rows", action="store_true", help="leave out rows that can't be used, and count them"
    )


def source_of(args: argparse.Namespace) -> str | None:
    """DATA or a YAML file; None where the first word is a setting already, which then goes to the others."""
    source: str | None = args.source
    if source is not None and "=" in source and not Path(source).is_file():
        args.settings = [source, *args.settings]
        return None
    return source


def asked(args: argparse.Namespace, verb: str, part: str) -> tuple[str | None, dict[str, Any]]:
    """DATA or a YAML file as in `source_of`, and the settings. With --resume the first word may be a run folder, if `part` lies
    in it: that is the setting `out` then. ConfigError for --resume without one."""
    source = source_of(args)  # first: it may hand a word to the settings
    found = given(args)
    if args.resume and source is not None and (Path(source) / part).exists():
        found.setdefault("out", source)
        source = None
    if args.resume and not found.get("out"):
        raise ConfigError(f"--resume needs the run folder: lorafit {verb} --resume --out RUN")
    return source, found


def opened(args: argparse.Namespace, out: Terminal) -> Session:
    """The base and the adapters that `runs` names (`base`: the base alone), as the options of `add_model` say."""
    from lorafit.session import open_session

    with out.working("loading") as spinner:
        return open_session(
            [path for path in args.runs if path != "base"],
            model=args.model,
            quant=args.quant,
            precision=args.precision,
            device=args.device,
            say=out.say,
            working=spinner.rename,
        )


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of a command line: its key=value words, and the options that are settings too."""
    from lorafit.config import pairs

    found: dict[str, Any] = pairs(args.settings)
    for key in ("model", "out", "held_out", "map", "start"):
        if (value := getattr(args, key, None)) is not None:
            found[key] = value
    if getattr(args, "skip_bad_rows", False):
        found["skip_bad_rows"] = True
    _known(found)
    return found


def _known(names: Iterable[str]) -> None:
    """ConfigError for a setting that no method has either. Methods are imported only for names that aren't everybody's: with
    torch, in half of the time that all the rest takes."""
    from lorafit.config import defaults, nearest

    if strange := [name for name in names if name not in defaults()]:
        from lorafit.methods import METHODS, settings

        own = {key for method in METHODS.values() for key in settings(method)}
        if unknown := [name for name in strange if name not in own]:
            raise ConfigError(f"unknown setting '{unknown[0]}'; {nearest(unknown[0], [*defaults(), *own])}")


@dataclass(frozen=True)
class Wanted:
    """What is asked about: training with these settings, from the adapter in `source`, with the model in `path`, on this
    data, written out by this chat, at this place."""

    config: Config
    source: Path | None
    path: Path
    chat: Chat
    data: Dataset
    place: Place


def refuse(args: argparse.Namespace) -> None:
    """Of a command line that has --for, what can be refused before seconds of imports: settings, the place, no data."""
    from lorafit import places
    from lorafit.files import need_data

    given(args)
    if args.place is not None:
        places.find(args.place)
    need_data(args.source)


def wanted(args: argparse.Namespace, out: Terminal, weights: bool) -> Wanted:
    """Settings, rows and place of a command line that has --for; `weights`: the model's must be there."""
    from lorafit import fit, places
    from lorafit.config import byte_count

    config = fit.read_config(args.source, given(args))
    memory = byte_count("memory", config.memory) if config.memory else None
    place = places.here(config.device, memory) if args.place is None else places.find(args.place, memory)
    if not place.bf16 and config.precision == "auto":
        config.precision = "fp32"
    source = fit.start_of(config)
    path, chat, data = fit.read_data(config, out, weights=weights)
    return Wanted(config, source, path, chat, data, place)


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output and nothing else there")


def print_json(values: Any) -> None:
    """The one object of --json; NaN becomes null, which JSON has a word for."""
    print(json.dumps(_finite(values), ensure_ascii=False, indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def terminal() -> Terminal:
    """Where progress goes: standard error, so that standard output stays for results."""
    return Terminal(stream=sys.stderr)


def _running() -> int:
    return int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].split("/")[0])


def beside_others(running: Callable[[], int] = _running) -> bool:
    """Whether other programs keep processors busy that our threads would take. `running` counts the processes that run or
    wait for a processor, this one among them; /proc/loadavg's own count by default, and False where there is none."""
    counts = []
    for _ in range(SAMPLES):
        try:
            counts.append(running() - 1)
        except (OSError, ValueError, IndexError):
            return False
        time.sleep(0.01)
    threads = len(os.sched_getaffinity(0))
    return statistics.median(counts) + threads > (os.cpu_count() or threads)


@contextmanager
def importing() -> Iterator[None]:
    """Around a verb's imports of torch and transformers, which without Python's garbage collector take a sixth less time.

    Hundreds of thousands of objects come to stay, and the collector would look through them again and again while they
    come. Afterwards it is on and leaves them alone ("frozen"), and with them 7 MB of real garbage (measured) and whatever a
    program that calls us holds by then. Where transformers is there already nothing happens.
    """
    if not gc.isenabled() or "transformers" in sys.modules:
        yield
        return
    if beside_others():
        os.environ.setdefault("GOMP_SPINCOUNT", BRIEFLY)  # read once, when torch is imported
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

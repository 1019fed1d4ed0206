"""Opening what was trained: a run, or any adapter in PEFT's format, on its base, with the chat it was trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorafit.config import nearest
from lorafit.data import Chat
from lorafit.errors import AdapterError, ConfigError, RunError
from lorafit.files import busy
from lorafit.host import Host
from lorafit.model.base import Base
from lorafit.model.load import load, stop_ids
from lorafit.model.quant import Quant
from lorafit.model.starts import Start
from lorafit.native.quantised import KINDS
from lorafit.peft_files import passed_over, read_config, read_notes
from lorafit.route import Stack
from lorafit.run import searching

Say = Callable[[str], object]


@dataclass
class Session:
    """A host with its adapters loaded, and the chat of each (the base's own under None)."""

    host: Host
    chats: dict[str | None, Chat]
    folders: dict[str, Path]

    def chat(self, name: str | None) -> Chat:
        """The chat that an adapter was trained with; of a stack that of its first."""
        first = name if name in self.chats or name is None else name.split("+")[0]
        return self.chats.get(first, self.chats[None])

    def stack(self, text: str | None) -> Stack:
        """The adapters that a text means: a name, or several as `a+b`, whose deltas are added. AdapterError for an unknown
        one."""
        there = self.host.adapters
        names = () if text is None else (text,) if text in there else tuple(text.split("+"))
        for name in names:
            if name not in there:
                raise AdapterError(f"no adapter '{name}'; {nearest(name, ['base', *there])}")
        return names


def base_chat(base: Base) -> Chat:
    """The chat of the base: its tokenizer's template, and every token its generation settings stop at."""
    return Chat.of(base.tokenizer, generation_eos=stop_ids(base.path))


def mismatches(trained: Chat, base: Chat) -> list[str]:
    """How the chat of an adapter differs from its base's, apart from the system prompt and date, which are its own."""
    return trained.differs(replace(base, system=trained.system, date=trained.date))


def adapter_folder(path: str | Path) -> Path:
    """The adapter folder that a run's or an adapter's path means."""
    place = Path(path)
    for folder in (place, place / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    if process := busy(place):
        raise RunError(f"{place} has no adapter yet: process {process} is still at work in it")
    if (place / "config.yaml").is_file():
        raise RunError(f"{place} has no adapter yet; finish it with: lorafit train --resume --out {place}")
    if (place / "config.json").is_file():
        raise RunError(f"{place} is a model, not a run; it is given with --model {place}")
    if what := searching(place):
        raise RunError(f"{place} has no adapter yet: it is {what}")
    near = ", ".join(str(p.parent) for p in sorted(place.parent.glob("*/config.yaml"))[:5])
    hint = f"; there are: {near}" if near else "; make one with: lorafit train DATA"
    raise RunError(f"{place} is neither a run nor an adapter{hint}")


def base_of(folder: Path) -> str:
    """The base that an adapter names: the model as the user gave it, or else PEFT's base_model_name_or_path."""
    name, path = read_notes(folder).get("base"), read_config(folder).get("base_model_name_or_path")
    if name is None or (Path(name).is_absolute() and not Path(name).exists()):
        name = path or name
    if not name:
        raise AdapterError(f"{folder} doesn't say which base it is for; name it with --model")
    return str(name)


def quant_of(folder: Path) -> Quant | None:
    """How the base was stored that an adapter was trained on."""
    notes = read_notes(folder)
    kind = notes.get("quant", "none")
    if kind not in ("none", *KINDS):
        raise AdapterError(
            f"{folder} was trained on a base in '{kind}', which isn't known here; choose one with --quant"
        )
    made = Quant.of(kind, bool(notes.get("double_quant", True)))
    if made is None or notes.get("quant_start") is None:
        return made
    try:
        return replace(made, start=Start.from_json(notes["quant_start"]))
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{folder} was trained on codes that aren't known here: {error}") from None


def tokens_of(folders: Sequence[Path]) -> list[str]:
    """The new tokens that a base needs for these adapters. AdapterError where they don't have them in one order."""
    lists = [list(read_notes(folder).get("new_tokens") or {}) for folder in folders]
    longest = max(lists, key=len, default=[])
    for folder, texts in zip(folders, lists, strict=True):
        if texts != longest[: len(texts)]:
            raise AdapterError(
                f"{folder} was trained with other new tokens ({', '.join(texts)}, not {', '.join(longest)}) than an adapter"
                " beside it; use them one at a time"
            )
    return longest


def open_session(
    paths: Sequence[str],
    *,
    model: str | None = None,
    quant: str | None = None,
    streamed: bool = False,
    precision: str = "auto",
    device: str = "auto",
    say: Say = lambda text: None,
    working: Say = lambda text: None,
) -> Session:
    """Load a base and these adapters over it (none: the base alone). `say` is told of every mismatch.

    Adapters are named by their run's folder. RunError/AdapterError if two of them are for different bases. `quant` as in the
    settings; None: as the adapters' base was stored. `streamed` as in `load`.
    """
    folders = _named(paths)
    bases = {base_of(folder) for folder in folders.values()}
    if model is None and len(bases) > 1:
        raise AdapterError(f"these adapters are for different bases: {', '.join(sorted(bases))}")
    trained = {name: quant_of(folder) for name, folder in folders.items()}
    stored = Quant.of(quant) if quant is not None else next(iter(trained.values()), None)
    if quant is None and len(set(trained.values())) > 1:
        each = ", ".join(f"{name} {kept or 'none'}" for name, kept in trained.items())
        kinds = sorted({kept.kind for kept in trained.values() if kept is not None})
        smallest = " or ".join(f"--quant {kind}" for kind in kinds)
        raise AdapterError(
            f"these adapters were trained on bases stored otherwise ({each}); choose one base for all of them: --quant none,"
            f" or {smallest}; each is at its best on its own, one at a time"
        )
    if stored is not None:  # without double quantisation, if that is what an adapter knows
        stored = next((kept for kept in trained.values() if kept is not None and kept.kind == stored.kind), stored)
    host = Host(
        load(
            model or (bases.pop() if bases else "smollm2"),
            precision=precision,
            device=device,
            quant=stored,
            tokens=tokens_of(list(folders.values())),
            streamed=streamed,
            working=working,
        )
    )
    chats: dict[str | None, Chat] = {None: base_chat(host.base)}
    for name, folder in folders.items():
        adapter = host.load(folder, name)
        if "fingerprint" not in adapter.notes:
            say(f"{folder} doesn't say which weights it was made for; only names and shapes were checked")
        for line in passed_over(folder):
            say(line)
        if trained[name] != stored:
            then, now = (kept or "its own precision" for kept in (trained[name], stored))
            say(f"{name} was trained on a base in {then}; this one is in {now}")
        saved = adapter.notes.get("chat")
        try:
            chats[name] = Chat.from_json(saved, host.base.tokenizer) if saved else chats[None]
        except (KeyError, TypeError, ValueError) as error:
            raise AdapterError(f"{folder}: its chat can't be read ({type(error).__name__} at {error})") from None
        for difference in mismatches(chats[name], chats[None]):
            say(f"{name}: {difference}; using what it was trained with")
    return Session(host, chats, folders)


def _named(paths: Sequence[str]) -> dict[str, Path]:
    """Adapter folders by the name of their run's folder; where that is taken, by the path as it was given."""
    found: dict[str, Path] = {}
    for path in paths:
        place = Path(path).resolve()
        name = place.parent.name if place.name == "adapter" else place.name
        folder = adapter_folder(path)
        if folder in found.values():
            raise AdapterError(f"{path} is named twice")
        found[str(path) if name in found or name == "base" else name] = folder
    return found

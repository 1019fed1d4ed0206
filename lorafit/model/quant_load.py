"""A model folder to a model, tensor by tensor: quantised, without the 16-bit model ever being in memory, or from a GGUF file.

The model is built without weights. To quantise, each linear weight is read, quantised and written to a file in the user's
cache, one after the other. That file, named by the contents of the folder, is then mapped into memory: at the next start
nothing is quantised, and processes share its pages. It holds the linear weights alone, under the names that bitsandbytes gives
its tensors, and what was put beside their codes; the others are read from the model's own files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.pytorch_utils import Conv1D

from lorafit.errors import ModelError
from lorafit.files import cache_folder, write_folder
from lorafit.model import gguf
from lorafit.model.new_tokens import Grown, NewTokens
from lorafit.model.quant import Quant, QuantLinear, linears, put, stored
from lorafit.model.shards import Entry, Files, Shards, write_file
from lorafit.model.sites import ranks
from lorafit.model.starts import Part
from lorafit.model.streamed import Source, stream
from lorafit.native.quantised import BLOCK, BY_ROWS, NESTED, Quantised, dynamic, table

FORMAT = 1  # raised when what is written changes
FILE = "weights.safetensors"
_STATE = 256  # bytes of the JSON that bitsandbytes keeps beside a weight, padded


def load(
    path: Path,
    config: Any,
    dtype: torch.dtype,
    quant: Quant | None,
    fingerprint: str,
    working: Callable[[str], object],
    streamed: bool = False,
    new: NewTokens | None = None,
) -> tuple[Any, Source]:
    """The transformers model of a folder on the CPU, with `quant` its linear modules QuantLinear, all else in `dtype`; and
    where its weights lie. `streamed`: what isn't codes is read by each module for its forward, see streamed.py. `new`: tokens
    that `config` has rows for already, and the files not.

    ModelError where a tensor is missing or of another shape, or the cache can't be written; ConfigError where a start is for
    weights that the model hasn't.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    found = list(linears(model)) if quant is not None else []
    fill_buffers(model)
    files: Files = gguf.of(path) or Shards(path)
    source = Source(model, files if new is None else Grown(files, model, new))
    if quant is not None:
        beside = ranks(model, quant.start) if quant.start is not None else {}
        codes = _cached(folder(path, fingerprint, quant), found, source, quant, beside, working)
        with safe_open(codes, framework="pt") as tensors:
            for name, module in found:
                bias: Any = getattr(module, "bias", None)
                if bias is not None:
                    bias = source.read(f"{name}.bias", dtype)
                q, part = read(tensors, name, _shape(module), quant), _part(tensors, name, quant, name in beside)
                put(model, name, QuantLinear(q, bias, dtype, isinstance(module, Conv1D), part))
    if streamed:
        stream(model, source, dtype)
    held = [*model.named_buffers(), *(() if streamed else model.named_parameters())]
    left = [name for name, tensor in held if tensor.is_meta]
    for number, name in enumerate(left, 1):
        working(f"reading {gguf.origin(path).name}: {number} of {len(left)}")
        _set(model, name, source.read(name, dtype))
    model.tie_weights()
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model, source


def fill_buffers(model: Any) -> None:
    """What the files don't hold: buffers such as rotary frequencies, made as transformers makes them after loading."""
    for name, module in model.named_modules():
        own = {key: t for key, t in module.named_buffers(recurse=False) if key in module._non_persistent_buffers_set}
        for key, empty in own.items():
            unset = math.nan if empty.is_floating_point() else -1
            setattr(module, key, torch.full(empty.shape, unset, dtype=empty.dtype, device="cpu"))
        if own:
            model._init_weights(module)
        for key in own:
            made = getattr(module, key)
            if bool((made != made).any() if made.is_floating_point() else (made == -1).any()):
                raise ModelError(f"{name}.{key} can't be made here; leave quant out, or use safetensors")


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, key = name.rpartition(".")
    module = model.get_submodule(parent)
    setattr(module, key, nn.Parameter(tensor, requires_grad=False) if key in module._parameters else tensor)


# --- the file of codes -------------------------------------------------------------------------------------------------


def folder(path: Path, fingerprint: str, quant: Quant) -> Path:
    """Where the codes are kept of the weights in `path`, which have this fingerprint.

    A fingerprint looks at samples. A change between them, in place, mustn't get the codes of before, so what the system
    says of the files counts too: a file that is written again is quantised again.
    """
    files = [gguf.origin(path)] if gguf.is_folder(path) else sorted(path.glob("*.safetensors"))
    written = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = f"{FORMAT} {fingerprint} {written} {quant.kind} {quant.double}"
    if quant.start is not None:
        text += f" {json.dumps(quant.start.to_json(), sort_keys=True)}"
    return cache_folder() / "quantised" / hashlib.sha256(text.encode()).hexdigest()[:32]


def _cached(
    place: Path,
    found: list[tuple[str, nn.Module]],
    source: Source,
    quant: Quant,
    beside: Mapping[str, int],
    working: Callable[[str], object],
) -> Path:
    """The file of codes in `place`, made now if it isn't there or isn't whole. `beside`: ranks of what goes beside codes, by
    path."""
    entries = [entry for name, module in found for entry in _entries(name, _shape(module), quant, beside.get(name))]
    if _whole(place / FILE, entries):
        return place / FILE

    def fill(scratch: Path) -> None:
        write_file(scratch / FILE, entries, codes())

    def codes() -> Iterator[dict[str, Tensor]]:
        for number, (name, module) in enumerate(found, 1):
            working(f"quantising to {quant.kind}, once: {number} of {len(found)}")
            given = source.read(f"{name}.weight")
            weight = given.t() if isinstance(module, Conv1D) else given
            q, part = stored(weight, quant, beside.get(name), f"{name}.weight")
            yield {**tensors_of(name, q), **_part_tensors(name, part)}

    write_folder(place, fill, again="quantise again, or set XDG_CACHE_HOME to a folder on another disk")
    return place / FILE


def _shape(module: Any) -> torch.Size:
    """(out, in)."""
    shape: torch.Size = module.weight.shape
    return torch.Size(reversed(shape)) if isinstance(module, Conv1D) else shape


def _entries(name: str, shape: torch.Size, quant: Quant, r: int | None) -> Iterator[Entry]:
    """The tensors of a weight (out, in), under bitsandbytes' names, and those of a part of rank `r` beside its codes."""
    if r is not None:
        r = min(r, *shape)
        yield Entry(f"{name}.start_a", torch.float32, (r, shape[1]))
        yield Entry(f"{name}.start_b", torch.float32, (shape[0], r))
        yield Entry(f"{name}.start_errors", torch.float32, (2,))
    if quant.kind in BY_ROWS:
        yield Entry(f"{name}.weight", torch.int8, tuple(shape))
        yield Entry(f"{name}.SCB", torch.float32, (shape[0],))
        return
    blocks = -(-shape.numel() // BLOCK)
    yield Entry(f"{name}.weight", torch.uint8, (-(-shape.numel() // 2), 1))
    yield Entry(f"{name}.weight.absmax", torch.uint8 if quant.double else torch.float32, (blocks,))
    yield Entry(f"{name}.weight.quant_map", torch.float32, (16,))
    yield Entry(f"{name}.weight.quant_state.bitsandbytes__{quant.kind}", torch.uint8, (_STATE,))
    if quant.double:
        yield Entry(f"{name}.weight.nested_absmax", torch.float32, (-(-blocks // NESTED),))
        yield Entry(f"{name}.weight.nested_quant_map", torch.float32, (256,))


def tensors_of(name: str, q: Quantised, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A weight as those tensors; `dtype` is what bitsandbytes makes of its numbers."""
    if q.kind in BY_ROWS:
        return {f"{name}.weight": q.codes, f"{name}.SCB": q.absmax}
    state: dict[str, Any] = {
        "quant_type": q.kind,
        "blocksize": BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    found = {
        f"{name}.weight": q.codes,
        f"{name}.weight.absmax": q.absmax,
        f"{name}.weight.quant_map": table(q.kind, "cpu").clone(),
    }
    if q.nested is not None and q.offset is not None:
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": q.offset.item()}
        found |= {f"{name}.weight.nested_absmax": q.nested, f"{name}.weight.nested_quant_map": dynamic("cpu").clone()}
    text = json.dumps(state).encode().ljust(_STATE)
    found[f"{name}.weight.quant_state.bitsandbytes__{q.kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    return found


def _part_tensors(name: str, part: Part | None) -> dict[str, Tensor]:
    """What is beside a weight's codes, as those tensors."""
    if part is None:
        return {}
    errors = torch.tensor([part.plain, part.after])
    return {f"{name}.start_a": part.a, f"{name}.start_b": part.b, f"{name}.start_errors": errors}


def _part(tensors: Any, name: str, quant: Quant, there: bool) -> Part | None:
    """What is beside a weight's codes, from an open file."""
    if quant.start is None or not there:
        return None
    a, b, errors = (tensors.get_tensor(f"{name}.start_{key}") for key in ("a", "b", "errors"))
    return Part(quant.start.method, a, b, *errors.tolist())


def read(tensors: Any, name: str, shape: torch.Size, quant: Quant) -> Quantised:
    """A weight (out, in) from an open file of codes."""
    if quant.kind in BY_ROWS:
        return Quantised(quant.kind, shape, tensors.get_tensor(f"{name}.weight"), tensors.get_tensor(f"{name}.SCB"))
    codes, absmax = tensors.get_tensor(f"{name}.weight"), tensors.get_tensor(f"{name}.weight.absmax")
    if not quant.double:
        return Quantised(quant.kind, shape, codes, absmax)
    state = json.loads(bytes(tensors.get_tensor(f"{name}.weight.quant_state.bitsandbytes__{quant.kind}").tolist()))
    nested, offset = tensors.get_tensor(f"{name}.weight.nested_absmax"), torch.tensor(state["nested_offset"])
    return Quantised(quant.kind, shape, codes, absmax, nested, offset)


def _whole(path: Path, entries: list[Entry]) -> bool:
    """The file is there, as long as its header says, with these tensors. It was renamed into place when it was whole."""
    try:
        with safe_open(path, framework="pt") as tensors:
            return set(tensors.keys()) == {entry.name for entry in entries}
    except (OSError, SafetensorError):
        return False

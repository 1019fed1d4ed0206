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
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.pytorch_utils import Conv1D

from lorafit.errors import ModelError
from lorafit.files import cache_folder, write_folder
from lorafit.model import gguf
from lorafit.model.gguf import GgufWeights
from lorafit.model.quant import Quant, QuantLinear, linears, put, stored
from lorafit.model.sites import ranks
from lorafit.model.starts import Part
from lorafit.native.quantised import BLOCK, NESTED, Quantised, dynamic, table

FORMAT = 1  # raised when what is written changes
FILE = "weights.safetensors"
_STATE = 256  # bytes of the JSON that bitsandbytes keeps beside a weight, padded
_TYPES = {torch.float32: "F32", torch.uint8: "U8", torch.int8: "I8"}


class Shards:
    """The tensors of a folder's safetensors files, read one at a time. A file is mapped only while one of its tensors is in
    use, so that pages of others don't count as this process's memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, torch.Size] = {}
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    self._files[name] = file
                    self.shapes[name] = torch.Size(tensors.get_slice(name).get_shape())

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, its numbers in `dtype`, or else as they are stored: then its memory is that of the file."""
        with safe_open(self._files[name], framework="pt") as tensors:
            found: Tensor = tensors.get_tensor(name)
        return found if dtype is None or not found.is_floating_point() else found.to(dtype)


def load(
    path: Path, config: Any, dtype: torch.dtype, quant: Quant | None, fingerprint: str, working: Callable[[str], object]
) -> Any:
    """The transformers model of a folder on the CPU, with `quant` its linear modules QuantLinear, all else in `dtype`.

    ModelError where a tensor is missing or of another shape, or the cache can't be written; ConfigError where a start is for
    weights that the model hasn't.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    found = list(linears(model)) if quant is not None else []
    fill_buffers(model)
    shards = gguf.of(path) or Shards(path)
    keys = _keys(model, shards)
    if quant is not None:
        beside = ranks(model, quant.start) if quant.start is not None else {}
        codes = _cached(found, keys, shards, quant, beside, fingerprint, working)
        with safe_open(codes, framework="pt") as tensors:
            for name, module in found:
                bias: Any = getattr(module, "bias", None)
                if bias is not None:
                    bias = shards.read(keys[f"{name}.bias"], dtype)
                q, part = read(tensors, name, _shape(module), quant), _part(tensors, name, quant, name in beside)
                put(model, name, QuantLinear(q, bias, dtype, isinstance(module, Conv1D), part))
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    for number, name in enumerate(left, 1):
        working(f"reading {gguf.origin(path).name}: {number} of {len(left)}")
        _set(model, name, shards.read(keys[name], dtype))
    model.tie_weights()
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model


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


def _keys(model: Any, shards: Shards | GgufWeights) -> dict[str, str]:
    """Where each tensor of the model lies in the files, by its name; those that share a weight have one key."""
    prefix = f"{model.base_model_prefix}."
    owners: dict[int, list[str]] = {}
    everything = dict(model.named_parameters(remove_duplicate=False))
    everything |= {name: t for name, t in model.named_buffers() if t.is_meta}
    for name, tensor in everything.items():
        owners.setdefault(id(tensor), []).append(name)
    found: dict[str, str] = {}
    wrong = []
    for names in owners.values():
        spellings = [s for name in names for s in (name, name.removeprefix(prefix), prefix + name)]
        key = next((s for s in spellings if s in shards.shapes), None)
        shape = everything[names[0]].shape
        if key is None:
            wrong.append(f"{names[0]} is missing")
        elif shards.shapes[key] != shape:
            wrong.append(f"{key} is {tuple(shards.shapes[key])}, expected {tuple(shape)}")
        else:
            found |= dict.fromkeys(names, key)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(f"{shards.folder} can't be loaded: {'; '.join(wrong[:3])}{more}")
    return found


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, key = name.rpartition(".")
    module = model.get_submodule(parent)
    setattr(module, key, nn.Parameter(tensor, requires_grad=False) if key in module._parameters else tensor)


# --- the file of codes -------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A tensor of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def folder(fingerprint: str, quant: Quant) -> Path:
    """Where the codes of the weights with this fingerprint are kept."""
    text = f"{FORMAT} {fingerprint} {quant.kind} {quant.double}"
    if quant.start is not None:
        text += f" {json.dumps(quant.start.to_json(), sort_keys=True)}"
    return cache_folder() / "quantised" / hashlib.sha256(text.encode()).hexdigest()[:32]


def _cached(
    found: list[tuple[str, nn.Module]],
    keys: dict[str, str],
    shards: Shards | GgufWeights,
    quant: Quant,
    beside: Mapping[str, int],
    fingerprint: str,
    working: Callable[[str], object],
) -> Path:
    """The file of codes, made now if it isn't there or isn't whole. `beside`: ranks of what goes beside codes, by path."""
    place = folder(fingerprint, quant)
    entries = [entry for name, module in found for entry in _entries(name, _shape(module), quant, beside.get(name))]
    if _whole(place / FILE, entries):
        return place / FILE

    def fill(scratch: Path) -> None:
        with (scratch / FILE).open("wb") as file:
            places = _header(file, entries)
            for number, (name, module) in enumerate(found, 1):
                working(f"quantising to {quant.kind}, once: {number} of {len(found)}")
                given = shards.read(keys[f"{name}.weight"])
                weight = given.t() if isinstance(module, Conv1D) else given
                q, part = stored(weight, quant, beside.get(name), f"{name}.weight")
                for key, tensor in {**tensors_of(name, q), **_part_tensors(name, part)}.items():
                    file.seek(places[key])
                    file.write(tensor.contiguous().numpy().data)

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
    if quant.kind == "int8":
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
    if q.kind == "int8":
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
    if quant.kind == "int8":
        return Quantised("int8", shape, tensors.get_tensor(f"{name}.weight"), tensors.get_tensor(f"{name}.SCB"))
    codes, absmax = tensors.get_tensor(f"{name}.weight"), tensors.get_tensor(f"{name}.weight.absmax")
    if not quant.double:
        return Quantised(quant.kind, shape, codes, absmax)
    state = json.loads(bytes(tensors.get_tensor(f"{name}.weight.quant_state.bitsandbytes__{quant.kind}").tolist()))
    nested, offset = tensors.get_tensor(f"{name}.weight.nested_absmax"), torch.tensor(state["nested_offset"])
    return Quantised(quant.kind, shape, codes, absmax, nested, offset)


def _header(file: Any, entries: list[Entry]) -> dict[str, int]:
    """Write the header of a safetensors file, and say where each tensor's bytes go: the widest numbers first, so that all
    are aligned."""
    header, places, at = {}, {}, 0
    for entry in sorted(entries, key=lambda entry: -entry.dtype.itemsize):
        header[entry.name] = {
            "dtype": _TYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.size],
        }
        places[entry.name] = at
        at += entry.size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text = text.ljust(-(-len(text) // 64) * 64 - 8 + 64)  # the first number is at a multiple of 64
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + at)
    return {name: 8 + len(text) + place for name, place in places.items()}


def _whole(path: Path, entries: list[Entry]) -> bool:
    """The file is there, as long as its header says, with these tensors. It was renamed into place when it was whole."""
    try:
        with safe_open(path, framework="pt") as tensors:
            return set(tensors.keys()) == {entry.name for entry in entries}
    except (OSError, SafetensorError):
        return False

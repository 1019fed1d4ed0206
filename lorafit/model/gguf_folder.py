"""A GGUF file as a model folder: config, generation settings and tokenizer from its metadata, and where its tensors are.

The config is made here, not by transformers, which leaves out in silence what it has no name for, such as scaled rotary
positions. A value or a tensor that isn't understood here is an error: without it the model would be another one.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorafit.errors import ModelError
from lorafit.files import cache_folder, write_folder, write_json
from lorafit.model.gguf import SOURCE, Entry, GgufWeights, Header, can_read, read_header, readable, source

FORMAT = 1  # raised when what is written changes
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_ROPE_FACTORS = "rope_freqs.weight"
_BIASES = {"attention": "blk.0.attn_output.bias", "mlp": "blk.0.ffn_up.bias"}

# Metadata by its name after the architecture's, and the setting of transformers' config that it is.
_LLAMA = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_GPT2 = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
# Only where they are there.
_GEMMA = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Says nothing about what is computed.
_IDLE = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "expert_used_count"}


@dataclass(frozen=True)
class Family:
    """An architecture: transformers' name for it, its settings, and what llama.cpp does to its tensors (see gguf.Entry)."""

    kind: str
    settings: dict[str, str] = field(default_factory=lambda: _LLAMA)
    optional: dict[str, str] = field(default_factory=dict)
    rotary: bool = True
    alternate: bool = False
    plus_one: bool = False
    wide: int = 0  # a model of so many layers scales its queries by the hidden size per head, not the width of a head


FAMILIES = {
    "llama": Family("llama", alternate=True),  # Mistral and SmolLM too
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma2": Family("gemma2", optional=_GEMMA, plus_one=True, wide=46),
    "gemma3": Family("gemma3_text", optional=_GEMMA, plus_one=True, wide=62),
    "gpt2": Family("gpt2", _GPT2, rotary=False),
}


def folder(file: Path, working: Callable[[str], object] = lambda text: None) -> Path:
    """The folder of a GGUF file in the user's cache, made now if it isn't there or the file has changed.

    ModelError where the file can't be read or holds something that isn't understood.
    """
    file = file.absolute()
    name = hashlib.sha256(f"{FORMAT} {file}".encode()).hexdigest()[:12]
    place = cache_folder() / "gguf" / f"{file.stem}-{name}"
    if _made(place):
        return place
    working(f"reading the vocabulary of {file.name}, once")
    parts = _understood(file)
    write_folder(place, lambda scratch: _fill(scratch, file, *parts), again="try again")
    return place


def bare(file: Path, place: Path) -> Path:
    """The same without tokenizer and stop tokens, in the empty folder `place`: to read weights back that were just written."""
    header, config, tensors = _understood(file)
    config.save_pretrained(place)
    write_json(place / SOURCE, source(file, header, tensors))
    return place


def _understood(file: Path) -> tuple[Header, Any, dict[str, Entry]]:
    """The header of a file, the config and the tensors that it means."""
    header = read_header(file)
    if _PART.search(file.name) or header.values.get("split.count", 0) > 1:
        raise ModelError(
            f"{file} is one part of several; join them first: llama-gguf-split --merge {file.name} whole.gguf"
        )
    for stored, tensor in header.tensors.items():
        if not can_read(tensor.type):
            raise ModelError(f"{file}: {stored} is stored as {tensor.type}, which can't be read; {readable()}")
    config = _config(file, header)
    return header, config, _tensors(file, header, config)


def _made(place: Path) -> bool:
    """The folder is there, and the file that it was made from has the same header still."""
    try:
        GgufWeights(place)
    except (ModelError, OSError):
        return False
    return True


def _fill(place: Path, file: Path, header: Header, config: Any, tensors: dict[str, Entry]) -> None:
    from transformers import PreTrainedTokenizerFast

    link = place / "model.gguf"  # alone in a folder: transformers would read what lies beside it too
    link.symlink_to(file)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(place, gguf_file=link.name, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"{file}: its tokenizer can't be made: {next(iter(str(error).splitlines()), type(error).__name__)}"
        ) from None
    link.unlink()
    config.save_pretrained(place)
    tokenizer.save_pretrained(place)
    ids = {
        kind: header.values.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "padding", "eos", "eot", "eom")
    }
    stops = sorted({stop for kind in ("eos", "eot", "eom") if (stop := ids[kind]) is not None})
    given = {"bos_token_id": ids["bos"], "pad_token_id": ids["padding"], "eos_token_id": stops or None}
    write_json(place / "generation_config.json", {key: value for key, value in given.items() if value is not None})
    write_json(place / SOURCE, source(file, header, tensors))


# --- the config --------------------------------------------------------------------------------------------------------


def _config(file: Path, header: Header) -> Any:
    """transformers' config from the metadata."""
    from transformers import AutoConfig

    name = header.values.get("general.architecture")
    family = FAMILIES.get(name or "")
    if family is None:
        raise ModelError(
            f"{file} is of the architecture '{name}'; of GGUF files those that can be read are: {', '.join(FAMILIES)}"
        )
    left = {key.removeprefix(f"{name}."): v for key, v in header.values.items() if key.startswith(f"{name}.")}
    made = {setting: left.pop(key) for key, setting in family.settings.items() if key in left}
    lacking = [
        key for key, setting in family.settings.items() if setting not in made and key != "attention.head_count_kv"
    ]
    if lacking or "token_embd.weight" not in header.tensors:
        raise ModelError(f"{file} lacks {', '.join(f'{name}.{key}' for key in lacking) or 'token_embd.weight'}")
    made |= {setting: left.pop(key) for key, setting in family.optional.items() if key in left}
    if family.rotary:
        made.setdefault("num_key_value_heads", made["num_attention_heads"])
        made["head_dim"] = left.pop("attention.key_length", made["hidden_size"] // made["num_attention_heads"])
        for key in ("attention.value_length", "rope.dimension_count"):
            if left.pop(key, made["head_dim"]) != made["head_dim"]:
                raise ModelError(
                    f"{file}: {name}.{key} isn't the width of a head ({made['head_dim']}); that isn't supported"
                )
        made["rope_parameters"] = _rope(file, header, left, made["head_dim"])
        made |= {f"{part}_bias": True for part, of in _BIASES.items() if of in header.tensors}
    if family.kind == "gemma3_text":  # layers that see a window turn as they were first trained to
        near = {"rope_type": "default", "rope_theta": left.pop("rope.freq_base_swa", 10000.0)}
        made["rope_parameters"] = {"full_attention": made["rope_parameters"], "sliding_attention": near}
    if family.wide:  # not in the file; llama.cpp knows it by the number of layers too
        whole = made["num_hidden_layers"] == family.wide
        made["query_pre_attn_scalar"] = (
            made["hidden_size"] // made["num_attention_heads"] if whole else made["head_dim"]
        )
    unknown = sorted(
        f"{name}.{key}" for key, value in left.items() if key not in _IDLE and value not in (0, "", "none")
    )
    if unknown:
        raise ModelError(f"{file} has settings that aren't supported: {', '.join(unknown)}")
    for kind, id_kind in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        made[f"{kind}_token_id"] = header.values.get(f"tokenizer.ggml.{id_kind}_token_id")
    made["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    made["tie_word_embeddings"] = "output.weight" not in header.tensors
    return AutoConfig.for_model(family.kind, **made)


def _rope(file: Path, header: Header, left: dict[str, Any], width: int) -> dict[str, Any]:
    """How positions turn; takes what it uses out of `left`."""
    made = {"rope_type": "default", "rope_theta": left.pop("rope.freq_base", 10000.0)}
    kind, factor = left.pop("rope.scaling.type", "none"), left.pop("rope.scaling.factor", 1.0)
    context = left.pop("rope.scaling.original_context_length", None)
    if kind == "linear":
        made |= {"rope_type": kind, "factor": factor}
    elif kind == "yarn":
        made |= {"rope_type": kind, "factor": factor, "original_max_position_embeddings": context}
    elif kind not in ("none", ""):
        raise ModelError(f"{file} scales its positions by '{kind}'; supported are linear, yarn and Llama 3's way")
    if _ROPE_FACTORS in header.tensors:
        found = _llama3(file, header, made["rope_theta"], width)
        if found is None or made["rope_type"] != "default":
            raise ModelError(f"{file}: {_ROPE_FACTORS} isn't Llama 3's way of scaling positions; that isn't supported")
        made |= found
    return made


def _llama3(file: Path, header: Header, theta: float, width: int) -> dict[str, Any] | None:
    """The settings that Llama 3 (3.1 and later) scales its frequencies by, from what llama.cpp divides each by; None if they
    are others. All its models have the same but for the factor, which the longest wave shows."""
    import numpy as np

    stored = header.tensors[_ROPE_FACTORS]
    given = torch.from_numpy(np.fromfile(file, np.float32, width // 2, offset=stored.begin))
    if stored.type != "F32" or stored.shape != (width // 2,):
        return None
    factor, low, high, context = float(given.max()), 1.0, 4.0, 8192
    waves = context / (2 * math.pi * theta ** (torch.arange(0, width, 2) / width))  # in the original context
    smooth = ((waves - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(given, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


# --- the tensors -------------------------------------------------------------------------------------------------------


def naming(name: str, config: Any) -> Callable[[str], tuple[str | None, int]]:
    """By a tensor's name in the transformers model, its name in a file of this architecture (None: it has none), and among
    how many heads its rows alternate (0: they don't, see gguf.Entry)."""
    import gguf

    (kind,) = (kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": getattr(config, "num_key_value_heads", 0)}

    def named(key: str) -> tuple[str | None, int]:
        path, _, leaf = key.rpartition(".")
        base = names.get_name(path)
        if base is None:
            return None, 0
        return f"{base}.{leaf}", heads.get(base.rpartition(".")[2], 0) if FAMILIES[name].alternate else 0

    return named


def _tensors(file: Path, header: Header, config: Any) -> dict[str, Entry]:
    """Where each tensor of the model is. ModelError unless all are there, of their shape, and none is left over."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    name = header.values["general.architecture"]
    family = FAMILIES[name]
    named = naming(name, config)
    found, wrong = {}, []
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        path, _, leaf = key.rpartition(".")
        place, heads = named(key)
        stored = header.tensors.get(place or "")
        if place is None or stored is None:
            wrong.append(f"{place or key} is missing")
            continue
        turned = isinstance(model.get_submodule(path), Conv1D) and leaf == "weight"
        shape = stored.shape[::-1] if turned else stored.shape
        if shape != tuple(tensor.shape):
            wrong.append(f"{place} is {stored.shape}, expected {tuple(tensor.shape[::-1] if turned else tensor.shape)}")
        plus_one = family.plus_one and place.endswith("norm.weight")
        found[key] = Entry(place, stored.type, shape, stored.begin, stored.size, heads, turned, plus_one)
    known = {entry.stored for entry in found.values()} | {_ROPE_FACTORS}
    wrong += [f"there is no place for {stored}" for stored in sorted(header.tensors.keys() - known)]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(f"{file} can't be read as {family.kind}: {'; '.join(wrong[:3])}{more}")
    return found

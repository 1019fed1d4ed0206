"""Merged, as one GGUF file for llama.cpp (ggml's docs/gguf.md; its converter convert_hf_to_gguf.py for names and rows).

One weight after the other is read, summed, turned into the file's type and written. The file is then read back two ways: each
weight beside the sum that it was made from, and the whole as a base, which must compute what the sums in its type compute
(export/merge.py). What rounding to that type does is told: in blocks of 8 or 4 bits it does that to the base alone, too.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from lorafit.errors import LorafitError, ModelError
from lorafit.export import gguf_vocabulary
from lorafit.export.base import Done, Job
from lorafit.export.merge import compare, finite_effect, logits_of, proved_sums, proved_written
from lorafit.export.sums import Sums, adapted_sites, merged_biases, merged_weight
from lorafit.host import Host
from lorafit.model import gguf as reading
from lorafit.model.base import Base
from lorafit.model.gguf_folder import FAMILIES, bare, naming
from lorafit.model.load import load
from lorafit.model.quant import QuantLinear
from lorafit.route import StackLike

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# By --type, that of the weights, and llama.cpp's number for such a file.
_FILE = {"f32": (Type.F32, 0), "f16": (Type.F16, 1), "q8_0": (Type.Q8_0, 7), "q4_0": (Type.Q4_0, 2)}
_EXACT = ("f32", "f16")  # types that must leave most of what the adapter does
_EDGES = ("token_embd.weight", "output.weight")  # which llama.cpp keeps in more bits than Q4_0 as well
# ‖what rounding did‖ / ‖W‖ of one weight. Numbers spread as weights are lose 2e-4, 0.006 and 0.09 of it; a row in the wrong
# place costs 1.4.
_LOSS = {Type.F32: 1e-6, Type.F16: 2e-3, Type.Q8_0: 0.03, Type.Q4_0: 0.3}


def write(job: Job, place: Path) -> Done:
    """ModelError for an architecture, or a setting of one, that llama.cpp has under another name; LorafitError where what is
    read back isn't what was merged."""
    base, spec = job.host.base, job.spec
    arch, context, whole = architecture(base), context_of(base), base.context
    prompts = [prompt[:context] for prompt in job.prompts]
    want, effect = finite_effect(job.host, spec, prompts)
    job.working(f"adding the adapter to the base, and writing {place.name}")
    write_model(job.host, spec, place, job.type, job.chat)
    job.working("reading it back and comparing")
    beside = place.with_name(f"{place.name}.read")
    beside.mkdir()
    folder = bare(place, beside)
    weights = reading.GgufWeights(folder)
    losses = {name: _loss(weights.read(name, torch.float32), weight) for name, weight in tensors(job.host, spec)}
    header = reading.read_header(place)
    stored = {name: header.tensors[str(naming(arch, base.model.config)(name)[0])].type for name in losses}
    for name, loss in losses.items():
        if not loss <= _LOSS[Type[stored[name]]]:
            raise LorafitError(
                f"{name} isn't what was written: {loss:.2g} of it is lost in {stored[name]}; nothing was kept"
            )
    tokenizer = base.tokenizer
    named = naming(arch, base.model.config)
    sums = Sums(job.host, spec)
    right = proved_sums(
        sums,
        want,
        prompts,
        lambda name, weight: _rounded(weight, _type_of(str(named(name)[0]), tuple(weight.shape), job.type)),
        working=job.working,
    )
    sums.forget()
    got = logits_of(
        Host(load(str(folder), precision="fp32", device="cpu", streamed=True, tokenizer=tokenizer)), None, prompts
    )
    exact = job.type in _EXACT
    proof = compare(want, got, effect, torch.float16, math.inf)
    proof = replace(proof, exact=proved_written("file", right, got))
    if exact and not proof.holds:
        raise LorafitError(
            f"the merged model isn't the same after rounding: {proof.lost:.0%} of the adapter's effect lost; nothing was"
            " written; try --type f32"
        )
    shutil.rmtree(beside)
    figures = {**proof.to_json(), "dtype": job.type, "rounding": max(losses.values())}
    notes = []
    if not exact:
        more = "; that is more than it does, so try a type of more bits" if proof.mean > effect else ""
        beside_it = "" if job.alone else f", the adapter by {effect:.2g}{more}"
        notes.append(f"rounding all weights to {job.type} changes the logits by {proof.mean:.2g} on average{beside_it}")
    if job.alone:
        del figures["effect"], figures["lost"]
    if context < whole:
        notes.append(
            f"the file says a context of {context}: beyond it this base looks back through a window, llama.cpp not"
        )
    return Done(
        "each weight, read back, beside the sum that was written (rounding: the largest share of one that was lost); logits"
        " of the file, read back, beside the unmerged model's",
        figures,
        tuple(notes),
        "llama-cli -m OUT",
    )


def architecture(base: Base) -> str:
    """llama.cpp's name for it. ModelError where it isn't written here."""
    config = base.model.config
    kind = config.model_type
    arch = ARCHITECTURES.get(kind)
    wrong = None
    if arch is None:
        wrong = f"a base of the architecture '{kind}' (there are {', '.join(ARCHITECTURES)})"
    elif getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        wrong = f"the activation '{config.hidden_act}'"
    elif arch != "llama" and any(name.endswith("o_proj.bias") for name, _ in base.model.named_parameters()):
        wrong = f"a {kind} with biases in its attention"
    elif _rope_kind(config) not in ("default", "linear", "yarn", "llama3"):
        wrong = f"positions scaled by '{_rope_kind(config)}'"
    if wrong:
        raise ModelError(
            f"{wrong} can't be written as GGUF here; write a folder with --format hf, and convert it with llama.cpp's"
            " convert_hf_to_gguf.py"
        )
    return str(arch)


def context_of(base: Base) -> int:
    """The longest document that llama.cpp computes as this base does: it knows no window in these architectures."""
    config = base.model.config
    kinds = getattr(config, "layer_types", None) or ()
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds or (config.model_type == "mistral" and window)
    return min(base.context, int(window)) if slides and window else base.context


# --- writing -----------------------------------------------------------------------------------------------------------


def write_model(host: Host, spec: StackLike, place: Path, kind: str, chat: Any) -> None:
    """Base + adapters as a GGUF file, one weight in memory at a time."""
    base = host.base
    arch = architecture(base)
    named = naming(arch, base.model.config)
    writer = gguf.GGUFWriter(place, arch)
    source = reading.origin(base.path) if reading.is_folder(base.path) else None
    if source is None:
        _settings(writer, arch, base)
        gguf_vocabulary.add(writer, base.tokenizer, chat, _rows(base))
    else:
        _taken_over(writer, source, base.new is not None)
        if base.new is not None:
            gguf_vocabulary.add(writer, base.tokenizer, chat, _rows(base))
            writer.add_vocab_size(_rows(base))
    if chat is not None:
        writer.add_chat_template(chat.template)
    writer.add_file_type(_FILE[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    extra = _rope_factors(base, source)
    if extra is not None:
        writer.add_tensor_info("rope_freqs.weight", extra.shape, extra.dtype, extra.nbytes)
    shapes = {name: tuple(tensor.shape) for name, tensor in _parameters(base)}
    for name, shape in shapes.items():
        stored = _type_of(str(named(name)[0]), shape, kind)
        block, size = gguf.GGML_QUANT_SIZES[stored]
        writer.add_tensor_info(
            str(named(name)[0]), shape, np.dtype(np.float32), math.prod(shape) // block * size, raw_dtype=stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if extra is not None:
        writer.write_tensor_data(extra)
    for name, weight in tensors(host, spec):
        stored_name, heads = named(name)
        weight = alternating(weight, heads) if heads else weight
        writer.write_tensor_data(_stored(name, weight, _type_of(str(stored_name), shapes[name], kind)))
    writer.close()


def alternating(weight: Tensor, heads: int) -> Tensor:
    """Rows (or a bias) as llama.cpp keeps them where its rotary positions turn neighbours: within each head those of the two
    halves in turn."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def tensors(host: Host, spec: StackLike) -> Iterator[tuple[str, Tensor]]:
    """The merged model's tensors by their names, fp32, one after the other."""
    source = host.base.source
    adapted = {site.path for site in adapted_sites(host, spec)}
    biases = {host.sites[path].bias_name: bias for path, bias in merged_biases(host, spec).items()}
    made = {
        site.name: site for site in host.sites.values() if site.path in adapted or isinstance(site.module, QuantLinear)
    }
    for name, parameter in _parameters(host.base):
        if name in biases:
            yield name, biases[name]
        elif name in made:
            site = made[name]
            yield name, site.turned(merged_weight(host, site, spec) if site.path in adapted else site.weight().float())
        else:
            yield name, (parameter if source is None else source.read(name)).detach().float()


def _parameters(base: Base) -> list[tuple[str, Tensor]]:
    """Each weight once (an output head that shares the embedding's isn't another), codes as the weight they stand for."""
    coded = {f"{path}.weight": module for path, module in base.model.named_modules() if isinstance(module, QuantLinear)}
    found = dict(base.model.named_parameters())
    found |= {name: torch.empty(module.shape, device="meta") for name, module in coded.items()}
    return list(found.items())


def _type_of(stored: str, shape: tuple[int, ...], kind: str) -> Type:
    """Vectors stay in fp32, and rows that aren't whole blocks in 16 bits."""
    chosen = _FILE[kind][0]
    if len(shape) == 1:
        return Type.F32
    if shape[-1] % gguf.GGML_QUANT_SIZES[chosen][0]:
        return Type.F16
    return Type.Q8_0 if chosen is Type.Q4_0 and stored in _EDGES else chosen


def _stored(name: str, weight: Tensor, kind: Type) -> Any:
    numbers = weight.contiguous().numpy()
    if kind is Type.F16 and not float(weight.abs().max()) <= np.finfo(np.float16).max:
        raise ModelError(f"{name} has numbers that 16-bit floats haven't; try --type q8_0")
    return gguf.quants.quantize(numbers, kind)


def _rounded(weight: Tensor, kind: Type) -> Tensor:
    """What is left of a weight in this type. Its rows are blocks, or numbers, of their own: in any order the same is left."""
    made = gguf.quants.dequantize(gguf.quants.quantize(weight.contiguous().numpy(), kind), kind)
    return torch.from_numpy(np.ascontiguousarray(made, dtype=np.float32)).view(weight.shape)


def _loss(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm()) / max(float(want.norm()), 1e-30)


def _rows(base: Base) -> int:
    rows: int = base.model.get_input_embeddings().weight.shape[0]
    return rows


# --- metadata ----------------------------------------------------------------------------------------------------------


def _settings(writer: Any, arch: str, base: Base) -> None:
    """The architecture's settings, from transformers' config by the table that files are read with."""
    config = base.model.config
    writer.add_type("model")
    writer.add_name(Path(base.name).name)
    for key, setting in FAMILIES[arch].settings.items():
        value = context_of(base) if key == "context_length" else getattr(config, setting)
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{arch}.{key}", value)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(_rows(base))
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = _rope_kind(config)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    known = {
        "rope_type",
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    }
    other = sorted(key for key, value in rope.items() if key not in known and value not in (None, 1.0))
    if other:
        raise ModelError(f"{base.name} scales positions with {', '.join(other)}; that can't be written as GGUF here")
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _rope_kind(config: Any) -> str:
    return str(config.rope_parameters.get("rope_type", "default"))


def _rope_factors(base: Base, source: Path | None) -> Any:
    """What llama.cpp divides each frequency by (head width / 2,), where Llama 3 scales them; None elsewhere."""
    if source is not None:
        stored = reading.read_header(source).tensors.get("rope_freqs.weight")
        return None if stored is None else np.fromfile(source, np.float32, math.prod(stored.shape), offset=stored.begin)
    config = base.model.config
    rope = config.rope_parameters
    if _rope_kind(config) != "llama3":
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the original context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 1 where a wave is short: it stays as it is
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float().numpy()


def _taken_over(writer: Any, source: Path, grown: bool) -> None:
    """The metadata of the file that the base is, but for what this file has otherwise: its tokens too, where it has `grown`."""
    own = {"general.architecture", "general.file_type", "general.quantization_version", "tokenizer.chat_template"}
    for key, value in gguf.GGUFReader(source).fields.items():
        if grown and (key.startswith("tokenizer.") or key.endswith(".vocab_size")):
            continue
        if key not in own and not key.startswith(("GGUF.", "split.", "quantize.")):
            kinds = value.types
            writer.add_key_value(key, value.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)

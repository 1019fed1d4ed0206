"""Merging into a base in 4 or 8 bits, for those who insist: W + ΔW rounded to codes again, as a folder that transformers
loads with bitsandbytes.

A number of W lies on one of the 16 values of its block, and a small ΔW seldom moves it as far as the next: it is rounded
back. Of a ΔW of 2 % of W or less nothing is left but noise of its size. So what rounding did is measured for each weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit import files
from lorafit.data import Chat
from lorafit.errors import LorafitError, RunError
from lorafit.export.merge import Proof, compare, finite_effect, logits_of, ratio, write
from lorafit.export.sums import adapted_sites, merged_biases, merged_weight
from lorafit.host import Host
from lorafit.model.quant import Quant, QuantLinear, quantise
from lorafit.model.quant_load import tensors_of
from lorafit.model.shards import Shards
from lorafit.native.quantised import ROUNDED, dequantise
from lorafit.route import StackLike


def roundable(quant: Quant | None) -> Quant:
    """How a base is stored that an adapter can be rounded into. RunError for others."""
    if quant is None:
        raise RunError(
            "this adapter was trained on a base that isn't quantised; merge into the original weights, and quantise when"
            " the folder is loaded"
        )
    if quant.kind == ROUNDED:
        raise RunError(
            f"the codes of {quant} are of turned weights, which nobody else computes with; merge into the original weights, or"
            " --into dequantised, or train with quant=int8"
        )
    return quant


def requantise(
    host: Host,
    spec: StackLike,
    out: Path,
    prompts: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype,
    chat: Chat | None = None,
    working: Callable[[str], object] = lambda text: None,
) -> Proof:
    """Write base + adapters to `out`: linear weights as codes of the base's kind, all else in `dtype`. The host (quantised,
    computing in fp32) is used up.

    The proof compares with the unmerged model and refuses nothing. RunError if `out` isn't empty or the base isn't
    quantised, or is so in a way of our own; LorafitError, and no folder, if what is read back isn't what was written.
    """
    out = files.free(out)
    quant, model = roundable(host.base.quant), host.base.model
    assert host.base.dtype is torch.float32 and not host.base.streamed
    quant = replace(quant, start=None)  # the folder has no place for what is beside codes: it is rounded with them
    want, effect = finite_effect(host, spec, prompts)
    working(f"adding the adapter to the base and rounding to {quant}")
    error: dict[str, float] = {}
    biases = merged_biases(host, spec)
    for site in adapted_sites(host, spec):
        if site.path in biases:
            site.write_bias(biases[site.path])
        merged = merged_weight(host, site, spec)
        if isinstance(site.module, QuantLinear):
            q = quantise(merged, quant, site.path)
            error[site.path] = ratio(dequantise(q, torch.float32) - merged, merged - site.weight())
            site.module.hold(q)
        else:
            site.write(merged)
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear) and module.part is not None:  # that no adapter here touches
            module.hold(quantise(module.numbers(), quant, path))
    for name in list(host.adapters):
        host.remove(name)
    got = logits_of(host, None, prompts)
    proof = replace(compare(want, got, effect, dtype, math.inf), dtype=str(quant), error=error)
    working(f"writing {out}")

    def fill(place: Path) -> None:
        codes = _codes(model, dtype)
        model.config.quantization_config = _config(model, quant, dtype)
        write(host, place, dtype, chat, codes)
        shards = Shards(place)
        wrong = [name for name, tensor in codes.items() if not torch.equal(shards.read(name), tensor)]
        if wrong:
            raise LorafitError(f"{wrong[0]} isn't what was written; nothing is kept, merge again")

    files.write_folder(out, fill, again="merge again")
    return proof


def _codes(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The quantised weights under bitsandbytes' names."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            found |= {
                key: tensor.contiguous().clone() for key, tensor in tensors_of(name, module.quantised, dtype).items()
            }
            if module.kind == "int8":
                found[f"{name}.weight_format"] = torch.zeros((), dtype=torch.uint8)  # row after row
    return found


def _config(model: Any, quant: Quant, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says to transformers: all linear modules but the output head are codes."""
    head = model.get_output_embeddings()
    skipped = [name for name, module in model.named_modules() if module is head]
    values: dict[str, Any] = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": skipped}
    if quant.kind == "int8":
        return {**values, "load_in_8bit": True, "load_in_4bit": False}
    return {
        **values,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant.kind,
        "bnb_4bit_use_double_quant": quant.double,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }

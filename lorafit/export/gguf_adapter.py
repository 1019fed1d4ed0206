"""The adapter as GGUF, for llama.cpp's --lora, beside its base in that format (llama.cpp's convert_lora_to_gguf.py).

llama.cpp multiplies by alpha / r with one alpha for all layers, and r of each: with alpha = 0 by 1. So the scale of each
layer goes into B, and alpha is 0. rsLoRA and patterns of ranks and alphas come out right that way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from lorafit.adapter import Adapter
from lorafit.export.base import LOGITS, Done, Job, Pair, as_lora, low_rank, only, said, same_logits
from lorafit.export.gguf_model import alternating, architecture
from lorafit.model import gguf as reading
from lorafit.model.gguf_folder import naming


def write(job: Job, place: Path) -> Done:
    """AdapterError for an embedding that the output head shares, on which llama.cpp stops; ModelError for another
    architecture than it can be written for."""
    base, sites = job.host.base, job.host.sites
    arch = architecture(base)
    pairs = low_rank(job, "llama.cpp's adapter")
    only(pairs, sites, {"linear", "embedding", "head"}, "which llama.cpp can't adapt")
    named = naming(arch, base.model.config)
    writer = gguf.GGUFWriter(place, arch)
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    writer.add_name(job.name)
    for path, (a, b) in pairs.items():
        stored, heads = named(sites[path].name)
        b = alternating(b, heads) if heads else b
        a = a.t() if sites[path].lookup else a  # a row for each token
        writer.add_tensor(f"{stored}.lora_a", a.contiguous().numpy())
        writer.add_tensor(f"{stored}.lora_b", b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = reading.is_folder(base.path)
    first = "" if made else "lorafit export base base.gguf --format gguf --model BASE && "
    use = f"{first}llama-cli -m {'BASE' if made else 'base.gguf'} --lora OUT"
    proof = same_logits(job, _read(place, job, {path: named(sites[path].name) for path in pairs}))
    return Done(LOGITS, said(proof), use=use)


def _read(place: Path, job: Job, names: dict[str, Any]) -> Adapter:
    """The file as a LoRA of ours, by the header that other GGUF files are read with and rows put back one by one."""
    header = reading.read_header(place)
    alpha = header.values["adapter.lora.alpha"]
    pairs: dict[str, Pair] = {}
    for path, (stored, heads) in names.items():
        a, b = (_tensor(place, header.tensors[f"{stored}.lora_{which}"]) for which in "ab")
        if job.host.sites[path].lookup:
            a = a.t().contiguous()
        if heads:
            row = torch.arange(len(b))
            width = len(b) // heads
            head, at = row // width, row % width  # where row `at` of a head in halves is, among rows in turn
            b = b[head * width + at % (width // 2) * 2 + at // (width // 2)]
        pairs[path] = a, b * (alpha / a.shape[0] if alpha else 1.0)
    return as_lora(pairs, job.host.sites, {})


def _tensor(place: Path, stored: reading.Stored) -> Tensor:
    assert stored.type == "F32"
    return torch.from_numpy(np.fromfile(place, np.float32, stored.size // 4, offset=stored.begin)).view(stored.shape)

"""An adapter in PEFT's format that needs nothing of its reader but the formula: scale 1, one rank, no patterns.

vLLM reads rank_pattern, alpha_pattern and rsLoRA; SGLang takes lora_alpha / r for every layer, whatever they say. Both stack
what they compute at once (q, k, v; gate, up), so a layer that lacks one of them gets zeros for it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lorafit import peft_files
from lorafit.errors import AdapterError
from lorafit.export.base import LOGITS, Done, Job, as_lora, low_rank, one_rank, only, said, same_logits
from lorafit.model import gguf

TAKEN = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be
_STACKED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


def write(job: Job, place: Path) -> Done:
    """AdapterError for what servers take no adapter for: experts, embeddings, output heads, GPT-2's layers, ranks over 512."""
    sites = job.host.sites
    pairs = low_rank(job, "PEFT's format")
    only(pairs, sites, {"linear"}, "which not every server takes an adapter for")
    r, made = one_rank(pairs)
    room = next((size for size in TAKEN if size >= r), None)
    if room is None:
        raise AdapterError(f"the adapter has rank {r}, and vLLM takes {TAKEN[-1]} at most; merge it with --format hf")
    leaves = {path.rsplit(".", 1)[-1] for path in made}
    leaves |= {leaf for group in _STACKED if group & leaves for leaf in group}
    for path, site in sites.items():
        if site.kind == "linear" and not site.head and path.rsplit(".", 1)[-1] in leaves and path not in made:
            out, width = site.shape
            made[path] = torch.zeros(r, width), torch.zeros(out, r)
    base = job.host.base
    whole = {path: made[path] for path in sites if path in made}  # in the model's order
    modules = [path for path, _ in base.model.named_modules()]
    adapter = as_lora(whole, sites, {**job.adapter.notes, "base": base.name, "fingerprint": base.fingerprint})
    peft_files.save(adapter, place, sites, str(gguf.origin(base.path)), modules)
    read = peft_files.load(place, sites, base.fingerprint)
    notes = (f"{len(made) - len(pairs)} layers that it doesn't touch have zeros",) if len(made) > len(pairs) else ()
    use = f"vllm serve BASE --enable-lora --max-lora-rank {room} --lora-modules {job.name}=OUT"
    return Done(LOGITS, {**said(same_logits(job, read)), "rank": r}, notes, use)

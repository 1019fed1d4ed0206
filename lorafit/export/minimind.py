"""A and B for MiniMind: a state dict under `<module>.lora.A.weight` (r, in) and `<module>.lora.B.weight` (out, r).

That project puts a pair of one rank beside every square linear layer, adds B·A without a scale, and expects each layer's
keys. So the scale goes into B, ranks are made one, and square layers without an adapter get zeros. It reads a file of
torch.save, which is the one file here that isn't safetensors: plain tensors, read back with weights_only.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from lorafit.errors import AdapterError, LorafitError
from lorafit.export.base import Done, Job, low_rank, one_rank


def write(job: Job, place: Path) -> Done:
    """AdapterError where a layer isn't square, or isn't a linear one."""
    sites = job.host.sites
    pairs = low_rank(job, "MiniMind's file")
    square = [
        path for path, site in sites.items() if site.kind == "linear" and len({*site.shape}) == 1 and not site.head
    ]
    other = [path for path in pairs if path not in square]
    if other:
        fit = sorted({path.rsplit(".", 1)[-1] for path in square})
        here = f"; train with targets={','.join(fit)}" if fit else "; this base has none"
        shape = tuple(sites[other[0]].shape)
        raise AdapterError(
            f"MiniMind adapts square linear layers alone, and {other[0]} is {shape} ({len(other)} such layers){here}, or merge"
            " it with --format hf"
        )
    r, made = one_rank(pairs)
    state: dict[str, Tensor] = {}
    for path in square:
        width = sites[path].shape[-1]
        a, b = made.get(path) or (torch.zeros(r, width), torch.zeros(width, r))
        state |= {f"{path}.lora.A.weight": a.contiguous(), f"{path}.lora.B.weight": b.contiguous()}
    torch.save(state, place)
    read = torch.load(place, weights_only=True)
    largest = 0.0
    for path in square:
        want = job.adapter[path].delta_weight(sites[path].weight()).detach() if path in pairs else torch.zeros(())
        if not bool(want.isfinite().all()):
            raise AdapterError(f"{job.folder}: what is added to {path} isn't finite: its numbers are too large")
        got = read[f"{path}.lora.B.weight"] @ read[f"{path}.lora.A.weight"]
        off = (
            float((got - want).abs().max()) / max(float(want.abs().max()), 1e-30)
            if path in pairs
            else float(got.norm())
        )
        largest = max(largest, off if math.isfinite(off) else math.inf)
    allowed = 1e-5
    if set(read) != set(state) or not largest <= allowed:
        raise LorafitError(f"{place.name} isn't what was written: B·A is off by {largest:.2g}; nothing was kept")
    notes = (
        (f"{len(square) - len(pairs)} square layers that it doesn't touch have zeros",)
        if len(square) > len(pairs)
        else ()
    )
    return Done(
        "B·A of every layer, read back, beside what the adapter adds to the weight (largest difference, as a share of the"
        " largest number)",
        {"largest": largest, "tolerance": allowed, "layers": len(square), "rank": r},
        notes,
        f"apply_lora(model, rank={r}); load_lora(model, 'OUT')",
    )

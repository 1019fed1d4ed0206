"""Merged, as a Hugging Face folder: what `lorafit merge` writes."""

from __future__ import annotations

from pathlib import Path

from lorafit.export.base import Done, Job
from lorafit.export.merge import merge


def write(job: Job, place: Path) -> Done:
    """See merge."""
    proof = merge(
        job.host,
        job.name,
        place,
        job.prompts,
        dtype=job.dtype,
        chat=job.chat,
        trained=job.trained,
        working=job.working,
    )
    return Done("logits of the folder, read back, beside the unmerged model's", proof.to_json(), use="vllm serve OUT")

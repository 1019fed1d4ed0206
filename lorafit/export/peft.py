"""The adapter as it is: its own files, which are in PEFT's format already."""

from __future__ import annotations

import shutil
from pathlib import Path

from lorafit import peft_files
from lorafit.errors import AdapterError
from lorafit.export.base import LOGITS, Done, Job, said, same_logits
from lorafit.model import gguf


def write(job: Job, place: Path) -> Done:
    """Copy the files and load them as any adapter is. AdapterError where PEFT has no such method."""
    kind = str(peft_files.read_config(job.folder).get("peft_type"))
    if kind == peft_files.INT8:
        raise AdapterError(f"{job.folder} is stored in int8; first: lorafit adapter convert {job.folder} OUT")
    if kind == "LORAFIT_IA3":  # see written.config_of: PEFT has the method, but none of its settings for rows
        raise AdapterError("PEFT's IA3 has no place for new tokens; merge it with --format hf, gguf or ollama")
    if kind.startswith("LORAFIT_"):
        raise AdapterError(
            f"PEFT has no place for what method '{job.adapter.method}' adds; merge it with --format hf, gguf or ollama"
        )
    for name in (peft_files.WEIGHTS, peft_files.CONFIG, peft_files.OWN):
        if (job.folder / name).is_file():
            shutil.copyfile(job.folder / name, place / name)
    read = peft_files.load(place, job.host.sites, job.host.base.fingerprint)
    base = job.host.base
    use = f"{_opened(base.path)}PeftModel.from_pretrained(base, 'OUT')"
    if base.new is not None:
        base.tokenizer.save_pretrained(place)
        use = f"base.resize_token_embeddings({base.model.get_input_embeddings().weight.shape[0]}); {use}"
    return Done(LOGITS, said(same_logits(job, read)), use=use)


def _opened(path: Path) -> str:
    """How transformers opens a base that PEFT can't by its name: a GGUF file."""
    if not gguf.is_folder(path):
        return ""
    file = gguf.origin(path)
    return f"base = AutoModelForCausalLM.from_pretrained('{file.parent}', gguf_file='{file.name}'); "

"""The worker of the other side: the same `Work` under transformers' Trainer with PEFT, or TRL's SFTTrainer.

Their defaults, set up fairly: the same adapter to start from, the same rows in the same order, 8 (or as many as the work's
steps have) a step, every real token learned, padding not.

    trainer   transformers.Trainer and PEFT, padded to the longest row of the batch
    script    the same, padded to a fixed length, as most tutorials do it
    trl       SFTTrainer as it comes
    trlpack   SFTTrainer with its packing, rows of 2048 tokens
    kbit      trainer with PEFT's prepare_model_for_kbit_training as it comes: with activation checkpointing

All others without activation checkpointing, which saves memory and costs time. A work with `quant` has its base in
bitsandbytes' codes here, but for those that it has nothing like: then it is as it comes. --tuned: no autocast, the base
in bf16 and PEFT's adapters in fp32 as PEFT makes them; the harness also gives it the tuned malloc.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lorafit.bench.harness import MODES
from lorafit.bench.ours import figures
from lorafit.bench.work import Work, read
from lorafit.machine import peak_memory
from lorafit.model.load import quiet

PACKED = 2048


class Counted:
    """A collator that counts what it makes: real and learned tokens of every batch, in order."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate
        self.tokens: list[int] = []
        self.targets: list[int] = []

    def __call__(self, rows: Any) -> Any:
        """A batch of these rows."""
        batch = self.collate(rows)
        mask = batch.get("attention_mask")
        self.tokens.append(int(mask.sum()) if mask is not None else batch["input_ids"].numel())
        self.targets.append(int((batch["labels"][:, 1:] != -100).sum()))
        return batch


def run(
    work: Work, mode: str = "trainer", *, tuned: bool = False, held_out: bool = False, began: float | None = None
) -> dict[str, Any]:
    """Train and say what was measured, in the same figures as our side."""
    from transformers import TrainerCallback

    since = began or time.time()
    quiet()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = made(work, mode, tuned, scratch)
        counted = trainer.data_collator = Counted(trainer.data_collator)
        marks: list[float] = []
        times: list[float] = []  # begin and end of each step, in seconds from the command

        class Clock(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                times.append(time.time() - since)

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                marks.append(time.perf_counter())
                times.append(time.time() - since)

        trainer.add_callback(Clock())
        begin = time.perf_counter()
        trainer.train()
    steps = len(marks)
    found = figures(counted.tokens[:steps], [begin, *marks], peak_memory(), times, sum(counted.targets[:steps]))
    found["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if held_out:
        found["held_out_loss"] = score(trainer.model, work)
    return found


def made(work: Work, mode: str, tuned: bool, scratch: str) -> Any:
    """The trainer of a mode."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    bf16 = work.precision == "bf16"
    tokenizer = AutoTokenizer.from_pretrained(work.model, local_files_only=True)
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dtype = torch.bfloat16 if bf16 else torch.float32
    stored = {"quantization_config": _bits(work, dtype)} if work.coded_there else {}
    base = AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype, local_files_only=True, **stored)
    base.config.use_cache = False
    if stored:
        from peft import prepare_model_for_kbit_training

        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=mode == "kbit")
    model = adapted(base, work)
    settings: dict[str, Any] = {
        "output_dir": scratch,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1 if mode == "trlpack" else len(work.steps[0]),
        "learning_rate": work.lr,
        "lr_scheduler_type": "cosine",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": bf16 and not tuned,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    documents = [document for step in work.steps for document in step]
    if mode in ("trainer", "script", "kbit"):
        fixed = {"padding": "max_length", "max_length": work.max_tokens} if mode == "script" else {}
        return Trainer(
            model=model,
            args=TrainingArguments(**settings),
            train_dataset=[{"input_ids": ids, "labels": ids} for ids in documents],
            # Not the collator for language modelling: it masks by the padding's id, and where that is the id of the end
            # of a turn, as in many chat models, the model would never learn to stop.
            data_collator=DataCollatorForSeq2Seq(tokenizer, **fixed),
        )
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    packed = mode == "trlpack"
    longest = max(len(ids) for ids in documents)
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(**settings, max_length=max(longest, PACKED) if packed else longest, packing=packed),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in documents]),
    )


def _bits(work: Work, dtype: torch.dtype) -> Any:
    """bitsandbytes' settings for a work's base, as QLoRA's users write them."""
    from transformers import BitsAndBytesConfig

    if work.quant == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=work.quant,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def adapted(base: Any, work: Work) -> Any:
    """The base with the adapter that all sides start from; with a fresh one of PEFT's while there is none."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if (Path(work.start) / "adapter_config.json").is_file():
        return PeftModel.from_pretrained(base, work.start, is_trainable=True)
    torch.manual_seed(0)
    fresh = LoraConfig(r=work.r, lora_alpha=2 * work.r, task_type="CAUSAL_LM", target_modules="all-linear")
    return get_peft_model(base, fresh)


@torch.no_grad()
def score(model: Any, work: Work) -> float:
    """Held-out loss: the mean over the learned tokens of all rows, each row alone."""
    # In evaluation mode bitsandbytes' layer repacks its codes on a CPU and computes something else. Nothing here drops out.
    model.train(work.coded_there)
    total, count = 0.0, 0
    for ids in work.held_out:
        row = torch.tensor([ids])
        total += model(input_ids=row, labels=row).loss.item() * (len(ids) - 1)
        count += len(ids) - 1
    return total / count


def main() -> None:
    """Read the work, do it, print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--mode", choices=MODES, default="trainer")
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--began", type=float)
    args = parser.parse_args()
    result, sys.stdout = sys.stdout, sys.stderr  # trainers print what they please
    done = run(read(args.work), args.mode, tuned=args.tuned, held_out=args.held_out, began=args.began)
    print(json.dumps(done), file=result)


if __name__ == "__main__":
    main()

"""Merge the adapter into its base, then use the result with transformers alone.

    python examples/05_merge.py runs/library runs/library-merged

The sums are compared with base and adapter, and the folder, read back, with the sums, before it counts.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafit.data import Message
from lorafit.export.merge import merge
from lorafit.session import open_session

parser = argparse.ArgumentParser()
parser.add_argument("run", nargs="?", default="runs/library")
parser.add_argument("out", nargs="?", default="runs/library-merged")
parser.add_argument("--max-new", default=40, type=int)
args = parser.parse_args()

# Weights are added in fp32 and cast once; streamed, they are read one by one.
session = open_session([args.run], precision="fp32", device="cpu", streamed=True)
(name,) = session.host.adapters
chat = session.chat(name)
prompts = [chat.prompt_ids([Message("user", text)]) for text in ("When do you open?", "Where are the maps?")]
proof = merge(session.host, name, Path(args.out), prompts, dtype=torch.float32, chat=chat)
print(f"{proof.positions} positions compared: largest logit difference {proof.largest:.2g}", end="")
print(f" by rounding, same best token at {proof.agree:.0%}")

model, tokenizer = AutoModelForCausalLM.from_pretrained(args.out), AutoTokenizer.from_pretrained(args.out)
turns = [{"role": "user", "content": "When do you open?"}]
inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
made = model.generate(**inputs, max_new_tokens=args.max_new, do_sample=False)
print(repr(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)))

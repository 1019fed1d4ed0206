"""Load the adapter with PEFT, without lorafit: same files, same logits.

    python examples/06_load_in_peft.py runs/library

Needs `pip install peft`. The comparison at the end is the only part that imports lorafit.
"""

import argparse
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("run", nargs="?", default="runs/library")
args = parser.parse_args()

folder = Path(args.run) / "adapter"
model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
ids = tokenizer("Where are the maps?", return_tensors="pt")["input_ids"]
with torch.no_grad():
    theirs = model(input_ids=ids).logits[0]
    with model.disable_adapter():
        plain = model(input_ids=ids).logits[0]

from lorafit.session import open_session  # noqa: E402

session = open_session([args.run], precision="fp32", device="cpu")
with torch.no_grad(), session.host.route(next(iter(session.host.adapters))):
    ours = session.host.logits(ids[0], [ids.shape[1]])
difference = float((ours - theirs).abs().max())
print(f"the adapter moves the logits by {float((theirs - plain).abs().max()):.2g}", end="; ")
print(f"lorafit and PEFT differ by {difference:.1g}")
assert difference < 1e-3

"""How far the answers of a base kept in 4 or 8 bits are from those in fp32: the divergence (KL, in nats a token) of its
predictions, and its loss.

    python benchmarks/divergence.py --data rows.json --rows 12

The rows are the last of the file; every token counts, prompts too. `exact`: w8a8 with inputs that aren't rounded; `plain`:
int8 with inputs that are, as they come, without being turned.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorafit.bench.work import from_file
from lorafit.log import table
from lorafit.model.base import Base
from lorafit.model.load import load, locate
from lorafit.model.quant import Quant, QuantLinear

KINDS = [("none", "bf16"), ("int8", "fp32"), ("int8", "bf16"), ("plain", "fp32"), ("exact", "fp32"), ("w8a8", "fp32")]
KINDS += [("w8a8", "bf16"), ("nf4", "bf16")]
STORED = {"plain": "int8", "exact": "w8a8"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FILE", help="any file that lorafit reads")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=160, help="of a row, at most")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    documents = from_file(args.data, locate(args.model), args.tokens)
    rows = [torch.tensor(document) for document in documents[-args.rows :]]
    want = predictions(load(args.model, precision="fp32", device="cpu"), rows)
    found = []
    for kind, precision in KINDS:
        print(f"{kind} in {precision} ...", file=sys.stderr)
        stored = STORED.get(kind, kind)
        base = load(args.model, precision=precision, device="cpu", quant=Quant.of(stored))
        if kind in STORED:
            simulate(base, rounded=kind == "plain")
        found.append({"base": kind, "precision": precision, **apart(predictions(base, rows), want, rows)})
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        rows_of_it = [[f"{v:.4f}" if isinstance(v, float) else v for v in one.values()] for one in found]
        print(table(["base", "type", "divergence", "loss"], rows_of_it, "llrr"))


def simulate(base: Base, rounded: bool) -> None:
    """Compute with the numbers that codes stand for, and inputs rounded row by row or as they are."""
    for module in base.model.modules():
        if isinstance(module, QuantLinear):
            module.register_forward_hook(_with(module.numbers(), module.bias, rounded))


def _with(weight: Tensor, bias: Tensor | None, rounded: bool):  # type: ignore[no-untyped-def]
    def hook(module: QuantLinear, given: tuple[Tensor], made: Tensor) -> Tensor:
        (x,) = given
        unit = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return linear((x / unit).round() * unit if rounded else x, weight, bias)

    return hook


@torch.no_grad()
def predictions(base: Base, rows: list[Tensor]) -> list[Tensor]:
    """Logarithms of the probabilities after each token of each row but its last."""
    return [torch.log_softmax(base.model(input_ids=row[None]).logits[0, :-1].float(), -1) for row in rows]


def apart(got: list[Tensor], want: list[Tensor], rows: list[Tensor]) -> dict[str, float]:
    """Divergence from what is wanted, and loss; means over all tokens."""
    count = sum(len(one) for one in got)
    kl = sum(float((w.exp() * (w - g)).sum()) for g, w in zip(got, want, strict=True))
    loss = -sum(float(g.gather(1, row[1:, None]).sum()) for g, row in zip(got, rows, strict=True))
    return {"divergence": kl / count, "loss": loss / count}


if __name__ == "__main__":
    main()

"""A frozen base in 4 or 8 bits (QLoRA, arXiv 2305.14314): its linear weights are quantised once, with the codes that
bitsandbytes gives them, and computed with through `QuantLinear`, which makes the numbers anew for every product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafit.errors import ModelError
from lorafit.native import quantised
from lorafit.native.quantised import Quantised


def quantise(weight: Tensor, kind: str, double: bool, name: str) -> Quantised:
    """As native.quantised.quantise. ModelError naming the weight if it isn't finite: everything that shares a block with
    such a number would be lost."""
    made = quantised.quantise(weight, kind, double)
    if not torch.isfinite(made.absmax if made.nested is None else made.nested).all():
        raise ModelError(f"{name} isn't finite, so it can't be quantised; the model is damaged")
    return made

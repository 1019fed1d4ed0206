"""How many adapters fit into memory at once, over one base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lorafit import plan
from lorafit.batches import default_tokens
from lorafit.config import Config
from lorafit.data import Tokens
from lorafit.train.loop import TOGETHER
from lorafit.train.optim import state_bytes

MOST = 32  # that are trained at once however much memory there is


def room(config: Config, model: plan.Model, rows: Sequence[Tokens], memory: int, processes: int = 1) -> int:
    """Bytes that all adapters together may take with their gradients and optimisers, of `memory`: what the base, and the
    activations of a micro-batch that jobs share, leave of it; in several processes each has its own."""
    tokens = max(TOGETHER, config.batch_tokens or default_tokens(rows, config.share))
    found = plan.estimate(replace(config, batch_tokens=tokens, accumulate=1), model, rows)
    return memory - processes * (found.peak_bytes - bytes_of(config.optimizer, found.trainable_parameters))


def bytes_of(optimizer: str, numbers: int) -> int:
    """What so many trained numbers take: themselves and their gradients in fp32, and the optimiser's state."""
    return 8 * numbers + state_bytes(optimizer, numbers)

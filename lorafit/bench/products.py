"""The machine's own limit: how long the matrix products take that no way of training this adapter can do without.

Those are, for every frozen matrix of the body, x·Wᵀ forward and dy·W backward, and the same for the output head on the
learned tokens, in chunks. They run in the model's order with each layer's own weights, so that weights come from memory as
they do in a step. Not among them: the adapter's own thin products, attention, and everything element by element.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from lorafit.host import Host
from lorafit.train.loss import CHUNK

REPEATS = 3


def frozen(host: Host) -> list[tuple[str, Tensor, float]]:
    """Every frozen matrix of the body in the model's order: path, weight (out, in), and its share of the tokens.

    An expert's share is what it gets when tokens are spread evenly.
    """
    config = host.base.model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    found = []
    for path, site in host.sites.items():
        if site.head or site.lookup:
            continue
        weight = site.weight()
        if weight.ndim == 2:
            found.append((path, weight, 1.0))
        else:
            found += [(f"{path}.{i}", w, chosen / len(weight)) for i, w in enumerate(weight)]
    return found


def needed(host: Host, tokens: int, targets: int) -> Iterator[tuple[Tensor, int, bool]]:
    """Every product of a step in order: weight (out, in), rows, and whether it is a backward one."""
    body = [(weight, max(1, round(tokens * share))) for _, weight, share in frozen(host)]
    head = host.base.head.weight.detach()
    for weight, rows in body:
        yield weight, rows, False
    for start in range(0, targets, CHUNK):
        for backward in (False, True):
            yield head, min(CHUNK, targets - start), backward
    for weight, rows in reversed(body):
        yield weight, rows, True


def flop(host: Host, tokens: int, targets: int) -> int:
    """Multiplications and additions of those products."""
    return sum(2 * rows * weight.numel() for weight, rows, _ in needed(host, tokens, targets))


@torch.no_grad()
def seconds(host: Host, tokens: int, targets: int, repeats: int = REPEATS) -> float:
    """The median time of all of them, into buffers that are there already."""
    plan = list(needed(host, tokens, targets))
    rows: dict[int, int] = {}  # the most that a width is met with
    for weight, n, _ in plan:
        for width in weight.shape:
            rows[width] = max(rows.get(width, 0), n)
    given = {width: torch.randn(n, width, dtype=host.base.dtype) for width, n in rows.items()}
    made = {width: torch.empty(n, width, dtype=host.base.dtype) for width, n in rows.items()}

    def once() -> float:
        begin = time.perf_counter()
        for weight, n, backward in plan:
            out, into = weight.shape
            if backward:
                torch.mm(given[out][:n], weight, out=made[into][:n])
            else:
                torch.mm(given[into][:n], weight.t(), out=made[out][:n])
        return time.perf_counter() - begin

    return statistics.median(once() for _ in range(repeats))

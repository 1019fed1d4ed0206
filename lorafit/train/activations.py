"""What the sites of an adapter are given, shown to its method before the first step: for methods that start from that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafit.batches import fill
from lorafit.data.tokens import Tokens
from lorafit.host import Host
from lorafit.methods import Observer

MOST = 100  # batches; what hasn't settled by then is taken as it is
TOKENS = 2048  # of a forward


@torch.no_grad()
def study(
    host: Host,
    name: str,
    batches: Iterable[list[Tokens]],
    *,
    tokens: int = TOKENS,
    progress: Callable[[int, int], object] | None = None,
) -> int:
    """Run the base over batches until the adapter's method has seen enough of its sites' inputs. Returns how many it took; 0
    where the method asks for none. A forward takes at most `tokens` tokens, or one row.

    The inputs are the base's: a fresh adapter changes nothing. Only learned tokens are shown. Parameters may have other
    shapes afterwards, so optimisers are made after this.
    """
    adapter = host.adapters[name]
    observer = adapter.observer()
    if observer is None:
        return 0
    eyes = Eyes(observer)
    hooks = [host.sites[path].module.register_forward_pre_hook(partial(eyes.look, path)) for path, _ in adapter.items()]
    done = 0
    try:
        for documents in islice(batches, MOST):
            runs = fill([len(row.ids) for row in documents], tokens if host.base.packs else 1)
            for run in runs:
                rows = [documents[i] for i in run]
                eyes.learned = torch.from_numpy(np.concatenate([row.learn for row in rows])).to(host.base.device)
                ids = torch.from_numpy(np.concatenate([row.ids for row in rows]).astype(np.int64)).to(host.base.device)
                host.base.hidden(ids, [len(row.ids) for row in rows])
            done += 1
            if progress:
                progress(done, MOST)
            if observer.enough():
                break
    finally:
        for hook in hooks:
            hook.remove()
    observer.end()
    adapter.to(host.base.device)
    return done


class Eyes:
    """Hands modules' inputs on, the rows of learned tokens alone: once for modules one after another that have the same."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.learned = torch.empty(0, dtype=torch.bool)
        self.last: tuple[Tensor | None, Tensor | None] = (None, None)

    def look(self, path: str, module: Any, args: tuple[Tensor, ...]) -> None:
        """Before a module's forward."""
        x, rows = self.last
        if x is not args[0] or rows is None:
            x = args[0]
            rows = x.reshape(-1, x.shape[-1])[self.learned]
            self.last = x, rows
        self.observer.see(path, rows)

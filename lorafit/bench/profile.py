"""Where the time of one step goes, by kind of work, from torch's profiler.

Time is counted where it is spent: an operation's own, without that of the operations inside it. What kind it is of is told
by itself and by what it stands in; a backward operation is of the kind of the forward one that it belongs to. Native code
shows under the names it gives itself (`lorafit::…`).
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from lorafit.host import Host

FROZEN, ADAPTER, ATTENTION = "frozen products", "adapter", "attention"
BOTH = "frozen products with low-rank additions"
POINTWISE, HEAD, OPTIMISER = "norms, rotary, gate", "loss head", "optimiser"
REST, BETWEEN = "other operations", "between operations (Python)"
SCOPE, NATIVE = "bench::", "lorafit::"

_MODULES = [  # of the base, by the end of their class's name
    (re.compile(r"Attention$"), ATTENTION),
    (re.compile(r"(Norm\d*|RotaryEmbedding|MLP)$"), POINTWISE),
]
_PRODUCT = re.compile(r"^aten::(mm|addmm|linear)$")
# The kernels make a frozen product and its low-rank addition, and the gradients of both, as one.
_KERNELS = dict.fromkeys(
    [
        "rms_norm",
        "rms_norm_again",
        "rms_norm_backward",
        "rotary",
        "silu",
        "silu_backward",
        "gelu_tanh",
        "gelu_tanh_backward",
    ],
    POINTWISE,
) | {
    "sum_products": FROZEN,
    "coded_products": FROZEN,
    "low_rank_forward": BOTH,
    "low_rank_backward": BOTH,
    "attention_forward": ATTENTION,
    "attention_backward": ATTENTION,
    "exponentials": HEAD,
    "sum_squares": OPTIMISER,
    "scale": OPTIMISER,
    "adamw": OPTIMISER,
}
_NAMES = [  # of operations
    (re.compile(r"scaled_dot_product|ScaledDotProduct|flash_attention"), ATTENTION),
    (re.compile(r"^Optimizer\.|_foreach_"), OPTIMISER),
    (re.compile(r"Loss|cross_entropy|log_softmax|nll_loss"), HEAD),
]


def profile_step(host: Host, r: int, step: Callable[[], int]) -> dict[str, Any]:
    """One step taken apart: `seconds` by kind in `parts`, their sum being `wall`, and the `tokens` that `step` returns."""
    with scopes(host), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        begin = time.perf_counter()
        tokens = step()
        wall = time.perf_counter() - begin
    parts = grouped(found.events(), r, host.base.head.weight.shape[0])
    parts[BETWEEN] = max(0.0, wall - sum(parts.values()))
    return {"wall": wall, "tokens": tokens, "parts": dict(sorted(parts.items(), key=lambda part: -part[1]))}


@contextmanager
def scopes(host: Host) -> Iterator[None]:
    """Within it, what the base's modules and the adapters' layers do stands under a name that says their kind."""
    handles, stack = [], []

    def enter(kind: str) -> Callable[..., None]:
        def opened(module: Any, args: Any) -> None:
            stack.append(record_function(SCOPE + kind))
            stack[-1].__enter__()

        return opened

    def leave(module: Any, args: Any, out: Any) -> None:
        stack.pop().__exit__(None, None, None)

    modules = [(module, kind_of_module(type(module).__name__)) for module in host.base.model.modules()]
    modules += [(layer, ADAPTER) for adapter in host.adapters.values() for _, layer in adapter.items()]
    for module, kind in modules:
        if kind:
            handles += [module.register_forward_pre_hook(enter(kind)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def kind_of_module(name: str) -> str:
    """The kind of a module of the base by its class's name, or nothing."""
    return next((kind for pattern, kind in _MODULES if pattern.search(name)), "")


def grouped(events: Iterable[Any], r: int, vocabulary: int) -> dict[str, float]:
    """Seconds by kind."""
    events = [event for event in events if not event.is_async]
    forward: dict[int, str] = {}  # the kind of the operation that made a node of the graph, by its number
    for event in events:
        if event.sequence_nr >= 0 and not _is_backward(event):
            forward[event.sequence_nr] = kind(
                event, r, vocabulary, {}
            )  # the last with a number is the one that made it
    parts: dict[str, float] = defaultdict(float)
    for event in events:
        parts[kind(event, r, vocabulary, forward)] += event.self_cpu_time_total / 1e6
    return dict(parts)


def kind(event: Any, r: int, vocabulary: int, forward: dict[int, str]) -> str:
    """The kind of an operation: a native name around it, else the nearest thing around it that says one."""
    around = list(_around(event))
    for each in around:
        if each.name.startswith(NATIVE):
            if any("HeadLoss" in outer.name for outer in around):
                return HEAD
            return _KERNELS.get(each.name.removeprefix(NATIVE), str(each.name))
    for each in around:
        if each.name.startswith(SCOPE):
            return str(each.name.removeprefix(SCOPE))
        if _PRODUCT.match(each.name):
            return _product(each, r, vocabulary)
        for pattern, found in _NAMES:
            if pattern.search(each.name):
                return found
        if _is_backward(each) and each.sequence_nr in forward:
            return forward[each.sequence_nr]
    return REST


def _product(event: Any, r: int, vocabulary: int) -> str:
    sizes = {size for shape in event.input_shapes or [] for size in shape or []}
    return HEAD if vocabulary in sizes else ADAPTER if r in sizes else FROZEN


def _around(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _is_backward(event: Any) -> bool:
    return "evaluate_function" in event.name or event.name.endswith(("Backward", "Backward0", "Backward1"))

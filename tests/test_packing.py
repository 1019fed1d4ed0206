"""Documents that begin alike, computed once, against the same documents each by itself."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_train import distance, host_with, loss_and_gradients
from tiny import VOCAB, base, randomize

from lorafit.batches import Micro, Plan, alike, pack
from lorafit.data.tokens import Tokens
from lorafit.evaluate import evaluate
from lorafit.host import Host
from lorafit.native import build
from lorafit.packing import SHORTEST, Packing
from lorafit.train.loop import Job, _gradients


def documents(*groups: tuple[int, list[int]], learned_from: int | None = None, seed: int = 0) -> list[Tokens]:
    """Of each group (shared tokens, lengths of the rest): rows that begin alike, taken in turn. Half is learned, or all from
    a token on."""
    draw = np.random.default_rng(seed)
    made = []
    for shared, rests in groups:
        beginning = draw.integers(0, VOCAB, shared)
        made.append([np.concatenate([beginning, draw.integers(0, VOCAB, n)]).astype(np.int32) for n in rests])
    longest = max(map(len, made))
    ids = [group[i] for i in range(longest) for group in made if i < len(group)]
    starts = [len(x) // 2 if learned_from is None else learned_from for x in ids]
    return [
        Tokens(x, np.arange(len(x)) >= start, line, None, "")
        for line, (x, start) in enumerate(zip(ids, starts, strict=True), 1)
    ]


def nested() -> list[Tokens]:
    """Three rows that share 30 tokens after the 18 that two others share with them."""
    few, more = documents((18, [6, 4])), documents((30, [8, 3, 5]), seed=1)
    begun = [np.concatenate([few[0].ids[:18], row.ids]) for row in more]
    return [*few, *(Tokens(ids, np.arange(len(ids)) >= 40, 9, None, "") for ids in begun)]


STEPS = {
    "one": documents((20, [5, 9, 1, 12])),
    "two and others": documents((20, [5, 9, 3]), (17, [4, 8]), (0, [7, 30])),
    "nested": nested(),
    "all learned": documents((20, [5, 9, 1, 12]), (0, [6]), learned_from=0),
    "the same": documents((20, [6])) * 3,
}


def host_of(shape: str, **changes) -> Host:
    """With weights of ordinary size: with large attention scores fp32 itself is off by more than the tolerance."""
    host = host_with(shape, scale=0.15, **changes)
    with torch.no_grad():
        host.base.model.get_input_embeddings().weight.normal_(0, 1, generator=torch.Generator().manual_seed(1))
    randomize(host.adapters["a"], 0.05)
    return host


def apart(host: Host, rows, accumulate: int = 1):
    host.base.body.shares = False
    try:
        return loss_and_gradients(host, rows, accumulate)
    finally:
        host.base.body.shares = True


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("shape", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("step", STEPS)
def test_loss_and_gradients_are_those_of_the_documents_apart(step, shape, native):
    host, rows = host_of(shape), STEPS[step]
    micro = pack(rows, share=True)
    assert micro.packing.shared and micro.tokens < sum(len(row.ids) for row in rows)
    with build.switched(native):
        for accumulate in (1, 2):
            want, gradients = apart(host, rows, accumulate)
            loss, found = loss_and_gradients(host, rows, accumulate)
            assert abs(loss - want) < 1e-5 * want
            assert distance(found, gradients) < 1e-5


def test_the_modules_in_fp64_agree():
    """The documents through transformers' own modules, a precision in which nothing is hidden by rounding."""
    host, exact = host_of("llama"), host_of("llama", dtype=torch.float64)
    assert exact.base.body is None
    exact.adapters["a"].load_state_dict(host.adapters["a"].state_dict())
    exact.base.model.load_state_dict(host.base.model.state_dict())
    want, gradients = loss_and_gradients(exact, STEPS["two and others"], 1)
    loss, found = loss_and_gradients(host, STEPS["two and others"], 1)
    assert abs(loss - want) < 1e-5 * want
    assert distance(found, gradients) < 1e-5


def test_checkpointing_and_adapted_embeddings_and_head():
    host = Host(base("llama", scale=0.15))
    randomize(host.add("a", "lora", r=3, targets=["all"]), 0.05)
    want, gradients = apart(host, STEPS["all learned"])
    for checkpointing in (False, True):
        host.base.checkpointing(checkpointing)
        loss, found = loss_and_gradients(host, STEPS["all learned"], 1)
        assert abs(loss - want) < 1e-5 * want
        assert distance(found, gradients) < 1e-5


def test_each_job_shares_its_own_beginning():
    host = Host(base("llama", scale=0.15))
    steps = {"a": documents((20, [5, 9, 3])), "b": documents((20, [4, 6])), "c": documents((0, [9]))}
    for name in steps:
        randomize(host.add(name, r=3, seed=ord(name)), 0.05)
    jobs = [Job(name, Plan(rows, 10**9), steps=1, lr=1e-3) for name, rows in steps.items()]
    found = {}
    for shares in (True, False):
        host.base.body.shares = shares
        for adapter in host.adapters.values():
            adapter.zero_grad()
        losses = _gradients(host, jobs, steps)
        found[shares] = (
            losses,
            {f"{n}.{k}": p.grad.clone() for n, a in host.adapters.items() for k, p in a.named_parameters()},
        )
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    assert distance(found[True][1], found[False][1]) < 1e-5


def test_who_may_not_share():
    def may(host: Host, training: bool = True) -> bool:
        host.adapters["a"].train(training)
        return host.shares({"a"})

    assert may(host_with("llama")) and not may(host_with("gpt2"))
    drawing = Host(base("llama"))
    drawing.add("a", "lora", r=3, dropout=0.5)
    assert not may(drawing) and may(drawing, training=False)
    with_switch = host_with("llama")
    with_switch.base.body.shares = False
    assert not may(with_switch)


def test_dropout_draws_for_each_document():
    host = Host(base("llama", scale=0.15))
    randomize(host.add("a", "lora", r=3, dropout=0.5), 0.05)
    want, gradients = apart(host, STEPS["one"])
    loss, found = loss_and_gradients(host, STEPS["one"], 1)
    assert loss == want and distance(found, gradients) == 0


def test_evaluation_shares_and_scores_the_same():
    host = host_of("llama")
    rows = STEPS["two and others"]
    shared = evaluate(host, rows, "a")
    host.base.body.shares = False
    assert shared.loss == pytest.approx(evaluate(host, rows, "a").loss, rel=1e-5)
    assert shared.target_tokens == sum(int(row.learn[1:].sum()) for row in rows)


def test_evaluation_of_who_may_not_share_takes_each_row_whole():
    host = host_with("gpt2")
    rows = STEPS["one"]
    each = [evaluate(host, [row], "a") for row in rows]
    want = sum(scores.loss * scores.target_tokens for scores in each) / sum(scores.target_tokens for scores in each)
    assert evaluate(host, rows, "a").loss == pytest.approx(want, rel=1e-5)


def spelled(micro: Micro) -> list[tuple[list[int], list[int]]]:
    """Each document's tokens, and the learned ones, read back from a row."""
    starts = np.cumsum([0, *micro.packing.lengths])
    parts = [micro.ids[a:b].tolist() for a, b in pairwise(starts)]
    continued = set(micro.packing.before)
    whole = [
        (parts[other] if other is not None else []) + parts[i]
        for i, other in enumerate(micro.packing.before)
        if i not in continued
    ]
    learned = micro.labels if micro.copies is None else micro.labels[micro.copies]
    return whole, learned.tolist()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("share", [True, False])
def test_nothing_is_lost(step, share):
    rows = STEPS[step]
    micro = pack(rows, share=share)
    whole, learned = spelled(micro)
    assert whole == [row.ids.tolist() for row in rows]
    assert learned == [token for row in rows for token in row.ids[1:][row.learn[1:]].tolist()]
    assert len(micro.owners) == len(learned)
    assert micro.positions.tolist() == sorted(micro.positions.tolist())
    if step == "all learned" and share:
        assert len(micro.labels) < len(learned)


def test_the_groups_that_save_most():
    def words(*texts: str) -> list[np.ndarray]:
        return [np.array([ord(c) for c in text], np.int32) for text in texts]

    def groups(*texts: str) -> list[tuple[int, list[int]]]:
        rows = words(*texts)
        return alike(rows, range(len(rows)))

    x = "x" * SHORTEST
    assert groups(x + "a", x + "b") == [(SHORTEST, [0, 1])]
    assert groups(x[1:] + "a", x[1:] + "b") == []  # too short to be worth it
    assert groups(x, x) == []  # each keeps a token of its own
    assert groups(x + "a", x + "a") == [(SHORTEST, [0, 1])]
    # A long beginning of two saves more than a short one of three, and less than one of ten.
    long = x + "l" * 40
    assert groups(long + "a", x + "b", long + "c") == [(len(long), [0, 2])]
    assert groups(long + "a", *(x + c for c in "bcdefghi"), long + "j") == [(SHORTEST, list(range(10)))]
    assert groups("", "a", x + "b") == []


def test_positions():
    packing = Packing((16, 3, 2, 4), (None, 0, 0, None))
    assert packing.positions.tolist() == [*range(16), 16, 17, 18, 16, 17, *range(4)]


def test_rows_within_rows_without_end():
    rows = [np.zeros(n, np.int32) for n in range(1, 1500)]
    groups = alike(rows, range(len(rows)))
    assert groups and all(length >= SHORTEST for length, _ in groups)


def test_a_row_that_teaches_an_adapted_head_nothing():
    host = Host(base("llama"))
    host.add("a", r=3, targets=["lm_head"])
    rows = [*documents((0, [5])), *documents((0, [6]), learned_from=6)]
    want, gradients = loss_and_gradients(host, rows, 1)
    loss, found = loss_and_gradients(host, rows, 2)
    assert abs(loss - want) < 1e-5 * want and distance(found, gradients) < 1e-5

"""Our own run through a model's layers against the modules it reads its weights from."""

from __future__ import annotations

import pytest
import torch
from test_train import distance, host_with, loss_and_gradients, rows
from tiny import base, randomize

from lorafit.generate import generate
from lorafit.host import Host
from lorafit.model.base import alone, probe
from lorafit.model.body import Body
from lorafit.native import build
from lorafit.train.loop import Job, Plan, _gradients

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
DOCUMENTS = rows([12, 5, 9, 3, 7, 1, 11])


def by_modules(host: Host, documents, accumulate: int = 1):
    """Loss and gradients with the modules' own forwards, hooks and torch's operations alone."""
    body, host.base.body = host.base.body, None
    try:
        with build.switched(False):
            return loss_and_gradients(host, documents, accumulate)
    finally:
        host.base.body = body


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("native", [True, False])
def test_gives_what_the_modules_give(family, native):
    # Weights of ordinary size: with large attention scores fp32 itself is off by more than the tolerance.
    host = host_with(family, scale=0.15)
    assert host.base.body is not None
    with torch.no_grad():
        host.base.model.get_input_embeddings().weight.normal_(0, 1, generator=torch.Generator().manual_seed(1))
    randomize(host.adapters["a"], 0.05)
    want, gradients = by_modules(host, DOCUMENTS)
    with build.switched(native):
        for accumulate in (1, 3):
            loss, found = loss_and_gradients(host, DOCUMENTS, accumulate)
            assert abs(loss - want) < 1e-5 * want
            assert distance(found, gradients) < 1e-5


def test_unknown_families_keep_their_modules():
    for shape in ("gpt2", "mixtral"):
        assert base(shape).body is None


def test_a_layer_that_differs_is_found_out():
    """A family known by name whose layer does something else is left to its modules."""
    made = base("llama")
    assert made.body is not None
    ids, lengths = torch.arange(14) % 50, [9, 5]

    def agrees():
        return made.body.agrees(ids, lengths, alone(made, ids, lengths, states=True)[1], False)

    with torch.no_grad():
        assert agrees()
        for module, change in ((made.model.model.layers[1].mlp, 1.01), (made.model.model.embed_tokens, 2.0)):
            handle = module.register_forward_hook(lambda module, args, out, change=change: out * change)
            given = alone(made, ids, lengths, states=True)[1]
            handle.remove()
            assert not made.body.agrees(ids, lengths, given, False)
        states = alone(made, ids, lengths, states=True)[1]
        assert not made.body.agrees(ids, lengths, states[:-1], False)
        assert not made.body.agrees(ids, lengths, [], False)
        assert agrees()
        made.body.act = "gelu_tanh"
        assert not agrees()


def test_a_model_that_keeps_its_states_to_itself_runs_by_its_modules(monkeypatch):
    made = base("llama")
    assert made.body is not None and made.plain_head
    forward = made.model.forward
    monkeypatch.setattr(made.model, "forward", lambda *args, output_hidden_states=False, **kw: forward(*args, **kw))
    probe(made)
    assert made.body is None and made.packs and made.plain_head


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_head_that_gets_something_else_is_found_out(family):
    """Between the body and the head's module, with and without layers of our own."""
    made = base(family)
    assert made.plain_head
    forward = made.model.forward

    def treated(*args, **kw):
        out = forward(*args, **kw)
        out.logits = out.logits * 1.01
        return out

    made.model.forward = treated
    probe(made)
    assert made.packs and not made.plain_head


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_window_counts_only_where_the_modules_have_one(family):
    """Longer documents than those that a base is tried on."""
    host = Host(base(family, sliding_window=16))
    ids, lengths = torch.arange(60) % 50, [40, 20]
    assert host.base.body is not None
    with torch.no_grad():
        got, want = host.hidden(ids, lengths), host.base.hidden(ids, lengths, packed=False)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("rope", ["dynamic", "linear"])
def test_angles_that_depend_on_the_neighbours_keep_documents_apart(rope):
    host = Host(base("llama", rope_parameters={"rope_type": rope, "factor": 2.0, "rope_theta": 10000.0}))
    assert host.base.packs == (rope == "linear")
    ids, lengths = torch.arange(130) % 50, [100, 30]
    with torch.no_grad():
        got, want = host.hidden(ids, lengths), host.base.hidden(ids, lengths, packed=False)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dropout_falls_on_the_same_numbers(family):
    host = Host(base(family))
    randomize(host.add("a", "lora", r=3, dropout=0.3))
    want, gradients = by_modules(host, DOCUMENTS)
    loss, found = loss_and_gradients(host, DOCUMENTS, 1)
    assert abs(loss - want) < 1e-5 * want
    assert distance(found, gradients) < 1e-5


def test_checkpointing_gives_the_same():
    """The same bits: what is computed anew is computed as it was."""
    host = host_with("llama")
    want, gradients = loss_and_gradients(host, DOCUMENTS, 1)
    host.base.checkpointing(True)
    loss, found = loss_and_gradients(host, DOCUMENTS, 1)
    assert loss == want
    assert distance(found, gradients) == 0


@pytest.mark.parametrize(
    "options",
    [
        dict(method="lora", targets=["q_proj"], r=2),
        dict(method="lora", targets=["down_proj", "v_proj"], r=40),
        dict(method="lora", targets=["all"], r=3),
        dict(method="full", targets=["q_proj", "embed_tokens", "up_proj"]),
        dict(method="lora", targets=["k_proj", "gate_proj"], r=4, rank_pattern={"gate_proj": 9}),
    ],
)
def test_other_targets_and_methods(options):
    host = Host(base("llama"))
    randomize(host.add("a", **options))
    want, gradients = by_modules(host, DOCUMENTS)
    loss, found = loss_and_gradients(host, DOCUMENTS, 1)
    assert abs(loss - want) < 1e-5 * want
    assert distance(found, gradients) < 1e-5


def test_several_adapters_in_one_row_and_a_stack():
    host = Host(base("llama"))
    for name in ("a", "b"):
        randomize(host.add(name, r=3, seed=ord(name)))
    documents = {"a": rows([5, 8]), "b": rows([7, 3, 4])}
    jobs = [Job(name, Plan(documents[name], 10**9), steps=1, lr=1e-3) for name in documents]

    def run():
        for adapter in host.adapters.values():
            adapter.zero_grad()
        losses = _gradients(host, jobs, documents)
        grads = {f"{n}.{k}": p.grad.clone() for n, a in host.adapters.items() for k, p in a.named_parameters()}
        return losses, grads

    fast, found = run()
    host.base.body = None
    with build.switched(False):
        plain, gradients = run()
    assert max(abs(f - p) for f, p in zip(fast, plain, strict=True)) < 1e-5
    assert distance(found, gradients) < 1e-5
    host.base.body = Body.of(host.base.model)
    ids, lengths = torch.arange(11) % 50, [4, 7]
    with torch.no_grad(), host.route(("a", "b")):
        got = host.hidden(ids, lengths)
        host.base.body = None
        assert (got - host.hidden(ids, lengths)).abs().max() < 1e-5 * got.abs().max()


def test_bf16_is_no_farther_from_fp32_than_the_modules_are():
    wide = dict(hidden_size=64, intermediate_size=96)  # what AMX tiles take
    exact_host = host_with("qwen3", scale=0.15, **wide)
    want, exact = by_modules(exact_host, DOCUMENTS)
    host = host_with("qwen3", scale=0.15, dtype=torch.bfloat16, **wide)
    adapter, source = host.adapters["a"], exact_host.adapters["a"]
    adapter.float().load_state_dict(source.state_dict())
    plain_loss, plain = by_modules(host, DOCUMENTS)
    loss, found = loss_and_gradients(host, DOCUMENTS, 1)
    assert abs(loss - want) < 2 * abs(plain_loss - want) + 1e-3
    assert distance(found, exact) < 2 * distance(plain, exact)  # either is a draw of bf16's rounding


@pytest.mark.parametrize("shape", ["llama", "gpt2", "mixtral"])
def test_answers_while_training_are_those_without_checkpointing(shape):
    host = host_with(shape)
    want = list(generate(host, list(range(5, 12)), "a", max_new=12))
    host.base.checkpointing(True)
    assert list(generate(host, list(range(5, 12)), "a", max_new=12)) == want
    assert len(set(want)) > 1
    assert all(module.training for module in host.base.recomputed) and host.base.recomputed

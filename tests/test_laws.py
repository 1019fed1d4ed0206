"""The laws, over every method and every kind of site, and of training. A new method is tested by its registry line alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import base, ids, model, randomize, restore, rows

from lorafit.batches import Plan, pack
from lorafit.host import Host
from lorafit.methods import METHODS, settings
from lorafit.model.load import prepare
from lorafit.model.quant import Quant, convert
from lorafit.model.sites import ranks, select
from lorafit.model.starts import Start
from lorafit.route import Route
from lorafit.train import optim
from lorafit.train.loop import Job, train
from lorafit.train.loss import losses

# (model shape, targets, base options): together every kind of site, with and without a shared embedding
PLACES = {
    "linear": ("llama", ["all-linear"], {}),
    "linear+bias": ("qwen2", ["all-linear"], {}),
    "conv1d": ("gpt2", ["all-linear"], {}),
    "experts": ("mixtral", ["*.experts.*"], {}),
    "embedding": ("llama", ["embed_tokens"], {}),
    "tied": ("llama", ["embed_tokens", "v_proj"], {"tie_word_embeddings": True}),
    "head": ("llama", ["lm_head", "down_proj"], {}),
    "codes": ("llama", ["all-linear"], {}),
}
CASES = [(m, p) for m in METHODS for p in PLACES]


def fits(host, method, targets):
    kind = METHODS[method]
    coded = host.base.quant is not None
    return all(site.kind in kind.kinds for site in select(host.sites, targets)) and (coded or not kind.needs_codes)


def in_codes(shape, method, targets):
    """A base in nf4, in codes of the method's own where it makes such."""
    made, kind = model(shape), METHODS[method]
    start = None
    if kind.codes:
        own = {name: default for name, (_, default) in settings(kind).items()}
        start = Start(method, own["r"], own[kind.codes], tuple(targets))
    quant = Quant("nf4", start=start)
    convert(made, quant, ranks(made, start) if start else None)
    return prepare(made, None, Path("nowhere"), shape, quant)


@pytest.fixture
def place(request):
    method, name = request.param
    shape, targets, options = PLACES[name]
    host = Host(in_codes(shape, method, targets) if name == "codes" else base(shape, **options))
    if not fits(host, method, targets):
        pytest.skip(f"{method} doesn't adapt this kind")
    return host, method, targets


cases = pytest.mark.parametrize("place", CASES, indirect=True, ids=[f"{m}-{p}" for m, p in CASES])
LENGTHS = [9, 5, 7]


@cases
def test_a_fresh_adapter_changes_nothing(place):
    host, method, targets = place
    x = ids(21)
    with torch.no_grad():
        before = host.logits(x, LENGTHS)
        host.add("a", method, targets)
        with host.route("a"):
            assert torch.equal(host.logits(x, LENGTHS), before)


@cases
def test_forward_equals_merged_weight(place):
    host, method, targets = place
    randomize(host.add("a", method, targets))
    x = ids(21)
    with torch.no_grad():
        plain = host.logits(x, LENGTHS)
        with host.route("a"):
            routed = host.logits(x, LENGTHS)
        weights = {site.path: host.merged_weight(site, "a") for site in select(host.sites, targets)}
        biases = {site.path: host.merged_bias(site, "a") for site in select(host.sites, targets)}
        restore(host.base.model)  # codes become numbers
        merged_host = Host(host.base)
        for path, w in weights.items():
            merged_host.sites[path].write(w)
            if biases[path] is not None:
                merged_host.sites[path].write_bias(biases[path])
        merged = merged_host.logits(x, LENGTHS)
    assert (routed - plain).abs().max() > 0.1  # the adapter is felt at all
    assert (routed - merged).abs().max() < 1e-5 * max(1, merged.abs().max())


@cases
def test_no_route_is_the_base(place):
    host, method, targets = place
    x = ids(21)
    with torch.no_grad():
        before = host.logits(x, LENGTHS)
        randomize(host.add("a", method, targets))
        assert torch.equal(host.logits(x, LENGTHS), before)
        with host.route(None):
            assert torch.equal(host.logits(x, LENGTHS), before)
        host.remove("a")
        assert torch.equal(host.logits(x, LENGTHS), before)


@cases
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_segment_in_a_mixed_batch_equals_the_segment_alone(place, checkpointing):
    host, method, targets = place
    if checkpointing:
        host.base.checkpointing(True)
    for name in "ab":
        adapter = host.add(name, method, targets, seed=ord(name))
        randomize(adapter, 0.2 if name == "a" else 0.1)
    stacks = ["a", ("b", "a"), None, "b", "a"]
    documents = rows([9, 5, 7, 4, 6])

    def run(parts, route):
        for adapter in host.adapters.values():
            adapter.zero_grad()
        micro = parts
        with host.route(route):
            each = losses(host, micro)
            each.sum().backward()
        return each.detach(), {
            f"{n}.{k}": p.grad.clone()
            for n, adapter in host.adapters.items()
            for k, p in adapter.named_parameters()
            if p.grad is not None
        }

    alone, gradients = [], {}
    for row, stack in zip(documents, stacks, strict=True):
        if stack is None:
            with torch.no_grad(), host.route(None):
                alone.append(losses(host, pack([row])))
            continue
        each, found = run(pack([row]), Route.all(stack))
        alone.append(each)
        for key, g in found.items():
            gradients[key] = gradients.get(key, 0) + g
    route = Route.of((len(row.ids), stack) for row, stack in zip(documents, stacks, strict=True))
    together, mixed = run(pack(documents), route)
    assert (together - torch.cat(alone)).abs().max() < 1e-5
    assert set(mixed) == set(gradients)
    for key, g in gradients.items():
        assert g.abs().max() > 0, key
        assert (mixed[key] - g).abs().max() < 1e-5 * max(1.0, g.abs().max()), key


@cases
def test_save_and_load_give_the_same_logits(place, tmp_path):
    host, method, targets = place
    randomize(host.add("a", method, targets))
    host.save("a", tmp_path)
    host.load(tmp_path, "b")
    x = ids(21)
    with torch.no_grad():
        with host.route("a"):
            first = host.logits(x, LENGTHS)
        with host.route("b"):
            assert torch.equal(host.logits(x, LENGTHS), first)


@pytest.mark.parametrize("method", [m for m, kind in METHODS.items() if "r" in settings(kind) and not kind.needs_codes])
def test_what_patterns_give_a_site_is_saved(method, tmp_path):
    """Also of methods whose files are lorafit's own; and a second time."""
    targets = ["q_proj", "down_proj"]
    host = Host(base("llama"))
    options = {"rank_pattern": {"*.1.*": 2}}
    if "alpha" in settings(METHODS[method]):
        options["alpha_pattern"] = {"q_proj": 5.0}
    randomize(host.add("a", method, targets, r=3, **options))
    x = ids(21)
    for name, place in (("b", tmp_path / "b"), ("c", tmp_path / "c")):
        place.mkdir()
        host.save(list(host.adapters)[-1], place)
        host.load(place, name)
        with torch.no_grad():
            with host.route("a"):
                want = host.logits(x, [21])
            with host.route(name):
                assert (host.logits(x, [21]) - want).abs().max() < 1e-5 * want.abs().max()


# --- laws of training: over every method, whatever it asks of the loop --------------------------------------------------

DOCUMENTS = {"a": rows([9, 5, 7, 4, 6, 8], seed=1), "b": rows([6, 12, 3, 10, 7, 5], seed=2)}
STEPS = 8
TRAINED = ["q_proj", "down_proj"]


OFTEN = {"interval": 3, "r": 4}  # so that what a method does now and then happens in so few steps


def started(method, names, dtype=torch.float64):
    """A host with these adapters, fresh, and a job for each; steps have two micro-batches. In fp64 only a mistake is felt: AdamW
    makes whole steps out of gradients that are rounding. (A base in codes is fp32.)"""
    kind = METHODS[method]
    if kind.needs_codes:
        dtype = torch.float32
    host = Host(in_codes("llama", method, TRAINED) if kind.needs_codes else base("llama", dtype, scale=0.15))
    options = {} if kind.needs_codes else {key: OFTEN[key] for key in settings(kind) if key in OFTEN}
    jobs = []
    for name in names:
        host.add(name, method, TRAINED, seed=ord(name), **options).to(dtype)
        jobs.append(Job(name, Plan(DOCUMENTS[name], 20, 2, seed=3), STEPS, 1e-2 * kind.lr_factor, warmup=0.0))
    return host, jobs


def state(host, job):
    return {**host.adapters[job.name].state_dict(), **optim.state(host.adapters[job.name], job.optimizer)}


def off(found, wanted):
    """The largest difference between two states, as a share of the tensor's largest number or of 1."""
    assert set(found) == set(wanted)
    pairs = [(found[name].double(), tensor.double()) for name, tensor in wanted.items()]
    return max(float((f - w).abs().max() / max(1, w.abs().max())) for f, w in pairs)


@pytest.mark.parametrize("method", METHODS)
def test_trained_together_equals_trained_alone(method):
    together, jobs = started(method, "ab")
    list(train(together, jobs))
    for job in jobs:
        host, (alone,) = started(method, job.name)
        fresh = {name: tensor.clone() for name, tensor in host.adapters[job.name].state_dict().items()}
        list(train(host, [alone]))
        wanted = host.adapters[job.name].state_dict()
        assert off(wanted, fresh) > 1e-3  # it learned at all
        exact = host.base.dtype is torch.float64
        assert off(together.adapters[job.name].state_dict(), wanted) < (1e-9 if exact else 1e-6)


@pytest.mark.parametrize("at", [4, STEPS - 1])
@pytest.mark.parametrize("method", METHODS)
def test_gone_on_from_a_checkpoint_gives_the_same_bits(method, at):
    host, (job,) = started(method, "a")
    for step in train(host, [job]):
        if step.number == at:
            saved = {name: tensor.clone() for name, tensor in host.adapters["a"].state_dict().items()}
            kept = {name: tensor.clone() for name, tensor in optim.state(host.adapters["a"], job.optimizer).items()}
    again, (other,) = started(method, "a")
    other.optimizer = optim.optimizer(again.adapters["a"], other.lr, 0.0)
    again.adapters["a"].load_state_dict(saved)
    optim.restore(again.adapters["a"], other.optimizer, kept)
    other.done = at
    list(train(again, [other]))
    wanted, found = state(host, job), state(again, other)
    assert set(found) == set(wanted) and all(torch.equal(found[name], t) for name, t in wanted.items())


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_change_nothing(method):
    found = []
    for halvings in (0, 3):
        host, (job,) = started(method, "a")
        list(train(host, [job], halvings))
        found.append(host.adapters["a"].state_dict())
    assert off(*found) < (1e-9 if host.base.dtype is torch.float64 else 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_fails_leaves_all_as_it_was(method):
    host, (job,) = started(method, "a")
    steps = train(host, [job])
    for _ in range(3):
        next(steps)
    before = {name: tensor.clone() for name, tensor in state(host, job).items()}
    with torch.no_grad():
        host.base.model.model.norm.weight[0] = torch.inf
    assert next(steps).jobs["a"].failed and job.done == 3
    after = state(host, job)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

"""The five laws, over every method and every kind of site. A new method is tested by its registry line alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import base, ids, model, randomize, restore, rows

from lorafit.batches import pack
from lorafit.host import Host
from lorafit.methods import METHODS, settings
from lorafit.model.load import prepare
from lorafit.model.quant import Quant, convert
from lorafit.model.sites import ranks, select
from lorafit.model.starts import Start
from lorafit.route import Route
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

"""Layers of a mapped base are asked for before they are needed, on the way there and back, and nothing else changes."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny import base, ids

from lorafit.host import Host
from lorafit.model import ahead
from lorafit.model.ahead import Ahead
from lorafit.model.body import Body
from lorafit.model.load import prepare
from lorafit.model.quant import Quant, convert

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux is asked for pages")


@pytest.fixture
def quantised(monkeypatch):
    monkeypatch.setattr(ahead, "SMALLEST", 1)
    plain = base("llama", num_hidden_layers=4, hidden_size=128, intermediate_size=256)  # codes of more than a page
    convert(plain.model, Quant("nf4"))
    return prepare(plain.model, None, plain.path, "tiny", Quant("nf4"))


def test_the_next_layer_is_asked_for_on_both_ways(quantised, monkeypatch):
    host, asked = Host(quantised), []
    host.add("a", "lora", r=3)
    body = quantised.body
    spans = body.ahead._spans
    numbers = {start: number for number, spans in enumerate(spans) for start, _ in spans[:1]}
    monkeypatch.setattr(ahead, "_advise", lambda: lambda start, length, what: asked.append(numbers.get(start)))

    def gradient():
        with host.route("a"):
            host.hidden(ids(12), [7, 5]).square().sum().backward()
        found = torch.cat([p.grad.flatten() for p in host.adapters["a"].parameters()])
        host.adapters["a"].zero_grad()
        return found

    with_advice = gradient()
    assert [number for number in asked if number is not None] == [1, 2, 3, 1, 0]
    body.ahead = None
    assert torch.equal(gradient(), with_advice)


def test_it_asks_for_whole_pages_that_hold_the_codes(quantised):
    body = quantised.body
    for layer, spans in zip(body.inner.layers, body.ahead._spans, strict=True):
        codes = [m.codes for m in layer.modules() if hasattr(m, "codes")]
        assert len(codes) == len(spans) == 7
        for t, (start, length) in zip(codes, spans, strict=True):
            assert start % 4096 == 0 and 0 <= t.data_ptr() - start < 4096
            assert start + length == t.data_ptr() + t.numel()


def test_a_base_of_numbers_and_a_small_one_ask_for_nothing():
    plain = base("llama")
    assert plain.body.ahead is None
    convert(plain.model, Quant("nf4"))
    assert Ahead.of(plain.model.base_model.layers) is None
    assert Body.of(plain.model).ahead is None

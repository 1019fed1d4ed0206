"""The estimate counts what training really makes, without reading weights."""

from __future__ import annotations

import json

import pytest
from tiny import rows

from lorafit import fit, plan
from lorafit.cli import main
from lorafit.host import Host
from lorafit.model.load import load


def made(model, data, **changes):
    return plan.estimate(fit.read_config(str(data), {"precision": "fp32", **changes}), model, rows([20] * 10))


@pytest.mark.parametrize(
    "changes", [{}, {"r": "4", "targets": "q_proj,up_proj"}, {"method": "full"}, {"rank_pattern": "q_proj=2"}]
)
def test_it_counts_what_the_host_makes(tiny_model, data_file, changes):
    config = fit.read_config(str(data_file), changes)
    host = Host(load(str(tiny_model), precision="fp32"))
    adapter = host.add("a", config.method, config.targets, rank_pattern=config.rank_pattern, **config.options)
    found = made(tiny_model, data_file, **changes)
    assert found.trainable_parameters == adapter.numbers()
    assert found.total_parameters == host.base.parameters()
    assert found.weights == 4 * found.total_parameters


def test_memory_follows_the_micro_batch(tiny_model, data_file):
    whole, split = (made(tiny_model, data_file, batch_tokens="200", accumulate=n) for n in ("1", "5"))
    assert (whole.micro_batch_tokens, split.micro_batch_tokens) == (200, 40)
    assert whole.activations == 5 * split.activations
    assert made(tiny_model, data_file, batch_tokens="200", checkpointing="true").activations < whole.activations


def test_json_is_one_object(capsys, tiny_model, data_file):
    assert main(["plan", str(data_file), "--model", str(tiny_model), "--json", "steps=3"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["peak_bytes"] > 350_000_000 and values["steps"] == 3

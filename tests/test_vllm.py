"""What `--format peft-portable` and `hf` write, in the real vLLM, fp32 on the CPU: the same log-probabilities as ours."""

from __future__ import annotations

import pytest
import torch
import vllm_cpu
from test_export import folder, job, logits, opened, trained
from tiny import ids

from lorafit.errors import AdapterError
from lorafit.export import export

TOLERANCE = 1e-4  # of a log-probability
SIZES = dict(hidden_size=128, intermediate_size=160, num_attention_heads=2, num_key_value_heads=1)
PROMPTS = [ids(9).tolist(), ids(13, seed=1).tolist(), ids(2, seed=2).tolist()]
# What a reader could overlook: scales, patterns, other starts, layers that are missing, ranks that differ.
ADAPTERS = {
    "plain": ("lora", ["all-linear"], {"r": 4}),
    "rslora": ("rslora", ["q_proj", "down_proj"], {"r": 6, "alpha": 9.0}),
    "patterns": (
        "lora",
        ["q_proj", "k_proj", "up_proj"],
        {
            "r": 4,
            "alpha": 6.0,
            "rslora": True,
            "rank_pattern": {"k_proj": 2, "*.1.*": 7},
            "alpha_pattern": {"q_proj": 3.0},
        },
    ),
    "pissa": ("pissa", ["q_proj", "o_proj", "gate_proj"], {"r": 3}),
    "adalora": ("adalora", ["all-linear"], {"r": 4}),
}


@pytest.fixture(autouse=True, scope="module")
def installed():
    vllm_cpu.need()


def agree(host, spec, found) -> float:
    """The largest difference between a log-probability there and ours, of the best tokens after each position."""
    worst = 0.0
    for prompt, steps in zip(PROMPTS, found, strict=True):
        with torch.no_grad(), host.route(spec):
            want = host.logits(torch.tensor(prompt), [len(prompt)]).log_softmax(-1)
        assert len(steps) == len(prompt)
        for mine, theirs in zip(want, steps, strict=True):
            assert len(theirs) >= vllm_cpu.TOP
            worst = max(worst, *(abs(float(mine[int(i)]) - value) for i, value in theirs.items()))
    return worst


@pytest.mark.parametrize("shape", ["llama", "qwen2"])
def test_portable_adapters_are_the_same_there(tmp_path, shape):
    place = folder(tmp_path, shape, max_position_embeddings=64, **SIZES)
    folders, loras = {}, {}
    for name, (method, targets, options) in ADAPTERS.items():
        folders[name] = trained(tmp_path, place, method, targets, **options)
        loras[name] = tmp_path / f"portable-{name}"
        export("peft-portable", job(place, folders[name]), loras[name])
    found = vllm_cpu.ask(place, loras, 16, PROMPTS)
    host = opened(place)
    assert agree(host, None, found[""]) < TOLERANCE
    for name, adapter in folders.items():
        host.load(adapter, name)
        off = agree(host, name, found[name])
        print(f"{shape} {name}: largest difference of a log-probability {off:.1e}")
        assert off < TOLERANCE, name
        assert agree(host, None, found[name]) > 0.1, name  # it is felt


def test_merged_is_the_same_there(tmp_path):
    place = folder(tmp_path, max_position_embeddings=64, **SIZES)
    adapter = trained(tmp_path, place, "dora", ["all-linear"])
    given = job(place, adapter)
    given.dtype = torch.float32
    export("hf", given, tmp_path / "merged")
    found = vllm_cpu.ask(tmp_path / "merged", {}, 8, PROMPTS)
    host = opened(place)
    host.load(adapter, "a")
    assert agree(host, "a", found[""]) < TOLERANCE


def test_what_is_refused_here_is_refused_there(tmp_path):
    place = folder(tmp_path, max_position_embeddings=64, **SIZES)
    adapter = trained(tmp_path, place, "dora", ["q_proj"])
    with pytest.raises(AdapterError, match="merge it with --format hf"):
        export("peft-portable", job(place, adapter), tmp_path / "out")
    with pytest.raises(RuntimeError, match="DoRA"):
        vllm_cpu.ask(place, {"dora": adapter}, 16, PROMPTS)
    assert logits(place, adapter).isfinite().all()

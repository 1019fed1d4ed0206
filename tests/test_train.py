"""Batch, accumulation and packing are questions of memory alone; jobs share the forward and nothing else."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import base, ids, model, randomize, rows

from lorafit.batches import Plan, default_tokens, fill, join, pack, targets
from lorafit.host import Host
from lorafit.model.base import Base, near
from lorafit.train import loop, optim
from lorafit.train.loop import Job, _gradients, train
from lorafit.train.loss import CHUNK, FrozenHeadLoss, losses

SHAPES = ["llama", "qwen3", "gpt2", "mistral", "mixtral"]


def host_with(shape: str, *, packs: bool = True, dtype=torch.float32, **changes) -> Host:
    host = Host(base(shape, dtype, **changes))
    assert host.base.packs and host.base.plain_head
    host.base.packs = packs
    randomize(host.add("a", "lora", r=3).to(dtype))
    return host


def loss_and_gradients(host: Host, documents, accumulate: int):
    job = Job("a", Plan(documents, 10**9, accumulate), steps=1, lr=1e-3)
    host.adapters["a"].zero_grad()
    (loss,) = _gradients(host, [job], {"a": documents})
    return loss, {name: p.grad.clone() for name, p in host.adapters["a"].named_parameters()}


def reference(host: Host, documents):
    """transformers' own forward over a padded batch, the mean over learned tokens written out."""
    width = max(len(row.ids) for row in documents)
    batch = torch.zeros(len(documents), width, dtype=torch.long)
    mask, labels = torch.zeros_like(batch), torch.full_like(batch, -100)
    for i, row in enumerate(documents):
        n = len(row.ids)
        batch[i, :n], mask[i, :n] = torch.from_numpy(row.ids).long(), 1
        labels[i, :n] = torch.where(torch.from_numpy(row.learn), torch.from_numpy(row.ids).long(), -100)
    host.adapters["a"].zero_grad()
    with host.route("a"):
        logits = host.base.model(input_ids=batch, attention_mask=mask).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in host.adapters["a"].named_parameters()}


def distance(found, gradients) -> float:
    """‖found − gradients‖ / ‖gradients‖ over all parameters."""
    assert set(found) == set(gradients)
    off = sum(((found[k] - g).double() ** 2).sum() for k, g in gradients.items())
    return float((off / sum((g.double() ** 2).sum() for g in gradients.values())) ** 0.5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_split_of_a_batch_gives_the_same_loss_and_gradients(shape, dtype, tolerance):
    documents = rows([12, 5, 9, 3, 7, 11, 4, 8])
    # Weights of ordinary size: with large attention scores fp32 itself is off by more than the tolerance.
    host, alone = (host_with(shape, packs=packs, dtype=dtype, scale=0.15) for packs in (True, False))
    for made in (host, alone):
        with torch.no_grad():
            made.base.model.get_input_embeddings().weight.normal_(0, 1, generator=torch.Generator().manual_seed(1))
        randomize(made.adapters["a"], 0.05)
    want, gradients = reference(host, documents)
    splits = {
        "packed, 8x1": (host, 1),
        "1x8": (host, 8),
        "a remainder": (host, 3),
        "not packed": (alone, 1),
        "not packed, 1x8": (alone, 8),
    }
    for name, (kind, accumulate) in splits.items():
        loss, found = loss_and_gradients(kind, documents, accumulate)
        assert abs(loss - want) < tolerance * max(1, want), name
        assert distance(found, gradients) < tolerance, name


def test_checkpointing_changes_nothing():
    documents = rows([12, 5, 9])
    host = host_with("llama")
    loss, gradients = loss_and_gradients(host, documents, 1)
    host.base.checkpointing(True)
    again, found = loss_and_gradients(host, documents, 1)
    assert loss == again
    assert all(torch.equal(found[k], g) for k, g in gradients.items())


def test_dropout_is_the_same_in_a_recomputed_forward():
    documents = rows([12, 5, 9])
    found = []
    for checkpointing in (False, True):
        host = Host(base("llama"))
        randomize(host.add("a", "lora", r=3, dropout=0.3))
        host.base.checkpointing(checkpointing)
        found.append(loss_and_gradients(host, documents, 2))
    (loss, gradients), (again, others) = found
    assert loss == again
    assert all(torch.equal(others[k], g) for k, g in gradients.items())
    plain, _ = loss_and_gradients(host_with("llama"), documents, 2)
    assert abs(plain - loss) > 1e-3  # dropout was active at all


def test_packed_documents_do_not_see_each_other():
    host = host_with("mistral")  # with a sliding window of 4
    x = ids(21)
    with torch.no_grad(), host.route("a"):
        packed = host.base.hidden(x, [9, 5, 7], packed=True)
        alone = host.base.hidden(x, [9, 5, 7], packed=False)
    assert (packed - alone).abs().max() < 1e-5


def test_an_architecture_that_mixes_documents_is_found_out(monkeypatch):
    import lorafit.model.attention as attention

    plain = attention.attention

    def careless(module, query, key, value, mask, doc_lengths=None, **kwargs):
        return plain(module, query, key, value, None, **kwargs)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, careless)
    assert not base("llama").packs


def test_a_few_logits_that_round_far_are_no_other_documents():
    """In 16 bits; where all of them are off by as much, it isn't rounding."""
    want = torch.randn(14, 5000, generator=torch.Generator().manual_seed(0))
    few, all_ = want.clone(), want + 0.07 * want.abs().max() * torch.sign(want)
    few[3, 7] += 0.06 * want.abs().max()
    tolerance = 0.05 * want.abs().max().item()
    assert near(few, want, tolerance) and near(want + 0.04 * tolerance, want, tolerance)
    assert not near(all_, want, tolerance) and not near(want.roll(1, 0), want, tolerance)
    assert not near(torch.full_like(want, torch.nan), want, tolerance)


def test_logits_that_are_treated_further_are_found_out():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from lorafit.model.load import prepare

    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    config = Gemma2Config(**sizes, num_key_value_heads=2, head_dim=4, final_logit_softcapping=0.5, sliding_window=4)
    capped = Gemma2ForCausalLM(config)
    with torch.no_grad():
        capped.model.embed_tokens.weight.normal_(0, 1)
    made: Base = prepare(capped, None, __import__("pathlib").Path("nowhere"), "gemma2")
    assert made.packs and not made.plain_head
    host = Host(made)
    randomize(host.add("a", "lora", r=3))
    documents = rows([12, 5, 9])
    want, gradients = reference(host, documents)
    loss, found = loss_and_gradients(host, documents, 2)
    assert abs(loss - want) < 1e-5
    assert all((found[k] - g).abs().max() < 1e-5 * max(1, g.abs().max()) for k, g in gradients.items())


@pytest.mark.parametrize("targets_", [["all-linear"], ["lm_head", "q_proj"]])
def test_the_loss_in_chunks_equals_the_plain_one(targets_, monkeypatch):
    monkeypatch.setattr("lorafit.train.loss.CHUNK", 4)
    assert CHUNK != 4
    host = Host(base("llama"))
    randomize(host.add("a", "lora", targets_, r=3))
    documents = rows([12, 5, 9], learn="all")
    want, gradients = reference(host, documents)
    loss, found = loss_and_gradients(host, documents, 1)
    assert abs(loss - want) < 1e-6 * want
    assert distance(found, gradients) < 5e-6  # with scores this large either is 3e-6 from the same in fp64


def test_frozen_head_loss_gradient():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(5, 4, dtype=torch.double, generator=generator, requires_grad=True)
    w = torch.randn(7, 4, dtype=torch.double, generator=generator)
    b = torch.randn(7, dtype=torch.double, generator=generator)
    y = torch.tensor([0, 6, 3, 3, 1])
    weights = torch.arange(1.0, 6.0, dtype=torch.double)
    (FrozenHeadLoss.apply(h, w, b, y) * weights).sum().backward()
    got = h.grad.clone()
    h.grad = None
    (F.cross_entropy(F.linear(h, w, b), y, reduction="none") * weights).sum().backward()
    assert (got - h.grad).abs().max() < 1e-5


def job_for(host, name, seed, lr=1e-2, steps=5, tokens=20, accumulate=2):
    return Job(name, Plan(rows([9, 5, 12, 7, 6, 11], seed=seed), tokens, accumulate, seed), steps=steps, lr=lr)


def run_jobs(names, checkpointing=False, poison=None):
    host = Host(base("llama"))
    host.base.checkpointing(checkpointing)
    jobs = []
    for name in names:
        seed = ord(name)
        host.add(name, "lora", r=2 + seed % 3, dropout=0.1 * (seed % 2), seed=seed)
        jobs.append(job_for(host, name, seed, lr=1e-2 * (1 + seed % 3), steps=3 + seed % 3))
        if name == poison:
            with torch.no_grad():
                next(iter(host.adapters[name].parameters()))[0, 0] = math.nan
    steps = list(train(host, jobs))
    return host, jobs, steps


def test_jobs_together_equal_jobs_alone():
    host, jobs, steps = run_jobs("abc")
    assert [job.done for job in jobs] == [3 + ord(c) % 3 for c in "abc"]
    for name in "abc":
        alone, (job,), solo = run_jobs(name)
        for (key, p), q in zip(host.adapters[name].named_parameters(), alone.adapters[name].parameters(), strict=True):
            assert (p - q).abs().max() < 1e-5, (name, key)
        together = [s.jobs[name].loss for s in steps if name in s.jobs]
        assert together == pytest.approx([s.jobs[name].loss for s in solo], abs=1e-5)


def test_a_nan_in_one_job_does_not_touch_another():
    host, jobs, steps = run_jobs("ab", poison="b")
    assert jobs[1].failed and jobs[1].done == 0
    assert "b" in steps[0].jobs and "b" not in steps[1].jobs
    alone, _, _ = run_jobs("a")
    for p, q in zip(host.adapters["a"].parameters(), alone.adapters["a"].parameters(), strict=True):
        assert (p - q).abs().max() < 1e-5


def test_a_failed_step_leaves_the_adapter_as_it_was():
    host = Host(base("llama"))
    adapter = host.add("a", "lora", r=2)
    job = job_for(host, "a", 1)
    before = copy.deepcopy(adapter.state_dict())
    with torch.no_grad():
        host.base.model.model.norm.weight[0] = math.inf
    (step,) = list(train(host, [job]))
    assert step.jobs["a"].failed
    assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_lowers_the_loss(method):
    host = Host(base("llama"))
    host.add("a", method)
    steps = list(train(host, [job_for(host, "a", 0, lr=2e-2 if method == "lora" else 5e-3, steps=30)]))
    assert steps[-1].jobs["a"].loss < 0.6 * steps[0].jobs["a"].loss


def test_the_base_is_never_edited():
    host = Host(base("llama"))
    before = copy.deepcopy(host.base.model.state_dict())
    host.add("a", "full")
    list(train(host, [job_for(host, "a", 0)]))
    after = host.base.model.state_dict()
    assert set(after) == set(before) and all(torch.equal(v, before[k]) for k, v in after.items())


# --- plans -------------------------------------------------------------------------------------------------------


def test_a_step_has_about_the_asked_tokens_and_every_row_once_an_epoch():
    documents = rows([5, 30, 7, 8, 9, 3, 4])
    plan = Plan(documents, tokens=16, seed=3)
    steps = plan.epoch(0)
    assert sorted(row.line for step in steps for row in step) == list(range(1, 8))
    for step in steps:
        assert len(step) == 1 or sum(len(row.ids) for row in step) <= 16
    assert [r.line for s in plan.epoch(1) for r in s] != [r.line for s in steps for r in s]


def test_a_plan_goes_on_from_any_step():
    plan = Plan(rows([5, 30, 7, 8, 9, 3, 4]), tokens=16, seed=3)
    whole = [step for _, step in zip(range(20), plan.since(0), strict=False)]
    for start in (1, 4, 5, 11):
        part = [step for _, step in zip(range(20 - start), plan.since(start), strict=False)]
        assert [[r.line for r in s] for s in part] == [[r.line for r in s] for s in whole[start:]]


def test_positions_never_cross_a_document():
    first, second = rows([4, 3], learn="all")
    micro = pack([first, second])
    assert micro.positions.tolist() == [0, 1, 2, 4, 5]
    assert micro.labels.tolist() == [*first.ids[1:], *second.ids[1:]]
    assert targets([first, second]) == 5
    both = join([(0, [first]), (1, [second])])
    assert both.owners.tolist() == [0, 0, 0, 1, 1] and both.segments == ((0, 4), (1, 3))


def test_steps_of_part_of_an_epoch():
    plan = Plan(rows([10] * 10), tokens=20)
    assert plan.steps(1) == 5 and plan.steps(2.5) == 12 and plan.steps(0.01) == 1


def test_fill_and_default_tokens():
    assert fill([5, 5, 5, 20, 1], 10) == [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    assert default_tokens(rows([50] * 10)) == 256
    assert default_tokens(rows([1000] * 100)) == 2048


def test_a_step_has_several_rows_where_they_share_most_of_their_tokens():
    prompt, others = rows([400], seed=1)[0].ids, rows([20] * 40)
    alike = [replace(row, ids=np.concatenate([prompt, row.ids]), learn=np.arange(420) > 400) for row in others]
    assert default_tokens(alike) == 4 * 420
    assert default_tokens(alike, share=False) == 420 * 40 // 32
    assert default_tokens(rows([420] * 40)) == 420 * 40 // 32
    assert default_tokens([]) == 256


def test_schedules():
    factors = [optim.rate(s, 100, "linear", 0.1) for s in range(100)]
    assert factors[0] < factors[5] < factors[10] == 1.0 and 0 < factors[99] < 0.02
    assert all(optim.rate(s, 100, "constant", 0) == 1 for s in (0, 50, 99))
    assert optim.rate(50, 100, "cosine", 0) == pytest.approx(0.5)


def test_no_targets_at_all_is_not_a_nan():
    host = host_with("llama")
    (row,) = rows([5])
    row.learn[:] = False
    with host.route("a"):
        assert len(losses(host, pack([row]))) == 0
    assert model("llama") is not None


def test_checkpointing_is_refused_where_it_would_turn_on_the_bases_dropout():
    from pathlib import Path

    from transformers import OPTConfig, OPTForCausalLM

    from lorafit.errors import ModelError
    from lorafit.model.load import prepare

    sizes = dict(vocab_size=61, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4)
    opt = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=64, dropout=0.5))
    made = prepare(opt, None, Path("nowhere"), "opt")
    with pytest.raises(ModelError, match="activation checkpointing"):
        made.checkpointing(True)
    assert not any(module.training for module in opt.modules())


def test_the_fingerprint_sees_every_tensor(tmp_path):
    import safetensors.torch

    from lorafit.model.fingerprint import fingerprint

    tensors = {f"w{i}": torch.randn(64, 64) for i in range(200)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    before = fingerprint(tmp_path)
    tensors["w123"] = torch.zeros(64, 64)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != before


def test_a_job_that_joins_or_leaves_between_steps_changes_no_other():
    """The list is the driver's: a place that becomes free is given to the next job."""

    lengths = [9, 13, 11, 17, 8, 12, 10, 14]

    def run(names, change=None):
        host = host_with("llama", dtype=torch.float64)
        for name in "bc":
            randomize(host.add(name, "lora", r=2).double())
        jobs = {name: Job(name, Plan(rows(lengths, seed=i), 40, seed=i), 6, 1e-2) for i, name in enumerate("abc")}
        there = [jobs[name] for name in names]
        for number, _ in enumerate(train(host, there), 1):
            if change and number == 2:
                there[1:] = [jobs["c"]]
        return {name: {k: v.clone() for k, v in host.adapters[name].state_dict().items()} for name in "abc"}, jobs

    together, jobs = run("ab", change=True)
    assert [jobs[name].done for name in "abc"] == [6, 2, 6]
    for name in "ac":
        alone, _ = run(name)
        for key, value in alone[name].items():
            torch.testing.assert_close(together[name][key], value, atol=1e-9, rtol=1e-9)


def test_jobs_share_a_micro_batch_as_long_as_it_stays_small():
    jobs = [Job(name, Plan([], 100, accumulate=2), 1, 1e-2) for name in "abc"]
    documents = {name: rows([9, 13, 11, 17, 8, 12, 10, 14], seed=i) for i, name in enumerate("abc")}
    alone = {name: Plan([], 100, accumulate=2).micros(documents[name]) for name in "abc"}
    pieces = loop._micros(jobs, documents, 0)
    assert [[owner for owner, _ in groupby(piece, key=lambda item: item[0])] for piece in pieces] == [[0, 1, 2]] * len(
        alone["a"]
    )
    small = max(sum(len(row.ids) for row in part) for parts in alone.values() for part in parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "TOGETHER", small)
        for piece in loop._micros(jobs, documents, 0):
            assert sum(len(row.ids) for _, row in piece) <= small
            for owner, part in groupby(piece, key=lambda item: item[0]):
                lines = [[row.line for row in whole] for whole in alone[jobs[owner].name]]
                assert [row.line for _, row in part] in lines

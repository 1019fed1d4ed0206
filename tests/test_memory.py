"""A step that runs out of memory is repeated in smaller pieces and computes the same; what can't be had is one clear error."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import resource
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import safetensors.torch
import torch
from data_helpers import CHATML, tokenizer
from tiny import base, rows
from transformers import LlamaConfig, LlamaForCausalLM

from lorafit import fit, machine
from lorafit.batches import Plan
from lorafit.config import byte_count
from lorafit.doctor import examine
from lorafit.errors import ConfigError, OutOfMemory
from lorafit.evaluate import evaluate
from lorafit.host import Host
from lorafit.log import Terminal
from lorafit.run import Run
from lorafit.train import loop
from lorafit.train.loop import Job, train

linux = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds mmap on Linux alone")
MESSAGE = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
DOCUMENTS = [9, 5, 12, 7, 6, 11, 8, 4]  # 62 tokens


class Failing:
    """The loss, failing at chosen calls (from 1); `tokens` are those of every micro-batch that was tried."""

    def __init__(self, monkeypatch, calls=(), where="forward", error=MESSAGE, module=loop):
        self.plain, self.calls, self.where, self.error = module.losses, set(calls), where, error
        self.tokens: list[int] = []
        monkeypatch.setattr(module, "losses", self)

    def __call__(self, host, micro):
        self.tokens.append(micro.tokens)
        failing = len(self.tokens) in self.calls
        if failing and self.where == "forward":
            raise RuntimeError(self.error)
        each = self.plain(host, micro)
        if failing:
            hidden = each * 1.0
            hidden.register_hook(self.fail)
            return hidden
        return each

    def fail(self, gradient):
        raise RuntimeError(self.error)


def host_and_job(accumulate=1, steps=4, dropout=0.0, name="a", host=None):
    host = host or Host(base("llama"))
    host.add(name, "lora", r=3, dropout=dropout, seed=ord(name))
    return host, Job(name, Plan(rows(DOCUMENTS, seed=ord(name)), 100, accumulate, ord(name)), steps=steps, lr=1e-2)


def parameters(host, name="a"):
    return [p.detach().clone() for p in host.adapters[name].parameters()]


def same(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("calls, accumulate", [([1], 2), ([1, 2], 4), ([1, 3], 4), ([1, 2, 6], 8)])
def test_the_run_is_that_of_smaller_micro_batches_bit_for_bit(monkeypatch, calls, accumulate, where, dropout):
    want, job = host_and_job(accumulate, dropout=dropout)
    plain = list(train(want, [job]))
    host, job = host_and_job(dropout=dropout)
    failing = Failing(monkeypatch, calls, where)
    steps = list(train(host, [job]))
    assert same(parameters(host), parameters(want))
    assert [s.jobs["a"] for s in steps] == [s.jobs["a"] for s in plain]
    assert [s.halvings for s in steps] == [int(math.log2(accumulate))] * 4
    assert len(steps[0].too_large) == len(calls) and not any(s.too_large for s in steps[1:])
    assert steps[0].too_large[0] == 62 and list(steps[0].too_large) == sorted(steps[0].too_large, reverse=True)
    assert steps[0].micro_tokens < steps[0].too_large[-1]
    assert max(failing.tokens[-3:]) <= steps[-1].micro_tokens
    assert not any(layer.training for layer in host.adapters["a"].modules())


def test_a_later_step_leaves_the_earlier_ones_as_they_were(monkeypatch):
    want, job = host_and_job()
    list(islice(train(want, [job]), 2))
    list(train(want, [job], halvings=1))
    host, job = host_and_job()
    Failing(monkeypatch, [3], "backward")
    steps = list(train(host, [job]))
    assert [(s.halvings, len(s.too_large)) for s in steps] == [(0, 0), (0, 0), (1, 1), (1, 0)]
    assert same(parameters(host), parameters(want))


def test_halving_changes_the_gradient_by_rounding_alone():
    host, job = host_and_job(accumulate=2)
    documents = {"a": list(job.plan.rows)}
    found = []
    for halvings in range(5):
        host.adapters["a"].zero_grad()
        loss = loop._gradients(host, [job], documents, halvings)
        found.append((loss[0], torch.cat([p.grad.flatten() for p in host.adapters["a"].parameters()])))
    assert {len(piece) for piece in loop._micros([job], documents, 4)} == {1}
    for loss, gradient in found[1:]:
        assert abs(loss - found[0][0]) < 1e-6 * found[0][0]
        assert (gradient - found[0][1]).norm() < 1e-6 * found[0][1].norm()


def test_joined_jobs_are_halved_together_down_to_one_document_of_one_job(monkeypatch):
    def made(poisoned):
        host = Host(base("llama"))
        jobs = [host_and_job(name=name, host=host)[1] for name in "abc"]
        if poisoned:
            with torch.no_grad():
                next(iter(host.adapters["b"].parameters()))[0, 0] = math.nan
        return host, jobs

    want, jobs = made(False)
    list(train(want, jobs))
    host, jobs = made(True)
    failing = Failing(monkeypatch, [1, 2, 3, 4, 5])
    steps = list(train(host, jobs))
    assert failing.tokens[0] == 3 * 62 and failing.tokens[5] < 16
    assert steps[0].micro_tokens == 12 and steps[0].too_large[0] == 3 * 62  # the longest document
    assert jobs[1].failed and [job.done for job in jobs] == [4, 0, 4]
    for name in "ac":
        for p, q in zip(parameters(host, name), parameters(want, name), strict=True):
            assert (p - q).abs().max() < 1e-4


def test_too_little_for_one_document_leaves_all_as_it_was_and_can_go_on(monkeypatch):
    want, job = host_and_job()
    list(train(want, [job]))
    host, job = host_and_job()
    with monkeypatch.context() as patch:
        Failing(patch, range(2, 99), "backward")
        steps = train(host, [job])
        next(steps)
        before = parameters(host)
        with pytest.raises(OutOfMemory, match=r"at step 2 with one document at a time; its longest has 12 tokens"):
            next(steps)
    assert same(parameters(host), before) and job.done == 1 and not job.failed
    assert all(p.grad is None for p in host.adapters["a"].parameters())
    list(train(host, [job]))
    assert same(parameters(host), parameters(want))


def test_other_errors_are_not_taken_for_it(monkeypatch):
    host, job = host_and_job()
    Failing(monkeypatch, [2], error="mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        list(train(host, [job]))
    assert all(p.grad is None for p in host.adapters["a"].parameters())


@pytest.mark.parametrize(
    "error, is_one",
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_one):
    assert machine.out_of_memory(error) is is_one


def test_a_failed_attempt_leaves_nothing_behind():
    import weakref

    seen = []

    def work():
        tensor = torch.zeros(3)
        seen.append(weakref.ref(tensor))
        raise RuntimeError(MESSAGE)

    assert machine.attempt(work) == (None, "can't allocate memory: you tried to")
    assert seen[0]() is None
    assert machine.attempt(lambda: 5) == (5, "")


def test_an_evaluation_halves_too(monkeypatch):
    from lorafit import evaluate as module

    host, _ = host_and_job()
    documents = rows(DOCUMENTS)
    want = evaluate(host, documents, "a")
    failing = Failing(monkeypatch, [1, 3], module=module)
    ticks = []
    found = evaluate(host, documents, "a", progress=lambda done, of: ticks.append(done))
    assert failing.tokens[:2] == [62, 26] and ticks[-1] == 8
    assert found.target_tokens == want.target_tokens and abs(found.loss - want.loss) < 1e-6
    assert max(failing.tokens[3:]) < 20
    Failing(monkeypatch, range(99), module=module)
    with pytest.raises(OutOfMemory, match="while one row of 9 tokens was scored"):
        evaluate(host, documents, "a")


# --- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, number",
    [
        ("6G", 6 * 10**9),
        ("500M", 5 * 10**8),
        ("1.5 gb", 15 * 10**8),
        ("6GiB", 6 << 30),
        ("12345678", 12345678),
        ("2T", 2 * 10**12),
    ],
)
def test_amounts_of_memory(text, number):
    assert byte_count("memory", text) == number


@pytest.mark.parametrize("text", ["six", "6X", "-1G", "", "G", "6i"])
def test_amounts_that_are_none(text, data_file):
    with pytest.raises(ConfigError, match=r"memory=.*: must be an amount of memory, for example memory=6G"):
        fit.read_config(str(data_file), {"memory": text})


@pytest.mark.parametrize("text", ["2", "800K"])
def test_an_amount_too_small_to_be_meant(text):
    with pytest.raises(ConfigError, match=rf"memory={text}: that is \d+ bytes; write memory={text.strip('K')}G or "):
        byte_count("memory", text)


@linux
def test_a_limit_is_set_for_a_time_and_never_raised():
    outside = resource.getrlimit(resource.RLIMIT_DATA)
    with machine.memory_limit():
        automatic = resource.getrlimit(resource.RLIMIT_DATA)
        assert (
            0 < automatic[0] < 1.2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + machine.private_memory()
        )
        with machine.memory_limit(10**15):
            assert resource.getrlimit(resource.RLIMIT_DATA)[0] <= automatic[0]
        with machine.memory_limit(machine.memory() + 300_000_000):
            tight, hard = resource.getrlimit(resource.RLIMIT_DATA)
            assert 200_000_000 < tight - machine.private_memory() < 310_000_000 and hard == outside[1]
            with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
                torch.zeros(10**8)
            assert machine.out_of_memory(caught.value)
        assert resource.getrlimit(resource.RLIMIT_DATA) == automatic
    assert resource.getrlimit(resource.RLIMIT_DATA) == outside


def test_control_groups_are_read(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "own").write_text("0::/a/b\n")
    for folder, most in (("a", "5000000\n"), ("a/b", "max\n")):
        (tmp_path / folder / "memory.max").write_text(most)
        (tmp_path / folder / "memory.high").write_text("max\n")
        (tmp_path / folder / "memory.current").write_text("3000000\n")
        (tmp_path / folder / "memory.stat").write_text("anon 7\ninactive_file 400000\nactive_file 600000\n")
    assert machine._groups(tmp_path, tmp_path / "own") == [3000000]
    old = tmp_path / "memory" / "x"
    old.mkdir(parents=True)
    (tmp_path / "own").write_text("4:cpu:/\n3:memory:/x\n0::/\n")
    (old / "memory.limit_in_bytes").write_text("2000000\n")
    (old.parent / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    for folder in (old, old.parent):
        (folder / "memory.usage_in_bytes").write_text("1500000\n")
        (folder / "memory.stat").write_text("total_inactive_file 60000\ntotal_active_file 40000\n")
    assert machine._groups(tmp_path, tmp_path / "own") == [600000]
    assert machine._groups(tmp_path, tmp_path / "none") == []


# --- whole runs under real limits ----------------------------------------------------------------------------------------

STEPS = {"steps": "2", "batch_tokens": "3000", "precision": "fp32", "samples": "1", "lr": "0.001", "max_tokens": "256"}


@pytest.fixture(scope="module")
def hungry(tmp_path_factory) -> tuple[Path, Path]:
    """A model with wide layers, which takes about 0.2 MB a token to train, and rows of some 50 tokens."""
    folder = tmp_path_factory.mktemp("hungry")
    tok = tokenizer(CHATML)
    sizes = dict(hidden_size=32, intermediate_size=6144, num_hidden_layers=4, num_attention_heads=2)
    config = LlamaConfig(
        vocab_size=len(tok), **sizes, max_position_embeddings=256, bos_token_id=0, eos_token_id=tok.eos_token_id
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tok.save_pretrained(folder / "model")
    text = "the cat sat on the mat one two three "
    data = [{"prompt": f"say {i}", "completion": text * 3 + str(i * 7)} for i in range(140)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    return folder / "model", folder / "rows.jsonl"


def settings(hungry, out: Path, **changes) -> dict[str, str]:
    model, data = hungry
    return {"data": str(data), "model": str(model), "out": str(out), **STEPS, **changes}


CHILD = """
import json, resource, sys
import torch
from lorafit import fit, machine
from lorafit.errors import LorafitError
from lorafit.log import Terminal
torch.set_num_threads(1)
room, resume, values = int(sys.argv[1]), sys.argv[2] == "resume", json.loads(sys.argv[3])
torch.ones(64, 64) @ torch.ones(64, 64)


def limit():  # over what is taken now; the same limit that `prlimit --data` would have set
    resource.setrlimit(resource.RLIMIT_DATA, (machine.private_memory() + abs(room),) * 2)


plain = fit.Training.run


def run(self, *args):
    limit()
    return plain(self, *args)


if room > 0:
    limit()
elif room < 0:  # only once the base and the rows are there
    fit.Training.run = run
try:
    if resume:
        fit.resume(values["out"], values, terminal=Terminal(stream=sys.stderr))
    else:
        fit.fit(fit.build(values), Terminal(stream=sys.stderr))
except LorafitError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(error.exit_code)
print("finished")
"""


# A limit as a setting, and Ctrl-C after the first step.
STOPPED = """
import os
from lorafit.run import Run
values["memory"] = str(machine.memory() + 400_000_000)
record = Run.record


def recording(self, name, values):
    record(self, name, values)
    if name == "metrics":
        os.kill(os.getpid(), 2)


Run.record = recording
"""


def child(room: int, values: dict[str, str], *, resume: bool = False, first: str = "", after: str = "", before=None):
    words = [
        sys.executable,
        "-c",
        CHILD.replace("try:", first + "try:") + after,
        str(room),
        "resume" if resume else "new",
        json.dumps(values),
    ]
    return subprocess.run(words, capture_output=True, text=True, preexec_fn=before, timeout=300)


@pytest.fixture(scope="module")
def unlimited(hungry, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unlimited") / "run"
    fit.fit(fit.build(settings(hungry, out)), Terminal(quiet=True))
    return out


def adapter(run: Path) -> torch.Tensor:
    tensors = safetensors.torch.load_file(run / "adapter" / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# Evaluation and merging, in the very process and under the very limit that training was done in.
AFTER = """
import pathlib
from lorafit.evaluate import evaluate
from lorafit.export.merge import merge
from lorafit.session import open_session
session = open_session([values["out"]], precision="fp32")
rows = fit.held_out_rows(pathlib.Path(values["out"]), session.chat("run"))
print("scored", round(evaluate(session.host, rows, "run").loss, 5))
proof = merge(session.host, "run", pathlib.Path(values["out"] + "-merged"), [[1, 2, 3]], dtype=torch.float32)
print("merged", proof.holds)
"""


@linux
def test_a_run_under_a_limit_finishes_with_the_adapter_of_an_unlimited_one(hungry, unlimited, tmp_path):
    out = tmp_path / "run"
    done = child(350_000_000, settings(hungry, out), after=AFTER)
    assert done.returncode == 0, done.stderr
    assert (
        "out of memory at step 1: micro-batches of" in done.stderr
        and "the result is the same but for rounding" in done.stderr
    )
    first, second = metrics(out)
    whole = metrics(unlimited)
    assert whole[0]["micro_tokens"] > 2000 and "too_large" not in whole[0]
    assert first["too_large"][0] == whole[0]["micro_tokens"] and first["micro_tokens"] < 2000
    assert "too_large" not in second and second["micro_tokens"] < 2000
    assert [m["tokens"] for m in (first, second)] == [m["tokens"] for m in whole]
    assert [m["loss"] for m in (first, second)] == pytest.approx([m["loss"] for m in whole], rel=1e-5)
    # Adam's first steps divide a gradient by itself, so rounding shows most where a gradient is next to nothing.
    assert (adapter(out) - adapter(unlimited)).norm() < 1e-3 * adapter(unlimited).norm()
    finished, scored, merged = done.stdout.splitlines()
    summary = json.loads((out / "summary.json").read_text())
    assert float(scored.split()[1]) == pytest.approx(summary["held_out_loss_after"], rel=1e-4)
    assert (finished, merged) == ("finished", "merged True")
    state = json.loads((out / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["halvings"] >= 1


@linux
def test_too_little_memory_is_one_error_and_the_run_goes_on_with_more(hungry, unlimited, tmp_path):
    out = tmp_path / "run"
    done = child(-16_000_000, settings(hungry, out, held_out_share="0"))  # AdamW's state is 10 of these
    assert done.returncode == 2, done.stdout + done.stderr
    assert "OutOfMemory: out of memory at step 1 with one document at a time" in done.stdout
    assert "go on with checkpointing=true or more memory: lorafit train --resume --out" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    (fault,) = [one for one in examine(out) if one.level == "fault"]  # which names the row as the error does
    assert re.search(r"; its longest has \d+ tokens \(.*\); 0 steps are recorded$", fault.evidence)
    newest = Run.open(out).newest()
    assert newest is not None and newest.step == 0 and newest.state["halvings"] == 0
    done = child(0, {"out": str(out)}, resume=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics(out)[0]["micro_tokens"] > 2000


@linux
def test_a_limit_of_the_users_own_and_a_resume_that_remembers(hungry, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"this needs about .* with one row at a time, and memory=1M"):
        fit.fit(fit.build(settings(hungry, out, memory="1M")), Terminal(quiet=True))
    assert not out.exists()
    done = child(0, settings(hungry, out), first=STOPPED)
    assert done.returncode == 130, done.stdout + done.stderr
    assert re.search("memory    about .* expected, at most", done.stderr) and "out of memory at step 1" in done.stderr
    done = child(0, {"out": str(out)}, resume=True)
    assert done.returncode == 0 and "out of memory" not in done.stderr, done.stdout + done.stderr
    first, second = metrics(out)
    assert first["too_large"] and first["micro_tokens"] < 2000
    assert "too_large" not in second and second["micro_tokens"] < 2000


GROUPS = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def group():
    """A control group of 900 MB (version 1 or 2), where the machine lets us make one."""
    old = GROUPS.is_dir()
    folder = (GROUPS if old else GROUPS.parent) / f"lorafit-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if old else "memory.max")).write_text("900000000")
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    yield folder
    with contextlib.suppress(OSError):
        folder.rmdir()


@linux
def test_in_a_control_group_the_process_is_not_killed(hungry, unlimited, tmp_path, group):
    out = tmp_path / "run"
    done = child(0, settings(hungry, out), before=lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
    assert done.returncode == 0, done.stderr
    assert "out of memory at step 1: micro-batches of" in done.stderr
    assert (adapter(out) - adapter(unlimited)).norm() < 1e-3 * adapter(unlimited).norm()

"""Kinds of AdamW: paged is plain bit for bit, 8 bits are those of bitsandbytes, and each can be saved, killed and resumed."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_run import KILLER, SETTINGS, config, same
from tiny import base, randomize, rows

from lorafit import fit, plan
from lorafit.batches import Plan
from lorafit.config import choices
from lorafit.errors import ConfigError, MissingExtra, RunError
from lorafit.host import Host
from lorafit.log import Terminal
from lorafit.native import build
from lorafit.native.adamw8 import BLOCK, nearest
from lorafit.native.quantised import dynamic
from lorafit.run import Run
from lorafit.train import optim
from lorafit.train.adamw import AdamW
from lorafit.train.adamw8 import PIECE, SMALL, AdamW8bit
from lorafit.train.loop import Job, train

QUIET = Terminal(quiet=True)
KINDS = choices("optimizer")
# Of the tiny model: adapters of 32 x 130 numbers and more, so that 8 bits are 8 bits, in blocks that aren't full.
SHORT = {**SETTINGS, "device": "cpu", "r": "130", "samples": "0", "steps": "8", "eval_every": "4"}


@pytest.fixture
def pages(tmp_path):
    """Room in a file of a run folder."""
    return Run.create(tmp_path / "run").pages


def parameters(*shapes, seed=0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(given, step: int, scale: float = 1.0) -> None:
    """Gradients of a direction and noise, their sizes spread over some decades as real ones are."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in given:
        noise = torch.randn(p.shape, generator=generator)
        p.grad = scale * noise * torch.exp(torch.randn(p.shape, generator=generator)) + 0.3


def dense(codes, absmax, signed: bool):
    """What codes stand for, written out."""
    spread = absmax.repeat_interleave(BLOCK)[: codes.numel()]
    return (dynamic("cpu", signed)[codes.flatten().long()] * spread).view(codes.shape)


# --- fp32 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_in_fp32_it_is_torchs_adamw(weight_decay, native):
    # Shapes of every remainder of the kernel's pieces; a tensor that has a gradient in some steps only; two rates.
    shapes = [(16, 576), (7, 3), (1,), (4096,), (4097,), (33, 129), (5,)]
    ours, theirs = parameters(*shapes), parameters(*shapes)
    groups = [[slice(0, 4), 1e-2], [slice(4, 7), 3e-3]]
    made = AdamW([{"params": ours[s], "lr": lr} for s, lr in groups], 1.0, weight_decay, optim.in_memory)
    plain = torch.optim.AdamW([{"params": theirs[s], "lr": lr} for s, lr in groups], weight_decay=weight_decay)
    for step in range(12):
        for given in (ours, theirs):
            gradients(given, step, 10.0 ** (step % 3 - 1))
            if step % 3 == 1:
                given[1].grad = given[5].grad = None
        versions = [p._version for p in ours]
        with build.switched(native):
            made.step()
        plain.step()
        moved = [p.grad is not None for p in ours]
        assert [p._version > v for p, v in zip(ours, versions, strict=True)] == moved
        made.zero_grad()
        assert all(p.grad is None for p in ours)
    for mine, other in zip(ours, theirs, strict=True):
        assert float(made.state[mine]["step"]) == float(plain.state[other]["step"])
        for a, b in (
            (mine, other),
            *((made.state[mine][key], plain.state[other][key]) for key in ("exp_avg", "exp_avg_sq")),
        ):
            assert (a - b).norm() <= 2e-6 * b.norm()


def turned(shape: tuple[int, int]) -> torch.nn.Parameter:
    """A parameter whose numbers lie column by column."""
    return torch.nn.Parameter(parameters(shape[::-1])[0].detach().t())


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("made_of", [lambda: parameters((8, 5))[0], lambda: turned((8, 5))], ids=["rows", "columns"])
@pytest.mark.parametrize("strides", ["rows", "columns"])
def test_in_fp32_numbers_may_lie_in_any_order(made_of, strides, native):
    mine, other = made_of(), torch.nn.Parameter(made_of().detach().contiguous())
    made, plain = (
        AdamW([{"params": [mine]}], 0.1, 0.0, optim.in_memory),
        torch.optim.AdamW([other], 0.1, weight_decay=0),
    )
    for step in range(3):
        gradient = torch.arange(40.0).view(5, 8).t() - 20 + step
        other.grad = gradient.contiguous()
        mine.grad = other.grad.clone() if strides == "rows" else gradient.clone()
        with build.switched(native):
            made.step()
        plain.step()
    assert torch.allclose(mine, other, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 7), (80, 70)])
def test_in_8_bits_a_turned_gradient_is_taken_too(shape):
    ours, theirs = parameters(shape), parameters(shape)
    gradient = parameters(shape[::-1], seed=1)[0].detach().t()
    for given, one in ((ours, gradient), (theirs, gradient.contiguous())):
        given[0].grad = one
        AdamW8bit([{"params": given}], 0.1, 0.0, optim.in_memory).step()
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("native", [True, False])
def test_a_step_without_any_gradient_changes_nothing(native):
    ours = parameters((3, 5), (2,))
    before = [p.detach().clone() for p in ours]
    made = AdamW([{"params": ours}], 0.1, 0.1, optim.in_memory)
    with build.switched(native):
        assert optim.clip(made, 1.0) == 0
        made.step()
    assert all(torch.equal(p, b) for p, b in zip(ours, before, strict=True))
    assert all(float(made.state[p]["step"]) == 0 for p in ours)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("most", [0.0, 1.0, 1e6])
def test_clipping_is_torchs(native, most):
    ours, theirs = parameters((300, 577), (17,), (1,)), parameters((300, 577), (17,), (1,))
    for given in (ours, theirs):
        gradients(given, 3)
        given[1].grad[16] = 700.0  # alone after a whole vector
    ours[2].grad = theirs[2].grad = None
    made = AdamW([{"params": ours}], 0.1, 0.0, optim.in_memory)
    with build.switched(native):
        found = optim.clip(made, most)
    wanted = float(torch.stack([p.grad.double().square().sum() for p in theirs[:2]]).sum().sqrt())
    torch.nn.utils.clip_grad_norm_(theirs, most or math.inf)
    assert found == pytest.approx(wanted, rel=1e-7 if native else 1e-5)  # torch's own sums are fp32
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        assert torch.allclose(mine.grad, other.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(native, bad):
    ours = parameters((40, 500))
    gradients(ours, 0)
    ours[0].grad[17, 300] = bad
    with build.switched(native):
        assert not math.isfinite(optim.clip(AdamW([{"params": ours}], 0.1, 0.0, optim.in_memory), 1.0))


# --- 8 bits ------------------------------------------------------------------------------------------------------------


def test_the_types_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes isn't installed")
    for signed in (True, False):
        assert torch.equal(dynamic("cpu", signed), functional.create_dynamic_map(signed=signed))


def test_the_type_without_signs_has_seven_decades_and_zero():
    values = dynamic("cpu", False)
    assert len(values) == 256 and values[0] == 0 and values[-1] == 1 and (values.diff() > 0).all()
    for i in range(7):
        low, high = 10.0 ** (i - 7), 10.0 ** (i - 6)
        assert ((values > low) & (values < high)).sum() == 2 ** (i + 1)


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_that_of_the_nearest_value(signed):
    """Of every number near a middle between two values, of all upper halves of a float, and of random ones."""
    values = dynamic("cpu", signed)
    middles = (values[:-1] + values[1:]) / 2
    near = [torch.nextafter(middles, torch.full_like(middles, end)) for end in (-2, 2)]
    every = (torch.arange(-32768, 32768, dtype=torch.int32) << 16).view(torch.float32)
    ends = [every, ((every.view(torch.int32)) | 0xFFFF).view(torch.float32)]
    some = torch.rand(100_000, generator=torch.Generator().manual_seed(1)) ** 8
    shares = torch.cat([values, middles, *near, *(e[e.abs() <= 1] for e in ends), some, -some])
    shares = shares[shares >= 0] if not signed else shares
    assert torch.equal(nearest(shares, signed).long(), torch.bucketize(shares, middles))
    off = (values[nearest(values, signed).long()] - values).abs().max()
    assert off == 0


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_kernel_makes_the_bits_of_its_twin(weight_decay):
    """Numbers, codes and absmax of five steps: blocks that aren't full, rows of zeros, pieces of a large tensor, and one without
    a gradient in between."""
    if build.library() is None:
        pytest.skip(f"no kernels here: {build.state()}")
    shapes = [(70, 100), (64, 64), (3, PIECE // 2 + 77), (5000,)]
    both = []
    for on in (True, False):
        ours = parameters(*shapes)
        made = AdamW8bit([{"params": ours, "scale": 1.0}], 0.01, weight_decay, optim.in_memory)
        for step in range(1, 6):
            gradients(ours, step)
            ours[0].grad[:20] = 0
            ours[3].grad = None if step == 3 else ours[3].grad
            before = [p._version for p in ours]
            with build.switched(on):
                made.step()
            moved = [p._version > old for p, old in zip(ours, before, strict=True)]
            assert moved == [True, True, True, step != 3]  # by which DoRA knows
        both.append((ours, made))
    for p, q in zip(both[0][0], both[1][0], strict=True):
        assert torch.equal(p, q)
        mine, twins = (made.state[t] for t, (_, made) in zip((p, q), both, strict=True))
        assert len(mine) == 5 and all(torch.equal(mine[key], twins[key]) for key in mine)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_an_update_is_its_formula_on_the_nearest_codes(weight_decay, native):
    """Three steps of parameters of every size, against the same written out number by number."""
    shapes = [(70, 100), (SMALL - 1,), (64, 64), (3, PIECE // 2 + 77), (5000,)]
    ours, theirs = parameters(*shapes), parameters(*shapes)
    made = AdamW8bit([{"params": ours, "scale": 1.0}], 0.01, weight_decay, optim.in_memory)
    small = torch.optim.AdamW([theirs[1]], lr=0.01, weight_decay=weight_decay)
    averages = {p: [torch.zeros_like(p), torch.zeros_like(p)] for p in theirs}
    for step in range(1, 4):
        gradients(ours, step)
        gradients(theirs, step)
        with build.switched(native):
            made.step()
        small.step()
        for p, q in zip(ours, theirs, strict=True):
            if p.numel() >= SMALL:
                with torch.no_grad():
                    mean, square = averages[q]
                    mean.mul_(0.9).add_(0.1 * q.grad)
                    square.mul_(0.999).add_(0.001 * q.grad**2)
                    size = square.sqrt() / math.sqrt(1 - 0.999**step) + 1e-8
                    q.mul_(1 - 0.01 * weight_decay).sub_(0.01 / (1 - 0.9**step) * mean / size)
                for key, signed, exact in (("exp_avg", True, mean), ("exp_avg_sq", False, square)):
                    codes, absmax = made.state[p][key], made.state[p][f"{key}_absmax"]
                    assert (
                        codes.dtype == torch.uint8 and codes.shape == p.shape and len(absmax) == -(-p.numel() // BLOCK)
                    )
                    share = exact.flatten() / absmax.repeat_interleave(BLOCK)[: p.numel()]
                    close = (share[: 3 * BLOCK, None] - dynamic("cpu", signed)).abs().argmin(1)
                    assert (close == codes.flatten()[: 3 * BLOCK]).float().mean() > 0.999  # rounding of the average
                    exact.copy_(dense(codes, absmax, signed))
            assert (p - q).abs().max() <= 1e-5 * q.abs().max(), (step, p.shape)
    assert made.state[ours[1]]["exp_avg"].dtype == torch.float32


def test_it_steps_beside_bitsandbytes():
    """Its AdamW8bit on the CPU, where gradients of a block have sizes alike: it rounds shares to 65,536 places before it looks
    for the nearest value, which takes the small ones of a block away; on a GPU it doesn't."""
    bnb = pytest.importorskip("bitsandbytes.optim", reason="bitsandbytes isn't installed")
    shapes = [(40, 256), (100,), (5000,)]
    ours, theirs = parameters(*shapes), parameters(*shapes)
    made = AdamW8bit([{"params": ours, "scale": 1.0}], 0.01, 0.1, optim.in_memory)
    peer = bnb.AdamW8bit(theirs, lr=0.01, weight_decay=0.1)
    for step in range(1, 6):
        for given in (ours, theirs):
            gradients(given, step)
            for p in given:
                p.grad = p.grad.sign() * (1 + torch.rand(p.shape, generator=torch.Generator().manual_seed(step)))
        made.step()
        peer.step()
    for p, q, start in zip(ours, theirs, parameters(*shapes), strict=True):
        assert (p - q).abs().max() <= 1e-2 * (q - start).abs().max()
        if p.numel() >= SMALL:
            for key, number, signed in (("exp_avg", "1", True), ("exp_avg_sq", "2", False)):
                mine = made.state[p][key], made.state[p][f"{key}_absmax"]
                its = peer.state[q][f"state{number}"], peer.state[q][f"absmax{number}"]
                assert (mine[0] == its[0]).float().mean() > 0.97
                assert torch.allclose(mine[1], its[1], rtol=1e-2)
                off = dense(*mine, signed) - dense(*its, signed)
                assert off.norm() <= 5e-3 * dense(*its, signed).norm()


def test_tensors_without_a_gradient_are_left_alone_and_count_their_own_steps():
    ours, alone = parameters((64, 100), (70, 70), (80, 90)), parameters((64, 100), (70, 70), (80, 90))
    made = AdamW8bit([{"params": ours, "scale": 1.0}], 0.01, 0.1, optim.in_memory)
    apart = [AdamW8bit([{"params": [p], "scale": 1.0}], 0.01, 0.1, optim.in_memory) for p in alone]
    for step in range(1, 4):
        gradients(ours, step)
        gradients(alone, step)
        if step == 2:
            ours[1].grad = alone[1].grad = None
        made.step()
        for each in apart:
            each.step()
        made.zero_grad()
        assert all(p.grad is None for p in ours)
    assert [float(made.state[p]["step"]) for p in ours] == [3, 2, 3]
    assert all(torch.equal(p, q) for p, q in zip(ours, alone, strict=True))


def test_groups_have_rates_of_their_own():
    slow, fast, small = parameters((64, 100), (64, 100), (10,))
    before = [p.detach().clone() for p in (slow, fast, small)]
    groups = [{"params": [slow], "scale": 1.0}, {"params": [fast, small], "scale": 4.0}]
    made = AdamW8bit(groups, 0.0, 0.0, optim.in_memory)
    optim.set_rate(made, 0.01)
    gradients((slow, fast, small), 1)
    made.step()
    moved = [float((p.detach() - b).abs().median()) for p, b in zip((slow, fast, small), before, strict=True)]
    assert moved == pytest.approx([0.01, 0.04, 0.04], rel=0.01)


def test_it_stays_near_the_plain_one():
    """After 20 steps of gradients of very different sizes, by a few hundredths of the way."""
    ours, theirs, start = (parameters((40, 256), (5000,)) for _ in range(3))
    made = AdamW8bit([{"params": ours, "scale": 1.0}], 0.001, 0, optim.in_memory)
    plain = torch.optim.AdamW(theirs, lr=0.001, weight_decay=0)
    for step in range(20):
        gradients(ours, step)
        gradients(theirs, step)
        made.step()
        plain.step()
    for p, q, s in zip(ours, theirs, start, strict=True):
        assert 0 < (p - q).norm() < 0.05 * (q - s).norm()


def test_it_learns_as_the_plain_one_does():
    """A least-squares problem of 8,000 numbers: both end near the same small loss."""
    generator = torch.Generator().manual_seed(4)
    x, wanted = torch.randn(200, 80, generator=generator), torch.randn(80, 100, generator=generator)
    ends = {}
    for kind in ("adamw", "adamw_8bit"):
        (w,) = parameters((80, 100), seed=9)
        groups = [{"params": [w], "scale": 1.0}]
        made = (
            AdamW8bit(groups, 0.02, 0, optim.in_memory)
            if kind == "adamw_8bit"
            else torch.optim.AdamW([w], weight_decay=0)
        )
        first = ((x @ (w - wanted)) ** 2).mean().item()
        for step in range(400):
            made.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
            made.zero_grad()
            ((x @ (w - wanted)) ** 2).mean().backward()
            made.step()
        ends[kind] = ((x @ (w - wanted)) ** 2).mean().item()
    assert ends["adamw"] < 1e-3 * first and ends["adamw_8bit"] < 1e-3 * first


def test_the_state_is_a_quarter():
    (p,) = parameters((256, 1024))
    made = AdamW8bit([{"params": [p], "scale": 1.0}], 0.01, 0, optim.in_memory)
    taken = sum(t.nbytes for key, t in made.state[p].items() if key != "step")
    assert taken == optim.state_bytes("adamw_8bit", p.numel())
    assert optim.state_bytes("adamw", p.numel()) / taken == pytest.approx(3.94, abs=0.01)
    assert optim.state_bytes("paged_adamw", p.numel()) == 0


# --- pages -------------------------------------------------------------------------------------------------------------


def test_pages_are_zeros_in_a_file_without_a_name(tmp_path, pages):
    room = pages(100_000, torch.float32)
    assert room.shape == (100_000,) and not room.any()
    room += 1
    assert float(room.sum()) == 100_000 and not list((tmp_path / "run").iterdir())
    if sys.platform == "linux":
        address = room.data_ptr()
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        (line,) = [m for m in maps if int(m[0].split("-")[0], 16) <= address < int(m[0].split("-")[1], 16)]
        assert line[1].endswith("s") and str(tmp_path) in line[5]  # shared with the file, so it can be written there
    assert len(pages(0, torch.uint8)) == 0


def test_a_full_disk_is_said_at_once(pages, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match="free some space"):
        pages(100, torch.float32)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_paged_is_the_same_bit_for_bit(kind, pages):
    ends = []
    for paged in ("", "paged_"):
        host = Host(base("llama"))
        adapter = host.add("a", r=300)  # of 4,800 numbers and more
        randomize(adapter)
        made = optim.optimizer(adapter, 0.01, 0.1, paged + kind, pages)
        for step in range(4):
            gradients(adapter.parameters(), step)
            made.step()
        ends.append([*adapter.state_dict().values(), *optim.state(adapter, made).values()])
    assert all(map(torch.equal, *ends)) and len(ends[0]) == len(ends[1])


# --- saved and restored ------------------------------------------------------------------------------------------------


def steps(adapter, made, numbers) -> None:
    for step in numbers:
        gradients(adapter.parameters(), step)
        made.step()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_restored_it_goes_on_to_the_same_bits(kind, pages, tmp_path):
    adapters = [Host(base("llama")).add("a", r=271) for _ in range(2)]  # blocks that aren't full
    whole, again = adapters
    made = optim.optimizer(whole, 0.01, 0, kind, pages)
    steps(whole, made, range(3))
    safetensors.torch.save_file(optim.state(whole, made), tmp_path / "state.safetensors")
    saved = safetensors.torch.load_file(tmp_path / "state.safetensors")
    again.load_state_dict(whole.state_dict())
    other = optim.optimizer(again, 0.01, 0, kind, pages)
    optim.restore(again, other, saved)
    for adapter, optimizer in ((whole, made), (again, other)):
        steps(adapter, optimizer, range(3, 6))
    assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))
    assert any(t.dtype == torch.uint8 for t in saved.values()) == ("8bit" in kind)


def test_the_state_of_another_kind_is_not_taken(pages):
    adapter = Host(base("llama")).add("a", r=300)
    plain, coded = (optim.optimizer(adapter, 0.01, 0, kind) for kind in ("adamw", "adamw_8bit"))
    for made in (plain, coded):
        steps(adapter, made, range(1))
    with pytest.raises(KeyError):
        optim.restore(adapter, plain, optim.state(adapter, coded))
    with pytest.raises(KeyError):
        optim.restore(adapter, coded, optim.state(adapter, plain))


def test_the_state_of_bitsandbytes_survives_too():
    """By its own keys, on the CPU here; its tables stay out, and its counter stays a number."""
    bnb = pytest.importorskip("bitsandbytes.optim", reason="bitsandbytes isn't installed")
    adapters = [Host(base("llama")).add("a", r=271) for _ in range(2)]
    both = []
    for adapter in adapters:
        groups = [{"params": list(adapter.parameters()), "scale": 1.0}]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bnb, "PagedAdamW8bit", bnb.AdamW8bit)  # on the CPU it warns that there are no pages
            both.append(optim._bitsandbytes("paged_adamw_8bit", groups, 0.01, 0))
    (whole, again), (made, other) = adapters, both
    steps(whole, made, range(3))
    again.load_state_dict(whole.state_dict())
    saved = optim.state(whole, made)
    assert {key.rpartition(".")[2] for key in saved} == {"step", "state1", "state2", "absmax1", "absmax2"}
    optim.restore(again, other, {key: t.clone() for key, t in saved.items()})
    for adapter, optimizer in ((whole, made), (again, other)):
        steps(adapter, optimizer, range(3, 5))
    assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))


# --- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tiny_model, data_file, tmp_path_factory):
    """The same run with each optimiser."""
    place = tmp_path_factory.mktemp("optimizers")
    for kind in KINDS:
        fit.fit(config(tiny_model, data_file, place / kind, **SHORT, optimizer=kind), QUIET)
    return place


def test_runs_of_a_kind_are_the_same_paged_or_not_and_8_bits_learn(runs):
    assert same(runs / "adamw", runs / "paged_adamw") and same(runs / "adamw_8bit", runs / "paged_adamw_8bit")
    assert not same(runs / "adamw", runs / "adamw_8bit")
    summaries = {kind: json.loads((runs / kind / "summary.json").read_text()) for kind in KINDS}
    assert all(summary["optimizer"] == kind for kind, summary in summaries.items())
    plain, coded = (summaries[kind] for kind in ("adamw", "adamw_8bit"))
    assert coded["held_out_loss_after"] == pytest.approx(plain["held_out_loss_after"], rel=0.02)
    sizes = [
        (runs / kind / "checkpoints" / "step-000008" / "optimizer.safetensors").stat().st_size for kind in KINDS[:2]
    ]
    assert sizes[0] / sizes[1] > 3  # some tensors are small
    assert not [p for kind in KINDS for p in (runs / kind).iterdir() if p.name.startswith((".", "tmp"))]


@pytest.mark.parametrize("kind, on", [("paged_adamw", "adamw"), ("paged_adamw_8bit", "paged_adamw_8bit")])
def test_killed_and_resumed_it_is_the_unbroken_run(runs, tiny_model, data_file, tmp_path, kind, on):
    out = tmp_path / "killed"
    settings = {"model": tiny_model, "out": out, "precision": "fp32", **SHORT, "optimizer": kind}
    words = [f"{k}={v}" for k, v in settings.items()]
    done = subprocess.run([sys.executable, "-c", KILLER, "record", "7", str(data_file), *words], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert {p.name for p in out.iterdir()} <= {
        *("config.yaml", "data.json", "chat.json", "metrics.jsonl", "evaluations.jsonl", "checkpoints", "lock")
    }
    fit.resume(out, {"optimizer": on}, terminal=QUIET)
    assert same(runs / kind, out)
    assert f"optimizer: {on}\n" in (out / "config.yaml").read_text()


def test_another_kind_is_refused_even_by_force(runs, tmp_path):
    shutil.copytree(runs / "adamw", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000008")
    with pytest.raises(RunError, match="optimizer: adamw -> adamw_8bit"):
        fit.resume(tmp_path / "run", {"optimizer": "adamw_8bit"}, terminal=QUIET)
    with pytest.raises(RunError, match="holds the state of another optimizer than paged_adamw_8bit"):
        fit.resume(tmp_path / "run", {"optimizer": "paged_adamw_8bit"}, force=True, terminal=QUIET)


def test_what_is_said_and_planned(tiny_model, data_file, tmp_path, capsys):
    found = {}
    for kind in KINDS:
        made = config(tiny_model, data_file, tmp_path / kind, optimizer=kind, steps="1")
        found[kind] = plan.estimate(made, plan.empty(made, tiny_model), rows([9, 12]))
    assert found["paged_adamw"].optimizer == 0 and found["adamw"].optimizer == 8 * found["adamw"].trainable_parameters
    assert found["adamw_8bit"].optimizer == pytest.approx(found["adamw"].optimizer / 3.94, rel=0.01)
    for kind in ("adamw", "paged_adamw"):
        fit.fit(config(tiny_model, data_file, tmp_path / kind, optimizer=kind, steps="1"), Terminal(stream=sys.stderr))
        assert (" paged_adamw," in capsys.readouterr().err) == (kind == "paged_adamw")
    with pytest.raises(ConfigError, match="must be one of adamw, adamw_8bit, paged_adamw, paged_adamw_8bit"):
        config(tiny_model, data_file, tmp_path / "x", optimizer="adam")


def test_a_gpu_needs_bitsandbytes_and_other_devices_go_without(monkeypatch):
    wanted = fit.build({"optimizer": "paged_adamw_8bit"})
    for device, found, error, message in (
        ("cuda", None, MissingExtra, r"pip install 'lorafit\[bitsandbytes\]'"),
        ("mps", True, ConfigError, "for cpu and cuda alone"),
    ):
        monkeypatch.setattr(fit, "pick_device", lambda name, device=device: torch.device(device))
        monkeypatch.setattr(fit.importlib.util, "find_spec", lambda name, found=found: found)
        with pytest.raises(error, match=message):
            fit._check_extras(wanted)


def test_a_job_of_the_loop_takes_any_kind(pages):
    ends = []
    for kind in ("paged_adamw_8bit", "adamw_8bit"):
        host = Host(base("llama"))
        adapter = host.add("a", r=300, seed=3)
        job = Job("a", Plan(rows([11, 7, 9, 12]), 20), 3, 0.01)
        job.optimizer = optim.optimizer(adapter, job.lr, 0, kind, pages)
        assert [step.number for step in train(host, [job])] == [1, 2, 3]
        ends.append(adapter.state_dict())
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())

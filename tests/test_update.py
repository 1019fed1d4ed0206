"""Methods that act in the training loop, against their formulas written out, and AdaLoRA against PEFT's."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from test_optim import dense
from tiny import base, ids, model, randomize, rows

from lorafit import fit
from lorafit.batches import Plan
from lorafit.errors import AdapterError, ConfigError
from lorafit.host import Host
from lorafit.log import Terminal
from lorafit.methods import find
from lorafit.methods.adalora import AdaLoRA, allocate, budget
from lorafit.methods.reflora import metric
from lorafit.methods.scalora import LEAST, MOST
from lorafit.train import optim
from lorafit.train.adamw8 import PIECE, SMALL
from lorafit.train.loop import Job, train

TARGETS = ["q_proj", "v_proj", "down_proj"]


class Site:
    """A bare matrix as a method sees it."""

    lookup = False

    def __init__(self, *shape: int) -> None:
        self.shape = torch.Size(shape)

    def weight(self):
        return torch.zeros(self.shape)

    def start(self, method):
        return None


class Descent:
    """Gradient descent without a state."""

    def __init__(self, layer, rate: float) -> None:
        self.layer, self.rate = layer, rate

    def step(self) -> None:
        for parameter in self.layer.parameters():
            parameter.sub_(self.rate * parameter.grad)

    def rescale(self, parameter, factor) -> None:
        pass


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def run(host, name="a", steps=10, lr=5e-3, documents=None, **changes):
    job = Job(name, Plan(documents or rows([9, 5, 12, 7, 6, 11]), 10**9), steps, lr, warmup=0.0, clip=0.0, **changes)
    return job, list(train(host, [job]))


# --- AdaLoRA -----------------------------------------------------------------------------------------------------------


def theirs_of(host, steps, **options):
    """PEFT's AdaLoRA on the same base, fp64, with our start and our schedule."""
    paths = [path for path, _ in host.adapters["a"].items()]
    task = "CAUSAL_LM"  # without it PEFT leaves the penalty out
    config = peft.AdaLoraConfig(target_modules=paths, total_step=steps, task_type=task, **options)
    plain = model("llama", scale=0.15).double()
    plain.loss_function = lambda logits, labels, **_: F.cross_entropy(logits[0, :-1], labels[0, 1:])  # theirs is fp32
    theirs = peft.get_peft_model(plain, config).double()
    with torch.no_grad():
        for path, layer in host.adapters["a"].items():
            module = theirs.base_model.model.get_submodule(path)
            for own, name in ((layer.a, "lora_A"), (layer.b, "lora_B"), (layer.e[:, None], "lora_E")):
                getattr(module, name)["default"].copy_(own)
            module.ranknum["default"].fill_(options["init_r"] - 1e-5)  # which it adds for no good reason
    return theirs


@pytest.mark.filterwarnings("ignore")
def test_adalora_is_pefts_step_by_step():
    """Losses, factors and ranks of twelve steps of AdamW, with PEFT's allocator and penalty, fp64, to 1e-9."""
    steps, document = 12, rows([14], learn="all")
    host = Host(base("llama", torch.float64, scale=0.15))
    options = {"tinit": 0.17, "tfinal": 0.25, "deltaT": 2, "orth_reg_weight": 0.5}
    adapter = host.add("a", "adalora", TARGETS, r=3, init_r=5, alpha=7.0, **options).double()
    theirs = theirs_of(host, steps, target_r=3, init_r=5, lora_alpha=7, tinit=2, tfinal=3, deltaT=2)
    factors = [p for name, p in theirs.named_parameters() if "lora_" in name]  # not its constant, ranknum
    adamw = torch.optim.AdamW(factors, lr=5e-3, weight_decay=0.0)
    x = torch.from_numpy(document[0].ids).long()[None]
    plan = Plan(document, 10**9)
    job = Job("a", plan, steps, 5e-3, "constant", warmup=0.0, clip=0.0)
    for step in train(host, [job]):
        loss = theirs(input_ids=x, labels=x).loss
        loss.backward()
        adamw.step()
        theirs.base_model.update_and_allocate(step.number)
        adamw.zero_grad()
        pairs = [(layer, theirs.base_model.model.get_submodule(path)) for path, layer in adapter.items()]
        for layer, module in pairs:
            assert (layer.a - module.lora_A["default"]).abs().max() < 1e-9
            assert (layer.b - module.lora_B["default"]).abs().max() < 1e-9
            assert (layer.e - module.lora_E["default"][:, 0]).abs().max() < 1e-9
            assert torch.equal(layer.e == 0, module.lora_E["default"][:, 0] == 0)
        assert step.jobs["a"].loss < float(loss)  # theirs holds the penalty, ours is the data's alone
    kept = [int((layer.e != 0).sum()) for layer, _ in pairs]
    assert sum(kept) == 3 * len(kept) and len(set(kept)) > 1


def test_the_budget_falls_with_the_third_power_and_is_met_exactly():
    layers = [AdaLoRA(Site(20, 30), r=4, init_r=6), AdaLoRA(Site(5, 30), r=4, init_r=6), AdaLoRA(Site(3, 8, 9), r=2)]
    first, final = 6 + 5 + 3 * 3, 4 + 4 + 3 * 2  # a weight of 5 rows has no more than rank 5
    assert [layer.kept.numel() for layer in layers] == [6, 5, 9]
    for step in range(10, 31):
        want = int(final + (first - final) * (1 - (step - 10) / 20) ** 3)
        assert budget(layers, step, 10, 30) == want
    with torch.no_grad():
        allocate(layers, 14)  # scores are all alike: still exactly
    assert sum(int(layer.kept.sum()) for layer in layers) == 14


def test_the_scores_are_sensitivity_times_uncertainty():
    layer = AdaLoRA(Site(7, 9), torch.Generator().manual_seed(0), r=2, init_r=3, beta1=0.8, beta2=0.6).double()
    mean = {n: 0.0 for n in "abe"}
    spread = dict(mean)
    with torch.no_grad():
        for step in range(4):
            for i, (name, p) in enumerate(layer.named_parameters()):
                p.copy_(normal(*p.shape, seed=10 * step + i))
                p.grad = normal(*p.shape, seed=100 + 10 * step + i)
                now = (p * p.grad).abs()
                mean[name] = 0.8 * mean[name] + 0.2 * now
                spread[name] = 0.6 * spread[name] + 0.4 * (now - mean[name]).abs()
            layer.measure()
    score = {n: mean[n] * spread[n] for n in "abe"}
    want = [score["e"][i] + score["a"][i].mean() + score["b"][:, i].mean() for i in range(3)]
    assert (layer.scores() - torch.stack(want)).abs().max() < 1e-12


def test_the_penalty_is_the_distance_from_orthonormal():
    layers = [AdaLoRA(Site(7, 9), r=2, init_r=3, orth_reg_weight=0.25).double(), AdaLoRA(Site(2, 5, 6), r=2).double()]
    grams = []
    for layer in layers:
        randomize(layer)
        for a, b in zip(
            layer.a.reshape(-1, *layer.a.shape[-2:]), layer.b.reshape(-1, *layer.b.shape[-2:]), strict=True
        ):
            eye = torch.eye(len(a))
            grams += [((a @ a.t() - eye) ** 2).sum().sqrt(), ((b.t() @ b - eye) ** 2).sum().sqrt()]
    assert abs(AdaLoRA.penalty(layers) - 0.25 * sum(grams) / len(grams)) < 1e-12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape, targets", [("llama", TARGETS), ("mixtral", ["all-linear"]), ("gpt2", ["all-linear"])])
def test_adalora_is_stored_as_a_lora_of_the_ranks_that_are_left(shape, targets, tmp_path):
    host = Host(base(shape))
    adapter = host.add("a", "adalora", targets, r=3, init_r=5)
    run(host, lr=2e-2)
    whole = sum(int((layer.e != 0).sum()) for _, layer in adapter.items())
    assert whole == 3 * sum(layer.e[..., 0].numel() for _, layer in adapter.items())
    weights = {path: layer for path, layer in adapter.items() if host.sites[path].kind != "experts"}
    gone = next(iter(weights))
    with torch.no_grad():
        weights[gone].kept.zero_()
        weights[gone].e.zero_()
    kept = {path: n for path, layer in weights.items() if (n := int((layer.e != 0).sum()))}
    assert len(set(kept.values())) > 1 and gone not in kept
    x = ids(13)
    with torch.no_grad(), host.route("a"):
        want = host.logits(x, [13])
    host.save("a", tmp_path)
    again = host.load(tmp_path, "b")
    assert again.method == "lora" and again.notes["trained_as"]["method"] == "adalora"
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert {path: layer.a.shape[0] for path, layer in again.items() if host.sites[path].kind != "experts"} == kept
    theirs = peft.PeftModel.from_pretrained(model(shape), tmp_path).eval()
    with torch.no_grad():
        with host.route("b"):
            assert (host.logits(x, [13]) - want).abs().max() < 1e-5 * max(1, want.abs().max())
        plain = host.logits(x, [13])
        assert (theirs(input_ids=x[None]).logits[0] - want).abs().max() < 1e-5 * max(1, want.abs().max())
    assert (plain - want).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pruned", [True, False])
def test_pefts_adalora_is_read(pruned, tmp_path):
    """An adapter that PEFT has trained for some steps, with ranks it has dropped or without, and the same logits."""
    names = ["q_proj", "down_proj"]
    config = peft.AdaLoraConfig(
        target_modules=names, target_r=2, init_r=4, tinit=1, tfinal=2, total_step=6, lora_alpha=9
    )
    theirs = peft.get_peft_model(model("llama"), config)
    x = ids(13)
    adamw = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=3e-2)
    for step in range(1, 7 if pruned else 2):
        theirs(input_ids=x[None], labels=x[None]).loss.backward()
        adamw.step()
        if pruned:
            theirs.base_model.update_and_allocate(step)
        adamw.zero_grad()
    theirs.eval().save_pretrained(tmp_path)
    host = Host(base("llama"))
    made = host.load(tmp_path, "a")
    assert len({layer.a.shape[0] for _, layer in made.items()}) > 1 or not pruned
    with torch.no_grad():
        want = theirs(input_ids=x[None]).logits[0]
        with host.route("a"):
            here = host.logits(x, [13])
        assert (host.logits(x, [13]) - want).abs().max() > 1e-3
    assert (here - want).abs().max() < 1e-5 * max(1, want.abs().max())
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    gone = next(name for name in tensors if name.endswith("lora_E"))
    del tensors[gone]
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"lora_E"):
        host.load(tmp_path, "b")


# --- RefLoRA -----------------------------------------------------------------------------------------------------------


def test_the_metric_solves_its_equation():
    a, b = normal(4, 30), normal(20, 4, seed=1)
    s, inverse = metric(a, b)
    assert (s @ (a @ a.t()) @ s - b.t() @ b).abs().max() < 1e-9 * (b.t() @ b).abs().max()
    assert (s @ inverse - torch.eye(4)).abs().max() < 1e-9 and (s - s.t()).abs().max() < 1e-9
    assert (torch.linalg.eigvalsh(s) > 0).all()
    assert torch.equal(metric(a, 0 * b)[0], torch.eye(4, dtype=torch.float64))
    b[:, 0] = b[:, 1]  # not of full rank
    assert all(m.isfinite().all() for m in metric(a, b))


def factor_wanted(method, unbalanced, split=None, steps=200, rate=0.02):
    """min ‖B·A − D‖² of rank 4 by `steps` of a method over gradient descent; the distance and the product that are left."""
    layer = find(method)(Site(20, 30), r=4, alpha=4.0, **({} if method == "lora" else {"plain": 0.0})).double()
    left, right = normal(20, 4, seed=2) / 20**0.5, normal(4, 30, seed=3) / 30**0.5
    wanted = left @ right
    with torch.no_grad():
        layer.a.copy_(0.5 * normal(4, 30, seed=4) * unbalanced)
        layer.b.copy_(0.5 * normal(20, 4, seed=5) / unbalanced)
        if split is not None:
            layer.a.copy_(split.t() @ layer.a)
            layer.b.copy_(layer.b @ torch.linalg.inv(split).t())
    for step in range(steps + 1):
        layer.zero_grad()
        ((layer.b @ layer.a - wanted) ** 2).sum().backward()
        with torch.no_grad():
            layer.update([layer], Descent(layer, rate if step else 0.0), step + 1, steps)
    product = (layer.b @ layer.a).detach()
    return float((product - wanted).norm() / wanted.norm()), product


def test_reflora_doesnt_mind_an_uneven_split():
    """Both variants arrive, where plain descent is stuck at every rate that it survives."""
    found = {
        m: [factor_wanted(m, 10.0, rate=rate)[0] for rate in (1e-3, 0.1)] for m in ("lora", "reflora", "reflora-s")
    }
    assert found["reflora"][-1] < 1e-6 and found["reflora-s"][-1] < 1e-2
    assert not min(found["lora"]) < 0.5
    assert factor_wanted("reflora-s", 10.0, rate=0.1)[0] == pytest.approx(
        factor_wanted("reflora-s", 1.0, rate=0.1)[0], rel=1e-6
    )


def test_a_reflora_step_is_the_same_for_every_split():
    split = normal(4, 4, seed=6) + 3 * torch.eye(4)
    first, again = (factor_wanted("reflora", 1.0, way, steps=1)[1] for way in (None, split))
    assert (first - again).abs().max() < 1e-9 * first.abs().max()


def with_gradients(method, dtype=torch.float64, **options):
    """A layer with factors, and the gradients that some G (20, 30) gives them."""
    layer = find(method)(Site(20, 30), r=4, alpha=6.0, **options).to(dtype)
    randomize(layer, 0.3)
    g = normal(20, 30, seed=7, dtype=dtype)
    (layer.delta_weight(torch.empty(0)) * g).sum().backward()
    return layer, g


def test_reflora_s_makes_both_sides_alike_and_the_state_follows():
    layer, _ = with_gradients("reflora-s", plain=0.5)
    with torch.no_grad():
        layer.a.mul_(5)
    stepper = optim.Stepper(torch.optim.AdamW(layer.parameters(), lr=0.0))
    before, sizes = (layer.b @ layer.a).detach(), (layer.b.norm() / layer.a.norm()).detach()
    with torch.no_grad():
        layer.update([layer], stepper, 5, 10)
        assert torch.equal(layer.b @ layer.a, before)  # still plain
        layer.update([layer], stepper, 6, 10)
    assert (layer.b @ layer.a - before).abs().max() < 1e-12 and abs(layer.a.norm() - layer.b.norm()) < 1e-12
    first = {p: 1 - 0.9**2 for p in (layer.a, layer.b)}  # of the gradient, after two steps with the same
    for p, factor in ((layer.a, 1 / sizes.sqrt()), (layer.b, sizes.sqrt())):
        state = stepper.optimizer.state[p]
        assert torch.allclose(state["exp_avg"], first[p] * p.grad * factor, rtol=1e-12, atol=0)
        assert torch.allclose(state["exp_avg_sq"], (1 - 0.999**2) * (p.grad * factor) ** 2, rtol=1e-9, atol=0)


def adamw(kind, parameters):
    made = torch.nn.ModuleDict({"0": torch.nn.ParameterDict({str(i): p for i, p in enumerate(parameters)})})
    made.lr_scale = dict
    made.items = lambda: [("0", made)]
    return optim.optimizer(made, 0.01, 0.0, kind)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("shape", [(8, 30), (80, 60), (3, PIECE // 2 + 77)], ids=["small", "large", "pieces"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_state_is_rescaled_as_if_all_gradients_had_been(kind, shape, axis):
    """In 8 bits but for rounding: a code is within a few hundredths."""
    factor = (0.5 + torch.rand(shape[axis], generator=torch.Generator().manual_seed(1))).unsqueeze(1 - axis)
    states = []
    for scaled in (False, True):
        p, beside = (torch.nn.Parameter(normal(*shape, seed=i, dtype=torch.float32)) for i in (1, 2))
        made = adamw(kind, [beside, p])
        for step in range(3):
            for i, q in enumerate((beside, p)):
                q.grad = normal(*shape, seed=10 * step + i, dtype=torch.float32)
            p.grad *= factor if scaled else 1
            made.step()
        if not scaled:
            optim.Stepper(made).rescale(p, factor)
        coded = kind == "adamw_8bit" and p.numel() >= SMALL
        found = {}
        for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            for name, q in (("it", p), ("beside", beside)):
                state = made.state[q]
                found[key, name] = dense(state[key], state[f"{key}_absmax"], signed) if coded else state[key]
        states.append(found)
    for key, tensor in states[1].items():
        allowed = 0.04 if coded and key[1] == "it" else 1e-6
        assert (states[0][key] - tensor).norm() <= allowed * tensor.norm(), key


# --- ScaLoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alike, scalars", [(False, False), (True, True)])
def test_the_scaling_is_the_nearest_to_the_gradient(alike, scalars):
    """Against least squares over the dense matrices themselves: 2r of them, or two where that has no roots."""
    layer, g = with_gradients("scalora", l_eta=1.0)
    if alike:  # rows that point the same way: some would have to be taken away
        with torch.no_grad():
            layer.a[1:] = layer.a[:1] + 0.3 * layer.a[1:]
        layer.zero_grad()
        (layer.delta_weight(torch.empty(0)) * g).sum().backward()
    s, a, b = layer.scale, layer.a.detach(), layer.b.detach()
    parts = [torch.outer(b[:, i], b[:, i]) @ g for i in range(4)] + [g @ torch.outer(a[i], a[i]) for i in range(4)]
    basis = torch.stack([part.flatten() for part in parts], 1)
    want = torch.linalg.lstsq(basis, g.flatten()).solution
    assert bool((want < 0).any()) == scalars
    if scalars:
        two = torch.stack([basis[:, :4].sum(1), basis[:, 4:].sum(1)], 1)
        want = torch.linalg.lstsq(two, g.flatten()).solution.repeat_interleave(4)
    middle = float(want.mean())
    layer.l_eta = middle  # so that the bounds aren't what is tested
    alpha, beta = layer.scaling()
    wanted = (want / middle).sqrt()
    assert wanted.min() > LEAST and wanted.max() < MOST
    assert (torch.cat([alpha, beta]) - wanted).abs().max() < 1e-9
    assert s == 1.5


def test_a_scaling_changes_nothing_but_the_way_on():
    layer, g = with_gradients("scalora", l_eta=0.5, interval=1)
    before = layer.delta_weight(torch.empty(0)).detach()
    alpha, beta = layer.scaling()
    assert alpha.std() > 0.01 and beta.std() > 0.01
    made = torch.optim.AdamW(layer.parameters(), lr=0.0)
    made.step()
    old = {p: {k: v.clone() for k, v in made.state[p].items()} for p in layer.parameters()}
    with torch.no_grad():
        layer.move(alpha, beta, optim.Stepper(made))
    assert (layer.delta_weight(torch.empty(0)) - before).abs().max() < 1e-12
    found = layer.a.grad.clone(), layer.b.grad.clone()
    layer.zero_grad()
    (layer.delta_weight(torch.empty(0)) * g).sum().backward()
    assert (found[0] - layer.a.grad).abs().max() < 1e-12 and (found[1] - layer.b.grad).abs().max() < 1e-12
    for p, factor in ((layer.a, alpha[:, None]), (layer.b, beta)):
        assert torch.allclose(made.state[p]["exp_avg"], old[p]["exp_avg"] * factor)
        assert torch.allclose(made.state[p]["exp_avg_sq"], old[p]["exp_avg_sq"] * factor**2)


def test_scalora_becomes_more_than_low_rank_and_plain_lora_cannot_follow():
    """A least-squares problem whose solution has rank 16: rank 4 alone is held up at the best matrix of that rank."""
    wanted = normal(40, 16, seed=1) @ normal(16, 40, seed=2) / 16
    values = torch.linalg.svdvals(wanted)
    best = float((values[4:] ** 2).sum() / (values**2).sum())
    left = {}
    for method, options in (("lora", {}), ("scalora", {"l_eta": 1.0, "interval": 10})):
        layer = find(method)(Site(40, 40), torch.Generator().manual_seed(0), r=4, alpha=4.0, **options).double()
        made = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.0)
        for step in range(1, 301):
            layer.zero_grad()
            x = normal(64, 40, seed=100 + step)
            ((x @ (layer.delta_weight(torch.empty(0)) - wanted).t()) ** 2).mean().backward()
            with torch.no_grad():
                layer.update([layer], optim.Stepper(made), step, 300)
        delta = layer.delta_weight(torch.empty(0)).detach()
        left[method] = float(((delta - wanted) ** 2).sum() / (wanted**2).sum())
    assert left["lora"] > 0.99 * best and left["scalora"] < 0.5 * best
    assert (torch.linalg.svdvals(delta) > 1e-2 * torch.linalg.matrix_norm(delta, 2)).sum() > 8


# --- a run -------------------------------------------------------------------------------------------------------------

LARGE = {"adalora": {"r": 8}, "reflora-s": {"r": 130}, "scalora": {"r": 130, "interval": 2}}


@pytest.mark.parametrize("method", LARGE)
def test_a_run_goes_on_with_the_same_bits_also_in_paged_8_bits(method, tiny_model, data_file, tmp_path):
    """Those that rescale with factors of 4096 numbers and more, whose state is in 8 bits. The last checkpoint is lost."""
    values = {
        "model": tiny_model,
        "out": tmp_path / "run",
        "method": method,
        **LARGE[method],
        "targets": "q_proj,up_proj",
    }
    values |= {"steps": 6, "checkpoint_every": 3, "eval_every": 3, "samples": 0, "optimizer": "paged_adamw_8bit"}
    values |= {"patience": 0, "batch_tokens": 200, "precision": "fp32"}
    run = fit.fit(fit.read_config(str(data_file), {k: str(v) for k, v in values.items()}), Terminal(quiet=True))
    summary = json.loads((run.folder / "summary.json").read_text())
    whole = run.at(6)
    wanted = {**whole.adapter(), **whole.optimizer()}
    assert any(tensor.dtype == torch.uint8 for tensor in wanted.values()) == find(method).rescales
    shutil.rmtree(whole.folder)
    (run.folder / "summary.json").unlink()
    fit.resume(run.folder, {}, terminal=Terminal(quiet=True))
    again = run.at(6)
    found = {**again.adapter(), **again.optimizer()}
    assert set(found) == set(wanted) and all(torch.equal(found[name], t) for name, t in wanted.items())
    assert (
        json.loads((run.folder / "summary.json").read_text())["held_out_loss_after"] == summary["held_out_loss_after"]
    )


# --- bad settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, options, says",
    [
        ("adalora", {"r": 8, "init_r": 4}, "r=8: .*at most init_r=4"),
        ("adalora", {"tinit": 200.0}, "tinit=200.0: a share of the steps"),
        ("adalora", {"tinit": 0.6, "tfinal": 0.5}, "leave no steps"),
        ("adalora", {"deltaT": 0}, "deltaT=0"),
        ("adalora", {"beta1": 1.0}, "beta1=1.0"),
        ("adalora", {"orth_reg_weight": -1.0}, "orth_reg_weight=-1.0"),
        ("reflora", {"plain": 1.0}, "plain=1.0: a share of the steps"),
        ("reflora-s", {"r": 0}, "r=0"),
        ("scalora", {"l_eta": 0.0}, "l_eta=0.0"),
        ("scalora", {"interval": 0}, "interval=0"),
    ],
)
def test_bad_settings_are_one_line(method, options, says):
    with pytest.raises(ConfigError, match=says) as error:
        Host(base("llama")).add("a", method, **options)
    assert "\n" not in str(error.value)

"""The plan counts what training really makes, without reading weights, and finds settings with which it fits."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from data_helpers import CHATML, tokenizer
from tiny import rows
from transformers import LlamaConfig

from lorafit import fit, pace, peft_files, places, plan
from lorafit.batches import Plan
from lorafit.cli import main
from lorafit.errors import AdapterError, ConfigError
from lorafit.host import Host
from lorafit.log import Terminal
from lorafit.methods import METHODS
from lorafit.model.load import load
from lorafit.model.quant import Quant, QuantLinear
from lorafit.native import build
from lorafit.train.loop import Step

LENGTHS = [20] * 10


def settings(data, **changes):
    return fit.read_config(str(data), {"precision": "fp32", **changes})


def made(model, data, lengths=LENGTHS, **changes):
    config = settings(data, **changes)
    return plan.estimate(config, plan.empty(config, model), rows(lengths))


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
    parts = ("runtime", "weights", "adapter", "optimizer", "logits")
    assert found.peak_bytes == sum(getattr(found, part) for part in parts) + max(found.activations, found.gradients)


@pytest.mark.parametrize("method, changes", [("lora", {"r": "4", "targets": "q_proj"}), ("full", {})])
def test_what_starts_from_an_adapter_is_planned_as_that(tiny_model, data_file, tmp_path, capsys, method, changes):
    host = Host(load(str(tiny_model), precision="fp32"))
    made = fit.read_config(str(data_file), {"method": method, **changes})
    adapter = host.add("a", method, made.targets, **made.options)
    (tmp_path / "old").mkdir()
    host.save("a", tmp_path / "old")
    words = ["plan", str(data_file), "--from", str(tmp_path / "old"), "--for", "cpu", "--no-time", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trainable_parameters"] == adapter.numbers()
    assert found["total_parameters"] == host.base.parameters()  # of its own base, not of the default one
    assert main([*words, "r=8"]) == 2 and "--from keeps the old adapter's shape" in capsys.readouterr().err


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if not kind.needs_codes])
def test_of_an_old_adapter_the_header_is_read(tiny_model, data_file, tmp_path, monkeypatch, method):
    """Not the numbers, which of method=full are as many as the base's."""
    host = Host(load(str(tiny_model), precision="fp32"))
    config = fit.read_config(str(data_file), {"method": method})
    host.add("a", method, config.targets or METHODS[method].targets, **config.options)
    host.save("a", tmp_path)
    want = plan.estimate(config, plan.empty(config, tiny_model, source=tmp_path), rows(LENGTHS))
    again = peft_files.load(tmp_path, host.sites)
    assert want.trainable_parameters == again.numbers()
    monkeypatch.setattr(safetensors.torch, "load_file", lambda path: pytest.fail("the whole file was read"))
    assert plan.estimate(config, plan.empty(config, tiny_model, source=tmp_path), rows(LENGTHS)) == want
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors can't be read: it is cut off"):
        plan.empty(config, tiny_model, source=tmp_path)


@pytest.mark.parametrize(
    "words, said",
    [(["epochs=0"], "epochs=0.0: must be"), (["rank_pattern=nothing=4"], "pattern 'nothing' matches none")],
)
def test_what_train_would_refuse_is_refused(tiny_model, data_file, capsys, words, said):
    assert main(["plan", str(data_file), "--model", str(tiny_model), *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_codes_are_counted_as_they_are_stored(tiny_model, data_file, kind, double):
    model = load(str(tiny_model), precision="fp32", quant=Quant(kind, double)).model
    parts = [t for m in model.modules() if isinstance(m, QuantLinear) for t in m.buffers()]
    found = made(tiny_model, data_file, quant=kind, double_quant=str(double))
    assert found.mapped == sum(t.numel() * t.element_size() for t in parts)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradients_stay_while_more_micro_batches_come(tiny_model, data_file, accumulate):
    found = made(tiny_model, data_file, batch_tokens="200", accumulate=str(accumulate), method="full")
    rest = found.peak_bytes - found.runtime - found.weights - found.adapter - found.optimizer - found.logits
    both = (found.activations, found.gradients)
    assert rest == (max(both) if accumulate == 1 else sum(both))


def test_memory_follows_the_micro_batch(tiny_model, data_file):
    whole, split = (made(tiny_model, data_file, batch_tokens="200", accumulate=n) for n in ("1", "5"))
    assert (whole.micro_batch_tokens, split.micro_batch_tokens) == (200, 40)
    assert 3 * split.activations < whole.activations < 6 * split.activations
    assert made(tiny_model, data_file, batch_tokens="200", checkpointing="true").activations < whole.activations


def test_dropout_keeps_what_fell_out_and_what_is_left(tiny_model, data_file):
    plain, dropped = (made(tiny_model, data_file, dropout=p, batch_tokens="200") for p in ("0", "0.1"))
    widths = sum(site.shape[-1] for site, _ in plan.empty(settings(data_file), tiny_model).chosen)
    air = 1.0 if build.pooled() else plan.AIR
    assert dropped.activations - plain.activations == pytest.approx(air * 2 * 4 * 200 * widths, rel=1e-3)


def test_the_largest_micro_batch_is_found_among_all_steps():
    made = Plan(rows([3, 50, 4, 5, 6, 7, 30, 8]), 60, accumulate=2, seed=1)
    sizes = [sum(len(row.ids) for row in micro) for step in made.epoch(0) for micro in made.micros(step)]
    assert sum(len(row.ids) for row in made.largest(made.epoch(0))) == max(sizes)


def test_what_rows_share_is_counted_once(tiny_model, data_file):
    config = settings(data_file, batch_tokens="400")
    model = plan.empty(config, tiny_model)
    alike = rows([40] * 10)
    for row in alike:
        row.ids[:30] = alike[0].ids[:30]
    apart = plan.estimate(settings(data_file, batch_tokens="400", share="false"), model, alike)
    assert plan.estimate(config, model, alike).activations < 0.5 * apart.activations
    assert plan.estimate(config, model, rows([40] * 10)).activations == apart.activations


def test_the_least_painful_change_that_fits_is_found(tiny_model, data_file):
    config = settings(data_file, batch_tokens="200")
    model, given = plan.empty(config, tiny_model), rows(LENGTHS)

    def peak(**change):
        return plan.estimate(settings(data_file, batch_tokens="200", **change), model, given).peak_bytes

    assert plan.judge(config, model, given, peak()).fits
    assert plan.judge(config, model, given, peak() - 1).change == {"accumulate": 2}
    assert plan.judge(config, model, given, peak(accumulate="8")).change == {"accumulate": 8}
    tight = plan.judge(config, model, given, peak(accumulate="16") - 1).change
    assert tight["checkpointing"] is True
    smallest = peak(accumulate="16", checkpointing="true", quant="nf4")
    assert plan.judge(config, model, given, smallest).change["quant"] == "nf4"
    streamed = plan.judge(config, model, given, smallest - 1)
    assert streamed.streams and streamed.change
    none = plan.judge(config, model, given, 1000)
    assert not none.fits and none.change == {} and none.best.peak_bytes <= smallest


def test_a_run_that_fits_as_asked_is_estimated_once(tiny_model, data_file, monkeypatch):
    """Every training begins with this."""
    config, made, plain = settings(data_file), [], plan.estimate
    monkeypatch.setattr(plan, "estimate", lambda *given: made.append(given) or plain(*given))
    assert plan.judge(config, plan.empty(config, tiny_model), rows(LENGTHS), 10**12).fits
    assert len(made) == 1


def test_the_order_of_the_ways_for_seventy_billion(tmp_path, data_file, monkeypatch):
    shape = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    shape.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)

    def peak(**changes):
        config = fit.read_config(str(data_file), {"precision": "bf16", "checkpointing": "true", **changes})
        return plan.estimate(config, plan.empty(config, tmp_path, gpu=True), rows([256] * 8)).peak_bytes

    full, lora, qlora = peak(method="full"), peak(), peak(quant="nf4")
    assert 1.2e12 < full < 1.4e12
    assert 141e9 < lora < 160e9
    assert 36e9 < qlora < 48e9


@pytest.mark.parametrize(
    "text, name, memory",
    [("RTX 4090", "RTX 4090", 24), ("4090", "RTX 4090", 24), ("nvidia h100", "H100", 80), ("a100-40", "A100 40GB", 40)],
)
def test_gpus_are_known_by_the_names_people_use(text, name, memory):
    found = places.find(text)
    assert (found.name, found.gpu) == (name, True) and 0.9 * memory * 1e9 < found.memory <= memory * 1e9


@pytest.mark.parametrize("text", ["3090 Ti", "1080ti"])
def test_a_card_that_is_not_known_is_no_amount_of_memory(text):
    with pytest.raises(ConfigError, match="nor a GPU known here"):
        places.find(text)


def test_a_card_without_bf16_trains_in_fp32(capsys, tiny_model, data_file):
    assert main(["plan", str(data_file), "--model", str(tiny_model), "--for", "T4"]) == 0
    assert "in fp32" in capsys.readouterr().out


class Machine:
    """In place of a clock and of training: a step takes `rest`, and for each token so much and more by layer."""

    def __init__(self, monkeypatch, a_layer: float, rest: float = 0.1, noise: float = 0.0) -> None:
        self.now, self.a_layer, self.rest, self.noise, self.steps = 0.0, a_layer, rest, noise, 0
        monkeypatch.setattr(pace.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(pace, "train", self.train)

    def seconds(self, tokens: int, layers: int) -> float:
        return self.rest + tokens * (0.0001 + self.a_layer * layers)

    def train(self, host, jobs):
        (job,) = jobs
        self.steps += 1
        tokens = int(job.plan.lengths.sum())
        self.now += self.seconds(tokens, host) * (1 + self.noise * (-1) ** self.steps)
        yield Step(1, tokens)


@pytest.mark.parametrize("a_layer, cut", [(0.00005, False), (0.002, True)])
@pytest.mark.parametrize("built", [(1, 3), (32,)])
def test_a_step_is_measured_in_bounded_time(data_file, monkeypatch, a_layer, cut, built):
    """What was left out is made up for: a layer's time, and a token's."""
    machine = Machine(monkeypatch, a_layer)
    models = pace.Models(dict(zip(built, built, strict=True)), layers=32)  # a host is its number of layers here
    each, most, off = pace._step(models, settings(data_file, batch_tokens="4000"), rows([40] * 200), 6.0)
    assert each == pytest.approx(machine.seconds(4000, 32) / 4000, rel=0.01)
    assert machine.now < 12 or machine.seconds(pace.WARM, built[-1]) > 3
    assert (most < 4000) == (cut or built == (32,))
    assert off >= pace.OFF + pace.OFF_CUT * (most < 4000)


def test_what_rounds_differ_by_is_what_the_time_may_be_off(data_file, monkeypatch):
    models = pace.Models({32: 32}, layers=32)
    Machine(monkeypatch, 0.0001, noise=0.3)
    config = settings(data_file, batch_tokens="80")
    assert 0.25 < pace._step(models, config, rows([40] * 4), 60.0)[2] < 0.45
    Machine(monkeypatch, 0.0001)
    assert pace._step(models, config, rows([40] * 4), 60.0)[2] == pace.OFF
    assert pace._step(models, config, rows([40] * 4), 0.0)[2] > pace.OFF


def test_a_single_long_row_is_cut(data_file, monkeypatch):
    machine = Machine(monkeypatch, 0.002)
    models = pace.Models({1: 1, 3: 3}, layers=32)
    pace._step(models, settings(data_file, batch_tokens="8000"), rows([8000]), 6.0)
    assert machine.now < 12


@pytest.mark.parametrize("short, long, want", [(7.0, 12.0, 42.0), (12.0, 12.0, 30.0), (1.0, 12.0, 48.0)])
def test_of_more_tokens_the_time_is_on_a_line(short, long, want):
    assert pace._longer(short, 50, long, 100, 400) == pytest.approx(want)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_of_a_large_model_a_few_layers_are_made_and_one_apart(tiny_model, tmp_path, data_file, monkeypatch, quant):
    shape = _shape(tiny_model)
    shape.num_hidden_layers = 5
    shape.save_pretrained(tmp_path)
    config = settings(data_file, quant=quant)
    assert set(pace.Models.of(config, tmp_path).hosts) == {5}
    monkeypatch.setattr(pace, "NUMBERS", 1)
    models = pace.Models.of(config, tmp_path)
    assert set(models.hosts) == {1, 2} and models.layers == 5
    one, two = models.hosts[1].base, models.hosts[2].base
    assert len(one.model.model.layers) == 1 and one.body is not None and two.body is not None
    held = {t.data_ptr() for t in (*two.model.parameters(), *two.model.buffers())}
    parts = [m for m in one.model.modules() if isinstance(m, QuantLinear)]
    assert len(parts) == (7 if quant == "nf4" else 0)
    assert {t.data_ptr() for t in one.model.parameters()} | {m.codes.data_ptr() for m in parts} <= held
    assert models.timed(lambda host: {1: 3.0, 2: 4.0}[len(host.base.model.model.layers)]) == 7.0


@pytest.mark.parametrize("words", [["method=loftq", "quant=nf4"], ["targets=*.1.self_attn.*"], ["method=pissa"]])
def test_the_measurement_takes_what_training_takes(capsys, tiny_model, data_file, words):
    assert main(["plan", str(data_file), "--model", str(tiny_model), "--json", "steps=2", *words]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] > 0


def test_what_cannot_be_planned_is_one_line(capsys, tmp_path, data_file):
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}')
    tokenizer(CHATML).save_pretrained(tmp_path)
    assert main(["plan", str(data_file), "--model", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_other_places():
    assert places.find("16G").memory == 14.4e9 and not places.find("16G").gpu
    here = places.find("cpu")
    assert here.here and here.memory > 1e8
    with pytest.raises(ConfigError, match="did you mean 'RTX 4090'"):
        places.find("4091")
    with pytest.raises(ConfigError, match=r"--for=0G: must be more than nothing, for example --for=6G$"):
        places.find("0G")


def test_steps_forwards_and_answers_make_the_time(tiny_model, data_file, monkeypatch):
    config = settings(data_file, batch_tokens="60")
    made = plan.estimate(config, plan.empty(config, tiny_model), rows(LENGTHS))
    made = replace(made, trained_tokens=100, scored_tokens=10, answers=2)
    monkeypatch.setattr(pace, "_step", lambda *given: (5.0, 60, 0.1))
    monkeypatch.setattr(pace, "_score", lambda *given: 1.5)
    monkeypatch.setattr(pace, "_answer", lambda *given: 11.0)
    found = pace.measured(config, tiny_model, rows(LENGTHS), made)
    assert (found.steps, found.evaluations, found.answers) == (500.0, 15.0, 2 * 48 * 11.0)
    assert found.total == sum((found.steps, found.evaluations, found.answers)) and found.dequantising == 0
    monkeypatch.setattr(pace, "_score", lambda *given: pytest.fail("nothing is held out"))
    assert pace.measured(config, tiny_model, rows(LENGTHS), replace(made, scored_tokens=0)).evaluations == 0


@pytest.mark.parametrize("changes", [{}, {"eval_every": "3"}, {"samples": "0"}, {"held_out_share": "0"}])
def test_evaluations_are_those_of_the_run(tiny_model, data_file, tmp_path, changes):
    """Held-out loss at the start and every so many steps, answers each time."""
    values = {
        "model": str(tiny_model),
        "out": str(tmp_path / "run"),
        "steps": "10",
        "patience": "0",
        "precision": "fp32",
    }
    config = fit.read_config(str(data_file), {**values, **changes})
    path, _, data = fit.read_data(config, Terminal(quiet=True))
    found = plan.estimate(config, plan.empty(config, path), data.train, data.held_out)
    run = fit.fit(fit.read_config(str(data_file), {**values, **changes}), Terminal(quiet=True))
    records = list(run.records("evaluations"))
    assert found.evaluations == len(records) and (bool(records) or "held_out_share" in changes)
    assert found.answers == sum(len(record["samples"]) for record in records)
    assert found.scored_tokens == len(records) * sum(len(row.ids) for row in data.held_out)


def test_what_codes_cost_on_a_gpu_depends_on_passes_and_not_on_tokens(tiny_model, data_file):
    def taken(lengths=LENGTHS, **changes) -> pace.Time:
        config = settings(data_file, batch_tokens="200", steps="5", **changes)
        return pace.by_rate(config, plan.estimate(config, plan.empty(config, tiny_model), rows(lengths)), 1e9, 1e6)

    plain, coded = taken(), taken(quant="nf4")
    assert plain.dequantising == 0 and coded.steps == plain.steps and coded.total > plain.total
    config = settings(data_file, quant="nf4")
    numbers = plan.estimate(config, plan.empty(config, tiny_model), rows(LENGTHS)).coded_parameters
    assert coded.dequantising == pytest.approx(5 * 2 * numbers * 4.52 / 1e6)
    assert taken(quant="nf4", accumulate="2").dequantising == pytest.approx(2 * coded.dequantising)
    assert taken(quant="nf4", checkpointing="true").dequantising == pytest.approx(1.5 * coded.dequantising)
    assert taken([10] * 20, quant="nf4").dequantising == pytest.approx(coded.dequantising)


def test_a_gpu_s_time_of_codes_is_near_the_measured_one(tmp_path, data_file, monkeypatch):
    """An H100 took 21 ms longer a step with Llama-2-7B's shape in nf4, and 30 ms of kernels; see docs/speed.md."""
    LlamaConfig().save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    values = {"quant": "nf4", "checkpointing": "true", "precision": "bf16", "steps": "1", "batch_tokens": "2048"}
    config = fit.read_config(str(data_file), values)
    found = plan.estimate(config, plan.empty(config, tmp_path, gpu=True), rows([512] * 4))
    card = places.find("H100")
    assert 0.015 < pace.by_rate(config, found, card.rate, card.bytes_a_second).dequantising < 0.04


def test_the_time_is_shown_in_parts_and_says_which_base_is_faster(capsys, tiny_model, data_file):
    words = ["plan", str(data_file), "--model", str(tiny_model), "steps=2", "precision=fp32"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert re.search(r"takes about \S+( \S+)? ±\d+% \(measured here\): steps ", shown)
    assert ", held-out rows " in shown and ", answers " in shown
    assert "\nquant=nf4 would fit too (" in shown and "instead of" in shown and "slower" in shown
    assert main([*words, "quant=nf4"]) == 0
    assert "\nquant=none fits too (" in capsys.readouterr().out
    assert main([*words, "quant=nf4", "--for", "A10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] == pytest.approx(sum(part or 0 for part in found["seconds_of"].values()))
    assert found["seconds_off"] is None  # of a data sheet
    assert found["otherwise"]["quant"] == "none" and 0 < found["otherwise"]["seconds"] < found["seconds"]
    assert found["seconds_of"]["dequantising"] > 0 and found["seconds_of"]["answers"] is None
    assert main([*words, "--for", "A10"]) == 0
    assert "answers come on top" in capsys.readouterr().out


def _shape(model):
    return LlamaConfig.from_pretrained(model)


def test_json_is_one_object(capsys, tiny_model, data_file):
    assert main(["plan", str(data_file), "--model", str(tiny_model), "--json", "steps=3"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["peak_bytes"] > plan.RUNTIME and values["steps"] == 3
    assert values["verdict"] == "fits" and values["seconds"] > 0 and values["seconds_off"] >= pace.OFF


def test_a_config_alone_is_enough(capsys, tmp_path, tiny_model, data_file):
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    tokenizer(CHATML).save_pretrained(tmp_path)
    assert main(["plan", str(data_file), "--model", str(tmp_path), "--for", "4090", "batch_tokens=64"]) == 0
    shown = capsys.readouterr().out
    assert "it fits" in shown and "RTX 4090" in shown and "data sheet" in shown
    assert main(["plan", str(data_file), "--model", str(tmp_path), "--for", "600M", "batch_tokens=64"]) == 0
    assert "accumulate" in capsys.readouterr().out or plan.RUNTIME < 590e6
    assert main(["train", str(data_file), "--model", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    "fits, change, code",
    [
        (True, {}, 0),
        (False, {"accumulate": 2}, 0),
        (False, {"accumulate": 2, "checkpointing": True}, 2),
        (False, {"quant": "nf4"}, 2),
        (False, {}, 2),
    ],
)
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_the_exit_code_says_whether_training_with_these_words_fits(
    capsys, tiny_model, data_file, monkeypatch, fits, change, code, more
):
    def judge(config, model, given, memory, streams, held_out):
        return plan.Verdict(fits, memory, plan.estimate(config, model, given), change)

    monkeypatch.setattr(plan, "judge", judge)
    assert main(["plan", str(data_file), "--model", str(tiny_model), "--no-time", *more]) == code
    shown = capsys.readouterr()
    assert not shown.err and ("fit" in shown.out)


@pytest.mark.parametrize("memory, hint", [("1M", "memory=1M")])
def test_training_refuses_what_cannot_fit_before_anything_is_loaded(
    capsys, tmp_path, tiny_model, data_file, memory, hint
):
    out = tmp_path / "run"
    assert main(["train", str(data_file), "--model", str(tiny_model), "--out", str(out), f"memory={memory}"]) == 2
    assert hint in capsys.readouterr().err and not out.exists()

"""`lorafit doctor` finds what is wrong with runs that really went wrong, and says nothing of those that didn't."""

from __future__ import annotations

import html
import io
import json
import shlex
import shutil
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import pytest
from conftest import conversation

from lorafit import doctor, fit, report
from lorafit.cli import main
from lorafit.config import read_yaml
from lorafit.doctor import examine, verdict
from lorafit.errors import LorafitError, RunError
from lorafit.log import Terminal
from lorafit.verbs import train

QUIET = Terminal(quiet=True)


@pytest.fixture(scope="module")
def quick_model(tmp_path_factory) -> Path:
    """A tiny model with weights large enough to learn, to overfit and to break in some steps."""
    import torch
    from data_helpers import CHATML, tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tok = tokenizer(CHATML)
    sizes = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    ids = dict(vocab_size=len(tok), bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **ids, max_position_embeddings=256, tie_word_embeddings=False))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.12, generator=generator)
    folder = tmp_path_factory.mktemp("quick")
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(quick_model, tmp_path_factory):
    """Makes a run with these settings, whatever becomes of it, once."""
    place = tmp_path_factory.mktemp("runs")
    data = place / "rows.jsonl"
    data.write_text("".join(json.dumps(conversation(i)) + "\n" for i in range(80)))
    made: dict[str, Path] = {}

    def run(name: str, rows: Path = data, **settings) -> Path:
        if name not in made:
            made[name] = place / name
            given = {"model": str(quick_model), "out": str(place / name), "precision": "fp32", "samples": 0, **settings}
            try:
                fit.fit(fit.read_config(str(rows), given), QUIET)
            except LorafitError as error:
                assert error.exit_code == 2
        return made[name]

    return run


def names(folder: Path, *levels: str) -> list[str]:
    return [one.name for one in examine(folder) if not levels or one.level in levels]


@pytest.mark.parametrize(
    "settings",
    [{"epochs": 6, "lr": 3e-3}, {"epochs": 6, "seed": 1, "lr": 5e-3}, {"epochs": 6, "method": "dora", "lr": 4e-3}],
)
def test_a_healthy_run_is_left_alone(runs, settings, capsys):
    run = runs("-".join(f"{k}{v}" for k, v in settings.items()), **settings)
    assert names(run, "fault", "warning") == []
    assert verdict(run, examine(run)).startswith("healthy: held-out loss")
    assert main(["doctor", str(run)]) == 0
    assert "healthy" in capsys.readouterr().out


@pytest.mark.parametrize("lr", [3.0, 1e25])
def test_divergence(runs, lr, capsys):
    run = runs(f"diverged{lr}", lr=lr, steps=30)
    assert names(run, "fault") == ["diverged"]
    assert main(["doctor", str(run), "--json"]) == 2
    out, err = capsys.readouterr()
    made = json.loads(out)
    notes = sum(one["level"] == "warning" for one in made["findings"])
    assert err == f"lorafit: {run}: 1 fault" + ("" if notes == 0 else f", {notes} warning{'s' * (notes > 1)}") + "\n"
    (fault,) = [one for one in made["findings"] if one["level"] == "fault"]
    assert "lr=" in fault["evidence"] and "advice" in fault["evidence"] and "warmup=0.1" in fault["command"]
    assert made["verdict"].startswith("ill")
    losses = doctor.Files.of(run).losses
    if len(losses) > 1:
        (highest, at), (last, end) = max((loss, step) for step, loss in losses), reversed(losses[-1])
        figures = (
            f"training loss {losses[0][1]:.3g} at step 1, {highest:.3g} at its highest (step {at}), {last:.3g} at step"
        )
        assert f"{figures} {end}, the last" in fault["evidence"]


def test_the_end_of_train_and_the_report_say_what_doctor_says(runs):
    """Neither gives advice of its own, which doctor might not share."""
    for settings in ({"steps": 4, "lr": 3e-3}, {"steps": 70, "lr": 1e-8}, {"epochs": 6, "lr": 3e-3}):
        run = runs("-".join(f"{k}{v}" for k, v in settings.items()), **settings)
        found = [one for one in examine(run) if one.level != "note"]
        end = train.described(str(run), json.loads((run / "summary.json").read_text()))
        verdict = (run / "report.html").read_text()
        verdict = verdict[verdict.index("<h2>Verdict") : verdict.index("<h2>Curves")]
        verdict = verdict.partition("<h2>Diagnosis")[0]
        assert "help" not in verdict and "more epochs" not in end
        assert ("\ndoctor " in end) == ("is under Diagnosis" in verdict) == bool(found) == ("steps" in settings)
        if found:
            assert f"\ndoctor         {found[0].what}; to mend it: {found[0].do}\n" in end
            assert f"\n  {found[0].command}\n" in end and found[0].what[1:] in html.unescape(verdict)


def test_which_loss_is_meant(runs, tmp_path):
    """Of a run whose best step is its start, and which ended far above it."""
    run = tmp_path / "run"
    shutil.copytree(runs("few", steps=4, lr=3e-3), run)
    rows = [{"step": step, "held_out_loss": loss} for step, loss in ((0, 2.3), (2, 2.5), (4, 8.9))]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"held_out_loss_before": 2.3, "held_out_loss_after": 2.3, "best_step": 0}
    (run / "summary.json").write_text(json.dumps(summary))
    line = verdict(run, examine(run))
    assert (
        "held-out loss 2.3000 before training, no evaluation of 4 steps was lower, 2.5000 at step 2 the nearest" in line
    )
    assert line.endswith("; 8.9000 at step 4, the last time")
    page = report.write(run).read_text()
    assert "It hardly learned" not in page and "lowest before training and rose to 8.900 at step 4" in page
    assert "memorised" not in page  # which doctor finds only where the training loss fell


@pytest.mark.parametrize("factor, wanted", [(100, 1.0), (1.5, 0.3)])
def test_train_and_doctor_name_the_same_rate(quick_model, tmp_path, monkeypatch, factor, wanted):
    """Advice's own where the rate was far over it, else a fifth of it."""
    from lorafit.train import loop

    plain, factors = loop.losses, iter([1.0, *[9.0] * 60])
    monkeypatch.setattr(loop, "losses", lambda host, micro: plain(host, micro) * next(factors))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(conversation(i)) + "\n" for i in range(20)))
    fair = fit.advice.rate_for(64, "llama", 256)
    given = {"model": str(quick_model), "precision": "fp32", "samples": 0, "steps": 30, "batch_tokens": 256}
    given |= {"out": str(tmp_path / "away"), "lr": factor * fair}
    with pytest.raises(fit.Failed) as failed:
        fit.fit(fit.read_config(str(data), given), QUIET)
    (fault,) = [one for one in examine(tmp_path / "away") if one.name == "diverged"]
    settings = f"lr={wanted * fair:.2g} warmup=0.1"
    assert f"; try {settings}, or look" in str(failed.value) and settings in fault.command


def test_a_rate_that_is_too_small(runs):
    run = runs("tiny", lr=1e-8, steps=70)
    (fault,) = [one for one in examine(run) if one.level == "fault"]
    assert (fault.name, fault.what) == ("nothing-learned", "nothing was learned: the learning rate is too small")
    words = shlex.split(fault.command)
    assert words[:2] == ["lorafit", "train"] and words[3:5] == ["--out", f"{run}-again"]
    rate = next(float(word[3:]) for word in words if word.startswith("lr="))
    assert rate == pytest.approx(fit.advice.rate_for(64, "llama", 256), rel=0.01)


def test_a_rate_that_is_too_high_but_breaks_nothing(runs):
    found = {one.name: one for one in examine(runs("high", lr=0.3, steps=30))}
    assert set(found) & {"high-rate"} and "diverged" not in found


def with_losses(run: Path, to: Path, *losses: tuple[int, float]) -> Path:
    """A copy of a run with this held-out loss at these steps."""
    shutil.copytree(run, to)
    rows = [{"step": step, "held_out_loss": loss} for step, loss in losses]
    (to / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return to


FALLING = (0, 2.0), (6, 1.8), (12, 1.7), (18, 1.65), (24, 1.62)
LITTLE = (0, 2.0), (6, 1.97), (12, 1.95), (18, 1.94), (24, 1.941)
AT_REST = (0, 2.0), (6, 1.8), (12, 1.62), (18, 1.61), (24, 1.612)
TURNED = (0, 2.0), (6, 1.94), (12, 1.96), (18, 1.99), (24, 2.1)


@pytest.mark.parametrize("losses, says", [(FALLING, "-19.0%), 21% of that after step 12"), (LITTLE, "-3.0%)")])
def test_a_rate_far_under_advice_is_told_where_there_was_more_to_learn(runs, tmp_path, losses, says):
    fair = fit.advice.rate_for(64, "llama", 256)
    run = with_losses(runs("low", lr=fair / 12, epochs=6), tmp_path / "low", *losses)
    found = {one.name: one for one in examine(run)}
    assert found["low-rate"].level == "warning" and "too-little" not in found and "nothing-learned" not in found
    assert says in found["low-rate"].evidence and f"gives {fair:.2g} for this base" in found["low-rate"].evidence
    assert f"lr={fair:.2g}" in found["low-rate"].command
    assert verdict(run, examine(run)).startswith("could be better")


@pytest.mark.parametrize(
    "losses, part, more",
    [
        (AT_REST, 12, {}),
        (TURNED, 12, {}),
        (FALLING, 4, {}),
        (LITTLE, 4, {}),
        (FALLING, 12, {"alpha": 64.0}),  # which does what twice the rate does
        (FALLING, 12, {"start": "runs/old"}),
    ],
)
def test_a_low_rate_that_did_its_work_or_was_chosen_is_left_alone(runs, tmp_path, losses, part, more):
    fair = fit.advice.rate_for(64, "llama", 256)
    run = with_losses(runs("low", lr=fair / 12, epochs=6), tmp_path / "low", *losses)
    config = {**read_yaml(run / "config.yaml"), "lr": fair / part, **more}
    (run / "config.yaml").write_text(json.dumps(config))
    assert "low-rate" not in names(run)


@pytest.mark.parametrize(
    "losses, numbers, told",
    [(FALLING, 40, True), (LITTLE, 40, True), (AT_REST, 40, False), (TURNED, 40, False), (LITTLE, 16, False)],
)
def test_far_fewer_trained_numbers_than_advice_chooses(runs, tmp_path, losses, numbers, told):
    """Against r=16 on all linear layers."""
    full = json.loads((runs("epochs6-lr0.003", epochs=6, lr=3e-3) / "summary.json").read_text())["trainable_parameters"]
    run = with_losses(runs("thin", epochs=6, lr=3e-3, targets="k_proj", r=1), tmp_path / "thin", *losses)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["trainable_parameters"] < full / 32
    (run / "summary.json").write_text(json.dumps({**summary, "trainable_parameters": full // numbers}))
    found = {one.name: one for one in examine(run)}
    assert ("little-trained" in found) == told
    if told:
        finding = found["little-trained"]
        assert finding.level == "warning" and "too-little" not in found
        assert f"(targets=k_proj, r=1), and advice trains {full:,};" in finding.evidence
        assert finding.command.endswith("targets=all-linear r=16")
    config = {**read_yaml(run / "config.yaml"), "method": "ia3"}  # whose numbers are few by its nature
    (run / "config.yaml").write_text(json.dumps(config))
    assert "little-trained" not in names(run)


def test_too_little_is_trained(runs):
    run = runs("narrow", targets="model.layers.0.self_attn.k_proj", r=1, steps=70)
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert rows[-1]["held_out_loss"] > 5  # so little of so small a model teaches it a little; of a real one less

    def noisy(step: int) -> float:  # falls by a tenth, which is less than it swings
        return 6.5 - 0.01 * step + (2.0 if step % 2 else -2.0)

    flat = [{**row, "held_out_loss": rows[0]["held_out_loss"]} for row in rows]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flat))
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps({**row, "loss": noisy(row["step"])}) + "\n" for row in steps))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "total_parameters": 1 << 28}))  # as of a real model
    (fault,) = [one for one in examine(run) if one.level == "fault"]
    assert fault.what == "nothing was learned: too little is trained" and "targets=all-linear" in fault.command


def test_the_command_it_gives_runs(runs, tmp_path, capsys, monkeypatch):
    run = runs("few", steps=4, lr=3e-3)
    finding = next(one for one in examine(run) if one.command)
    words = shlex.split(finding.command)[1:]
    out = words[words.index("--out") + 1]
    assert main([*words, "samples=0"]) == 0
    after = read_yaml(Path(out) / "config.yaml")
    assert after["steps"] > 4 and after["lr"] == 3e-3
    shutil.rmtree(out)


def test_few_steps_and_a_part_of_the_rows(runs):
    assert names(runs("few", steps=4, lr=3e-3), "warning") == ["few-steps"]
    assert "part-of-epoch" in names(runs("part", steps=22, lr=3e-3, batch_tokens=20, eval_every=2))


@pytest.mark.parametrize("number", [4, 9, 15, 16, 18])
def test_what_advice_chose_of_few_rows_is_not_called_too_few_steps(runs, tmp_path, number):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(conversation(i)) + "\n" for i in range(number)))
    run = runs(f"advised{number}", rows=file)
    assert json.loads((run / "summary.json").read_text())["steps"] < 20 and "few-steps" not in names(run)
    if number == 15:  # nothing is held out: no more passes than advice takes, but as many
        once = {one.name: one for one in examine(runs("once", rows=file, epochs=1))}
        assert " epochs=3 " in once["few-steps"].command
        large = {one.name: one for one in examine(runs("steps-large", rows=file, epochs=3, batch_tokens=2048))}
        assert large["few-steps"].do == "smaller steps" and "batch_tokens=256" in large["few-steps"].command


def test_still_learning_at_the_end(runs):
    run = runs("early", steps=24, lr=1e-3, schedule="constant", eval_every=4)
    found = {one.name: one for one in examine(run)}
    assert "too-little" in found and "steps=48" in found["too-little"].command


def test_overfitting(runs, tmp_path):
    rows = tmp_path / "few.jsonl"
    rows.write_text("".join(json.dumps(conversation(3 * i)) + "\n" for i in range(20)))
    run = runs("over", rows=rows, epochs=60, lr=2e-2, patience=0)
    found = {one.name: one for one in examine(run)}
    best = json.loads((run / "summary.json").read_text())["best_step"]
    assert found["overfitting"].level == "warning" and found["overfitting"].step == best
    assert f"the adapter of step {best} is the one that was kept" in found["overfitting"].do
    assert "few-rows" in found and found["few-rows"].level == "note"
    assert "trouble" in (run / "report.html").read_text() and "by heart" in (run / "report.html").read_text()


def test_without_held_out_rows(runs):
    found = {one.name: one for one in examine(runs("blind", held_out_share=0, epochs=8, lr=3e-3))}
    assert found["few-rows"].level == "warning" and "--held-out" in found["few-rows"].do


def test_nothing_is_held_out_of_rows_that_repeat(quick_model, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text((json.dumps(conversation(1)) + "\n") * 30 + (json.dumps(conversation(2)) + "\n") * 30)
    given = {"model": str(quick_model), "out": str(tmp_path / "run"), "steps": 1, "samples": 0}
    fit.fit(fit.read_config(str(file), given), QUIET)
    found = {one.name: one for one in examine(tmp_path / "run")}
    assert "since the rows repeat each other" in found["few-rows"].what
    assert found["few-rows"].evidence.startswith("60 rows to train on, 58 of them repeat another")


def test_an_answers_end_that_is_never_learned(runs):
    run = runs("healthy", epochs=8)
    copy = run.parent / "endless"
    shutil.copytree(run, copy)
    data = json.loads((run / "data.json").read_text())
    assert any("<|im_end|>" in text for text, on in data["text_example"] if on)
    pieces = [[text.replace("<|im_end|>", ""), on] for text, on in data["text_example"]]
    (copy / "data.json").write_text(json.dumps({**data, "text_example": pieces}))
    found = {one.name: one for one in examine(copy)}
    assert found["no-end"].level == "fault" and "the chat template puts none" in found["no-end"].what
    pieces = [
        part
        for text, on in data["text_example"]
        for part in ([text.replace("<|im_end|>", ""), on], ["<|im_end|>", False])
    ]
    (copy / "data.json").write_text(json.dumps({**data, "text_example": pieces}))
    found = {one.name: one for one in examine(copy)}
    assert "learn=assistant leaves it out" in found["no-end"].what
    assert "no-end" not in names(run)


def test_placeholders_that_nobody_filled_in(runs, quick_model, tmp_path):
    rows = [conversation(i) for i in range(40)]
    for row in rows[4::2]:
        row["messages"][-1]["content"] += " {{name}}"
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model": str(quick_model), "out": str(tmp_path / "run"), "steps": 2, "samples": 0, "batch_tokens": 16}
    told = io.StringIO()
    fit.fit(fit.read_config(str(file), given), Terminal(stream=told))
    assert "(the first: 1 row)" in told.getvalue()
    assert "18 rows have a placeholder such as {{name}} in an answer (the first: line 5)" in told.getvalue()
    found = {one.name: one for one in examine(tmp_path / "run")}
    assert found["placeholders"].level == "warning"
    assert found["placeholders"].evidence == f"18 of 40 rows, the first at line 5 of {file}"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "answers hold placeholders such as {{name}}" in page[: page.index("<h2>Curves")]
    assert "placeholders" not in names(runs("few", steps=4, lr=3e-3))


def test_rows_that_were_cut(runs):
    found = {one.name: one for one in examine(runs("cut", steps=30, lr=3e-3, long="truncate", max_tokens=20))}
    assert found["no-end"].level == "fault" and "cut inside an answer" in found["no-end"].evidence
    assert found["cut-rows"].level == "warning" and "max_tokens=32" in found["cut-rows"].command


def test_leaving_out_the_cut_rows_is_the_command_only_where_others_are_left(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs("cut", steps=30, lr=3e-3, long="truncate", max_tokens=20), run)
    data = json.loads((run / "data.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    rows, base = data["train_rows"] + data["held_out_rows"], tmp_path / "base"
    base.mkdir()

    def mend(cut: int, context: int) -> doctor.Finding:
        (run / "data.json").write_text(json.dumps({**data, "truncated": cut, "truncated_end": cut}))
        (run / "summary.json").write_text(json.dumps({**summary, "base_path": str(base)}))
        (base / "config.json").write_text(json.dumps({"max_position_embeddings": context}))
        return next(one for one in examine(run) if one.name == "no-end")

    assert mend(rows // 4, 256).command.endswith(" long=skip")
    found = mend(rows - 4, 256)
    assert found.command.endswith(" max_tokens=32") and f"long=skip would leave 4 of {rows} rows" in found.do
    assert mend(rows - 4, 25).command.endswith(" max_tokens=25")
    found = mend(rows - 4, 20)
    assert found.command == "" and "the base takes no longer ones" in found.do


def test_the_command_against_cut_answers_trains_with_them_whole(runs):
    """Of rows that are nearly all too long."""
    found = {one.name: one for one in examine(runs("cut", steps=30, lr=3e-3, long="truncate", max_tokens=20))}
    words = shlex.split(found["no-end"].command)[1:]
    assert main([*words, "samples=0"]) == 0
    out = Path(words[words.index("--out") + 1])
    assert not {"no-end", "cut-rows"} & set(names(out))
    shutil.rmtree(out)


def test_a_killed_run_and_one_that_goes_on(tiny_model, data_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "killed"
    words = ["train", str(data_file), "--model", str(tiny_model), "--out", str(out), "steps=5000", "samples=0"]
    process = subprocess.Popen([sys.executable, "-m", "lorafit", *words], stderr=subprocess.DEVNULL)
    try:
        while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 20:
            assert process.poll() is None
            time.sleep(0.05)
        capsys.readouterr()
        main(["doctor", str(out)])
        told = capsys.readouterr().out
        assert f"it is still going on (process {process.pid})" in told and "--resume" not in told
        with monkeypatch.context() as patch:  # one that got in would train on
            patch.setattr(fit, "Training", lambda *_: pytest.fail("it got in"))
            assert main(["train", "--resume", str(out)]) == 2 == main(["chat", str(out)])
        told = capsys.readouterr().err.splitlines()
        assert told == [
            f"lorafit: process {process.pid} is at work in {out}; wait for it, or stop it first",
            f"lorafit: {out} has no adapter yet: process {process.pid} is still at work in it",
        ]
        assert main([*words[:5], str(out)]) == 2
        assert f"exists already, and process {process.pid} is at work in it" in capsys.readouterr().err
        assert main(["runs", str(tmp_path)]) == 0 and f"going on (process {process.pid})" in capsys.readouterr().out
    finally:
        process.kill()
        process.wait()
    (fault,) = [one for one in examine(out) if one.level == "fault"]
    assert fault.name == "unfinished" and fault.command == f"lorafit train --resume --out {out}"
    assert main(["doctor", str(out)]) == 2
    assert "it has no end" in capsys.readouterr().out


def test_a_stopped_run(tiny_model, data_file, tmp_path, monkeypatch):
    given = {"model": str(tiny_model), "out": str(tmp_path / "run"), "steps": 12, "samples": 0}
    step = fit.Training.record

    def stopping(self, run, *rest):
        step(self, run, *rest)
        if len(run.records("metrics")) == 3:
            raise fit.Interrupted("stopped after step 3 of 12")

    monkeypatch.setattr(fit.Training, "record", stopping)
    with pytest.raises(fit.Interrupted):
        fit.fit(fit.read_config(str(data_file), given), QUIET)
    assert "interrupted" in names(tmp_path / "run", "fault")
    monkeypatch.setattr(fit.Training, "record", step)
    fit.resume(tmp_path / "run", {}, terminal=QUIET)
    assert not (tmp_path / "run" / "stopped.json").exists()
    assert "interrupted" not in names(tmp_path / "run")


def test_memory_that_ran_out(runs, monkeypatch):
    from lorafit.errors import OutOfMemory

    run = runs("few", steps=4, lr=3e-3)
    copy = run.parent / "oom"
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    said = "out of memory at step 5 with one document at a time; its longest has 30 tokens (9 MB are left)"
    data = json.loads((run / "data.json").read_text())
    (copy / "data.json").write_text(json.dumps({**data, "lengths": [[0, 32, 80], [32, 64, 0], [4096, 8192, 3]]}))
    fit.Run.open(copy).broke_off(OutOfMemory(said, "step 4 is saved, go on with more memory"))
    (fault,) = [one for one in examine(copy) if one.level == "fault"]
    assert fault.name == "out-of-memory" and fault.command.endswith("--out " + str(copy) + " checkpointing=true")
    assert fault.evidence.startswith(f"{said}; 4 steps are recorded; before that micro-batches of ")
    assert fault.evidence.endswith(" tokens fitted; 3 of 83 rows have 4096 tokens or more")
    rows = (run / "metrics.jsonl").read_text().splitlines()
    rows[1] = json.dumps({**json.loads(rows[1]), "too_large": [200, 100], "micro_tokens": 50})
    shutil.copytree(run, run.parent / "halved")
    (run.parent / "halved" / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    found = {one.name: one for one in examine(run.parent / "halved")}
    assert found["memory"].level == "note" and "200 tokens didn't fit; after 2 attempts" in found["memory"].evidence


def test_spikes(runs):
    run = runs("spiky-source", epochs=8, lr=3e-3)
    copy = run.parent / "spiky"
    shutil.copytree(run, copy)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[30] |= {"loss": 40.0, "grad_norm": 500.0}
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {one.name: one for one in examine(copy)}
    assert found["spikes"].step == 31 and "spikes" not in names(run)


def test_damaged_and_foreign_folders(runs, tmp_path):
    run = runs("few", steps=4, lr=3e-3)
    copy = run.parent / "torn"
    shutil.copytree(run, copy)
    for name in ("metrics.jsonl", "evaluations.jsonl", "data.json", "chat.json", "summary.json"):
        (copy / name).write_text('{"step": "x", "loss": [], "lengths": [[1]], "stop": [3], "text_example": [1]}\n')
        doctor.verdict(copy, examine(copy))
        report.write(copy)
        (copy / name).unlink()
        doctor.verdict(copy, examine(copy))
    with pytest.raises(RunError, match="is not a run"):
        examine(tmp_path)


def test_of_a_search_that_has_not_ended_it_says_how_to_go_on(tmp_path):
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune" / "search.json").write_text("{}")
    with pytest.raises(
        RunError, match=f"is a search that hasn't ended.*lorafit tune --resume --out {tmp_path} goes on"
    ):
        examine(tmp_path)


def test_a_search_in_its_last_phase_goes_on_with_tune(runs, tmp_path, capsys):
    """Its folder has the settings and perhaps the summary of its winner by then."""
    run = tmp_path / "search"
    shutil.copytree(runs("few", steps=4, lr=3e-3), run)
    (run / "tune").mkdir()
    (run / "tune" / "search.json").write_text("{}")
    go_on = f"lorafit tune --resume --out {run}"
    for gone in ("report.html", "summary.json"):
        (run / gone).unlink()
        (fault,) = [one for one in examine(run) if one.level == "fault"]
        assert (fault.name, fault.command) == ("unfinished", go_on) and "the search has no end" in fault.what
    with pytest.raises(RunError, match=f"is a search that hasn't ended; {go_on} goes on"):
        fit.resume(run, {}, terminal=QUIET)
    assert main(["runs", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "search not finished" in told and go_on in told
    shutil.copy(runs("few") / "summary.json", run)
    (run / "tune.json").write_text("{}")
    report.write(run)  # ends it, and must not say of itself that it isn't there
    assert "has no end" not in (run / "report.html").read_text() and "unfinished" not in names(run)
    assert main(["runs", str(tmp_path)]) == 0
    assert "not finished" not in capsys.readouterr().out


ODD = (-1, 0, "a\0b", None, [], [[]], {"x": {}}, 3.5, True, 10**400)


def places(value) -> list[tuple]:
    """The ways to every value within JSON values; of a list's, to the first and the last."""
    keys = list(value) if isinstance(value, dict) else sorted({0, len(value) - 1}) if value else []
    inside = [(key, *way) for key in keys if isinstance(value[key], dict | list) for way in places(value[key])]
    return [(key,) for key in keys] + inside


def with_odd(value, way: tuple, odd):
    """A copy with another value at that place."""
    made = deepcopy(value)
    place = made
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = odd
    return made


@pytest.mark.parametrize(
    "name", ["config.yaml", "data.json", "chat.json", "summary.json", "metrics.jsonl", "evaluations.jsonl"]
)
def test_no_value_breaks_it(runs, tmp_path, name):
    """Whatever a file's values have become, doctor and report have words for it: of a run that has most there is to say."""
    run = tmp_path / "run"
    shutil.copytree(runs("cut", steps=30, lr=3e-3, long="truncate", max_tokens=20), run)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps[-1] |= {"too_large": [200, 100]}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    file = run / name
    text = file.read_text()
    if name.endswith("yaml"):
        whole, write = read_yaml(file), json.dumps  # which is YAML too
    elif name.endswith("jsonl"):
        whole = [json.loads(line) for line in text.splitlines()]

        def write(rows) -> str:
            return "".join(json.dumps(row) + "\n" for row in rows)
    else:
        whole, write = json.loads(text), json.dumps
    for way in places(whole):
        for odd in ODD:
            file.write_text(write(with_odd(whole, way, odd)))
            try:
                doctor.verdict(run, examine(run))
                report.write(run)
            except Exception as error:
                raise AssertionError(f"{name}: {way} = {odd!r}") from error

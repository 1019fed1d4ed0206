"""Runs survive being killed: after `kill -9` anywhere, --resume gives the very bits of an uninterrupted run."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import safetensors.torch
import torch
import yaml

from lorafit import files, fit
from lorafit.errors import ConfigError, DataError, RunError
from lorafit.log import Terminal
from lorafit.run import Run, next_folder
from lorafit.train import watch
from lorafit.verbs.train import described

SETTINGS = {
    "steps": "14",
    "batch_tokens": "200",
    "eval_every": "5",
    "checkpoint_every": "3",
    "dropout": "0.1",
    "samples": "1",
}
QUIET = Terminal(quiet=True)


def config(model, data, out, **changes):
    return fit.read_config(
        str(data), {"model": str(model), "out": str(out), "precision": "fp32", **SETTINGS, **changes}
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "adapter" / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def whole(tiny_model, data_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    fit.fit(config(tiny_model, data_file, out), QUIET)
    return out


def test_a_finished_run_holds_what_scripts_rely_on(whole, tiny_model):
    summary = json.loads((whole / "summary.json").read_text())
    for key in [
        *("tokens_per_second", "seconds", "peak_rss_bytes", "held_out_loss_before", "held_out_loss_after"),
        *("best_step", "trainable_parameters", "base"),
    ]:
        assert summary[key] is not None, key
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, 15))
    assert all({"step", "loss", "lr", "target_tokens", "tokens_per_second"} <= set(m) for m in metrics)
    adapter = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert Path(adapter["base_model_name_or_path"]) == tiny_model
    assert "<html" in (whole / "report.html").read_text()
    saved = yaml.safe_load((whole / "config.yaml").read_text())
    assert saved["r"] == 16 and saved["steps"] == 14 and saved["lr"] > 0
    notes = json.loads((whole / "adapter" / "lorafit.json").read_text())
    assert notes["fingerprint"] and "<|im_end|>" in [s["text"] for s in notes["chat"]["stop"]]
    assert not list(whole.glob("**/.*tmp*")) and not list(whole.glob("**/*.bin")) and not list(whole.glob("**/*.pt"))


def test_the_time_of_a_run_is_told_by_what_it_went_to(whole):
    summary = json.loads((whole / "summary.json").read_text())
    parts = summary["seconds_of"]
    assert list(parts) == ["steps", "evaluations", "answers", "saving"] and all(parts.values())
    assert sum(parts.values()) <= summary["seconds"] + 0.02  # rounded; nothing is counted twice
    told = described(str(whole), {**summary, "seconds_of": {"steps": 90, "evaluations": 8, "answers": 0, "saving": 1}})
    assert "of that steps 1 min 30 s, evaluations 8.0 s, saving 1.0 s\n" in told


def test_the_same_settings_give_the_same_bits(whole, tiny_model, data_file, tmp_path):
    fit.fit(config(tiny_model, data_file, tmp_path / "again"), QUIET)
    assert same(whole, tmp_path / "again")
    fit.fit(config(tiny_model, data_file, tmp_path / "other", seed="1"), QUIET)
    assert not same(whole, tmp_path / "other")


KILLER = """
import os, signal, sys
from lorafit import fit, files, run
from lorafit.log import Terminal
where, count = sys.argv[1], int(sys.argv[2])
def killing(plain):
    def call(*args, **kwargs):
        global count
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)
    return call
if where == "record":
    run.Run.record = killing(run.Run.record)
elif where == "hash":   # between the two files of a checkpoint
    files.sha256 = killing(files.sha256)
elif where == "sync":
    files._sync = killing(files._sync)
elif where == "adapter":
    fit.Training._save_adapter = killing(fit.Training._save_adapter)
elif where == "report":
    fit.report.write = killing(fit.report.write)
elif where == "config":
    files.write_text = killing(files.write_text)
settings = dict(word.split("=", 1) for word in sys.argv[4:])
fit.fit(fit.read_config(sys.argv[3], settings), Terminal(quiet=True))
"""


@pytest.mark.parametrize(
    "where, count",
    [
        ("record", 1),
        ("record", 4),
        ("record", 9),
        ("record", 16),
        ("hash", 5),
        ("sync", 5),
        ("sync", 20),
        ("adapter", 1),
        ("report", 1),
    ],
)
def test_kill_9_and_resume_give_the_same_bits(whole, tiny_model, data_file, tmp_path, where, count):
    out = tmp_path / "killed"
    settings = {"model": tiny_model, "out": out, "precision": "fp32", **SETTINGS}
    words = [f"{k}={v}" for k, v in settings.items()]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, where, str(count), str(data_file), *words], capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (out / "report.html").exists()
    fit.resume(out, {}, terminal=QUIET)
    assert same(whole, out) and (out / "report.html").exists()
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 15))
    losses = [
        [json.loads(line)["loss"] for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (whole, out)
    ]
    assert losses[0] == losses[1]


@pytest.fixture
def half(tiny_model, data_file, tmp_path) -> Path:
    """A run stopped by Ctrl-C after step 7."""
    out = tmp_path / "half"
    seen = []

    class Watching(Run):
        def record(self, name, values):
            super().record(name, values)
            if name == "metrics":
                seen.append(values)
                if len(seen) == 7:
                    os.kill(os.getpid(), signal.SIGINT)

    plain = fit.Run.create
    fit.Run.create = staticmethod(lambda folder: Watching(plain(folder).folder))
    try:
        with pytest.raises(fit.Interrupted, match=r"after step 7 of 14.*--resume --out"):
            fit.fit(config(tiny_model, data_file, out), QUIET)
    finally:
        fit.Run.create = staticmethod(plain)
    return out


def test_ctrl_c_saves_and_resume_goes_on(half, whole):
    fit.resume(half, {}, terminal=QUIET)
    assert same(whole, half)


def test_a_resumed_run_is_alone_in_its_folder(half, monkeypatch):
    with files.alone(half), pytest.raises(RunError, match=f"process {os.getpid()} is at work in {half}"):
        fit.resume(half, {}, terminal=QUIET)
    seen, train = [], fit.Training.run
    monkeypatch.setattr(
        fit.Training, "run", lambda *args, **more: seen.append(files.at_work(half)) or train(*args, **more)
    )
    fit.resume(half, {}, terminal=QUIET)
    assert seen == [str(os.getpid())] and files.at_work(half) == ""


def test_where_a_disk_knows_no_locks_all_get_in(tmp_path, monkeypatch):
    import fcntl

    def unknown(*words):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with files.alone(tmp_path), files.alone(tmp_path):
        assert files.at_work(tmp_path) == ""


@pytest.mark.parametrize("change", ["lr=0.5", "batch_tokens=100", "r=3", "seed=4", "steps=20"])
def test_a_resume_with_other_settings_is_refused_unless_forced(half, change):
    key, value = change.split("=")
    with pytest.raises(RunError, match=rf"{key}: .* -> {value}"):
        fit.resume(half, {key: value}, terminal=QUIET)
    assert not (half / "summary.json").exists()
    if key == "lr":
        fit.resume(half, {key: value}, force=True, terminal=QUIET)
        assert yaml.safe_load((half / "config.yaml").read_text())["lr"] == 0.5
        assert (half / "summary.json").exists()


def test_a_finished_run_goes_on_when_more_steps_are_forced(half):
    fit.resume(half, {}, terminal=QUIET)
    fit.resume(half, {"steps": "17"}, force=True, terminal=QUIET)
    assert json.loads((half / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 17
    assert json.loads((half / "summary.json").read_text())["steps"] == 17


def test_a_resume_with_other_rows_is_refused(half, data_file, tmp_path):
    rows = data_file.read_text().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join([*rows[:-1], rows[-1].replace("sat", "lay")]) + "\n")
    with pytest.raises(RunError, match="data: .* -> "):
        fit.resume(half, {"data": str(other)}, terminal=QUIET)
    other.write_text(data_file.read_text())  # the same rows in another file are the same data
    fit.resume(half, {"data": str(other)}, terminal=QUIET)


def test_a_resume_on_another_base_is_refused(half, tiny_model, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    tensors = safetensors.torch.load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] += 1
    safetensors.torch.save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="base: .* -> "):
        fit.resume(half, {"model": str(copy)}, terminal=QUIET)


def test_resuming_a_finished_run_says_so(whole):
    with pytest.raises(RunError, match="is finished"):
        fit.resume(whole, {}, terminal=QUIET)


@pytest.mark.parametrize("damage", ["truncate", "flip", "state", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_newest_whole_one(half, whole, damage, capsys):
    newest = max((half / "checkpoints").iterdir())
    file = newest / ("state.json" if damage == "state" else "optimizer.safetensors")
    data = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "state":
        file.write_bytes(data[:20])
    else:
        file.unlink()
    said = []
    terminal = Terminal(quiet=True)
    terminal.say = lambda text="": said.append(text)
    fit.resume(half, {}, terminal=terminal)
    assert any("damaged" in line and newest.name in line for line in said)
    assert same(whole, half)


def test_a_full_disk_is_one_clear_error_and_leaves_no_half_checkpoint(tiny_model, data_file, tmp_path, monkeypatch):
    plain = safetensors.torch.save_file
    count = [0]

    def full(tensors, path, *args, **kwargs):
        count[0] += 1
        if count[0] == 6:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        return plain(tensors, path, *args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    out = tmp_path / "full"
    with pytest.raises(RunError, match=r"No space left on device; free some space, then go on with --resume"):
        fit.fit(config(tiny_model, data_file, out), QUIET)
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names and all(name.startswith("step-") for name in names)
    assert fit.Run(out).newest() is not None
    fit.resume(out, {}, terminal=QUIET)


def test_a_folder_with_something_in_it_is_not_overwritten(whole, tiny_model, data_file):
    with pytest.raises(RunError, match="exists already; --resume"):
        fit.fit(config(tiny_model, data_file, whole), QUIET)


def test_a_first_step_of_one_row_is_one_row(tiny_model, data_file, tmp_path):
    said = io.StringIO()
    changes = {"steps": "1", "batch_tokens": "5", "samples": "0"}
    fit.fit(config(tiny_model, data_file, tmp_path / "run", **changes), Terminal(stream=said))
    assert "(the first: 1 row)" in said.getvalue()


def test_a_run_that_trains_while_the_kernels_are_built_has_the_pool(tiny_model, data_file, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(fit.pool, "start", lambda: found.append(fit.kernels.on()) or True)
    monkeypatch.setattr(fit.kernels, "built", lambda: False)
    settings = {"model": str(tiny_model), "out": str(tmp_path / "run"), "steps": "1", "precision": "fp32"}
    fit.fit(fit.read_config(str(data_file), settings), QUIET)
    assert found[0]  # not only where they are switched off for the while


def test_from_starts_new_training_from_the_old_adapter(whole, tiny_model, data_file, tmp_path):
    values = {**SETTINGS, "model": str(tiny_model), "out": str(tmp_path / "more"), "start": str(whole), "steps": "2"}
    for key, asked, has in (("dropout", "0.5", "0.1"), ("r", "64", r"\d+"), ("targets", "q_proj", ".*_proj.*")):
        said = rf"^--from keeps the old adapter's shape, so {key}={asked} can't be set: the adapter has {key}={has};"
        with pytest.raises(ConfigError, match=said):
            fit.read_config(str(data_file), {**values, key: asked})
    with pytest.raises(ConfigError, match=r"so niter=2 can't be set: that is method=lora; leave it out$"):
        fit.read_config(str(data_file), {**values, "niter": "2"})
    (tmp_path / "more.yaml").write_text(f"data: {data_file}\nstart: {whole}\nr: 64\n")
    with pytest.raises(ConfigError, match=r"so r=64 can't be set"):
        fit.read_config(str(tmp_path / "more.yaml"), {})
    (tmp_path / "same.yaml").write_text(
        (whole / "config.yaml").read_text()
    )  # a run's own settings ask for no other shape
    assert fit.read_config(str(tmp_path / "same.yaml"), {"start": str(whole)}).start == str(whole)
    run = fit.fit(fit.read_config(str(data_file), {**values, "precision": "fp32"}), QUIET)
    before = json.loads((run.folder / "evaluations.jsonl").read_text().splitlines()[0])["held_out_loss"]
    old = json.loads((whole / "summary.json").read_text())
    assert abs(before - old["held_out_loss_after"]) < 1e-5
    assert before < old["held_out_loss_before"] - 0.1


def test_a_run_that_started_from_another_does_not_need_it_any_more(whole, tiny_model, data_file, tmp_path):
    shutil.copytree(whole, tmp_path / "old")
    values = {"model": str(tiny_model), "out": str(tmp_path / "new"), "start": str(tmp_path / "old"), "steps": "2"}
    run = fit.fit(fit.read_config(str(data_file), {**values, "precision": "fp32"}), QUIET)
    lineage = json.loads((run.adapter / "lorafit.json").read_text())["lineage"]
    assert lineage["made"] == "train" and lineage["of"][0]["adapter"] == str(tmp_path / "old" / "adapter")
    shutil.rmtree(tmp_path / "old")
    (run.folder / "summary.json").unlink()  # as after a kill at the very end
    fit.resume(run.folder, {}, terminal=QUIET)
    assert (run.folder / "summary.json").exists()


def test_a_kill_before_the_settings_are_written_leaves_a_usable_folder(tiny_model, data_file, tmp_path):
    out = tmp_path / "killed"
    words = [f"{k}={v}" for k, v in {"model": tiny_model, "out": out, "precision": "fp32", **SETTINGS}.items()]
    done = subprocess.run([sys.executable, "-c", KILLER, "config", "1", str(data_file), *words], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    fit.fit(config(tiny_model, data_file, out), QUIET)


def test_early_stopping_keeps_the_best(tiny_model, data_file, tmp_path):
    run = fit.fit(
        config(
            tiny_model,
            data_file,
            tmp_path / "over",
            steps="200",
            lr="0.03",
            eval_every="3",
            patience="2",
            schedule="constant",
        ),
        QUIET,
    )
    summary = json.loads((run.folder / "summary.json").read_text())
    evaluations = [json.loads(line) for line in (run.folder / "evaluations.jsonl").read_text().splitlines()]
    best = min(evaluations, key=lambda e: e["held_out_loss"])
    assert summary["steps"] < 200 and "no better held-out loss in 2" in summary["stopped"]
    assert summary["best_step"] == best["step"] < summary["steps"]
    kept = {k.removeprefix("layers."): v for k, v in run.at(best["step"]).adapter().items()}
    found = weights(run.folder)
    assert torch.equal(
        found["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"], kept["model/layers/0/mlp/up_proj.b"]
    )


def test_nan_stops_with_what_to_try(tiny_model, data_file, tmp_path, monkeypatch):
    from lorafit.train import loop

    plain = loop.losses
    count = [0]

    def poisoned(host, micro):
        count[0] += 1
        return plain(host, micro) * (float("nan") if count[0] == 8 else 1.0)

    monkeypatch.setattr(loop, "losses", poisoned)
    with pytest.raises(fit.Failed, match=r"loss is nan.* at step 8; the adapter of step 5, the best so far.*try lr="):
        fit.fit(config(tiny_model, data_file, tmp_path / "nan"), QUIET)
    assert weights(tmp_path / "nan")


def test_a_runaway_loss_stops(tiny_model, data_file, tmp_path, monkeypatch):
    from lorafit.train import loop

    plain = loop.losses
    count = [0]

    def growing(host, micro):
        count[0] += 1
        return plain(host, micro) * (1 + 0.05 * count[0])

    monkeypatch.setattr(loop, "losses", growing)
    with pytest.raises(fit.Failed, match=r"ran away, from .* at step 1 to .* at step \d+; try lr="):
        fit.fit(config(tiny_model, data_file, tmp_path / "away", steps="60", eval_every="60"), QUIET)
    assert json.loads((tmp_path / "away" / "summary.json").read_text())["steps"] < 30


NOISY = [1.9, 3.1, 0.8, 2.7, 2.2, 1.4, 2.9, 1.1] * 5


@pytest.mark.parametrize(
    "before, losses, stopped",
    [
        (2.3, [2.4, 7.9, 8.3, 8.1, 8.2], 4),  # at once: the first steps are no measure then
        (2.3, [2.4, 2.6, 5.0, 9.0, 9.2, 9.1], 6),
        (math.nan, [2.4, *[11.0] * 5], 5),  # nothing held out: the first step is from before any change
        (math.nan, [0.36, 1.2, 2.8, 2.6, 1.1, 0.9, 2.2], 0),
        (2.3, [2.4, 4.0, 4.9, 5.0, 5.1, *[5.0] * 30], 11),
        (2.3, [2.4, *[2.3] * 20, *[4.5] * 30], 30),
        (2.3, NOISY, 0),
        (math.nan, NOISY, 0),
        (2.0, [0.3, *NOISY], 0),  # a row that was easy by chance
        (10.8, [10.9, 10.5, 9.0, 7.7, 6.5, 6.0, 5.5], 0),
        (0.02, [0.02, 0.3, 0.5, 0.4, 0.2, *[0.1] * 20], 0),
    ],
)
def test_what_counts_as_running_away(before, losses, stopped):
    seen = watch.Watch(before=before)
    found = next((i for i, loss in enumerate(losses, 1) if seen.loss(loss)), 0)
    assert (found > 0) == (stopped > 0) and found <= stopped
    assert watch.Watch.from_json(seen.to_json()).to_json() == seen.to_json()


def test_a_loss_that_explodes_at_once_stops(tiny_model, data_file, tmp_path, monkeypatch):
    """As SmolLM2's does with lr=0.05: 2.95, 9.67, 20.2. A tiny model's logits can't, so its loss is made to."""
    from lorafit.train import loop

    plain, factors = loop.losses, iter([1.0, 1.2, *[4.0] * 60])
    monkeypatch.setattr(loop, "losses", lambda host, micro: plain(host, micro) * next(factors))
    with pytest.raises(fit.Failed, match=r"ran away at once, from .* at step 1 to .* at step \d+; try lr="):
        fit.fit(config(tiny_model, data_file, tmp_path / "away", steps="60", eval_every="60"), QUIET)
    assert json.loads((tmp_path / "away" / "summary.json").read_text())["steps"] < 8


@pytest.mark.parametrize(
    "steps, every, step, left", [(10, 3, 1, 4), (10, 3, 4, 3), (10, 3, 10, 1), (9, 3, 9, 1), (9, 9, 2, 1)]
)
def test_evaluations_that_are_still_to_come_are_counted(steps, every, step, left):
    held_out = SimpleNamespace(held_out=[1])
    one = SimpleNamespace(config=SimpleNamespace(eval_every=every), job=SimpleNamespace(steps=steps), data=held_out)
    assert fit.Training._evaluations_left(one, step) == left
    held_out.held_out = []
    assert fit.Training._evaluations_left(one, step) == 0


def test_bad_rows_stop_before_anything_is_written(tiny_model, data_file, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(data_file.read_text() + '{"messages": []}\nnot json\n')
    with pytest.raises(DataError, match=r"2 of 62 rows.*line 61.*line 62.*--skip-bad-rows"):
        fit.fit(config(tiny_model, bad, tmp_path / "out"), QUIET)
    assert not (tmp_path / "out").exists()
    run = fit.fit(config(tiny_model, bad, tmp_path / "out", skip_bad_rows=True, steps="1"), QUIET)
    assert len(json.loads((run.folder / "data.json").read_text())["faults"]) == 2


def test_full_fine_tuning_and_its_size(whole, tiny_model, data_file, tmp_path):
    values = {**SETTINGS, "model": str(tiny_model), "out": str(tmp_path / "full"), "method": "full", "steps": "6"}
    del values["dropout"]
    run = fit.fit(fit.read_config(str(data_file), values), QUIET)
    summary = json.loads((run.folder / "summary.json").read_text())
    lora = json.loads((whole / "summary.json").read_text())
    assert summary["trainable_parameters"] > 0.95 * summary["total_parameters"]
    assert summary["adapter_bytes"] > lora["adapter_bytes"]


def test_unknown_settings_name_the_nearest(data_file):
    with pytest.raises(ConfigError, match="'learning_rat'"):
        fit.read_config(str(data_file), {"learning_rat": "1"})
    with pytest.raises(ConfigError, match=r"'epoch'; did you mean 'epochs'"):
        fit.read_config(str(data_file), {"epoch": "1"})
    with pytest.raises(ConfigError, match=r"'dropuot'; did you mean 'dropout'"):
        fit.read_config(str(data_file), {"dropuot": "0.1"})


def test_yaml_and_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: x.jsonl\nlr: 1.0e-4\nr: 4\ntargets: [q_proj, v_proj]\nrank_pattern: {q_proj: 8}\n")
    made = fit.read_config(str(path), {"r": "6", "alpha_pattern": "v_proj=3"})
    assert (made.lr, made.options["r"], made.targets) == (1e-4, 6, ["q_proj", "v_proj"])
    assert made.rank_pattern == {"q_proj": 8} and made.alpha_pattern == {"v_proj": 3.0}
    path.write_text("r: [1\n")
    with pytest.raises(ConfigError, match="not valid YAML") as error:
        fit.read_config(str(path), {})
    assert "unicode string" not in str(error.value) and f'"{path}", line 2' in str(error.value)


def test_next_folder(tmp_path):
    assert next_folder("a b/My data.v2.jsonl", tmp_path).name == "My-data.v2-1"
    (tmp_path / "My-data.v2-1").mkdir()
    assert next_folder("My data.v2.jsonl", tmp_path).name == "My-data.v2-2"


def test_a_short_write_is_a_full_disk(tmp_path):
    """numpy names no number for it; GGUF files are written through numpy."""
    with pytest.raises(RunError) as error:
        files.write_file(tmp_path / "x.gguf", lambda place: numpy.zeros(10**6).tofile("/dev/full"), "export again")
    assert str(error.value).endswith("x.gguf: No space left on device; free some space, then export again")


def test_write_folder_is_whole_or_not_at_all(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("old")

    def fails(place):
        (place / "new").write_text("new")
        raise ValueError("in between")

    with pytest.raises(ValueError):
        files.write_folder(tmp_path / "x", fails)
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x" / "old").exists()

    def new(place):
        (place / "new").write_text("new")
        (place / "new").chmod(0o600)  # as safetensors makes them

    files.write_folder(tmp_path / "x", new)
    assert (tmp_path / "x" / "new").stat().st_mode & 0o777 == 0o644
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["new"]


def test_answers_with_odd_line_ends_and_half_characters_survive_a_resume(tmp_path):
    run = Run.create(tmp_path / "r")
    odd = ["a\u2028b\x85c", "half \ud83d", "plain"]
    for step, text in enumerate(odd):
        run.record("evaluations", {"step": step, "samples": [{"answer": text}]})
    (run.folder / "evaluations.jsonl").open("a").write('{"step": 3, "samp')  # torn by a kill
    run.rewind(1)
    assert [r["step"] for r in run.records("evaluations")] == [0, 1]
    assert run.records("evaluations")[0]["samples"][0]["answer"] == odd[0]

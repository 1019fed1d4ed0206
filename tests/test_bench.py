"""Both sides count the same and learn from the same; the sums behind the tables are right. No time is ever asserted."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import base, rows
from transformers import LlamaConfig, LlamaForCausalLM

from lorafit.bench import cases, harness, ours, peers, products, profile, shapes, tables
from lorafit.bench import work as works
from lorafit.bench.work import Work
from lorafit.cli import main
from lorafit.errors import ConfigError, LorafitError, MissingExtra
from lorafit.host import Host
from lorafit.log import Terminal

ROOT = Path(__file__).parent.parent
FIGURES = {
    "tokens",
    "targets",
    "steps",
    "seconds",
    "tokens_per_second",
    "tokens_per_second_whole",
    "first_step_begins",
    "first_step_ends",
    "peak_rss_bytes",
    "losses",
}
LENGTHS = [12, 5, 9, 3, 7, 11, 4, 8]
BEGINNING = 17  # tokens that every document starts with


def documents(lengths, seed=0):
    return [[int(i) % 10 for i in row.ids] for row in rows(lengths, seed)]


@pytest.fixture
def work(tiny_model, tmp_path) -> Work:
    beginning = [int(i) % 10 for i in rows([BEGINNING], 2)[0].ids]
    steps = works.batches([beginning + document for document in documents(LENGTHS)], 3)
    return Work(str(tiny_model), "fp32", steps, str(tmp_path / "start"), documents([6, 10], 1), r=4, lr=1e-2)


def wider(source, place):
    """The model with rows of a whole block: bitsandbytes gets narrower ones wrong on a CPU."""
    config = LlamaConfig.from_pretrained(source)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(place)
    for file in source.glob("*token*"):
        shutil.copy(file, place / file.name)
    return place


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", peers.MODES)
def test_both_sides_learn_the_same_from_the_same(work, mode, tmp_path):
    if mode.startswith("trl"):
        pytest.importorskip("trl")
    if mode == "kbit":
        pytest.importorskip("bitsandbytes")
        work = work.but(quant="nf4", model=str(wider(Path(work.model), tmp_path / "wider")))
    mine = ours.run(work, held_out=True)
    theirs = peers.run(work, mode, held_out=True)
    assert set(theirs) == FIGURES | {"held_out_loss"} and set(mine) == set(theirs) | {"tokens_through"}
    whole = sum(LENGTHS) + BEGINNING * len(LENGTHS)
    assert mine["tokens"] == theirs["tokens"] == work.tokens == whole
    assert mine["tokens_through"] == whole - BEGINNING * (len(LENGTHS) - len(work.steps))
    assert mine["targets"] == theirs["targets"] == work.targets == whole - len(LENGTHS)
    if mode != "trlpack":  # which has steps of its own
        assert mine["losses"] == pytest.approx(theirs["losses"], abs=1e-3)
        assert mine["held_out_loss"] == pytest.approx(theirs["held_out_loss"], rel=1e-4)


def test_the_second_worker_starts_where_the_first_did(work):
    first, again = ours.run(work), ours.run(work)
    assert (Path(work.start) / "adapter_config.json").is_file()
    assert first["losses"] == again["losses"]


def test_work_is_read_as_it_was_written(work, tmp_path):
    assert works.read(work.write(tmp_path / "work.json")) == work


def test_a_worker_prints_one_line_of_json(work):
    found = harness.train(harness.OURS, work)
    assert set(found) == FIGURES | {"tokens_through"}
    assert found["tokens"] == work.tokens


def test_a_worker_that_fails_says_why_in_one_line(work):
    broken = harness.train(harness.OURS, work.but(model="nowhere"))
    assert "no model at 'nowhere'" in broken["error"]


def test_documents_of_asked_lengths(tiny_model):
    made = works.of_lengths([40, 300, 7], tiny_model)
    assert [len(ids) for ids in made] == [40, 300, 7]
    assert made == works.of_lengths([40, 300, 7], tiny_model)
    alpaca = [len(ids) for ids in works.alpaca_like(200, tiny_model)]
    assert min(alpaca) >= works.SHORTEST and max(alpaca) <= works.LONGEST and 150 < sum(alpaca) / 200 < 250


def test_rows_of_a_file_are_cut_and_learned_whole(tiny_model, data_file):
    whole = works.from_file(str(data_file), tiny_model, 512)
    cut = works.from_file(str(data_file), tiny_model, 10)
    assert len(whole) == len(cut) == 60
    assert cut == [ids[:10] for ids in whole]


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["llama", "qwen3", "gpt2", "mixtral"])
def test_products_are_those_of_every_frozen_matrix_and_the_head(shape):
    host = Host(base(shape))
    matrices = [s for s in host.sites.values() if not s.head and not s.lookup]
    found = products.frozen(host)
    assert sum(w.numel() for _, w, _ in found) == sum(s.weight().numel() for s in matrices)
    plan = list(products.needed(host, 100, 1000))
    head = host.base.head.weight
    forward, backward = ([(w, n) for w, n, b in plan if w.shape != head.shape and b is way] for way in (False, True))
    assert len(forward) == len(backward) == len(found)
    assert sorted(n for w, n, _ in plan if w.shape == head.shape) == [488, 488, 512, 512]
    if shape != "mixtral":
        assert all(n == 100 for _, n in forward)
        body = sum(2 * 2 * 100 * s.weight().numel() for s in matrices)
        assert products.flop(host, 100, 1000) == body + 2 * 2 * 1000 * head.numel()
    else:
        assert {n for w, n in forward if w.ndim == 2} == {100, 50}  # two of four experts a token
    assert products.seconds(host, 10, 9, repeats=1) > 0


# --- profile ---------------------------------------------------------------------------------------------------------


def test_a_step_is_taken_apart(work):
    found = ours.profiled(work)
    assert found["tokens"] == sum(LENGTHS[3:6]) + 3 * BEGINNING
    assert sum(found["parts"].values()) == pytest.approx(found["wall"], rel=0.2)
    assert {profile.FROZEN, profile.ADAPTER, profile.ATTENTION, profile.POINTWISE, profile.HEAD} <= set(found["parts"])
    assert {profile.OPTIMISER, profile.BETWEEN} <= set(found["parts"])
    assert not [part for part in found["parts"] if part.startswith(profile.NATIVE)]  # every kernel has a kind


def event(name, parent=None, number=-1, shapes=(), own=1.0):
    return SimpleNamespace(
        name=name,
        cpu_parent=parent,
        sequence_nr=number,
        input_shapes=shapes,
        self_cpu_time_total=own,
        is_async=False,
    )


def test_operations_go_by_what_they_stand_in():
    native = event("lorafit::attention")
    norm = event("bench::" + profile.POINTWISE)
    made = event("aten::mul", norm, number=7)
    backward = event("autograd::engine::evaluate_function: MulBackward0", number=7)
    cases_ = {
        "lorafit::attention": event("aten::mm", native, shapes=[[9, 16], [16, 16]]),
        profile.FROZEN: event("aten::mm", norm, shapes=[[9, 16], [16, 16]]),
        profile.ADAPTER: event("aten::mm", norm, shapes=[[9, 16], [16, 4]]),
        profile.HEAD: event("aten::mm", None, shapes=[[9, 16], [16, 61]]),
        profile.OPTIMISER: event("aten::mul", event("Optimizer.step#AdamW.step")),
        profile.ATTENTION: event("aten::_scaled_dot_product_flash_attention_for_cpu"),
        profile.REST: event("aten::index"),
    }
    for expected, each in cases_.items():
        assert profile.grouped([each], r=4, vocabulary=61) == {expected: 1e-6}
    found = profile.grouped([norm, made, backward, event("aten::mul", backward)], 4, 61)
    assert found == pytest.approx({profile.POINTWISE: 4e-6})


def test_scopes_leave_the_base_as_it_was():
    host = Host(base("llama"))
    host.add("a", r=2)
    with profile.scopes(host):
        pass
    assert not any(m._forward_pre_hooks for m in host.base.model.modules())


# --- sums and tables -------------------------------------------------------------------------------------------------


def result(speed, peak=1e9, loss=None):
    return {"tokens_per_second": speed, "tokens_per_second_whole": speed, "peak_rss_bytes": peak} | (
        {"held_out_loss": loss} if loss else {}
    )


RUNS = {
    "ours": [result(100, 1e9, 2.0) | {"tokens": 4000, "tokens_through": 3000}, result(220, 1e9), result(300, 2e9)],
    "trainer": [result(50, 2e9, 2.01), result(100, 4e9), {"error": "killed"}],
    "trl+tuned": [{"error": "no"}] * 3,
}


def test_ratios_compare_neighbours_and_skip_what_failed():
    assert harness.ratios(RUNS, "trainer", "tokens_per_second") == [2.0, 2.2]
    assert harness.median(RUNS["ours"], "tokens_per_second") == 220
    assert harness.ratios(RUNS, "trl+tuned", "tokens_per_second") == []
    assert harness.median(RUNS["trl+tuned"], "tokens_per_second") is None


def test_warm_up_is_left_out_of_one_speed_alone():
    found = ours.figures([100, 50, 50], [0.0, 10.0, 11.0, 12.0], 5, [0.5, 1.0], 197)
    assert found["tokens_per_second"] == 50 and found["tokens_per_second_whole"] == pytest.approx(200 / 12)
    assert ours.figures([100], [0.0, 10.0], 5, [0.5, 1.0], 99)["tokens_per_second"] == 10


def whole():
    timed = {"seconds_timed": 4.0, "products_before": 1.0, "products_after": 3.0, "products_flop": 4 * 10**12}
    return {
        "machine": {"cpu": "some", "threads": 2, "capability": "AVX2", "amx": False, "memory_bytes": 8e9, "torch": "2"},
        "settings": {"cases": list(cases.CASES), "r": 16, "repeats": 3},
        "precision": "bf16",
        "documents": {"data": None, "rows": 16, "tokens": 3000},
        "trained": RUNS,
        "cases": [{"name": "r=4", "precision": "bf16", "tokens_a_step": 1500, "runs": {k: RUNS[k] for k in ("ours", "trainer")}}],
        "limit": [{"precision": "bf16", "steps": 2, "runs": [timed] * 3}],
        "profile": [{"precision": "fp32", "wall": 2.0, "tokens": 10, "parts": {"attention": 1.5, "x|y": 0.5}}],
        "start": {"cold": [{"begins": 20.0, "ends": 30.0}], "warm": [{"begins": t, "ends": t + 2} for t in (2.0, 3.0, 7.0)]},
    }  # fmt: skip


def test_every_table_is_drawn():
    text = "\n\n".join(table.text() for table in tables.tables(whole()))
    for line in (
        "trainer       75 75 2.10x 2.00-2.20",
        "with once: 25.0% fewer tokens go through the model.",
        "trl+tuned failed failed",
        "ours 1.0 GB",
        "trainer 2.0100 -0.50%",
        "r=4 bf16 1,500 220 75 2.10x 0.38x",
        "bf16 0.500 s 1.500 s 2.00 2.000 s 50.0%",
        "attention 1500.0 ms 75.0%",
        "lorafit train, nothing built yet 20.0 s 30.0 s",
        "lorafit train 3.0 s 5.0 s",
    ):
        assert " ".join(line.split()) in " ".join(text.split()), line
    assert "killed" in text
    page = "\n\n".join(table.markdown() for table in tables.tables(whole()))
    assert "| x\\|y | 500.0 ms | 25.0% |" in page
    assert "documents with lengths like Alpaca's" in tables.method(whole())


def test_only_the_tables_asked_for():
    found = whole() | {"settings": {"cases": ["memory"]}}
    for gone in ("cases", "limit", "profile", "start"):
        found.pop(gone)
    (made,) = tables.tables(found)
    assert made.title == "Peak memory"


# --- the verb --------------------------------------------------------------------------------------------------------


def in_process(module, words, env=None):
    """What a worker does, without a process for it."""
    work = works.read(Path(words[0]))
    assert module in ("ours", "peers")
    if module == "ours":
        return ours.run(work, held_out="--held-out" in words, limit="--limit" in words)
    with contextlib.redirect_stdout(sys.stderr):
        return peers.run(work, held_out="--held-out" in words, tuned="--tuned" in words)


@pytest.mark.filterwarnings("ignore")
def test_the_verb_from_end_to_end(tiny_model, data_file, capsys, monkeypatch):
    monkeypatch.setattr(harness, "worker", in_process)
    words = ["--data", data_file, "--model", tiny_model, "--rows", "16", "--held-out", "4", "--repeats", "1"]
    words += [
        "--cases",
        "speed,memory,loss,limit",
        "--peers",
        "trainer,trainer+tuned",
        "--precision",
        "fp32",
        "--quick",
        "--json",
    ]
    assert main(["bench", *map(str, words)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["trained"]) == {"ours", "trainer", "trainer+tuned"} and found["documents"]["rows"] == 16
    assert [part["precision"] for part in found["limit"]] == ["fp32"]
    mine, theirs = (found["trained"][name][0] for name in ("ours", "trainer"))
    assert mine["held_out_loss"] == pytest.approx(theirs["held_out_loss"], rel=1e-4)
    assert len(tables.tables(found)) == 4


def test_from_command_to_first_step(tiny_model, monkeypatch):
    monkeypatch.setattr(cases, "_missing", lambda: True)
    found = cases.run(
        cases.quick(model=str(tiny_model), cases=["start"], repeats=1, precision="fp32"), Terminal(quiet=True)
    )
    assert set(found["start"]) == {"cold", "warm"}
    for (first,) in found["start"].values():
        assert 0 < first["begins"] < first["ends"]


@pytest.mark.filterwarnings("ignore")
def test_the_grid_of_cases(tiny_model, monkeypatch):
    monkeypatch.setattr(harness, "worker", in_process)
    monkeypatch.setattr(shapes, "build", lambda shape, source, place: tiny_model)
    # The third is longer than the tiny model's context, the last isn't in the precision asked for.
    names = ["r=4", "8 x 40", "1 x 8192", "qwen3 fp32", "gpt2 bf16"]
    settings = cases.quick(
        model=str(tiny_model), cases=["cases"], grid=names, peers=["trainer"], repeats=1, precision="fp32"
    )
    found = cases.run(settings, Terminal(quiet=True))["cases"]
    assert [case["name"] for case in found] == ["r=4", "8 x 40", "qwen3 fp32"]
    assert found[1]["tokens_a_step"] == 320
    for case in found:
        mine, theirs = (case["runs"][side][0] for side in ("ours", "trainer"))
        assert (mine["tokens"], mine["targets"]) == (theirs["tokens"], theirs["targets"])


@pytest.mark.parametrize(
    "words, said",
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--cases", "spede"], "unknown case 'spede'"),
        (["--peers", "unknown"], "unknown peer 'unknown'"),
        (["--rows", "8"], "at least 1 repeat and 16 rows"),
        (["--held-out", "0"], "the held-out loss needs rows"),
        (["--cases", "cases", "--grid", "r=3"], "no case 'r=3'"),
    ],
)
def test_mistakes_are_told_in_one_line(tiny_model, capsys, monkeypatch, words, said):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: object())
    assert main(["bench", "--model", str(tiny_model), "--repeats", "1", *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lorafit:")]
    assert said in line


def test_too_few_rows_are_told_with_what_would_do(tiny_model, data_file, monkeypatch):
    settings = cases.Settings(model=str(tiny_model), data=str(data_file), peers=["trainer"], held_out=20)
    with pytest.raises(ConfigError, match="has 60 rows.*--rows 40 would do"):
        cases.run(settings, Terminal(quiet=True))


def test_a_missing_extra_is_told_and_the_rest_runs_without(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in ("trl", "peft") else find(name))
    with pytest.raises(MissingExtra, match=r"peft and trl; pip install 'lorafit\[bench\]', or measure --cases limit"):
        cases.run(cases.Settings(peers=["trl"], cases=["speed"]), Terminal(quiet=True))
    harness.need(harness.sides([]), "the rest")


def test_a_side_that_fails_is_not_tried_again_and_a_fault_of_ours_is_told(work, monkeypatch, tiny_model):
    monkeypatch.setattr(harness, "train", lambda side, *a: result(5) if side.ours else {"error": "no memory"})
    runs = harness.compare("x", work, harness.sides(["trainer"]), 2, Terminal(quiet=True))
    assert runs == {"ours": [result(5)] * 2, "trainer": [{"error": "no memory"}]}
    monkeypatch.setattr(harness, "train", lambda *a: {"error": "a fault"})
    with pytest.raises(LorafitError, match="a fault"):
        cases.run(cases.quick(model=str(tiny_model), cases=["speed"], peers=["trainer"]), Terminal(quiet=True))


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_shapes_are_built(shape, tiny_model, tmp_path):
    from lorafit.model.load import load

    made = load(str(shapes.build(shape, tiny_model, tmp_path)), precision="bf16", device="cpu")
    assert made.packs and made.plain_head and made.dtype == torch.bfloat16
    assert 60e6 < made.parameters() < 150e6


# --- benchmarks/ -----------------------------------------------------------------------------------------------------


def test_tables_are_written_between_the_markers(tmp_path, monkeypatch):
    results, page = tmp_path / "results.json", tmp_path / "speed.md"
    results.write_text(json.dumps(whole()))
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    script = runpy.run_path(str(ROOT / "benchmarks" / "all.py"))
    monkeypatch.setattr(sys, "argv", ["all.py", "--from", str(results), "--write", str(page)])
    for _ in range(2):
        script["main"]()
    written = page.read_text(encoding="utf-8")
    assert written.count("**Training speed**") == 1 and "| ours | 220 |" in written
    assert written.startswith(text[:200]) and written.endswith(text[-200:])


def test_a_stopped_sitting_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    asked = []

    def measured(settings, terminal):
        asked.append(list(settings.cases))
        if len(asked) == 3:
            raise KeyboardInterrupt
        own = "trained" if "speed" in settings.cases else settings.cases[0]
        found = {key: value for key, value in whole().items() if key not in script["PARTS"] or key == own}
        return found | {"settings": {**whole()["settings"], "cases": list(settings.cases)}}

    script = runpy.run_path(str(ROOT / "benchmarks" / "all.py"))
    monkeypatch.setattr(cases, "run", measured)
    with pytest.raises(KeyboardInterrupt):
        script["measure"](cases.Settings(), tmp_path / "results.json")
    found = script["measure"](cases.Settings(), tmp_path / "results.json")
    assert asked == [["speed", "memory", "loss"], ["cases"], ["limit"], ["limit"], ["profile"], ["start"]]
    assert found["settings"]["cases"] == list(cases.CASES) and len(tables.tables(found)) == 7

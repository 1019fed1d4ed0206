"""From a configuration to a run: the only place that wires the whole arrow, from data file to finished adapter."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import lorafit
from lorafit import advice, doctor, files, peft_files, places, plan, report
from lorafit import config as settings
from lorafit.batches import Plan, spared
from lorafit.config import Config
from lorafit.data import Chat, Dataset, Tokens, fingerprint, prepare
from lorafit.data.report import PLACEHOLDERS
from lorafit.errors import ConfigError, MissingExtra, ModelError, OutOfMemory, RunError, UserError
from lorafit.evaluate import SAMPLE_TOKENS, TOKENS, evaluate, prompt_of, spacing
from lorafit.generate import answer
from lorafit.host import Host
from lorafit.log import Terminal, count, cut, many, size
from lorafit.machine import (
    Stop,
    gpu_memory,
    gpu_memory_limit,
    gpu_peak,
    memory,
    memory_limit,
    out_of_memory,
    peak_memory,
)
from lorafit.methods import METHODS, find
from lorafit.methods import settings as method_settings
from lorafit.model.base import Base
from lorafit.model.body import Body
from lorafit.model.load import context_of, load, load_tokenizer, locate, pick_device, shape_of, stop_ids, stored_bytes
from lorafit.model.new_tokens import extend
from lorafit.model.quant import Quant
from lorafit.model.starts import Start
from lorafit.native import build as kernels
from lorafit.native import pool
from lorafit.native.quantised import ROUNDED
from lorafit.plan import Estimate
from lorafit.route import StackLike
from lorafit.run import Checkpoint, Run, next_folder, searching
from lorafit.session import adapter_folder, base_of, quant_of
from lorafit.train import optim
from lorafit.train.activations import MOST, study
from lorafit.train.loop import Job, Step, train
from lorafit.train.watch import Watch

MARGIN = 1.2  # of what is there, that an estimate may be above it
NAME = "adapter"  # of the one adapter that a run trains, beside which a search has others
MOST_TOKENS = 4096  # of a row, where the user sets no limit
PARTS = ("steps", "evaluations", "answers", "saving")  # what a run's time goes to

# Tokens x parameters above which kernels save more time than waiting for their compilation takes, which has gone on beside
# loading (1,100 tokens, 135 million: six seconds, where the plain operations take 4 to 6 ms a token longer).
WORTH_COMPILING = 1.5e11

# On a GPU: steps x layers above which compiling the layers (half a minute) saves more than it takes (about 1.5 ms each).
WORTH_COMPILING_LAYERS = 20_000

# Settings that a resumed run may change: they decide where things are, what is shown or what memory is taken, not what is
# learned. The rows and the base are compared by their contents.
_FREE = {"data", "held_out", "out", "model", "start", "samples", "log", "checkpoint_every", "skip_bad_rows", "map"}
_FREE |= {"cache", "memory", "checkpointing", "share"}


class Interrupted(UserError):
    """Ctrl-C or SIGTERM: everything is saved."""

    exit_code = 130


class Failed(RunError):
    """Training stopped because it went wrong (NaN, divergence)."""


def read_config(source: str | None, given: Mapping[str, Any]) -> Config:
    """A config from a data file or YAML file and the settings given beside it (which win)."""
    values: dict[str, Any] = {}
    if source is not None:
        if Path(source).suffix in (".yaml", ".yml"):
            values = settings.read_yaml(Path(source))
        else:
            values["data"] = source
    if given.get("steps") is not None and given.get("epochs") is not None:
        raise ConfigError(f"steps={given['steps']} and epochs={given['epochs']} both say how long; leave one out")
    if start := {**values, **given}.get("start"):
        folder = adapter_folder(start)
        values, given = _without_shape({**values, **given}, folder), {}
        before = quant_of(folder)
        values = {**({"quant": before.kind, "double_quant": before.double} if before else {}), **values}
    return build({**values, **given})


def _without_shape(values: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The settings beside an adapter that training starts from, which has its shape already; one that asks for another shape
    isn't ignored."""
    method, has = peft_files.settings_of(source)
    kinds = {key: kind for each in METHODS.values() for key, (kind, _) in method_settings(each).items()}
    kinds |= {"method": str, "targets": list[str], "whole": list[str], "new_tokens": list[str]}
    kinds |= {"rank_pattern": dict[str, int], "alpha_pattern": dict[str, float]}
    has = {"method": method, **has}
    for key, value in values.items():
        asked = settings.coerce(key, kinds[key], value) if key in kinds else None
        if asked is None or asked in ([], {}) or (key in has and asked == has[key]):
            continue
        old = f"the adapter has {key}={_word(has[key])}" if key in has else f"that is method={method}"
        raise ConfigError(
            f"--from keeps the old adapter's shape, so {key}={_word(asked)} can't be set: {old}; leave it out"
        )
    return {key: value for key, value in values.items() if key not in kinds}


def _word(value: Any) -> str:
    """A setting's value as it is written."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def build(values: Mapping[str, Any]) -> Config:
    """A checked config; the method's own settings are among the known keys."""
    kind = find(str(values.get("method", Config().method)))
    made = settings.build(values, method_settings(kind))
    if kind.needs_codes and made.quant == "none":
        raise ConfigError(f"method={made.method} starts from what quantising loses; add quant=nf4")
    return made


def quant_for(config: Config, source: Path | None = None) -> Quant | None:
    """How the base is to be stored: in codes of the method's own, where it makes such, or in those that the adapter in
    `source` was trained with."""
    made = Quant.of(config.quant, config.double_quant)
    kind = find(config.method)
    if made is None or (source is None and not kind.codes):
        return made
    if source is not None:
        before = quant_of(source)
        return before if before is not None and replace(before, start=None) == made else made
    start = Start(
        config.method,
        config.options["r"],
        config.options[kind.codes],
        tuple(config.targets or kind.targets),
        tuple(sorted(config.rank_pattern.items())),
    )
    return replace(made, start=start)


def fit(config: Config, terminal: Terminal | None = None) -> Run:
    """Train a new adapter as `config` says. Returns the finished run.

    Raises DataError, ModelError, ConfigError before anything is written; Failed when training went wrong and Interrupted
    on Ctrl-C, both with what was reached saved in the run.
    """
    terminal = terminal or Terminal()
    if not config.data:
        raise ConfigError("no data; give a file: lorafit train DATA")
    folder = Path(config.out) if config.out else next_folder(config.data)
    if folder.exists():
        Run.create(folder)  # says at once what is in the way, before minutes of work
    made = Training(config, terminal)
    run = Run.create(folder)
    with files.alone(run.folder):
        return _begin(config, made, run)


def _begin(config: Config, made: Training, run: Run) -> Run:
    """Write what the folder holds before the first step, then train."""
    config.out = str(run.folder)
    if config.start:  # the run keeps what it started from, so that it can be resumed whatever becomes of the old one
        source = adapter_folder(config.start)
        made.terminal.say(f"starts from {source}")
        lineage = {"made": "train", "of": [peft_files.ancestor(str(source), source)]}
        made.host.adapters[NAME].notes["lineage"] = lineage
        files.write_folder(run.folder / "start", lambda place: _start(source, place, lineage))
        config.start = str((run.folder / "start").absolute())
    files.write_text(run.folder / "config.yaml", settings.to_yaml(config))
    files.write_json(run.folder / "data.json", made.data.report.to_json())
    files.write_json(run.folder / "chat.json", made.chat.to_json())
    return made.run(run, None)


def resume(folder: str | Path, given: Mapping[str, Any], force: bool = False, terminal: Terminal | None = None) -> Run:
    """Go on with a run from its newest whole checkpoint. RunError shows the differences if it isn't the same training."""
    terminal = terminal or Terminal()
    run = Run.open(Path(folder))
    if search := searching(run.folder):
        raise RunError(f"{run.folder} is {search}")
    with files.alone(run.folder):
        return _go_on(run, given, force, terminal)


def _go_on(run: Run, given: Mapping[str, Any], force: bool, terminal: Terminal) -> Run:
    """`resume`, in a folder that no other process is at work in."""
    saved = settings.read_yaml(run.folder / "config.yaml")
    if given.get("method", saved.get("method")) != saved.get("method"):
        raise RunError(f"{run.folder} trains method={saved.get('method')}; another method needs a new run")
    before, after = build(saved), build({**saved, **given, "out": str(run.folder)})
    now = _deciding(after)
    changes = [f"{key}: {was} -> {now.get(key)}" for key, was in _deciding(before).items() if was != now.get(key)]
    if changes and not force:
        raise RunError(_refusal(run, changes))
    newest = run.newest(terminal.say)
    if newest is None:
        terminal.say(f"{run.folder} has no checkpoint yet; starting from its first step")
    elif newest.state.get("finished") and not changes and _is_complete(run):
        raise RunError(f"{run.folder} is finished ({newest.state['finished']}); --from {run.folder} trains on from it")
    # The chat that the run began with: a template may show the date, which must not move while a run is on.
    made = Training(after, terminal, files.load_json(run.folder / "chat.json", RunError))
    changes += [
        f"{what}: {newest.state['identity'].get(what, '?')[:12]} -> {now[:12]}"
        for what, now in made.identity.items()
        if newest is not None and newest.state["identity"].get(what) != now
    ]
    if changes and not force:
        raise RunError(_refusal(run, changes))
    if newest is not None:
        made.check_shape(newest)
    files.write_text(run.folder / "config.yaml", settings.to_yaml(after))
    files.write_json(run.folder / "data.json", made.data.report.to_json())
    return made.run(run, newest, changed=bool(changes))


def _deciding(config: Config) -> dict[str, Any]:
    """The settings that what is learned depends on. Where the optimiser's state lies isn't one."""
    values = {key: value for key, value in settings.flat(config).items() if key not in _FREE}
    return {**values, "optimizer": config.optimizer.removeprefix("paged_")}


def _start(source: Path, place: Path, lineage: Mapping[str, Any]) -> None:
    """A copy of the adapter that training starts from, with the notes that a resumed run carries on."""
    shutil.copytree(source, place, dirs_exist_ok=True)
    files.write_json(place / peft_files.OWN, {**peft_files.read_notes(source), "lineage": lineage})


def _is_complete(run: Run) -> bool:
    """Everything a finished run holds is there: a kill may fall between the last checkpoint and these files."""
    return all((run.folder / name).exists() for name in ("adapter/adapter_config.json", "summary.json", "report.html"))


def _refusal(run: Run, changes: list[str]) -> str:
    return (
        f"{run.folder} was trained with other settings ({'; '.join(changes)}); leave them as they were,"
        f" --force to go on all the same, or --from {run.folder} to start new training from its adapter"
    )


class Training:
    """What a run needs in memory, made once: base, chat, rows, host, and the job of the adapter `name`."""

    def __init__(self, config: Config, terminal: Terminal, saved_chat: dict[str, Any] | None = None) -> None:
        self.config, self.terminal, self.name = config, terminal, NAME
        self.shares = False  # its steps' time with others
        _check_files(config)
        _check_extras(config)
        source = start_of(config)
        if config.model != Config().model and Path(config.model).expanduser().exists():
            config.model = str(Path(config.model).expanduser().absolute())  # the run may be used from another folder
        if source is not None:
            config.new_tokens = list(peft_files.read_notes(source).get("new_tokens") or {})
        kernels.switch(config.native)
        on_cpu = pick_device(config.device).type == "cpu"
        if on_cpu:
            kernels.prepare()
            pool.start()  # here: while the kernels are being built they are off, and loading would go without it
        path, self.chat = _chat_of(config, terminal)
        tokenizer = self.chat.tokenizer
        template = hashlib.sha256(self.chat.template.encode()).hexdigest()
        if saved_chat is not None and saved_chat["template"] == self.chat.template:
            self.chat = Chat.from_json({**saved_chat, "system": config.system}, tokenizer)
        if self.chat.default_template:
            terminal.say(f"{config.model} has no chat template; using lorafit's plain one (shown in the report)")
        config.data = str(Path(config.data).expanduser().absolute())
        config.held_out = str(Path(config.held_out).expanduser().absolute()) if config.held_out else None
        self.data = load_data(config, self.chat, terminal)
        self.chat.system = config.system or self.data.report.system
        self.memory = settings.byte_count("memory", config.memory) if config.memory else None
        self.advised = advised(config, path, self.data)
        self.expected = _expected(config, path, self.data.train, self.memory, source)
        ready = config.native and (kernels.built() or not on_cpu)
        with terminal.working("loading the base") as spinner, kernels.switched(ready):
            base = load(
                config.model,
                precision=config.precision,
                device=config.device,
                quant=quant_for(config, source),
                tokenizer=tokenizer,
                tokens=config.new_tokens,
                working=spinner.rename,
            )
        config.precision = "bf16" if base.dtype == torch.bfloat16 else "fp32"
        config.device = str(base.device)
        if config.checkpointing:
            base.checkpointing(True)
        if base.body is not None:
            base.body.shares = config.share
        if not base.packs:
            terminal.say(f"{config.model}: documents can't share a row in this architecture; each goes through alone")
        self.host = Host(base)
        self._add_adapter(source)
        self.job = self._job()
        self._wait_for_kernels()
        if self.memory is not None and self.memory <= self._used():
            raise ConfigError(
                f"memory={config.memory}: the base and the rows alone take {size(self._used())}; allow more"
            )
        self.identity = {
            "data": fingerprint(self.data),
            "base": base.fingerprint,
            "chat template": template,
        }

    def _limited(self) -> AbstractContextManager[object]:
        """Within it, no more than `memory` can be taken where the base is."""
        return (gpu_memory_limit if self.host.base.device.type == "cuda" else memory_limit)(self.memory)

    def beside(self, name: str, config: Config) -> Training:
        """A further adapter over the same base, to be trained on the same rows as `config` says: it may differ from this one's
        in what neither base nor rows depend on."""
        other = copy.copy(self)
        same = ("model", "data", "held_out", "max_tokens", "precision", "device")  # resolved when they were loaded
        other.config, other.name = replace(config, **{key: getattr(self.config, key) for key in same}), name
        other.shares = True
        other._add_adapter(None)
        other.job = other._job()
        other._start()
        return other

    def _start(self) -> None:
        """Nothing is done yet."""
        self.watch = Watch(self.config.patience)
        self.seconds = 0.0
        self.spent = dict.fromkeys(PARTS, 0.0)  # seconds
        self.evaluating = 0.0  # seconds of the last evaluation and its checkpoint
        self.tokens = 0
        self.peak = self.halvings = 0
        self.began = time.monotonic()

    @contextmanager
    def _on(self, part: str) -> Iterator[None]:
        """What is done within it counts as this part of the run's time."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.spent[part] += time.monotonic() - began

    def _used(self) -> int:
        """Bytes in use where the base is: what `memory` limits."""
        return gpu_memory() if self.host.base.device.type == "cuda" else memory()

    def _add_adapter(self, source: Path | None) -> None:
        config = self.config
        if source is not None:
            adapter = self.host.load(source, self.name)
            for line in peft_files.passed_over(source):
                self.terminal.say(line)
            config.method, config.options = adapter.method, dict(adapter.options)
            return
        with self.terminal.working("making the adapter"):
            self.host.add(
                self.name,
                config.method,
                config.targets,
                rank_pattern=config.rank_pattern,
                alpha_pattern=config.alpha_pattern,
                whole=config.whole,
                seed=config.seed,
                **config.options,
            )

    def _job(self) -> Job:
        config = self.config
        if config.lr is None:  # a model that only loading could tell the shape of
            self.advised = advice.settle(config, self.data, self.host.base.model.config)
        assert config.batch_tokens is not None and config.lr is not None
        plan = Plan(self.data.train, config.batch_tokens, config.accumulate, config.seed)
        steps = config.steps or plan.steps(config.epochs)
        config.eval_every = config.eval_every or spacing(steps)
        return Job(self.name, plan, steps, config.lr, config.schedule, config.warmup, config.clip, config.weight_decay)

    def _wait_for_kernels(self) -> None:
        """Compiling goes on beside loading; a run that is over sooner than it would pay doesn't wait for its end. On a GPU
        there are layers to compile instead."""
        base, job = self.host.base, self.job
        if self.config.native and base.device.type == "cuda" and base.body is not None and base.quant is None:
            if job.steps * len(base.body.inner.layers) > WORTH_COMPILING_LAYERS:
                self._compile_layers(base.body)
            return
        if not self.config.native or base.device.type != "cpu" or kernels.built():
            return
        assert self.config.batch_tokens is not None
        tokens = job.steps * min(self.config.batch_tokens, int(job.plan.lengths.sum()))
        if tokens * base.parameters() > WORTH_COMPILING:
            with self.terminal.working("compiling the kernels, once"):
                kernels.library()
            return
        kernels.switch(False, "not compiled yet")
        self.terminal.say("the kernels are still being compiled; this short run doesn't wait for them")

    def _compile_layers(self, body: Body) -> None:
        """Have torch.compile take the layers, and see whether it gives what they give; without, everything works, slower."""
        why = ""
        try:
            with self.terminal.working("compiling the layers"):
                want = self._small_gradient()
                body.compiled = True
                off = (self._small_gradient() - want).norm() / want.norm()
            if not off < (0.25 if body.inner.dtype == torch.bfloat16 else 1e-3):  # rounding, of many layers
                why = f"their gradients would be off by {off:.2g}"
        except Exception as error:  # no compiler, no Triton, a torch that can't: whatever it is, there is another way
            if out_of_memory(error):
                raise
            why = next(iter(str(error).splitlines()), type(error).__name__)
        if why:
            body.compiled = False
            self.terminal.say(f"the layers can't be compiled: {why}")

    def _small_gradient(self) -> torch.Tensor:
        """The adapter's gradient, flat, of a sum of hidden states of two short documents."""
        adapter, base = self.host.adapters[self.name], self.host.base
        ids = torch.arange(64, device=base.device) % base.model.get_input_embeddings().weight.shape[0]
        try:
            adapter.train()
            with self.host.route(self.name):
                self.host.hidden(ids, [40, 24])[:, ::2].float().sum().backward()
            return torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])
        finally:
            adapter.zero_grad(set_to_none=True)
            adapter.eval()

    # --- the run -----------------------------------------------------------------------------------------------------

    def run(self, run: Run, newest: Checkpoint | None, changed: bool = False) -> Run:
        """Train from `newest` (or the start) to the end, and write what a finished run holds. `changed`: it isn't the same
        training any more, so an end that was recorded isn't its end."""
        self._start()
        run.begin()
        if newest is None:
            with self._limited():
                self.look()
        self.say_what(run)
        if parts := self.host.base.parts():
            errors = [{"path": path, "plain": part.plain, "after": part.after} for path, part in parts.items()]
            files.write_json(run.folder / "start.json", errors)
        try:
            reason = self._to_its_end(run, newest, changed)
        except Exception as error:
            run.broke_off(error)
            raise
        return self.finish(run, reason)

    def _to_its_end(self, run: Run, newest: Checkpoint | None, changed: bool) -> str:
        """Train; returns why it ended early, or ''."""
        writer = _tensorboard(self.config, run)
        stop = Stop(lambda: self.terminal.say("stopping after this step; once more to stop at once"))
        job = self.job
        try:
            job.optimizer = self.optimizer(run)
            if newest is not None:
                self.restore(run, newest)
                self.began -= self.seconds
            with self._limited(), stop, self.terminal.progress() as progress:
                if newest is None:
                    run.rewind(-1)
                    self._first(run)
                ended = newest.state.get("finished", "") if newest is not None else ""
                # A run that had ended early, and was killed before its adapter was written, ends there again.
                over = bool(ended) and not changed and newest is not None and newest.step < self.job.steps
                return ended if over else self._steps(run, progress, stop, writer)
        except Exception as error:
            if not isinstance(error, OutOfMemory) and not out_of_memory(error):
                raise
            raise OutOfMemory(next(iter(str(error).splitlines()), "out of memory"), self._too_little(run)) from None
        finally:
            pool.give_back()

    def optimizer(self, run: Run) -> optim.Optimizer:
        """Of the kind that is set; what is paged lies in the run's folder."""
        job, adapter = self.job, self.host.adapters[self.name]
        return optim.optimizer(adapter, job.lr, job.weight_decay, self.config.optimizer, run.pages)

    def _too_little(self, run: Run) -> str:
        """What to try when there isn't enough memory for anything less."""
        config, newest = self.config, run.newest()
        now = [] if config.checkpointing else ["checkpointing=true"]
        now += [f"a larger memory than {config.memory}"] if config.memory else ["more memory"]
        anew = ["a smaller max_tokens", "a smaller r", *(["precision=bf16"] if config.precision != "bf16" else [])]
        return (
            f"{f'step {newest.step} is saved' if newest else 'no step is done yet'}, go on with {' or '.join(now)}:"
            f" lorafit train --resume --out {run.folder}; or start anew with {' or '.join(anew)}"
        )

    def check_shape(self, newest: Checkpoint) -> None:
        """RunError, before the run is touched, where a checkpoint's adapter isn't of this run's shape any more."""
        try:  # into memory alone: a method may take its shape from what was saved
            self.host.adapters[self.name].load_state_dict(newest.adapter())
        except RuntimeError:
            raise RunError(
                f"{newest.folder} holds an adapter of another shape; r, targets and patterns can't be changed by --force,"
                f" start a new run instead"
            ) from None

    def look(self) -> None:
        """Let the method see what its sites are given, where it starts from that."""
        job, most = self.job, math.ceil(self.config.batch_tokens or TOKENS)
        doing = f"looking at what the sites are given, in at most {MOST} batches, for method={self.config.method}"
        with self.terminal.working(doing) as spinner:
            seen = study(self.host, self.name, job.plan.since(0), tokens=min(TOKENS, most), progress=spinner.update)
        if seen:
            found = self.host.adapters[self.name].ranks()
            few, many = min(found, default=0), max(found, default=0)
            self.terminal.say(f"start     {seen} batches looked at: ranks from {few} to {many}")

    def restore(self, run: Run, newest: Checkpoint) -> None:
        """Go back to a checkpoint, and the run's records with it."""
        adapter = self.host.adapters[self.name]
        adapter.load_state_dict(newest.adapter())
        assert self.job.optimizer is not None
        try:
            optim.restore(adapter, self.job.optimizer, newest.optimizer())
        except KeyError:
            raise RunError(
                f"{newest.folder} holds the state of another optimizer than {self.config.optimizer}; it can't be changed by"
                " --force, start a new run instead"
            ) from None
        self.job.done = newest.step
        self.watch = Watch.from_json(newest.state["watch"])
        self.watch.patience = self.config.patience
        self.seconds = newest.state["seconds"]
        self.spent |= newest.state["spent"] if "spent" in newest.state else {"steps": newest.state["busy"]}
        self.tokens, self.peak = newest.state["tokens"], newest.state["peak_rss_bytes"]
        if newest.state.get("memory") == self.config.memory:  # with another limit the size is found anew
            self.halvings = newest.state.get("halvings", 0)
        run.rewind(newest.step)
        self.terminal.say(f"resuming after step {newest.step} of {self.job.steps}")

    def _first(self, run: Run) -> None:
        """Where training starts from: held-out loss and answers before the first step."""
        began = time.monotonic()
        if self.data.held_out:
            self._evaluate(run, 0)
        if self.config.start or self.data.held_out:
            self.checkpoint(run)
        self.evaluating = time.monotonic() - began

    def _steps(self, run: Run, progress: Any, stop: Stop, writer: Any) -> str:
        config, job = self.config, self.job
        assert config.eval_every is not None
        last = time.monotonic()
        for step in self._train(run):
            now = time.monotonic()
            figures = step.jobs[self.name]
            if figures.failed:
                return figures.failed
            self.halvings = step.halvings
            if step.too_large:
                draws = " and what dropout draws" if config.options.get("dropout") else ""
                self.terminal.say(
                    f"out of memory at step {step.number}: micro-batches of {step.micro_tokens} tokens instead of"
                    f" {step.too_large[0]} from here on; the result is the same but for rounding{draws}"
                )
            self.spent["steps"] += now - last
            self.tokens += step.tokens
            self.record(run, step, now - last, writer)
            reason = self.watch.loss(figures.loss)
            progress.update(
                step.number,
                job.steps,
                loss=self.watch.mean,
                tokens_per_second=self.tokens / self.spent["steps"],
                memory_bytes=self._used(),
                pauses=self.evaluating * self._evaluations_left(step.number),
            )
            began = time.monotonic()
            due = step.number % config.eval_every == 0 or step.number == job.steps
            if due and self.data.held_out and not reason:
                loss, enough = self._evaluate(run, step.number, writer)
                left = self.evaluating * self._evaluations_left(step.number + 1)
                progress.update(step.number, job.steps, pauses=left, held_out_loss=loss)
                if enough:
                    self.checkpoint(run, enough)
                    return enough if step.number < job.steps else ""
            if due or step.number % config.checkpoint_every == 0 or stop.asked or reason:
                self.checkpoint(run, "all steps done" if step.number == job.steps else "")
                self.evaluating = time.monotonic() - began if due else self.evaluating
                progress.pause(time.monotonic() - began)
            if reason:
                job.failed = reason
                return reason
            if stop.asked and step.number < job.steps:
                raise Interrupted(
                    f"stopped after step {step.number} of {job.steps}, all saved; go on with:"
                    f" lorafit train --resume --out {run.folder}"
                )
            last = time.monotonic()
        return ""

    def _evaluations_left(self, step: int) -> int:
        """After so many steps, this one's own among them."""
        every, steps = self.config.eval_every, self.job.steps
        assert every is not None
        return -(-steps // every) - max(0, step - 1) // every if self.data.held_out else 0

    def _train(self, run: Run) -> Iterator[Step]:
        try:
            yield from train(self.host, [self.job], self.halvings)
        except OutOfMemory:  # the adapter is as the last step left it, and that step may have no checkpoint yet
            self.checkpoint(run)
            raise

    def record(self, run: Run, step: Step, seconds: float, writer: Any = None) -> None:
        """What a step told, in the run's metrics."""
        figures = step.jobs[self.name]
        values: dict[str, Any] = {
            "step": step.number,
            "loss": figures.loss,
            "lr": figures.lr,
            "target_tokens": figures.target_tokens,
            "tokens": step.tokens,
            "micro_tokens": step.micro_tokens,
            "tokens_per_second": round(step.tokens / seconds, 2),
            "grad_norm": figures.grad_norm,
            "seconds": round(seconds, 4),
        }
        if step.too_large:
            values["too_large"] = list(step.too_large)
        run.record("metrics", values)
        if writer is not None:
            for key in ("loss", "lr", "tokens_per_second", "grad_norm"):
                writer.add_scalar(f"train/{key}", values[key], step.number)

    def held_out_loss(self, progress: Callable[[int, int], object] | None = None) -> float:
        """The mean loss of the held-out rows' learned tokens, as the adapter is now."""
        # No larger than a training forward, so that it never needs more memory than training does.
        assert self.config.batch_tokens is not None
        tokens = min(TOKENS, math.ceil(self.config.batch_tokens / self.config.accumulate / 2**self.halvings))
        with self._on("evaluations"):
            return evaluate(self.host, self.data.held_out, self.name, tokens=tokens, progress=progress).loss

    def _evaluate(self, run: Run, step: int, writer: Any = None) -> tuple[float, str]:
        """Held-out loss and sample answers; whether to stop, and why."""
        with self.terminal.working("scoring the held-out rows") as spinner:
            loss = self.held_out_loss(spinner.update)
        if step == 0:
            self.watch.before = loss
        best, stop = self.watch.evaluation(step, loss)
        with self.terminal.working("answering held-out prompts") as spinner:
            samples = self._samples(progress=spinner.update)
        run.record("evaluations", {"step": step, "held_out_loss": loss, "best": best, "samples": samples})
        if writer is not None:
            writer.add_scalar("held_out/loss", loss, step)
        self.terminal.say(f"step {step}: held-out loss {loss:.4f}{' (best so far)' if best and step else ''}")
        for sample in samples:
            self.terminal.say(f"    {_line(sample['prompt'], 40)} -> {_line(sample['answer'], 70)}")
        return loss, stop

    def _samples(
        self, spec: StackLike = None, progress: Callable[[int, int], object] = lambda done, total: None
    ) -> list[dict[str, str]]:
        """Answers to held-out prompts through a stack of adapters; None: the one in training. `progress` is told how many of them
        are there, after each and before the first."""
        name = self.name if spec is None else spec
        rows = [(row, found) for row in self.data.held_out if (found := prompt_of(row))][: self.config.samples]
        samples: list[dict[str, str]] = []
        progress(0, len(rows))
        for row, (messages, expected) in rows:
            ids = self.chat.prompt_ids(messages, row.example.tools)
            with self._on("answers"):
                text = answer(self.host, self.chat, ids, name, max_new=SAMPLE_TOKENS)
            samples.append({"prompt": messages[-1].content, "expected": expected, "answer": text})
            progress(len(samples), len(rows))
        return samples

    def checkpoint(self, run: Run, finished: str = "") -> Path:
        """Save everything that going on needs, and return where. `finished`: why nothing comes after it."""
        assert self.job.optimizer is not None
        adapter = self.host.adapters[self.name]
        self.seconds = time.monotonic() - self.began
        self.peak = max(self.peak, peak_memory())
        state = {
            "identity": self.identity,
            "watch": self.watch.to_json(),
            "seconds": self.seconds,
            "spent": self.spent,
            "tokens": self.tokens,
            "peak_rss_bytes": self.peak,
            "halvings": self.halvings,
            "memory": self.config.memory,
            "finished": finished,
        }
        best = self.watch.best_step if self.data.held_out else None
        with self._on("saving"):
            weights = {name: p.detach().cpu() for name, p in adapter.state_dict().items()}
            return run.checkpoint(self.job.done, weights, optim.state(adapter, self.job.optimizer), state, best)

    # --- the end -------------------------------------------------------------------------------------------------------

    def go_to(self, run: Run, step: int) -> None:
        """Make the adapter what it was after `step`, the last or one with a checkpoint."""
        if step != self.job.done:
            self.host.adapters[self.name].load_state_dict(run.at(step).adapter())

    def answer_again(
        self, run: Run, step: int, progress: Callable[[int, int], object] = lambda done, total: None
    ) -> None:
        """Put answers into the records of evaluations that were made without: the base's, and those after `step`. `progress` as
        in `_samples`, of both."""
        self.go_to(run, step)
        samples: dict[int, list[dict[str, str]]] = {}
        stacks: dict[int, StackLike] = {0: (), step: self.name} if step else {0: self.name}

        def after(done: int, each: int) -> None:
            progress(sum(map(len, samples.values())) + done, each * len(stacks))

        for at, spec in stacks.items():
            samples[at] = self._samples(spec, after)
        run.amend("evaluations", {at: {"samples": answers} for at, answers in samples.items()})

    def finish(self, run: Run, reason: str) -> Run:
        """Write the best adapter, the summary and the report. Failed where training went wrong."""
        went_wrong = bool(self.job.failed)
        best = self.watch.best_step if self.data.held_out else self.job.done
        self.go_to(run, best)
        if not went_wrong or best > 0:
            with self._on("saving"):
                self._save_adapter(run, best)
        files.write_json(run.folder / "summary.json", self.summary(run, best, reason))
        report.write(run.folder)
        if went_wrong:
            kept = f"; the adapter of step {best}, the best so far, is in {run.adapter}" if best > 0 else ""
            calmer = " ".join(doctor.calmer(doctor.Files.of(run.folder)))  # what doctor's command for this run has
            exact = ", precision=fp32" if self.config.precision == "bf16" else ""
            raise Failed(
                f"training stopped: {reason}{kept}; try {calmer}{exact}, or look at the rows with `lorafit check`;"
                f" `lorafit doctor {run.folder}` has the figures"
            )
        return run

    def _save_adapter(self, run: Run, step: int) -> None:
        self.host.adapters[self.name].notes |= {
            "lorafit": lorafit.__version__,
            "chat": self.chat.to_json(),
            "learn": self.config.learn,
            "step": step,
        }
        files.write_folder(run.adapter, lambda place: self.host.save(self.name, place))

    def summary(self, run: Run, best: int, reason: str) -> dict[str, Any]:
        """What summary.json holds."""
        watch, base = self.watch, self.host.base
        number = self.host.adapters[self.name].numbers()
        weights = run.adapter / "adapter_model.safetensors"
        return {
            "base": self.config.model,
            "base_path": str(base.path),
            "base_fingerprint": base.fingerprint,
            "quant": self.config.quant,
            "method": self.config.method,
            "optimizer": self.config.optimizer,
            "held_out_loss_before": _finite(watch.before),
            "held_out_loss_after": _finite(watch.best_loss),
            "best_step": best,
            "steps": self.job.done,
            "stopped": reason or "all steps done",
            "seconds": round(time.monotonic() - self.began, 2),
            "seconds_of": None if self.shares else {part: round(spent, 2) for part, spent in self.spent.items()},
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / self.spent["steps"], 2) if self.spent["steps"] else None,
            "peak_rss_bytes": max(self.peak, peak_memory()),
            "peak_gpu_bytes": gpu_peak() or None,
            "planned_peak_bytes": self.expected.peak_bytes if self.expected else None,
            "trainable_parameters": number,
            "total_parameters": base.parameters(),
            "adapter_bytes": weights.stat().st_size if weights.exists() else 0,
            "base_bytes": stored_bytes(base.path),
            "train_rows": len(self.data.train),
            "held_out_rows": len(self.data.held_out),
        }

    def say_what(self, run: Run) -> None:
        """What is about to happen, before it does."""
        config, job, base = self.config, self.job, self.host.base
        adapter = self.host.adapters[self.name]
        share = adapter.numbers() / base.parameters()
        stored_numbers = sum(t.numel() for t in adapter.state_dict().values())
        options = " ".join(f"{k}={v}" for k, v in config.options.items())
        rows = self.data.report
        say = self.terminal.say
        place = f"{base.device}{_kernels(base)}"
        stored = f"{base.quant}, computed in " if base.quant else ""
        if self.advised:
            chosen = " ".join(choice.words for choice in self.advised)
            say(f"settings  by advice: {chosen} (`lorafit advise {cut(config.data, 200)}` gives the reasons)")
        say(f"base      {config.model}: {count(base.parameters())} parameters, {stored}{config.precision} on {place}")
        if config.quant == ROUNDED and not (kernels.on() and kernels.multiplies_codes()):
            say(
                f"          {ROUNDED} without kernels for it is slower than any other kind, and no better;"
                " leave quant out, or take int8"
            )
        say(
            f"data      {count(len(self.data.train))} rows to train on, {len(self.data.held_out)} held out,"
            f" {count(rows.tokens)} tokens, {rows.share:.0%} of them learned"
        )
        if rows.faults:
            say(f"          {many(len(rows.faults), 'bad row')} left out; `lorafit check` lists them")
        if unfilled := next((note for note in rows.notes if note.reason.startswith(PLACEHOLDERS)), None):
            have = "has" if unfilled.rows == 1 else "have"
            say(
                f"          {many(unfilled.rows, 'row')} {have} a placeholder such as {{{{name}}}} in an answer (the first: line"
                f" {unfilled.line}), which it learns to say; fill them in"
            )
        if rows.truncated or rows.skipped:
            say(
                f"          over {config.max_tokens} tokens: {many(rows.truncated, 'row')} cut"
                f" ({rows.truncated_end} inside an answer), {rows.skipped} left out"
            )
        evaluation = f" evaluation every {config.eval_every};" if self.data.held_out else ""
        if not self.data.held_out:
            say("          nothing is held out: no evaluation, no early stop, the last step's adapter is kept")
        say(
            f"adapter   {config.method} {options} on {len(list(adapter.items()))} sites: {count(adapter.numbers())}"
            f" trainable ({share:.2%}), {size(stored_numbers * 4)} on disk"
        )
        if parts := base.parts().values():
            plain, after = (fmean(errors) for errors in zip(*((p.plain, p.after) for p in parts), strict=True))
            say(
                f"start     {base.quant}: mean error of {len(parts)} weights {plain:.4f} in plain codes -> {after:.4f}"
                " (start.json)"
            )
        first = next(job.plan.since(job.done))
        optimizer = "" if config.optimizer == Config().optimizer else f" {config.optimizer},"
        say(
            f"training  {job.steps} steps of about {config.batch_tokens} tokens (the first: {many(len(first), 'row')}), lr"
            f" {config.lr:.2g} {config.schedule},{optimizer}{evaluation} run folder {run.folder}"
        )
        if self.host.shares({self.name}) and (again := spared(first)):
            say(f"          rows begin alike: of the first step's tokens {count(again)} needn't be computed again")
        most = f", at most {size(self.memory)}" if self.memory is not None else ""
        about = f"about {size(self.expected.peak_bytes)} are" if self.expected else "not known how much is"
        say(f"memory    {about} expected{most}; now {size(self._used())}")


def _expected(
    config: Config, path: Path, rows: Sequence[Tokens], memory: int | None, source: Path | None
) -> Estimate | None:
    """What training will take, None where that can't be told. ConfigError, before the base is loaded, where it can't fit, with
    what would.

    A step halves its micro-batches by itself, so it is refused only if one row at a time is too much; and the estimate may
    be off, so only if it is by more than MARGIN.
    """
    room = places.here(config.device, memory)
    try:
        model = plan.empty(config, path, room.gpu, source)
    except ModelError:  # loading will tell what is wrong, or it works all the same
        return None
    verdict = plan.judge(config, model, rows, room.memory, streams=memory is None)
    if verdict.fits or set(verdict.change) == {"accumulate"}:
        return verdict.best
    least = plan.least(config, model, rows)
    if least.peak_bytes <= room.memory * MARGIN:
        return least
    way = f"it fits with {verdict.words}" if verdict.change else plan.way_out(config, verdict)
    if not verdict.change and verdict.best.peak_bytes < least.peak_bytes:
        way = f"the thriftiest settings would still need {size(verdict.best.peak_bytes)}: {way}"
    limit = f"memory={config.memory}" if config.memory else f"{size(room.memory)} are left on {room.name}"
    raise ConfigError(
        f"this needs about {size(least.peak_bytes)} even with one row at a time, and {limit}; {way}"
        " (`lorafit plan` with the same words shows what takes how much)"
    )


def start_of(config: Config) -> Path | None:
    """The adapter that training starts from; its base becomes the config's model, where the user set none."""
    source = adapter_folder(config.start) if config.start else None
    if source is not None and config.model == Config().model:
        config.model = base_of(source)
    if source is not None:
        config.method = peft_files.method_of(source)
    return source


def advised(config: Config, path: Path, data: Dataset) -> list[advice.Choice]:
    """What advice has put into a config where the user set nothing. None of it yet where only loading the model will tell its
    shape, or what is wrong with it."""
    try:
        shape = shape_of(path)
    except ModelError:
        return []
    return advice.settle(config, data, shape)


def load_data(config: Config, chat: Chat, terminal: Terminal, strict: bool = True) -> Dataset:
    """The rows of a config's data file(s), tokenised and split."""
    with terminal.working(f"reading {Path(config.data).name}") as spinner:
        return prepare(
            config.data,
            chat,
            held_out=config.held_out,
            held_out_share=config.held_out_share,
            mapping=config.map or None,
            learn=config.learn,
            max_tokens=config.max_tokens or MOST_TOKENS,
            long=config.long,
            seed=config.seed,
            skip_bad_rows=config.skip_bad_rows,
            strict=strict,
            cache=config.cache,
            say=terminal.say,
            progress=lambda done: spinner.update(done, None),
        )


def read_data(
    config: Config, terminal: Terminal, strict: bool = True, weights: bool = True
) -> tuple[Path, Chat, Dataset]:
    """The model's folder, its chat and the rows of a config, without loading the model; `weights`: they must be there."""
    _check_files(config)
    path, chat = _chat_of(config, terminal, weights)
    return path, chat, load_data(config, chat, terminal, strict)


def _chat_of(config: Config, terminal: Terminal, weights: bool = True) -> tuple[Path, Chat]:
    """The model's folder and its chat; `max_tokens` becomes the model's, where the user set none."""
    with terminal.working("loading the tokenizer") as spinner:
        path = locate(config.model, spinner.rename, weights)
        tokenizer = load_tokenizer(path)
        config.new_tokens = _texts(config.new_tokens)
        extend(tokenizer, config.new_tokens)
        chat = Chat.of(tokenizer, system=config.system, generation_eos=stop_ids(path))
    config.max_tokens = config.max_tokens or min(context_of(path), MOST_TOKENS)
    return path, chat


def _texts(given: Sequence[str]) -> list[str]:
    """New tokens as they were given, or as a file holds them, one a line."""
    file = Path(given[0]).expanduser() if len(given) == 1 else None
    if file is None or not (file.is_file() or file.suffix == ".txt"):
        return list(given)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"new_tokens={given[0]} can't be read: {error}") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ConfigError(f"new_tokens={given[0]} holds no tokens; write one a line")
    return found


def held_out_rows(run: Path, chat: Chat) -> Sequence[Tokens]:
    """The held-out rows of a finished run, read again from its data. A LorafitError where they aren't there any more."""
    return _data_of(run, chat).held_out


def learned_from(run: Path, chat: Chat, rows: Sequence[Tokens]) -> list[bool]:
    """Which of these rows a run learned from, whole or cut, by their tokens. LorafitError where its data isn't there any more."""
    there = {row.ids.tobytes() for row in rows}
    whole, cut = set(), set()
    for row in _data_of(run, chat).train:
        if row.full > len(row.ids):
            cut.add((len(row.ids), row.ids.tobytes()))
        elif (ids := row.ids.tobytes()) in there:
            whole.add(ids)
    lengths = {length for length, _ in cut}
    return [
        row.ids.tobytes() in whole or any((length, row.ids[:length].tobytes()) in cut for length in lengths)
        for row in rows
    ]


def _data_of(run: Path, chat: Chat) -> Dataset:
    """A run's rows, read again from its data."""
    config = build(settings.read_yaml(Run.open(run).folder / "config.yaml"))
    return load_data(config, chat, Terminal(quiet=True))


def _check_files(config: Config) -> None:
    """Said before a model is looked for, loaded, or converted for the first time."""
    if config.steps is None and config.epochs <= 0:
        raise ConfigError(f"epochs={config.epochs}: must be more than 0")
    for file in (config.data, config.held_out):
        if file:
            files.need_data(file)


def _check_extras(config: Config) -> None:
    if config.quant == ROUNDED and (device := pick_device(config.device).type) != "cpu":
        raise ConfigError(f"quant={ROUNDED} is computed on the CPU alone, this is {device}; use quant=int8")
    if config.log == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise MissingExtra("log=tensorboard needs tensorboard; pip install 'lorafit[tensorboard]'")
    if config.optimizer != "adamw" and (device := pick_device(config.device).type) != "cpu":
        if config.optimizer.endswith("_8bit") and find(config.method).rescales:
            raise ConfigError(
                f"method={config.method} rescales AdamW's state, which isn't possible in 8 bits on {device}; use"
                " optimizer=paged_adamw, or leave it out"
            )
        if device != "cuda":
            raise ConfigError(f"optimizer={config.optimizer}: for cpu and cuda alone, this is {device}; leave it out")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingExtra(
                f"optimizer={config.optimizer} on a GPU needs bitsandbytes; pip install 'lorafit[bitsandbytes]'"
            )


def _tensorboard(config: Config, run: Run) -> Any:
    if config.log != "tensorboard":
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run.folder / "tensorboard"))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _line(text: str, columns: int) -> str:
    return cut(" ".join(text.split()), columns)


def _kernels(base: Base) -> str:
    """Which kernels do the work, where there is a choice."""
    return f", kernels {kernels.state()}" if base.device.type == "cpu" else ""

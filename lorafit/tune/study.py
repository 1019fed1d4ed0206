"""The folder of a search, and the way from settings to it.

    tune/search.json   what was asked for        tune/state.json   how far it is; names each candidate's checkpoint
    tune/001/ …        a run folder for each candidate: config.yaml, metrics.jsonl, evaluations.jsonl, checkpoints/
    tune.jsonl         every event               tune.json, tune.svg   the table and the pictures, at the end
    and what a run folder holds, of the winner, at the end

state.json is replaced as one file after the checkpoints it names are there, so a search is taken up from one whole moment.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from lorafit import config as settings
from lorafit import files, fit, places, plan, tried
from lorafit.errors import ConfigError, ModelError, OutOfMemory, RunError
from lorafit.evaluate import prompt_of, score_answers
from lorafit.fit import Training
from lorafit.log import Progress, Terminal, duration, many
from lorafit.machine import Stop, gpu_memory_limit, memory_limit, out_of_memory
from lorafit.native import build as kernels
from lorafit.native import pool
from lorafit.run import Run, next_folder
from lorafit.tune import together
from lorafit.tune import workers as crews
from lorafit.tune.books import Books
from lorafit.tune.options import Options, budget_of
from lorafit.tune.proposals import Proposals
from lorafit.tune.search import FEWEST, Candidate, Event, Round, Search, evaluations, name_of, range_steps, too_short
from lorafit.tune.space import Choice, Range, Values, space

ANSWERS = 64  # held-out rows that are answered for another objective
CANDIDATES = 8  # where no budget is given
PARTS = 30  # of a training, which is a step of what is shown: the time left goes by what the last ten or so took
QUIET = Terminal(quiet=True)
OUT = ("cut", "failed")  # states of a candidate that doesn't go on


def tune(source: str | None, given: Mapping[str, Any], options: Options, terminal: Terminal | None = None) -> Run:
    """Search, and return the run that the best candidate has become. Errors are those of `fit`."""
    options.check()
    terminal = terminal or Terminal()
    config = fit.read_config(source, given)
    if not config.data:
        raise ConfigError("no data; give a file: lorafit tune DATA")
    if config.start:
        raise ConfigError("--from can't be searched: candidates start from fresh adapters; leave it out")
    if config.lr == 0:
        raise ConfigError("lr=0 trains nothing, so there is nothing to search; leave it out")
    written = settings.read_yaml(Path(source)) if source and Path(source).suffix in (".yaml", ".yml") else {}
    asked = {**written, **given}
    asked.pop("out", None)
    if options.space is not None:
        space(options.space, asked)  # before minutes of work
    folder = Path(config.out) if config.out else next_folder(config.data)
    if folder.exists():
        Run.create(folder, search=True)
    base = Training(config, terminal)
    made = Study(Run(folder), asked, options, base, terminal)
    Run.create(folder, search=True)
    asked |= {key: value for key in ("data", "model", "held_out") if (value := getattr(config, key))}
    made.begin(asked)
    with files.alone(folder / "tune"):
        return made.run_to_its_end()


def resume(folder: str | Path, terminal: Terminal | None = None, workers: str | None = None) -> Run:
    """Go on with a search from its last whole moment, by these workers if any are named. RunError if rows or base are others
    now, or it is finished."""
    terminal = terminal or Terminal()
    run = Run(Path(folder))
    saved = files.load_json(run.folder / "tune" / "search.json", RunError)
    if saved is None:
        raise RunError(f"{run.folder} is not a search (it has no tune/search.json); lorafit tune DATA --out makes one")
    if not files.unfinished_search(run.folder):
        raise RunError(f"{run.folder} is finished; its winner trains on with: lorafit train DATA --from {run.folder}")
    with files.alone(run.folder / "tune"):
        asked, options = saved["settings"], Options(**saved["options"])
        if workers is not None:
            options = replace(options, workers=workers)
            options.check()
        config = fit.read_config(None, {**asked, "out": str(run.folder)})
        base = Training(config, terminal, files.load_json(run.folder / "chat.json", RunError))
        made = Study(run, asked, options, base, terminal)
        made.take_up()
        return made.run_to_its_end()


class Study:
    """A search with its folder. `base` is prepared with the settings that all candidates share; its adapter isn't trained."""

    def __init__(
        self, run: Run, asked: Mapping[str, Any], options: Options, base: Training, terminal: Terminal
    ) -> None:
        self.run, self.asked, self.options, self.base, self.terminal = run, asked, options, base, terminal
        if not base.data.held_out:
            raise ConfigError("a search compares candidates on held-out rows, and there are none; see held_out_share")
        if options.objective != "loss" and not any(map(prompt_of, base.data.held_out[:ANSWERS])):
            raise ConfigError(
                f"--objective {options.objective}: no held-out row asks for an answer; use --objective loss"
            )
        if base.host.base.quant is not None and base.host.base.quant.start is not None:
            raise ConfigError(
                f"method={base.config.method} has codes of its own made of the base; others can't share them"
            )
        asking = sum(prompt_of(row) is not None for row in base.data.held_out[:ANSWERS])
        self.answers = 0 if options.objective == "loss" else asking  # of each finalist, which decide
        prompts = filter(None, map(prompt_of, base.data.held_out))
        self.samples = len(list(itertools.islice(prompts, base.config.samples)))  # that are answered at the very end
        base.host.remove(base.name)
        self.proposals = Proposals(asked, options, base)
        self.proposals.try_edges()
        if base.config.native and base.host.base.device.type == "cpu" and not kernels.on():
            kernels.switch(True)
            with terminal.working("compiling the kernels, once"):
                kernels.library()
        amount = budget_of(options.budget) if options.budget else CANDIDATES
        self.limit = amount if isinstance(amount, float) else None
        size = amount if isinstance(amount, int) else None
        self.search = Search(
            self.proposals.strategy(size),
            self.make,
            places=min(options.together or together.MOST, together.MOST),
            wake=self._restored,
            room=self._room(),
            time_for=self._time_for,
        )
        self.books = Books(self.of)
        self.saved: dict[int, tuple[int, str]] = {}  # candidate -> the step and state of its checkpoint
        self.events = self.done_rounds = 0
        self.paused = 0.0  # seconds of evaluations and what was saved after them
        self.enough: dict[str, Any] = {}  # what was said last about the time
        self.seconds = 0.0  # of earlier parts of a search that was taken up
        self.began = time.monotonic()

    # --- candidates ------------------------------------------------------------------------------------------------------

    def make(self, number: int, values: Values) -> Training:
        """A new candidate's adapter, job and run folder."""
        if number:
            shutil.rmtree(self.of(number).folder, ignore_errors=True)  # of a part that was killed before it was saved
        training = self._made(number, values)
        training.look()  # before there is an optimiser: the method may take its shape from what it sees
        training.job.optimizer = training.optimizer(self.of(number) if number else self.run)
        return training

    def _made(self, number: int, values: Values) -> Training:
        training = self.base.beside(name_of(number), self.proposals.config_of(values))
        training.terminal = QUIET
        training.expected = None
        run = self.of(number)
        if number:
            run.folder.mkdir(parents=True, exist_ok=True)
            training.config.out = str(run.folder)
            files.write_text(run.folder / "config.yaml", settings.to_yaml(training.config))
            self.books.add(number, training)
        return training

    def of(self, number: int) -> Run:
        """A candidate's run folder."""
        return Run(self.run.folder / "tune" / name_of(number))

    def _room(self) -> int | None:
        """Bytes for adapters; None where the model can't be planned for, or other machines' memory counts."""
        base, place, others = self.base, self.base.host.base, self.options.workers
        if others.startswith("ray:"):
            return None
        count = int(others.removeprefix("local:")) if others.startswith("local:") else 0
        try:
            model = plan.empty(base.config, place.path, place.device.type != "cpu")
        except ModelError:
            return None
        here = places.here(base.config.device, base.memory)
        left = here.memory + (sum(p.numel() * p.element_size() for p in place.model.parameters()) if here.gpu else 0)
        return together.room(base.config, model, base.data.train, left, 1 + count)

    def _time_for(self, done: float) -> int:
        """How many candidates there is time for, from what those so far have taken."""
        assert self.limit is not None
        test = (
            range_steps(self.base.job.steps) / self.base.job.steps if self._ranged() else 0.0
        )  # a part of a training too
        whole = self.limit / (self.spent() / max(done + test, 1e-9)) - test
        size = max(2, len(self.search.candidates))
        while self.search.strategy.cost(size + 1, self.base.job.steps) <= whole and size < 1000:
            size += 1
        return size

    def _ranged(self) -> bool:
        """Whether there was a range test."""
        told = any(what == "centre" for what, *_ in self.search.calls)
        return told and range_steps(self.base.job.steps) >= FEWEST

    def spent(self) -> float:
        """Seconds, of all parts."""
        return self.seconds + time.monotonic() - self.began

    # --- beginning and taking up -----------------------------------------------------------------------------------------

    def begin(self, asked: Mapping[str, Any]) -> None:
        """What the folder holds before the first step."""
        base, place = self.base, self.run.folder

        def fill(folder: Path) -> None:
            files.write_json(folder / "search.json", {"settings": asked, "options": asdict(self.options)})

        files.write_folder(place / "tune", fill)  # first: with it a search can be taken up
        files.write_json(place / "data.json", base.data.report.to_json())
        files.write_json(place / "chat.json", base.chat.to_json())

    def take_up(self) -> None:
        """Put everything back as state.json says. RunError if the search isn't the same any more."""
        place = self.run.folder / "tune"
        state = files.load_json(place / "state.json", RunError)
        if state is None:
            self.terminal.say(f"{self.run.folder} has nothing saved yet; starting from its beginning")
            (self.run.folder / "tune.jsonl").unlink(missing_ok=True)
            self.begin(self.asked)
            return
        changed = [key for key, now in self.base.identity.items() if state["identity"].get(key) != now]
        if changed:
            raise RunError(
                f"{self.run.folder} began with another {' and '.join(changed)}; bring it back, or search anew"
            )
        self._replay(state)
        events = self.run.records("tune")[: state["events"]]
        files.write_text(self.run.folder / "tune.jsonl", "".join(_line(event) for event in events))
        self.events, self.seconds, self.done_rounds = state["events"], state["seconds"], state["rounds"]
        self.search.halvings, self.search.before = state["halvings"], state["before"]
        for saved in state["candidates"]:
            self._put_back(saved)
        out = len([c for c in self.search.candidates.values() if c.state in OUT])
        self.terminal.say(
            f"going on with {len(self.search.candidates)} candidates, {out} of them out, after {duration(self.seconds)}"
        )

    def _replay(self, state: Mapping[str, Any]) -> None:
        """Ask and tell the strategy again what it was asked and told."""
        values = []
        for what, *arguments in state["calls"]:
            answer = self.search.call(what, *(math.inf if a is None else a for a in arguments))
            if what == "ask" and answer is not None:
                values.append(answer)
        if json.dumps(values) != json.dumps([saved["values"] for saved in state["candidates"]]):
            raise RunError(
                f"{self.run.folder} had other candidates; another version of Optuna, or of lorafit, began it"
            )

    def _put_back(self, saved: Mapping[str, Any]) -> None:
        values = {**saved, "losses": [math.inf if loss is None else loss for loss in saved["losses"]]}
        values["best_loss"] = math.inf if saved["best_loss"] is None else saved["best_loss"]
        candidate = Candidate(**{**values, "training": None})
        if candidate.state not in OUT:
            self.saved[candidate.number] = (candidate.taken, candidate.state)
        if candidate.state in ("training", "done"):
            candidate.training = self._restored(candidate)
        self.search.put_back(candidate)

    def _restored(self, candidate: Candidate) -> Training:
        """A candidate's adapter and job, and its records, as its checkpoint holds them."""
        training = self._made(candidate.number, candidate.values)
        run = self.of(candidate.number)
        for stale in (run.folder / "checkpoints").iterdir():
            if stale.name > f"step-{candidate.taken:06d}" or stale.name.startswith("."):
                shutil.rmtree(stale)
        checkpoint = run.at(candidate.taken)
        training.check_shape(checkpoint)
        training.job.optimizer = training.optimizer(run)
        training.restore(run, checkpoint)
        training.began = time.monotonic() - training.seconds
        return training

    # --- the search ------------------------------------------------------------------------------------------------------

    def run_to_its_end(self) -> Run:
        """Go through the rounds, saving what they tell; then finish. Interrupted on Ctrl-C, with everything saved."""
        self.say_what()
        self.began = time.monotonic()
        limit = gpu_memory_limit if self.base.host.base.device.type == "cuda" else memory_limit
        stop = Stop(lambda: self.terminal.say("stopping after this step; once more to stop at once"))
        try:
            with limit(self.base.memory), stop:
                rounds = self._found()
                with (
                    self.terminal.progress() as progress
                ):  # its own: what a step takes there says nothing of later ones
                    first = self._range_test(rounds, progress, stop)
                with self.terminal.progress() as progress:
                    self._rounds(itertools.chain(first, rounds), progress, stop)
                return self._finish(lambda: self._stopped("all saved") if stop.asked else None)
        except Exception as error:
            if not isinstance(error, OutOfMemory) and not out_of_memory(error):
                raise
            line = next(iter(str(error).splitlines()), "out of memory")
            raise OutOfMemory(
                f"{line}; go on with more memory: lorafit tune --resume --out {self.run.folder}; or search anew with a smaller"
                " --together, batch_tokens or max_tokens, or with checkpointing=true"
            ) from None
        finally:
            pool.give_back()

    def _found(self) -> Iterator[Round]:
        """The rounds of the search, here or at workers."""
        if self.options.workers == "none":
            yield from self.search.rounds()
            return
        crew = crews.crew(self.options.workers, settings.to_yaml(self.base.config), self.base.chat.to_json())
        try:
            spread = crews.Spread(self.search, crew, self._store, self._files, self._config, self.run.folder)
            yield from spread.rounds()
        finally:
            crew.close()

    def _store(self, told: crews.Outcome) -> None:
        """Keep what a worker brings of a candidate."""
        run = self.of(told.number)
        for row in told.metrics:
            run.record("metrics", row)
        if told.files:
            run.put(told.taken, told.files, told.best_step)
            self.saved[told.number] = (told.taken, told.state)

    def _files(self, candidate: Candidate) -> dict[str, bytes]:
        folder = self.of(candidate.number).at(candidate.taken).folder
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    def _config(self, candidate: Candidate) -> str:
        return (self.of(candidate.number).folder / "config.yaml").read_text(encoding="utf-8")

    def _range_test(self, rounds: Iterator[Round], progress: Progress, stop: Stop) -> list[Round]:
        """Go through the rounds of the range test, if there is one; the first round after it."""
        steps = range_steps(self.base.job.steps)
        for found in rounds:
            if not found.testing or found.step is None:
                return [found]
            done = found.step.number
            progress.update(done, steps, state=f"finding a learning rate to search around: step {done}/{steps}")
            if stop.asked:
                self._stopped("the range test isn't over, so nothing is saved yet")
            self.books.pause()
        return []

    def _stopped(self, what: str) -> NoReturn:
        raise fit.Interrupted(
            f"stopped after {self.done_rounds} steps, {what}; go on with: lorafit tune --resume --out {self.run.folder}"
        )

    def _rounds(self, rounds: Iterable[Round], progress: Progress, stop: Stop) -> None:
        scoring = 0.0
        for found in rounds:
            if found.step is not None:
                self.done_rounds += 1
                self.books.record(self.search, found.step)
            began = time.monotonic()
            for event in found.events:
                self._take(event)
            every = self.base.config.checkpoint_every
            due = bool(found.events) or (found.step is not None and self.done_rounds % every == 0)
            if due or stop.asked:
                self.save()
            paused = self.search.scoring - scoring + time.monotonic() - began
            scoring = self.search.scoring
            self.paused += paused
            progress.pause(paused)  # else what evaluations take would look like slower steps
            self._show(progress)
            if stop.asked:
                self._stopped("all saved")
            self.books.pause()
        self._show(progress, over=True)

    def _take(self, event: Event) -> None:
        """Write an event down, and say what people want to know."""
        self.run.record("tune", event.to_json())
        self.events += 1
        number, figures = event.candidate, event.figures
        if event.kind in ("joined", "evaluated"):
            loss = figures.get("held_out_loss", self.search.before)
            best = figures.get("best", True)
            row = {"step": figures["step"] if event.kind == "evaluated" else 0, "held_out_loss": loss, "best": best}
            self.of(number).record("evaluations", {**row, "samples": []})
        said = {
            "range": lambda: (
                f"learning rates are tried around {figures['lr']:.2g}"
                + (", by a range test" if figures["curve"] else "; trainings are too short for a range test")
            ),
            "lost": lambda: (
                f"worker {figures['worker']} has died; its candidates go on elsewhere: {figures['candidates']}"
            ),
            "budget": lambda: f"there is time for {'all ' * figures['all']}{many(figures['candidates'], 'candidate')}",
            "joined": lambda: f"#{number} joins: {tried.words(figures['settings']) or 'the settings as they are'}",
            "cut": lambda: f"#{number} is out: {figures['why']}",
            "failed": lambda: f"#{number} fails: {figures['why']}",
            "done": lambda: (
                f"#{number} is trained: held-out loss {figures['held_out_loss']:.4f}"
                + (f" ({figures['why']})" if figures["why"] else "")
            ),
        }
        if event.kind in said and (event.kind != "budget" or figures != self.enough):
            self.terminal.say(said[event.kind]())
        if event.kind == "budget":
            self.enough = figures

    def _show(self, progress: Progress, over: bool = False) -> None:
        """The candidates' state in one line."""
        all_of_them = list(self.search.candidates.values())
        if not all_of_them:
            return
        number = {
            state: sum(c.state == state for c in all_of_them)
            for state in ("training", "waiting", "cut", "failed", "done")
        }
        known = [c for c in all_of_them if c.taken and c.state != "failed" and c.best_step]
        best = min(known, key=lambda c: c.best_loss, default=None)
        done, left = self.search.done(), self.search.left(self.base.job.steps)
        # Nobody knows yet how long answers take: the time left is that of training, and is never 0 before them.
        near = over or ((self.answers or self.samples) and left < 0.02 * (done + left))
        progress.update(
            PARTS * (done + left if near else done),
            PARTS * (done + left),
            pauses=self._pauses(left),
            state=", ".join(f"{amount} {state}" for state, amount in number.items() if amount)
            + (", answers come after" if self.answers else ", sample answers come after" if self.samples else ""),
            held_out_loss=best.best_loss if best else None,
        )

    def _pauses(self, trainings: float) -> float:
        """Seconds of evaluations in so many trainings that are still to come. At workers they go on beside steps, so there none
        are counted for themselves."""
        if not self.search.scored or self.options.workers != "none":
            return 0.0
        job, every = self.base.job, self.base.config.eval_every
        assert every is not None
        return trainings * evaluations(job.steps, every) * self.paused / self.search.scored

    # --- saving ----------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Everything that a search is taken up from: checkpoints first, then the one file that names them."""
        search = self.search
        for number, candidate in search.candidates.items():
            now = (candidate.taken, candidate.state)
            before = self.saved.get(number)
            done = candidate.state == "done"
            if candidate.training is not None and (before is None or before[0] != now[0] or (done and before != now)):
                candidate.training.halvings = search.halvings
                candidate.training.checkpoint(self.of(number), (candidate.why or "all steps done") if done else "")
            self.saved[number] = now
        state = {
            "identity": self.base.identity,
            "seconds": self.spent(),
            "rounds": self.done_rounds,
            "events": self.events,
            "halvings": search.halvings,
            "before": search.before,
            "calls": [[_plain(word) for word in call] for call in search.calls],
            "candidates": [_candidate(c) for c in search.candidates.values()],
        }
        files.write_json(self.run.folder / "tune" / "state.json", state)
        for number in search.rest():
            self.books.forget(number)
        for number, candidate in search.candidates.items():
            if candidate.state in OUT:
                self.books.forget(number)
                shutil.rmtree(self.of(number).folder / "checkpoints", ignore_errors=True)

    # --- the end ---------------------------------------------------------------------------------------------------------

    def _finish(self, answered: Callable[[], object]) -> Run:
        """Choose the winner, and make the run folder that `train` would have made of it. `answered` is called after each
        answer."""
        finalists = [c for c in self.search.candidates.values() if c.state == "done"]
        if not finalists:
            reasons = "; ".join(f"#{c.number} {c.why}" for c in self.search.candidates.values() if c.why)
            raise fit.Failed(f"no candidate could be trained to its end ({reasons}); try smaller learning rates")
        for candidate in finalists if self.options.workers != "none" else ():
            assert candidate.training is not None
            run = self.of(candidate.number)
            candidate.training.restore(run, run.at(candidate.taken))
        if self.answers:
            self.terminal.say(
                f"{many(len(finalists), 'finalist')} now {'answers' if len(finalists) == 1 else 'answer'}"
                f" {many(self.answers, 'held-out prompt')}{'' if len(finalists) == 1 else ' each'}:"
                f" {self.options.objective} decides"
            )
        scores = {c.number: self._score(c, answered) for c in finalists}
        for number, score in scores.items() if self.answers else ():
            self.terminal.say(f"#{number}: {self.options.objective} {score:.4f} of {many(self.answers, 'answer')}")
        best = max if self.options.objective != "loss" else min
        winner = best(finalists, key=lambda c: (scores[c.number], -c.number if best is max else c.number))
        training = winner.training
        assert training is not None
        self._assemble(winner, training, scores, answered)
        return self.run

    def _score(self, candidate: Candidate, answered: Callable[[], object]) -> float:
        """What the objective makes of a candidate's best adapter."""
        training = candidate.training
        if self.options.objective == "loss" or training is None:
            return candidate.best_loss
        training.go_to(self.of(candidate.number), candidate.best_step)
        with self.terminal.working(f"answering held-out prompts with #{candidate.number}") as spinner:

            def progress(done: int, total: int) -> None:
                spinner.update(done, total)
                answered()

            exact, f1, _ = score_answers(
                training.host,
                training.chat,
                training.data.held_out[:ANSWERS],
                training.name,
                progress=progress,
            )
        return f1 if self.options.objective == "token_f1" else exact

    def _assemble(
        self, winner: Candidate, training: Training, scores: Mapping[int, float], answered: Callable[[], object]
    ) -> None:
        own, run = self.of(winner.number).folder, self.run
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            files.write_text(run.folder / name, (own / name).read_text(encoding="utf-8"))
        for checkpoint in (own / "checkpoints").iterdir():
            target = run.folder / "checkpoints" / checkpoint.name
            files.write_folder(target, lambda place, source=checkpoint: _copy(source, place))  # type: ignore[misc]
        training.config.out = str(run.folder)
        files.write_text(run.folder / "config.yaml", settings.to_yaml(training.config))
        found = self.table(winner, scores)
        files.write_json(run.folder / "tune.json", found)
        files.write_text(run.folder / "tune.svg", tried.svg(found))
        training.began = time.monotonic() - self.spent()
        self._sample(winner, training, answered)
        training.finish(run, winner.why)
        for number in self.search.candidates:
            shutil.rmtree(self.of(number).folder / "checkpoints", ignore_errors=True)

    def _sample(self, winner: Candidate, training: Training, answered: Callable[[], object]) -> None:
        """The answers that `train` shows: of the base, and of the winner at its best step."""
        what = f"answering {many(self.samples, 'held-out prompt')} without and with #{winner.number}"
        with self.terminal.working(what) as spinner:

            def progress(done: int, total: int) -> None:
                spinner.update(done, total)
                answered()

            training.answer_again(self.run, winner.best_step, progress)

    def table(self, winner: Candidate, scores: Mapping[int, float]) -> dict[str, Any]:
        """What tune.json holds."""
        candidates = []
        for number, c in self.search.candidates.items():
            own = settings.read_yaml(self.of(number).folder / "config.yaml")
            shape = {
                key: own.get(key)
                for key in ("lr", "r", "alpha", "method", "targets", "batch_tokens", *self.proposals.space)
            }
            row = {**_candidate(c), "settings": {key: value for key, value in shape.items() if value is not None}}
            candidates.append({**row, "rungs": list(c.rungs), "score": scores.get(number), "winner": c is winner})
        test = next((event for event in self.run.records("tune") if event["event"] == "range"), None)
        return {
            "search": self.options.search,
            "budget": self.options.budget or str(CANDIDATES),
            "objective": self.options.objective,
            "answers": self.answers or None,
            "searched": list(self.proposals.space),
            "seconds": round(self.spent(), 2),
            "trainings": round(self.search.done(), 3),
            "held_out_loss_before": self.search.before,
            "held_out_rows": len(self.base.data.held_out),
            "untried": self._untried(),
            "all": self.search.strategy.whole,
            "winner": winner.number,
            "winner_settings": tried.words(winner.values),
            "range_test": None if test is None else {key: test[key] for key in ("lr", "usual", "curve")},
            "candidates": candidates,
        }

    def _untried(self) -> list[str]:
        """Settings whose stage had no candidate, though there were other values."""
        if self.options.search != "staged":
            return []
        known = {key for c in self.search.candidates.values() for key in c.values}
        now, space = self.proposals.start, self.proposals.space
        return [key for key, one in space.items() if key not in known and any(v != now.get(key) for v in one.grid())]

    def say_what(self) -> None:
        """What is about to happen, before it does."""
        base, say = self.base, self.terminal.say
        what = "; ".join(f"{key} {_shape(one)}" for key, one in self.proposals.space.items())
        place = base.host.base
        say(f"base      {base.config.model}: {base.config.precision} on {place.device}")
        say(f"data      {len(base.data.train)} rows to train on, {len(base.data.held_out)} held out")
        say(f"search    {self.options.search}: {what}")
        room = (
            ""
            if self.search.room is None
            else f"; memory has room for {max(0, self.search.room) / 1e9:.1f} GB of adapters"
        )
        say(f"together  at most {self.search.places}{room}; run folder {self.run.folder}")
        if self.answers:
            say(
                f"decides   {self.options.objective}: at the end those trained to their ends answer up to"
                f" {many(self.answers, 'held-out prompt')} each, which takes its own time"
            )
        if few := too_short(base.job.steps, self.search.strategy.wants_rate):
            say(f"short     {few}")


def _copy(source: Path, place: Path) -> None:
    shutil.copytree(source, place, dirs_exist_ok=True)


def _candidate(c: Candidate) -> dict[str, Any]:
    """A candidate's figures in JSON types."""
    return {
        "number": c.number,
        "values": c.values,
        "steps": c.steps,
        "state": c.state,
        "why": c.why,
        "losses": [_plain(loss) for loss in c.losses],
        "taken": c.taken,
        "best_loss": _plain(c.best_loss),
        "best_step": c.best_step,
    }


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def _shape(one: Range | Choice) -> str:
    if isinstance(one, Range):
        return f"{one.low:.2g} to {one.high:.2g}"
    return ", ".join(
        "+".join(value) or "the method's own" if isinstance(value, list) else str(value) for value in one.values
    )

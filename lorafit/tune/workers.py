"""Candidates trained by other processes, each with a base of its own: subprocesses of this machine, or actors of a Ray cluster.

The one who searches gives a worker candidates, each with the checkpoint it goes on from. A worker trains all it has together
until something happens to one of them, and tells that with a new checkpoint. So all that is known is with the one who searches:
when a worker dies, its candidates go on elsewhere from what they last told. A candidate at a rung leaves its worker; if it goes
on, whoever has a place takes it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from lorafit import errors, fit
from lorafit.errors import ConfigError, LorafitError, MissingExtra, RunError
from lorafit.fit import Training
from lorafit.log import Terminal
from lorafit.run import Run
from lorafit.tune.books import Books
from lorafit.tune.halving import Verdicts
from lorafit.tune.search import Candidate, Event, Round, Search, State, name_of
from lorafit.tune.space import Values

LOOK = 0.5  # seconds between looks whether somebody wants to stop
PATIENCE = 10.0  # seconds that a worker has to end
QUIET = Terminal(quiet=True)


@dataclass(frozen=True)
class Item:
    """A candidate for a worker: its config.yaml, and the files of the checkpoint that it goes on from (none: from the start)."""

    number: int
    config: str
    taken: int
    before: float  # held-out loss before training
    losses: tuple[float, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What happened to a candidate, and where it is now."""

    number: int
    state: State
    why: str
    taken: int
    best_loss: float
    best_step: int
    events: tuple[Event, ...]
    metrics: tuple[dict[str, Any], ...]
    files: Mapping[str, bytes] = field(default_factory=dict)


# --- at the worker ------------------------------------------------------------------------------------------------------


class Worker:
    """A base with the candidates that it was given. `config` is what the base and the rows depend on, resolved."""

    def __init__(self, config: str, chat: dict[str, Any]) -> None:
        _tidy(lambda pid: not _runs(pid))
        self.scratch = tempfile.TemporaryDirectory(prefix=f"{_scratch()}{os.getpid()}-")
        self.base = Training(fit.build(yaml.safe_load(config)), QUIET, chat)
        self.base.host.remove(self.base.name)
        self.search = Search(_Nobody(), _none, places=0)
        self.books = Books(self._run)
        self.rounds: Iterator[Round] = iter(())

    def process(self) -> int:
        """Its process."""
        return os.getpid()

    def advance(self, items: Sequence[Item]) -> list[Outcome]:
        """Take these in beside those that are there, and train until something happens to one of them."""
        self.books.pause()
        for item in items:
            self._take(item)
        while self.search.candidates:
            found = next(self.rounds, None)
            if found is None:
                self.rounds = self.search.rounds()
                continue
            if found.step is not None:
                self.books.record(self.search, found.step)
            if found.events:
                return [self._outcome(number, found) for number in sorted({event.candidate for event in found.events})]
        return []

    def _run(self, number: int) -> Run:
        return Run(Path(self.scratch.name) / name_of(number))

    def _take(self, item: Item) -> None:
        training = self.base.beside(name_of(item.number), fit.build(yaml.safe_load(item.config)))
        training.terminal, run = QUIET, self._run(item.number)
        run.folder.mkdir(parents=True)
        if item.files:
            run.put(item.taken, item.files)
            checkpoint = run.at(item.taken)
            training.check_shape(checkpoint)
            training.job.optimizer = training.optimizer(run)
            training.restore(run, checkpoint)
        else:
            training.look()
            training.job.optimizer = training.optimizer(run)
            self.search.before = item.before
            self.search.begin(training)
        made = Candidate(item.number, {}, training, training.job.steps, losses=list(item.losses), taken=item.taken)
        made.best_loss, made.best_step = training.watch.best_loss, training.watch.best_step
        self.books.add(item.number, training)
        self.search.put_back(made)

    def _outcome(self, number: int, found: Round) -> Outcome:
        candidate, run = self.search.candidates[number], self._run(number)
        files: dict[str, bytes] = {}
        if candidate.training is not None:
            done = candidate.state == "done"
            folder = candidate.training.checkpoint(run, (candidate.why or "all steps done") if done else "")
            files = {file.name: file.read_bytes() for file in folder.iterdir()}
        told = Outcome(
            number,
            candidate.state,
            candidate.why,
            candidate.taken,
            candidate.best_loss,
            candidate.best_step,
            tuple(event for event in found.events if event.candidate == number),
            tuple(run.records("metrics")),
            files,
        )
        (run.folder / "metrics.jsonl").unlink(missing_ok=True)
        if candidate.state != "training":
            self.search.drop(candidate)
            self.books.forget(number)
            run.remove()
        return told


def _scratch() -> str:
    """What the names of this machine's scratch folders begin with; a process's number follows, which another machine that shares
    the folder for temporary files (a container does) may have given to another process."""
    return f"lorafit-worker-{socket.gethostname()}-"


def _tidy(wanted: Callable[[int], bool]) -> None:
    """Remove this user's scratch folders of such processes of this machine."""
    for folder in Path(tempfile.gettempdir()).iterdir():
        number = folder.name.removeprefix(_scratch()).partition("-")[0]
        if folder.name.startswith(_scratch()) and number.isdecimal() and wanted(int(number)):
            with contextlib.suppress(OSError):  # somebody else may be removing it too
                if folder.lstat().st_uid == os.getuid():
                    shutil.rmtree(folder, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class _Nobody:
    """A Strategy that proposes nobody and judges nobody: that isn't a worker's to do."""

    size: int | None = 0
    wants_rate = False
    whole = True

    def centre(self, rate: float) -> None:
        """Not wanted."""

    def resize(self, size: int) -> int:
        """Not wanted."""
        return 0

    def ask(self) -> Values | None:
        """Nobody."""
        return None

    def report(self, number: int, rung: int, loss: float) -> None:
        """Whoever searches hears of it in an Outcome."""

    def verdicts(self) -> Verdicts:
        """None."""
        return Verdicts({}, {})

    def cost(self, size: int, steps: int) -> float:
        """Nothing."""
        return 0.0


def _none(number: int, values: Values) -> Training:
    raise AssertionError("a worker makes no candidates")


# --- the workers, as who searches sees them -----------------------------------------------------------------------------


class Crew(Protocol):
    """Workers by number."""

    alive: set[int]

    def send(self, worker: int, items: Sequence[Item]) -> None:
        """Have an idle worker take these in and go on."""

    def wait(self, seconds: float) -> tuple[int, list[Outcome] | None] | None:
        """Whoever has something to tell first; None for the list: it has died. None in all: nobody yet."""

    def close(self) -> None:
        """End them."""


def crew(text: str, config: str, chat: dict[str, Any]) -> Crew:
    """`local:N`, or `ray://…`. ConfigError for anything else, MissingExtra without Ray."""
    check(text)
    return (
        Local(int(text.removeprefix("local:")), config, chat) if text.startswith("local:") else Ray(text, config, chat)
    )


def check(text: str) -> None:
    """See `crew`; or `none`: no workers."""
    if text != "none" and not re.fullmatch(r"local:[1-9][0-9]*|ray://[^?\s]+(\?workers=[1-9][0-9]*)?", text):
        raise ConfigError(
            f"--workers {text}: must be none, local:N, or ray://HOST:PORT, ray://auto, ray://local; with ?workers=N if not one a"
            " node"
        )
    if text.startswith("ray:") and importlib.util.find_spec("ray") is None:
        raise MissingExtra("--workers ray://… needs Ray; pip install 'lorafit[ray]'")


class Local:
    """Subprocesses of this machine, which share its processors."""

    def __init__(self, count: int, config: str, chat: dict[str, Any]) -> None:
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        context = multiprocessing.get_context("spawn")
        self.ends: dict[int, multiprocessing.connection.Connection] = {}
        self.processes: dict[int, Any] = {}
        for number in range(1, count + 1):
            self.ends[number], theirs = context.Pipe()
            self.processes[number] = context.Process(target=serve, args=(theirs, config, chat, threads), daemon=True)
            self.processes[number].start()
            theirs.close()
        self.alive = set(self.ends)

    def send(self, worker: int, items: Sequence[Item]) -> None:
        """One that has died by now is noticed by `wait`."""
        with contextlib.suppress(OSError):
            self.ends[worker].send(list(items))

    def wait(self, seconds: float) -> tuple[int, list[Outcome] | None] | None:
        """An end that was closed is a death."""
        numbers = {id(self.ends[worker]): worker for worker in self.alive}
        for end in multiprocessing.connection.wait([self.ends[worker] for worker in self.alive], seconds):
            worker = numbers[id(end)]
            try:
                told, error = self.ends[worker].recv()
            except (EOFError, OSError):
                self.alive.discard(worker)
                return worker, None
            if error:
                raise _raised(*error)
            return worker, told
        return None

    def close(self) -> None:
        """Whatever they are at."""
        for worker, process in self.processes.items():
            self.ends[worker].close()
            process.terminate()
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
        _tidy(lambda pid: any(process.pid == pid for process in self.processes.values()))  # of those that were killed


def serve(end: multiprocessing.connection.Connection, config: str, chat: dict[str, Any], threads: int) -> None:
    """What a subprocess does until the other end is closed."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who searches
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_follow, daemon=True).start()
    torch.set_num_threads(threads)
    worker: Worker | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            items = end.recv()
            try:
                worker = worker or Worker(config, chat)
                end.send((worker.advance(items), None))
            except Exception as error:
                end.send(([], (type(error).__name__, str(error))))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is leaving already


def _follow() -> None:
    """End the process when the one who searches is gone, even by a kill: then nobody wants what it is at."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # the system closes a dead process's end of a pipe
    _tidy(lambda pid: pid == os.getpid())
    os._exit(0)


def _leave(number: int, frame: Any) -> None:
    """End the process so that its scratch folder goes; what asks once more isn't heard."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)


def _raised(kind: str, text: str) -> LorafitError:
    """An error of a worker, as what it was where that is one of ours."""
    found = getattr(errors, kind, None)
    known = isinstance(found, type) and issubclass(found, LorafitError)
    return found(text) if known and found is not None else LorafitError(f"a worker failed: {kind}: {text}")


class Ray:
    """Actors of a cluster: `ray://HOST:PORT`, `ray://auto` (the one that this machine is in), `ray://local` (one that is started
    here)."""

    def __init__(self, text: str, config: str, chat: dict[str, Any]) -> None:
        import ray

        self.ray = ray
        address, _, count = text.removeprefix("ray://").partition("?workers=")
        try:
            if address == "local":
                ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            elif address == "auto":
                ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
            else:
                ray.init(address=f"ray://{address}", logging_level=logging.ERROR)
        except ConnectionError as error:
            raise RunError(
                f"no Ray cluster answers at {text}: {str(error).splitlines()[0]}; start one with: ray start --head"
            ) from None
        nodes = [node for node in ray.nodes() if node["Alive"]]
        number = int(count) if count else max(1, len(nodes))
        processors = max(1, int(sum(node["Resources"].get("CPU", 0) for node in nodes)) // number)
        kind = ray.remote(num_cpus=processors, max_restarts=0, scheduling_strategy="SPREAD")(Worker)
        self.actors = {i: kind.remote(config, chat) for i in range(1, number + 1)}
        self.alive = set(self.actors)
        self.pending: dict[Any, int] = {}

    def send(self, worker: int, items: Sequence[Item]) -> None:
        """The answer is a reference to what isn't known yet."""
        self.pending[self.actors[worker].advance.remote(list(items))] = worker

    def wait(self, seconds: float) -> tuple[int, list[Outcome] | None] | None:
        """An actor that can't be reached any more is dead."""
        ready, _ = self.ray.wait(list(self.pending), timeout=seconds)
        if not ready:
            return None
        worker = self.pending.pop(ready[0])
        try:
            return worker, self.ray.get(ready[0])
        except self.ray.exceptions.RayActorError as error:
            if isinstance(error, self.ray.exceptions.ActorDiedError) and "creation task" in str(error):
                raise LorafitError(f"a worker can't begin: {str(error).strip().splitlines()[-1]}") from None
            self.alive.discard(worker)
            return worker, None
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise _raised(type(cause).__name__, str(cause)) from None

    def close(self) -> None:
        """With what this process has in the cluster."""
        self.ray.shutdown()


# --- who searches -------------------------------------------------------------------------------------------------------


class Spread:
    """A search whose candidates train at workers. `store` keeps what an Outcome brings: checkpoint and metrics. `files` are those
    of a candidate's checkpoint, `config` its config.yaml."""

    def __init__(
        self,
        search: Search,
        workers: Crew,
        store: Callable[[Outcome], None],
        files: Callable[[Candidate], Mapping[str, bytes]],
        config: Callable[[Candidate], str],
        folder: Path,
    ) -> None:
        self.search, self.workers = search, workers
        self.store, self.files, self.config, self.folder = store, files, config, folder
        self.at: dict[int, set[int]] = {worker: set() for worker in workers.alive}  # whose candidates are whose
        self.busy: set[int] = set()
        self.new: dict[int, list[int]] = {worker: [] for worker in workers.alive}

    def rounds(self) -> Iterator[Round]:
        """As Search.rounds."""
        if self.search.strategy.wants_rate:
            yield from self.search.range_test()
        while True:
            self._assign()
            yield self.search.round(None)  # before they go: what joins is saved first
            self._send()
            if not self.busy:
                return
            told = self.workers.wait(LOOK)
            if told is not None:
                self._hear(*told)

    def _assign(self) -> None:
        """Give those that nobody has, then those that may go on, then new ones, to whoever has the fewest."""
        search = self.search
        taken = set().union(*self.at.values()) if self.at else set()
        left = [c for c in search.candidates.values() if c.state == "training" and c.number not in taken]
        while self.at:
            worker = min(self.at, key=lambda w: (len(self.at[w]), w))
            if len(self.at[worker]) >= search.places:
                return
            candidate = left.pop(0) if left else search.following()
            if candidate is None:
                return
            candidate.state = "training"
            self.at[worker].add(candidate.number)
            self.new[worker].append(candidate.number)

    def _send(self) -> None:
        for worker in sorted(self.at):
            if worker in self.busy or not self.at[worker]:
                continue
            items = []
            for number in self.new[worker]:
                c = self.search.candidates[number]
                files = self.files(c) if c.taken else {}
                items.append(Item(number, self.config(c), c.taken, self.search.before, tuple(c.losses), files))
            self.new[worker] = []
            self.busy.add(worker)
            self.workers.send(worker, items)

    def _hear(self, worker: int, told: list[Outcome] | None) -> None:
        self.busy.discard(worker)
        if told is None:
            lost = sorted(self.at.pop(worker))
            self.new.pop(worker)
            self.search.say("lost", 0, worker=worker, candidates=lost)
            if not self.at:
                raise RunError(
                    f"all workers have died; what they told is saved, go on with: lorafit tune --resume --out {self.folder}"
                )
            return
        for outcome in told:
            self.store(outcome)
            self.search.absorb(outcome.number, outcome.events, outcome.state, outcome.why, outcome.taken)
            candidate = self.search.candidates[outcome.number]
            candidate.best_loss, candidate.best_step = outcome.best_loss, outcome.best_step
            if outcome.state != "training":
                self.at[worker].discard(outcome.number)
        self.search.judge()

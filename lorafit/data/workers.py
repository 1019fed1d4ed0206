"""Batches of rows to parts, on all processors, in order.

Python runs on one processor, so other processes are needed. They are started as programs of their own: a fork would copy
locks that torch's threads may hold, and multiprocessing's other ways run the user's script once more. A worker imports
neither torch nor transformers, knows nothing but what it is sent, and ends with its input, however this process ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from typing import Any, BinaryIO

from lorafit.data.parts import Part, Work
from lorafit.data.read import Row
from lorafit.data.turns import weight

BATCH = 512  # rows
LETTERS = 1_000_000  # and about the most letters of a batch
FEW = 4  # batches that are done before workers would be ready
MOST = 8  # workers


def batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in batches that bound how much is in memory at a time."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += weight(row.value)
        if len(batch) == BATCH or size >= LETTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def spread(work: Work, rows: Iterable[Row], workers: int | None = None) -> Generator[Part]:
    """The parts of these rows in order. `workers`: how many processes; 0 for none, None for one a processor."""
    found = batches(rows)
    first = list(islice(found, FEW + 1))
    count = _processors() if workers is None else workers
    if count < 1 or (workers is None and (count < 2 or len(first) <= FEW)):
        yield from map(work, chain(first, found))
        return
    with _Pool(work, count) as pool:
        waiting: deque[Future[Part]] = deque()
        for batch in chain(first, found):
            waiting.append(pool.submit(batch))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def serve() -> None:
    """A worker's life: takes its work, then batches, and gives a part for each (None where it failed)."""
    with contextlib.suppress(ValueError, OSError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's business, which ends this one
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints can't get between the answers
    with contextlib.suppress(EOFError, OSError):
        work = pickle.load(source)
        while True:
            batch = pickle.load(source)
            try:
                answer = work(batch)
            except Exception:
                answer = None
            pickle.dump(answer, target, pickle.HIGHEST_PROTOCOL)
            target.flush()


class _Pool:
    """A thread for each worker, which writes to it and reads from it in turn."""

    def __init__(self, work: Work, count: int) -> None:
        self._work, self._closed = work, False
        self._children: list[subprocess.Popen[bytes]] = []
        self._mine = threading.local()
        try:
            self._message = pickle.dumps(replace(work, chat=work.chat.light()), pickle.HIGHEST_PROTOCOL)
        except Exception:  # a tokenizer with parts in Python can't be sent; the threads then work here
            self._message = b""
        self._threads = ThreadPoolExecutor(count, "lorafit-data", self._start)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self._closed = True
        for child in list(self._children):
            child.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for child in self._children:
            for stream in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):
                    stream.close()  # type: ignore[union-attr]
            child.wait()

    def submit(self, batch: Sequence[Row]) -> Future[Part]:
        """The part of a batch, some time."""
        return self._threads.submit(self._run, batch)

    def _start(self) -> None:
        self._mine.child = None
        if not self._message or not sys.executable or getattr(sys, "frozen", False):
            return
        paths = [os.path.abspath(path) for path in sys.path]
        alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = {**os.environ, **alone, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(paths)}
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", "-c", "from lorafit.data.workers import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # the terminal's signals don't reach it
            )
        except OSError:
            return
        self._children.append(child)
        if self._closed:
            child.kill()
        with contextlib.suppress(OSError):
            _input(child).write(self._message)
        self._mine.child = child

    def _run(self, batch: Sequence[Row]) -> Part:
        child = self._mine.child
        part: Any = None
        if child is not None:
            try:
                pickle.dump(batch, _input(child), pickle.HIGHEST_PROTOCOL)
                _input(child).flush()
                part = pickle.load(child.stdout)
            except Exception:  # it was killed, or a row can't be sent: this thread does without it from now on
                child.kill()
                self._mine.child = None
        if part is None and not self._closed:
            part = self._work(batch)  # raises what the worker raised
        return part  # type: ignore[no-any-return]


def _input(child: subprocess.Popen[bytes]) -> BinaryIO:
    assert child.stdin is not None
    return child.stdin  # type: ignore[return-value]


def _processors() -> int:
    try:
        return min(MOST, len(os.sched_getaffinity(0)))
    except AttributeError:
        return min(MOST, os.cpu_count() or 1)

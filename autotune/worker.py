"""Processes that do what may crash or hang: compile, launch, measure.

A worker is a fresh process (spawned, so that it has a CUDA context of its own) that handles one
task after another and answers each with messages; it waits until a message has been dealt with. One
that says nothing for too long is killed, one that dies is noticed; the caller goes on with a new
one.
"""

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

DONE_SECONDS = 60.0  # from the answer to a task until the worker can take another
START_SECONDS = 180.0  # to import torch and TileLang and to open the GPU, on a busy machine
DONE = "done"
GO_ON = "go on"
READY = "ready"


class WorkerDied(RuntimeError):
    """The process ended; the message says how."""


class WorkerHung(RuntimeError):
    """The process said nothing for too long and was killed."""


class Worker:
    """One process.

    Args:
        handler: "module:name" of what to call in the process with the arguments; it returns a
            function from a task to an iterable of messages.
        arguments: for it; they are pickled.
        log: where the process's own output goes; nowhere if None.
    """

    def __init__(
        self, handler: str, arguments: tuple[Any, ...] = (), log: Path | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, handler, arguments, log), daemon=True
        )
        with _deaf_to_ctrl_c():
            self._process.start()
        theirs.close()
        self._ready = False

    @property
    def pid(self) -> int | None:
        """The process's number."""
        return self._process.pid

    def send(self, task: Any) -> None:
        """Give it a task.

        Raises:
            WorkerDied: It is gone.
        """
        try:
            self.connection.send(task)
        except OSError as error:
            raise WorkerDied(self._epitaph()) from error

    def messages(self, seconds: float) -> Iterator[Any]:
        """What it answers to the task, one by one.

        Args:
            seconds: that may pass before a message; the first of a process may take longer.

        Raises:
            WorkerDied: It ended instead.
            WorkerHung: It said nothing in time; it has been killed.
        """
        if not self._ready:
            self._expect(READY, START_SECONDS)
            self._ready = True
        while (said := self.message(seconds)) != DONE:
            yield said
            self.send(GO_ON)

    def message(self, seconds: float) -> Any:
        """The next message as it is: READY once, then answers, DONE after each task.

        Args:
            seconds: to wait for it.

        Raises:
            WorkerDied: It ended instead.
            WorkerHung: It said nothing in time; it has been killed.
        """
        try:
            if not self.connection.poll(seconds):
                self.kill()
                raise WorkerHung(
                    f"no answer for {seconds:.0f} s" if seconds else "no answer in time"
                )
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(self._epitaph()) from error

    def _expect(self, wanted: str, seconds: float) -> None:
        if (said := self.message(seconds)) != wanted:
            self.kill()
            raise WorkerDied(f"the process said {said!r} where {wanted!r} was its turn")

    def _epitaph(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        self.kill()
        if code is not None and code < 0:
            return f"the process died of {signal.Signals(-code).name}"
        return f"the process ended with code {code}"

    def kill(self) -> None:
        """End it at once."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self.connection.close()

    def close(self) -> None:
        """End it when it is idle."""
        with contextlib.suppress(OSError, ValueError):
            self.connection.send(None)
            self._process.join(5)
        self.kill()


def pooled(
    handler: str,
    tasks: Iterable[Any],
    *,
    jobs: int,
    seconds: float,
    arguments: tuple[Any, ...] = (),
    log: Path | None = None,
) -> Generator[tuple[Any, Any], None, None]:
    """Hand tasks, of one answer each, to several workers.

    Args:
        handler: as in `Worker`.
        tasks: each pickled.
        jobs: processes.
        seconds: for a task, after which its process is killed.
        arguments: as in `Worker`.
        log: as in `Worker`.

    Yields:
        (task, its message), in the order of completion; the message is a `WorkerDied` or a
        `WorkerHung` where the process failed.
    """
    left = list(tasks)[::-1]
    busy: dict[Any, tuple[Worker, Any, float]] = {}  # by connection: worker, task, its time

    def start(worker: Worker | None) -> None:
        fresh = worker or Worker(handler, arguments, log)
        task = left.pop()
        busy[fresh.connection] = fresh, task, time.monotonic() + seconds + START_SECONDS
        with contextlib.suppress(WorkerDied):  # noticed when its answer is read
            fresh.send(task)

    def answer(worker: Worker) -> tuple[Any, Worker | None]:
        """What it says now, and the worker if it can take another task after that."""
        try:
            said = worker.message(0.0)
        except (WorkerDied, WorkerHung) as error:
            return error, None
        if said != READY:
            try:
                worker.send(GO_ON)
                worker._expect(DONE, DONE_SECONDS)  # tasks of a pool have one answer
            except (WorkerDied, WorkerHung):
                return said, None
        return said, worker

    try:
        while left and len(busy) < jobs:
            start(None)
        while busy:
            soonest = min(time_ for *_, time_ in busy.values())
            heard = wait(list(busy), timeout=max(0.0, soonest - time.monotonic()))
            late = [at for at, entry in busy.items() if entry[2] <= time.monotonic()]
            for connection in dict.fromkeys((*heard, *late)):
                worker, task, _ = busy[connection]  # there until it has answered, to be killed
                said, alive = answer(worker)
                if said == READY:
                    busy[connection] = worker, task, time.monotonic() + seconds
                    continue
                del busy[connection]
                if left:
                    start(alive)
                elif alive:
                    alive.close()
                yield task, said
    finally:
        for worker, *_ in busy.values():
            worker.kill()


def _serve(
    connection: Connection, handler: str, arguments: tuple[Any, ...], log: Path | None
) -> None:
    """The process: answers tasks until None comes or the other end is gone."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    target = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(target, stream.fileno())
    os.environ.setdefault("TILELANG_PRINT_ON_COMPILATION", "0")
    module, _, name = handler.partition(":")
    handle: Callable[[Any], Iterable[Any]] = getattr(importlib.import_module(module), name)(
        *arguments
    )
    connection.send(READY)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (task := connection.recv()) is not None:
            for message in handle(task):
                connection.send(message)
                connection.recv()  # GO_ON
            connection.send(DONE)


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """A process that is started meanwhile never hears of Ctrl-C, which the terminal sends to all.

    It would break off its imports with a traceback before `_serve` could ignore it. This process
    hears of it behind the block.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which unblocks the signal where it must start first
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _die_with_parent() -> None:
    """Have Linux kill this process when the tuner is killed, or a hung kernel would outlive it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

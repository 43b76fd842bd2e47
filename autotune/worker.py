"""Processes that do what may crash or hang: compile, launch, measure.

A worker is a process of its own, with a CUDA context of its own, that handles one task after
another and answers each with messages; it waits until a message has been dealt with. A worker that
says nothing for too long is killed, and the caller goes on with a new one.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_SECONDS = 180.0  # to import torch and TileLang and to open the GPU, on a busy machine
DONE = "done"
GO_ON = "go on"
READY = "ready"
# What a new process finds imported: it is forked from a server that imports torch once. TileLang's
# import asks CUDA for its devices, and CUDA works in no fork of a process that has done so.
PRELOAD = ["torch"]


class WorkerDied(RuntimeError):
    """The process ended; the message says how."""


class WorkerHung(RuntimeError):
    """The process said nothing for too long and was killed."""


class Worker:
    """One process.

    It calls `handler`, "module:name", with the arguments, which are pickled. The handler returns a
    function from a task to an iterable of messages. What the process prints goes to `log`.
    """

    def __init__(
        self, handler: str, arguments: tuple[Any, ...] = (), log: Path | None = None
    ) -> None:
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            context.set_forkserver_preload(PRELOAD)
        self._connection, theirs = context.Pipe()
        given = theirs, dict(os.environ), handler, arguments, log
        self._process = context.Process(target=_serve, args=given, daemon=True)
        with _without_ctrl_c():
            self._process.start()
        theirs.close()
        self._ready = False

    @property
    def pid(self) -> int | None:
        """The process's number."""
        return self._process.pid

    def send(self, task: Any) -> None:
        """Give the process a task; WorkerDied if it has ended."""
        try:
            self._connection.send(task)
        except OSError as error:
            raise WorkerDied(self._ending()) from error

    def messages(self, seconds: float) -> Iterator[Any]:
        """The answers to a task, one by one.

        WorkerDied if the process ends instead. WorkerHung if no answer comes within the seconds:
        the process has been killed.
        """
        if not self._ready:
            self.message(START_SECONDS)
            self._ready = True
        while (said := self.message(seconds)) != DONE:
            yield said
            self.send(GO_ON)

    def message(self, seconds: float) -> Any:
        """The next message: READY once, then answers, DONE after each task."""
        try:
            if not self._connection.poll(seconds):
                self.kill()
                raise WorkerHung(f"no answer for {seconds:.0f} s")
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(self._ending()) from error

    def _ending(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        self.kill()
        if code is not None and code < 0:
            return f"the process died of {signal.Signals(-code).name}"
        return f"the process ended with code {code}"

    def end(self) -> None:
        """Let the idle process end by itself, which frees what it shares."""
        self._connection.close()
        self._process.join(5)
        self.kill()

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def pooled(
    handler: str,
    tasks: Iterable[Any],
    *,
    jobs: int,
    seconds: float,
    arguments: tuple[Any, ...] = (),
    log: Path | None = None,
) -> Generator[tuple[Any, Any], None, None]:
    """Give tasks, of one answer each, to several workers.

    Yields (task, answer) in the order of completion; a `WorkerDied` or a `WorkerHung` is the answer
    where the process failed.
    """
    started: list[Worker] = []
    idle: list[Worker] = []
    ended = False

    def answer(task: Any) -> Any:
        try:
            worker = idle.pop()
        except IndexError:
            worker = Worker(handler, arguments, log)
            started.append(worker)
        if ended:
            worker.kill()
        said = None
        try:
            worker.send(task)
            for message in worker.messages(seconds):
                said = message
        except (WorkerDied, WorkerHung) as error:
            return error if said is None else said
        idle.append(worker)
        return said

    threads = ThreadPoolExecutor(jobs)
    try:
        asked = {threads.submit(answer, task): task for task in tasks}
        for future in as_completed(asked):
            yield asked[future], future.result()
    finally:
        ended = True
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in started:
            (worker.end if worker in idle else worker.kill)()


def resolve(name: str) -> Any:
    """What "module:attribute" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _serve(
    connection: Connection,
    environment: dict[str, str],
    handler: str,
    arguments: tuple[Any, ...],
    log: Path | None,
) -> None:
    """The process: answers tasks until the other end is gone."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    target = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    streams: tuple[Any, ...] = (sys.stdout, sys.stderr)
    for stream in streams:
        os.dup2(target, stream.fileno())
        stream.reconfigure(line_buffering=True)  # what is printed is there when it is killed
    os.environ.clear()  # a forked process has the environment with which the server began
    os.environ.update(environment)
    os.environ.setdefault("TILELANG_PRINT_ON_COMPILATION", "0")
    handle: Callable[[Any], Iterable[Any]] = resolve(handler)(*arguments)
    connection.send(READY)
    with contextlib.suppress(EOFError):
        while True:
            for message in handle(connection.recv()):
                connection.send(message)
                connection.recv()  # GO_ON
            connection.send(DONE)


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Start processes that ignore Ctrl-C, before `_serve` does: it would end their imports.

    This process gets the signal after the block.
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
    """Kill this process when its parent is gone, or a hung kernel would outlive a killed tuner."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)

"""The second phase: run, check and time the candidates of a problem, in a process that may fail.

In the worker process `measure` tries one candidate after another: its results must be the
default's, and its first few times near the fastest. The best then take turns with the default. In
the tuner's process `Measurer` collects the outcomes and replaces a worker that hangs or dies.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .bench import CudaBench, difference
from .problems import Problem
from .timing import SLOW, Sample, impression, interleaved
from .worker import Worker, WorkerDied, WorkerHung, resolve

CUDA = f"{__package__}.bench:CudaBench"
FINALISTS = 4  # of the default's reduction order, and the best of every other order
RESTARTS = 2  # of a worker that failed without a candidate to blame
_HANDLER = f"{__name__}:handler"


class Candidate(NamedTuple):
    """A configuration to measure."""

    config: Any
    order: Any  # its reduction order: a candidate of the default's order has the default's bits


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate."""

    status: str  # "measured", "slow" (by its first few times) or "rejected"
    why: str = ""  # for a person, where it is not measured
    ratio: float = 0.0  # median of its first few times over the default's; 0 if it has none
    sample: Sample | None = None  # its time, if it was measured


class Task(NamedTuple):
    """A problem for a worker."""

    problem: Problem
    candidates: tuple[Candidate, ...]  # the default first
    known: dict[int, Outcome]  # of earlier attempts, by index
    parameter_grads: int = 0  # results, the last ones, that sum over tokens: their bits may differ


Message = tuple[int, Outcome | None]
"""A candidate's index and what became of it; None before whatever may end the process."""


def handler(bench: str) -> Callable[[Any], Iterator[Any]]:
    """What a worker process runs: a task into messages, or a function's name into its value."""

    def handle(task: Task | str) -> Iterator[Any]:
        if isinstance(task, str):
            yield resolve(task)()
        else:
            yield from measure(task, resolve(bench))

    return handle


def measure(task: Task, open_bench: Callable[[Problem], CudaBench]) -> Iterator[Message]:
    """Check and time the candidates of a problem.

    Yields (index, None) before whatever may fail, (index, outcome) for each candidate and again for
    each finalist. Raises an error of the default, after it is "rejected", and an error after which
    nothing runs: the process must end.
    """
    yield 0, None
    try:
        bench = open_bench(task.problem)
        expected = _repeated(bench, task.candidates[0].config)
        timers = {0: bench.timer(task.candidates[0].config)}
        default = impression(timers[0])
    except Exception as error:
        yield 0, Outcome("rejected", _brief(error))
        raise
    outcomes = {0: Outcome("slow", ratio=1.0), **task.known}
    yield 0, outcomes[0]
    for index, candidate in enumerate(task.candidates):
        if index in outcomes:
            continue
        yield index, None
        try:
            same_order = candidate.order == task.candidates[0].order
            same_bits = len(expected) - task.parameter_grads if same_order else 0
            outcomes[index] = _check(bench, candidate.config, expected, same_bits)
            if outcomes[index].status != "rejected":
                timer = bench.timer(candidate.config)
                ratio = impression(timer) / default
                why = f"{ratio:.2f} times the default in its first calls"
                if ratio <= SLOW * _fastest(outcomes):
                    timers[index] = timer
                outcomes[index] = Outcome("slow", why, ratio)
        except Exception as error:
            outcomes[index] = Outcome("rejected", f"crashed: {_brief(error)}")
            yield index, outcomes[index]
            if not bench.healthy():
                raise
        else:
            yield index, outcomes[index]
    finalists = _finalists(task.candidates, outcomes)
    for index in finalists:
        if index not in timers:
            yield index, None
            timers[index] = bench.timer(task.candidates[index].config)
    running = 0

    def turn(index: int) -> float:
        nonlocal running
        running = index
        return timers[index]()

    try:
        samples = interleaved([functools.partial(turn, index) for index in finalists])
    except Exception as error:  # its first calls worked: the others are timed in a new process
        yield running, Outcome("rejected", f"{'crashed: ' if running else ''}{_brief(error)}")
        raise
    for index, sample in zip(finalists, samples, strict=True):
        yield index, Outcome("measured", ratio=outcomes[index].ratio, sample=sample)


def _brief(error: Exception) -> str:
    """An error's type and first line, which is empty for a bare assert."""
    first_line = str(error).partition("\n")[0][:200]
    return f"{type(error).__name__}: {first_line}"


def _repeated(bench: CudaBench, config: Any) -> Any:
    """The default's results; they must have the same bits every time."""
    first, *others = bench.results(config)
    for results in others:
        if why := difference(results, first, same_bits=len(first)):
            raise RuntimeError(f"measure: the default must be deterministic: {why}")
    return first


def _check(bench: CudaBench, config: Any, expected: Any, same_bits: int) -> Outcome:
    """Compare several results with the default's, and with each other."""
    first = None
    for results in bench.results(config):
        why = difference(results, expected, same_bits=same_bits)
        if why is None and first is not None:
            why = difference(results, first, same_bits=len(first))
        if why:
            return Outcome("rejected", f"wrong: {why}")
        first = results
    return Outcome("checked")


def _fastest(outcomes: dict[int, Outcome]) -> float:
    return min(o.ratio for o in outcomes.values() if o.ratio)


def _finalists(candidates: tuple[Candidate, ...], outcomes: dict[int, Outcome]) -> list[int]:
    """The default, the best few of its reduction order, and the best of every other order."""
    limit = SLOW * _fastest(outcomes)
    ranked = sorted(
        (o.ratio, index) for index, o in outcomes.items() if index and 0 < o.ratio <= limit
    )
    chosen, places = [0], {candidates[0].order: FINALISTS}
    for _, index in ranked:
        order = candidates[index].order
        if places.setdefault(order, 1):
            places[order] -= 1
            chosen.append(index)
    return chosen


class Measurer:
    """Measures problems in a worker process that is replaced when it fails.

    A candidate that takes longer than `seconds` is killed. `bench` is "module:class" of a
    `CudaBench`. What the process prints goes to `log`.
    """

    def __init__(self, *, seconds: float, bench: str = CUDA, log: Path | None = None) -> None:
        self._seconds = seconds
        self._bench = bench
        self._log = log
        self._worker: Worker | None = None

    def __enter__(self) -> "Measurer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker:
            self._worker.kill()

    def ask(self, function: str) -> Any:
        """What a function of no arguments, "module:name", returns in the process."""
        (answer,) = self._messages(function)
        return answer

    def measure(
        self,
        problem: Problem,
        candidates: tuple[Candidate, ...],
        known: dict[int, Outcome],
        keep: Callable[[int, Outcome], None],
        parameter_grads: int = 0,
    ) -> dict[int, Outcome]:
        """Outcomes of a problem's candidates, by index; each is given to `keep` once it is known.

        RuntimeError if the default itself fails, or workers fail without a candidate to blame.
        """
        outcomes = dict(known)
        restarts = 0

        def found(index: int, outcome: Outcome) -> None:
            outcomes[index] = outcome
            keep(index, outcome)

        while True:
            trying: int | None = None
            broken, rejected = "", False
            try:
                task = Task(problem, candidates, outcomes, parameter_grads)
                for index, outcome in self._messages(task):
                    if outcome is None:
                        trying = index
                    elif index == 0 and outcome.status == "rejected":
                        broken = outcome.why
                    else:
                        trying, rejected = None, outcome.status == "rejected"
                        found(index, outcome)
                return outcomes
            except (WorkerDied, WorkerHung) as error:
                if broken or trying == 0:
                    why = broken or error
                    raise RuntimeError(f"{problem}: the default must run, got {why}") from error
                if trying is not None:
                    kind = "hung" if isinstance(error, WorkerHung) else "crashed"
                    found(trying, Outcome("rejected", f"{kind}: {error}"))
                elif not rejected:  # else what broke the process is known and is not tried again
                    restarts += 1
                    if restarts > RESTARTS:
                        raise RuntimeError(f"{problem}: measuring must end, got {error}") from error

    def _messages(self, task: Any) -> Iterator[Any]:
        worker = self._worker = self._worker or Worker(_HANDLER, (self._bench,), self._log)
        try:
            worker.send(task)
            yield from worker.messages(self._seconds)
        except BaseException:
            self._worker = None
            worker.kill()
            raise

"""`mhc-tile perf run`: op x case x contender, checked, then timed in turns.

Contenders are this library ("mhc_tile"), its reference in eager PyTorch and under torch.compile,
and other implementations that are installed. Every one's results, and in training its gradients of
every tensor, are compared with the reference in float64 first; what differs by more than the
rounding of bf16 explains is shown as wrong and not timed. What fails is shown with its error, and
the run goes on.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhc_tile.autotune import _arguments as given
from mhc_tile.autotune._extras import require
from mhc_tile.autotune.timing import rounds

from . import output, tables, warm
from .accuracy import TOLERANCE, as_tuple, check, leaves_of
from .bench import Bench, bench_of
from .compare import check_comparable
from .environment import environment, version
from .operations import MODES, OPERATIONS, Case, Inputs, Operation, Results, chosen_cases
from .peers import ADAPTERS, Contender, left_out, named
from .records import OURS, Record, Row

EAGER, COMPILED = "reference (eager)", "reference (compiled)"
COMPILED_TF32 = "reference (compiled, tf32)"
NAMES = (OURS, EAGER, COMPILED, COMPILED_TF32, *ADAPTERS)
TURNS = 20
QUICK_TURNS = 10
LONG_S = 30.0  # until a contender can be timed; longer is said


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mhc-tile perf run`."""
    add = parser.add_argument
    add("--quick", action="store_true", help="the main sizes only: under 3 minutes, all compiled")
    add(
        "--device",
        type=given.text,
        default="cuda",
        help="cuda, or cpu for small sizes (default: cuda)",
    )
    add("--op", nargs="+", choices=tuple(OPERATIONS), default=[], help="these only")
    add("--mode", nargs="+", choices=MODES, default=[], help="these only")
    add("--tokens", type=int, nargs="+", default=[], help="T: cases of these only")
    add("--hidden", type=int, nargs="+", default=[], help="C: cases of these only")
    names = "by the beginnings of their names; default: all"
    add("--contender", type=given.text, nargs="+", default=[], help=names)
    turns = f"of each contender (default: {TURNS}, {QUICK_TURNS} with --quick)"
    add("--turns", type=int, metavar="N", help=turns)
    warm.add_arguments(parser)
    add("--out", type=given.path, metavar="FILE", help="result file (default: perf-<gpu>.json)")
    add("--figures", type=given.path, metavar="DIR", help="roofline and scaling as PNG, too")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table and write the result.

    Returns:
        0, or 1 if this library is wrong or fails somewhere.

    Raises:
        ValueError: The arguments leave nothing to measure.
        OSError: The result cannot be written.
        MissingExtraError: A package of the perf extra is missing.
        KeyboardInterrupt: After Ctrl-C, with what was measured in the file.
    """
    output.check_positive("perf run", turns=args.turns)
    warm.check_arguments(args)
    output.check_names("perf run", args.contender, NAMES, names_here(args.device))
    bench = bench_of(args.device)
    chosen = chosen_cases(args)
    for package in ("tabulate", "tqdm"):
        require(package, "mhc-tile perf run", "perf")  # before minutes are spent
    where = environment(bench.bandwidth(), args.device)
    wanted = functools.partial(_wanted, names=tuple(args.contender))
    absent = left_out({case.op for case in chosen}, wanted)
    where |= {"left_out": absent} if absent else {}
    path = output.result_path("perf", where, args.out)
    output.check_figures("perf run", args.figures)
    turns = args.turns or (QUICK_TURNS if args.quick else TURNS)
    if args.warm:
        warm.compile_first(chosen, wanted, args.device, args.jobs)
    record, lost = measure_all(chosen, bench, wanted, turns, where, path)
    if not record.rows:
        raise ValueError(
            "perf run: --contender must leave one that has the chosen ops and modes, got "
            f"{'; '.join([', '.join(args.contender), *absent])}"
        )
    output.say(tables.run(record), f"\nresult: {output.kept_at(record, path)}")
    if args.figures:
        output.draw(record, args.figures)
    return int(lost or any(row.status != "ok" for row in record.rows if row.contender == OURS))


def measure_all(
    chosen: Sequence[Case],
    bench: Bench,
    wanted: Callable[[str], bool],
    turns: int,
    where: dict[str, Any],
    path: Path | None = None,
) -> tuple[Record, bool]:
    """Case after case.

    Args:
        chosen: the cases.
        bench: where.
        wanted: which contenders, by name.
        turns: of each.
        where: the environment; at the end "cases_left" goes, and the copy is measured again.
        path: of the result, which is written after every case and however it ends.

    Returns:
        The result, and whether the GPU answers no more.

    Raises:
        OSError: The result cannot be written.
        MissingExtraError: tqdm is missing.
        KeyboardInterrupt: After Ctrl-C.
    """
    progress, parts, lost = output.Progress(), list[dict[str, Row]](), False
    where["cases_left"] = len(chosen)

    def keep() -> Record:
        return output.keep("run", where, parts, path)

    try:
        for case in progress.over(chosen, "mhc-tile perf"):
            progress.say(case.key)
            parts.append({})
            measure(case, bench, wanted, turns, parts[-1], progress)
            where["cases_left"] = len(chosen) - len(parts)
            keep()  # a process that is killed loses the case in flight
        del where["cases_left"]  # it has ended
        where["copy_bytes_per_s"] = max(where["copy_bytes_per_s"], bench.bandwidth())
    except output.UnusableError as error:
        output.say(f"perf: {error}; the cases after it are not measured")
        lost = True
    finally:  # whatever ends the run, what was measured is kept
        record = keep()
        output.say_unfinished(record, path)
    return record, lost


def names_here(device: str) -> list[str]:
    """The contenders that can be measured: packages where they are installed, with their versions.

    Args:
        device: "cuda" or "cpu".

    Example:
        >>> names_here("cpu")[:3]
        ['mhc_tile', 'reference (eager)', 'reference (compiled)']
    """
    own = [OURS, EAGER, COMPILED, *[COMPILED_TF32] * (device == "cuda")]
    return own + [named(package) for package in ADAPTERS if version(package)]


def measure_for_gate(base: Record, path: Path | None = None, *, force: bool = False) -> Record:
    """This library on the cases of a baseline.

    Args:
        base: of `mhc-tile perf run`; cases without our times are left out.
        path: as for `measure_all`.
        force: as for `compare.check_comparable`.

    Raises:
        ValueError: The GPU, or what it copies, is not as it was.
        OSError: As there, as the others.
    """
    bench = bench_of("cuda")
    keys = [row.case for row in base.rows if row.contender == OURS and row.us is not None]
    chosen = [Case.of(key) for key in dict.fromkeys(keys)]
    where = environment(bench.bandwidth())
    check_comparable(base, Record("run", where, []), force=force)
    return measure_all(chosen, bench, lambda name: name == OURS, TURNS, where, path)[0]


def contenders(
    case: Case, wanted: Callable[[str], bool] = lambda name: True, device: str = "cuda"
) -> Iterator[Contender | Row]:
    """Who takes part in a case; a row for who could not be loaded.

    Args:
        case: the op is of `OPERATIONS`.
        wanted: of a name.
        device: "cuda" or "cpu".
    """
    operation = OPERATIONS[case.op]
    if wanted(OURS):
        yield Contender(OURS, operation.ours)
    if wanted(EAGER):
        yield Contender(EAGER, operation.reference)
    names = (COMPILED, *[COMPILED_TF32] * (operation.parameters > 0 and device == "cuda"))
    if chosen := [name for name in names if wanted(name)]:
        torch._dynamo.reset()  # a case is compiled for itself, whatever others have left
        compiled = torch.compile(operation.reference, fullgraph=True, dynamic=False)
        for name in chosen:
            yield Contender(name, compiled, tf32=name == COMPILED_TF32)
    if case.streams != 4 or case.dtype != "bfloat16":
        return
    for name, adapter in ADAPTERS.items():
        if version(name) is None or not wanted(named(name)):
            continue  # said once, in the environment
        try:
            contender = adapter(case.op)
        except Exception as error:
            yield _row(case, name, None, **output.fault_of(error))
            continue
        if contender and case.mode in contender.modes:
            yield contender


@output.without_advice()
def measure(
    case: Case,
    bench: Bench,
    wanted: Callable[[str], bool],
    turns: int = TURNS,
    rows: dict[str, Row] | None = None,
    progress: output.Progress | None = None,
) -> dict[str, Row]:
    """One case: every contender checked, then timed in turns.

    Args:
        case: what.
        bench: where.
        wanted: which contenders, by name.
        turns: of each.
        rows: what is measured is put in here as it comes, for who is interrupted.
        progress: is told which contender begins, and of one that takes long to compile.

    Returns:
        A row for each contender, by name.

    Raises:
        UnusableError: A contender left the GPU so that nothing works on it any more.
    """
    operation = OPERATIONS[case.op]
    rows = {} if rows is None else rows
    moved = operation.moved(case) if bench.device == "cuda" else None
    taking_part = contenders(case, wanted, bench.device)
    try:
        inputs = _Sets(case, operation, bench)
    except torch.OutOfMemoryError as error:
        fault = output.fault_of(error, "inputs do not fit")
        for one in taking_part:
            row = one if isinstance(one, Row) else _row(case, one.name, moved, **fault)
            rows[row.contender] = row
            output.recover(bench, row)
        return rows
    timers: dict[str, Any] = {}
    for contender in taking_part:
        if isinstance(contender, Row):
            rows[contender.contender] = contender
            continue
        row, start = _row(case, contender.name, moved), time.monotonic()
        if progress:
            progress.detail(f"{case.key}, {contender.name}")
        try:
            row, timers[row.contender] = _prepare(case, contender, inputs, bench, row)
        except _WrongError as error:
            row = row.replace(status="wrong", fault=str(error), error=error.error)
        except Exception as error:
            row = row.replace(**output.fault_of(error))
        rows[row.contender] = row
        taken = time.monotonic() - start
        if progress and taken > LONG_S:
            progress.note(f"{case.key}: {row.contender} took {taken:.0f} s to compile and check")
        if row.status != "ok":
            output.recover(bench, row)

    def failed(name: str, error: Exception) -> None:
        rows[name] = _row(case, name, moved, **output.fault_of(error))
        output.recover(bench, rows[name])

    for samples in rounds(timers, turns, failed):
        for name, sample in samples.items():
            rows[name] = rows[name].timed(sample)
    return rows


class _WrongError(Exception):
    """A contender computes something else."""

    def __init__(self, text: str, error: float | None) -> None:
        super().__init__(text)
        self.error = error


class _Sets:
    """The inputs of a case, made once for all contenders, and cotangents of the results."""

    def __init__(self, case: Case, operation: Operation, bench: Bench) -> None:
        self._case, self._operation, self._device = case, operation, bench.device
        first = self._set(0)
        count = bench.sets(sum(value.nbytes for value in first[0]))
        self.all = [first, *(self._set(seed) for seed in range(1, count))]

    def _set(self, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        make = Inputs(self._case, self._device, seed)
        tensors = [make.get(name) for name in self._operation.names]
        return tensors, make.like(self._shapes(tensors))

    def _shapes(self, tensors: Sequence[Tensor]) -> Results:
        """Results of the reference on one token, as many as there are tokens."""
        own = len(tensors) - self._operation.parameters
        with torch.no_grad():
            found = as_tuple(
                self._operation.reference(*(t[:1] for t in tensors[:own]), *tensors[own:])
            )
        return tuple(value.expand(self._case.tokens, *value.shape[1:]) for value in found)


def _prepare(
    case: Case, contender: Contender, inputs: _Sets, bench: Bench, row: Row
) -> tuple[Row, Any]:
    """Check a contender; its row without times, and its timer."""
    if contender.note:
        raise _WrongError(f"computes something else: {contender.note}", None)
    error = check(case, contender, *inputs.all[0])
    if not error < TOLERANCE:
        fault = f"relative error {error:.1e} against the reference in float64"
        raise _WrongError(fault, error if math.isfinite(error) else None)  # JSON has no infinity
    training = case.mode == "training"
    own = []
    for tensors, cotangents in inputs.all:
        leaves = leaves_of(case, contender, tensors)
        own.append([*leaves, *(contender.cotangents(*cotangents) if training else ())])
    count = len(leaves_of(case, contender, inputs.all[0][0]))

    def function(*values: Tensor) -> Any:
        leaves, cotangents = values[:count], values[count:]
        if case.mode == "inference":
            with torch.no_grad():
                return contender.results(*leaves)
        results = contender.results(*leaves)
        return torch.autograd.grad(results, leaves, cotangents) if training else results

    def forward() -> Results:
        with torch.set_grad_enabled(case.mode != "inference"):
            return contender.results(*own[0][:count])

    def backward(results: Results) -> Any:
        return torch.autograd.grad(results, own[0][:count], own[0][count:])

    with contender.setting():
        function(*own[0])  # compiles
        peak, saved = bench.memory(forward, backward if training else None)
        timed = bench.timed(function, own)
        host = bench.host_us(function, own[0], timed.launches)
    row = row.replace(
        error=error,
        captured=timed.captured,
        launches=timed.launches,
        host_us=host,
        peak_bytes=peak,
        saved_bytes=saved,
    )

    def timer() -> float:
        with contender.setting():  # what no graph has captured is called again
            return timed.timer()

    return row, timer


def _row(case: Case, name: str, moved: int | None, **values: Any) -> Row:
    return Row(
        case=case.key,
        contender=name,
        op=case.op,
        mode=case.mode,
        tokens=case.tokens,
        hidden_size=case.hidden_size,
        streams=case.streams,
        dtype=case.dtype,
        bytes=moved,
        **values,
    )


def _wanted(name: str, names: tuple[str, ...]) -> bool:
    return not names or name.startswith(names)

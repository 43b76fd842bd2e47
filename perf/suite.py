"""`mhc-tile perf run`: op x case x contender, checked, then timed in turns.

Contenders are this library, its reference in eager PyTorch and under torch.compile, and other
packages that are installed. Results, and in training gradients of every tensor, are compared with
the reference in float64 first. A contender that is wrong by more than bf16 rounds is not timed, and
one that fails is a row with its error.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from mhc_tile.autotune._options import Options
from mhc_tile.autotune.timing import Timer, rounds

from . import output, session, tables, warm
from .accuracy import TOLERANCE, as_tuple, check, leaves_of
from .bench import Bench, bench_of
from .compare import check_comparable
from .environment import environment
from .operations import MODES, OPERATIONS, Case, Inputs, Operation, Results, chosen_cases
from .peers import ADAPTERS, Contender, is_asked, left_out, named, version
from .records import OURS, Record, Row

EAGER, COMPILED = "reference (eager)", "reference (compiled)"
COMPILED_TF32 = "reference (compiled, tf32)"
NAMES = (OURS, EAGER, COMPILED, COMPILED_TF32, *ADAPTERS)
TURNS = 20
QUICK_TURNS = 10
LONG_S = 30.0  # until a contender can be timed; longer is said

_OP: Any = Literal.__getitem__(tuple(OPERATIONS))
_MODE: Any = Literal.__getitem__(MODES)
OPTIONS: Options = {
    "quick": (bool, "the main sizes only: under 3 minutes, all compiled"),
    "device": (str, "cuda, or cpu for small sizes (default: cuda)"),
    "op": (tuple[_OP, ...], "these only"),
    "mode": (tuple[_MODE, ...], "these only"),
    "tokens": (tuple[int, ...], "T: cases of these only"),
    "hidden": (tuple[int, ...], "C: cases of these only"),
    "contender": (tuple[str, ...], "by the beginnings of their names (default: all)"),
    "turns": (int, f"of each contender (default: {TURNS}, {QUICK_TURNS} with --quick)"),
    "warm": (bool, "compile side by side first, in several processes"),
    "jobs": (int, "processes of --warm (default: one a core, or as the GPU's memory allows)"),
    "out": (Path, "result file (default: perf-<gpu>.json)"),
    "figures": (Path, "folder for roofline and scaling as PNG, too"),
}
DEFAULTS = {"device": "cuda"}


def run(args: SimpleNamespace) -> int:
    """Measure, print a table and write the result.

    Returns:
        0, or 1 if this library is wrong or fails somewhere.

    Raises:
        ValueError: The arguments leave nothing to measure.
        KeyboardInterrupt: After Ctrl-C, with what was measured in the file.
    """
    output.check_positive("perf run", jobs=args.jobs)
    if args.jobs and not args.warm:
        raise ValueError(f"perf run: --jobs must come with --warm, got --jobs {args.jobs} alone")
    chosen = chosen_cases(args)
    bench, where, path = session.begin("run", args, NAMES, names_here(args.device))
    wanted = functools.partial(is_asked, names=args.contender)
    absent = left_out({case.op for case in chosen}, wanted)
    if not any(True for case in chosen for _ in contenders(case, wanted, args.device)):
        raise ValueError(
            "perf run: --contender must leave one that has the chosen ops and modes, got "
            f"{'; '.join([', '.join(args.contender), *absent])}"
        )
    where |= {"left_out": absent} if absent else {}
    if args.warm:
        warm.compile_first(chosen, wanted, args.device, args.jobs)
    turns = args.turns or (QUICK_TURNS if args.quick else TURNS)
    record = _measure_all(chosen, bench, wanted, turns, where, path)
    output.say(tables.run(record), "")
    return session.end(record, path, args.figures)


def _measure_all(
    chosen: Sequence[Case],
    bench: Bench,
    wanted: Callable[[str], bool],
    turns: int,
    where: dict[str, Any],
    path: Path | None,
) -> Record:
    def measured(case: Case, rows: dict[str, Row], progress: output.Progress) -> None:
        progress.say(case.key)
        measure(case, bench, wanted, turns, rows, progress)

    return session.measure_all("run", chosen, measured, bench, where, path, bar=True)


def names_here(device: str) -> list[str]:
    """The contenders that can be measured; installed packages have their versions in the name."""
    own = [OURS, EAGER, COMPILED, *[COMPILED_TF32] * (device == "cuda")]
    return own + [named(package) for package in ADAPTERS if version(package)]


def measure_for_gate(base: Record, path: Path | None = None, *, force: bool = False) -> Record:
    """This library on the cases of a baseline that have our times.

    Raises:
        ValueError: The GPU, or what it copies, is not as it was, and nothing is forced.
        OSError: The result cannot be written.
    """
    bench = bench_of("cuda")
    keys = [row.case for row in base.rows if row.contender == OURS and row.us is not None]
    chosen = [Case.of(key) for key in dict.fromkeys(keys)]
    where = environment(bench.bandwidth())
    check_comparable(base, Record("run", where, []), force=force)
    return _measure_all(chosen, bench, lambda name: name == OURS, TURNS, where, path)


def contenders(
    case: Case, wanted: Callable[[str], bool] = lambda name: True, device: str = "cuda"
) -> Iterator[Contender | Row]:
    """Who takes part in a case; a row for who could not be loaded."""
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
    """One case: every contender that is wanted by its name checked, then timed in turns.

    Returns:
        `rows`, a row for each contender by name, which come as they are measured.

    Raises:
        UnusableError: A contender left the GPU so that nothing works on it any more.
    """
    operation = OPERATIONS[case.op]
    rows = {} if rows is None else rows
    moved = operation.moved(case) if bench.device == "cuda" else None
    inputs, fault = [], {}
    try:
        inputs = _input_sets(case, operation, bench)
    except torch.OutOfMemoryError as error:
        fault = output.fault_of(error, "inputs do not fit")
    timers: dict[str, Timer] = {}
    for contender in contenders(case, wanted, bench.device):
        if isinstance(contender, Row):
            rows[contender.contender] = contender
            continue
        row, timer, start = _row(case, contender.name, moved, **fault), None, time.monotonic()
        if progress:
            progress.detail(f"{case.key}, {contender.name}")
        try:
            if not fault:
                row, timer = _prepare(case, contender, inputs, bench, row)
        except Exception as error:
            row = row.replace(**output.fault_of(error))
        rows[row.contender] = row
        if timer:
            timers[row.contender] = timer
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


def _input_sets(
    case: Case, operation: Operation, bench: Bench
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The inputs of a case and cotangents of its results, made once for all contenders."""

    def drawn(seed: int) -> tuple[list[Tensor], list[Tensor]]:
        make = Inputs(case, bench.device, seed)
        tensors = [make.get(name) for name in operation.names]
        own = len(tensors) - operation.parameters
        with torch.no_grad():  # results of one token have the shapes, but for the tokens
            one = as_tuple(operation.reference(*(t[:1] for t in tensors[:own]), *tensors[own:]))
        return tensors, make.like(tuple(v.expand(case.tokens, *v.shape[1:]) for v in one))

    first = drawn(0)
    count = bench.sets(sum(value.nbytes for value in first[0]))
    return [first, *(drawn(seed) for seed in range(1, count))]


def _prepare(
    case: Case,
    contender: Contender,
    inputs: Sequence[tuple[list[Tensor], list[Tensor]]],
    bench: Bench,
    row: Row,
) -> tuple[Row, Timer | None]:
    """Check a contender; its row without times, and its timer if it is right."""
    if contender.note:
        return row.replace(status="wrong", fault=f"computes something else: {contender.note}"), None
    error = check(case, contender, *inputs[0])
    if not error < TOLERANCE:
        fault = f"relative error {error:.1e} against the reference in float64"
        known = error if math.isfinite(error) else None  # JSON has no infinity
        return row.replace(status="wrong", fault=fault, error=known), None
    training = case.mode == "training"
    own = []
    for tensors, cotangents in inputs:
        leaves = leaves_of(case, contender, tensors)
        own.append([*leaves, *(contender.cotangents(*cotangents) if training else ())])
    count = len(leaves)

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
    shape = (case.tokens, case.hidden_size, case.streams, case.dtype)
    return Row(case.key, name, case.op, case.mode, *shape, bytes=moved, **values)

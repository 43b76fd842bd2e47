"""`mhc-tile perf run`: op x case x contender, checked, then timed in turns.

Contenders are this library ("mhc_tile"), its reference in eager PyTorch and under torch.compile,
and other implementations that are installed. Every one's results, and in training its gradients of
every tensor, are compared with the reference in float64 first; what differs by more than the
rounding of bf16 explains is shown as wrong and not timed. What fails is shown with its error, and
the run goes on.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhc_tile.autotune._extras import require
from mhc_tile.autotune.timing import interleaved

from . import records
from .bench import Bench, bench_of
from .operations import MODES, OPERATIONS, Case, Inputs, Operation, Results, cases
from .peers import ADAPTERS, Contender
from .records import OURS, Record, Row

EAGER, COMPILED = "reference (eager)", "reference (compiled)"
TOLERANCE = 0.01  # relative RMS error; bf16 rounds to 2e-3
CHUNK = 1024  # tokens of the reference in float64 at a time
TURNS = 20
QUICK_TURNS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mhc-tile perf run`."""
    add = parser.add_argument
    add("--quick", action="store_true", help="the main sizes only: under 3 minutes, warm")
    add("--device", default="cuda", help="cuda, or cpu for small sizes (default: cuda)")
    add("--op", nargs="+", choices=tuple(OPERATIONS), default=[], help="these only")
    add("--mode", nargs="+", choices=MODES, default=[], help="these only")
    add("--tokens", type=int, nargs="+", default=[], help="T: cases of these only")
    add("--hidden", type=int, nargs="+", default=[], help="C: cases of these only")
    add("--contender", nargs="+", default=[], help="by the beginnings of their names; default: all")
    add("--out", type=Path, metavar="FILE", help="result file (default: perf-<gpu>.json)")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table and write the result.

    Returns:
        0, or 1 if this library is wrong or fails somewhere.

    Raises:
        ValueError: The arguments leave nothing to measure.
        OSError: The result cannot be written.
        KeyboardInterrupt: After Ctrl-C, with what was measured in the file.
    """
    bench = bench_of(args.device)
    chosen = [
        case
        for case in cases(quick=args.quick, device=args.device, ops=args.op)
        if (not args.mode or case.mode in args.mode)
        and (not args.tokens or case.tokens in args.tokens)
        and (not args.hidden or case.hidden_size in args.hidden)
    ]
    if not chosen:
        raise ValueError(
            "perf run: --op, --mode, --tokens and --hidden must leave a case, got none"
        )
    environment = records.environment(bench.bandwidth(), args.device)
    record = Record("run", environment, [])
    path = args.out or Path(f"perf-{_slug(environment)}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    progress = require("tqdm", "mhc-tile perf run", "perf").tqdm(chosen, disable=None)
    wanted = functools.partial(_wanted, names=tuple(args.contender))
    rows: list[Row] = []
    try:
        for case in progress:
            progress.set_description(case.key)
            if not sys.stderr.isatty():
                sys.stderr.write(f"{case.key}\n")
            rows += measure(case, bench, wanted, QUICK_TURNS if args.quick else TURNS)
    finally:  # whatever ends the run, what was measured is kept
        records.write(Record("run", record.environment, rows), path)
    _say(table(Record("run", environment, rows)), f"\nresult: {path}")
    return int(any(row.status != "ok" for row in rows if row.contender == OURS))


def measure_for_gate(base: Record) -> Record:
    """This library on the cases of a baseline.

    Args:
        base: of `mhc-tile perf run`; cases without our times are left out.
    """
    bench = bench_of("cuda")
    record = Record("run", records.environment(bench.bandwidth()), [])
    keys = [row.case for row in base.rows if row.contender == OURS and row.us is not None]
    rows = [
        row
        for key in dict.fromkeys(keys)
        for row in measure(Case.of(key), bench, lambda name: name == OURS, TURNS)
    ]
    return Record("run", record.environment, rows)


def contenders(
    case: Case, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[Contender | Row]:
    """Who takes part in a case; a row for who could not be loaded.

    Args:
        case: the op is of `OPERATIONS`.
        wanted: of a name.
    """
    operation = OPERATIONS[case.op]
    if wanted(OURS):
        yield Contender(OURS, operation.ours)
    if wanted(EAGER):
        yield Contender(EAGER, operation.reference)
    if wanted(COMPILED):
        torch._dynamo.reset()  # a case is compiled for itself, whatever others have left
        compiled = torch.compile(operation.reference, fullgraph=True, dynamic=False)
        yield Contender(COMPILED, compiled)
    if case.streams != 4 or case.dtype != "bfloat16":
        return
    for name, adapter in ADAPTERS.items():
        if not wanted(name):
            continue
        if records.version(name) is None:
            continue  # said once, in the environment
        try:
            contender = adapter(case.op)
        except Exception as error:
            yield _row(case, name, None, status="failed", fault=_one_line(error))
            continue
        if contender:
            yield contender


def measure(
    case: Case, bench: Bench, wanted: Callable[[str], bool], turns: int = TURNS
) -> list[Row]:
    """One case: every contender checked, then timed in turns.

    Args:
        case: what.
        bench: where.
        wanted: which contenders, by name.
        turns: of each.

    Returns:
        A row for each contender.
    """
    operation = OPERATIONS[case.op]
    rows: dict[str, Row] = {}
    timers: dict[str, Any] = {}
    moved = operation.moved(case) if bench.device == "cuda" else None
    inputs = _Sets(case, operation, bench)
    for contender in contenders(case, wanted):
        if isinstance(contender, Row):
            rows[contender.contender] = contender
            continue
        row = _row(case, contender.name, moved)
        try:
            row, timers[row.contender] = _prepare(case, contender, inputs, bench, row)
        except torch.OutOfMemoryError as error:
            row = row.replace(status="out of memory", fault=_one_line(error))
        except _WrongError as error:
            row = row.replace(status="wrong", fault=str(error), error=error.error)
        except Exception as error:
            row = row.replace(status="failed", fault=_one_line(error))
        if row.status != "ok" and not bench.recover():
            raise RuntimeError(f"perf run: {row.contender} left the GPU unusable: {row.fault}")
        rows[row.contender] = row
    samples = interleaved(list(timers.values()), turns) if timers else []
    for name, sample in zip(timers, samples, strict=True):
        rows[name] = rows[name].replace(
            us=sample.us, p20=sample.low, p80=sample.high, turns=sample.turns
        )
    return list(rows.values())


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
        tensors = [make.make(name) for name in self._operation.names]
        return tensors, make.like(self._shapes(tensors))

    def _shapes(self, tensors: Sequence[Tensor]) -> Results:
        """Results of the reference on one token, as many as there are tokens."""
        own = len(tensors) - self._operation.parameters
        with torch.no_grad():
            found = _tuple(
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
        raise _WrongError(f"relative error {error:.1e} against the reference in float64", error)
    training = case.mode == "training"
    own = []
    for tensors, cotangents in inputs.all:
        leaves = _leaves(case, contender, tensors)
        own.append([*leaves, *(contender.cotangents(*cotangents) if training else ())])
    count = len(_leaves(case, contender, inputs.all[0][0]))

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

    function(*own[0])  # compiles
    peak, saved = bench.memory(forward, backward if training else None)
    host = bench.host_us(function, own[0])
    timed = bench.timed(function, own)
    row = row.replace(
        error=error,
        captured=timed.captured,
        launches=timed.launches,
        host_us=host,
        peak_bytes=peak,
        saved_bytes=saved,
    )
    return row, timed.timer


def check(
    case: Case, contender: Contender, tensors: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> float:
    """The largest relative RMS error of a contender's results, and of its gradients in training.

    The truth is the reference in float64 on the same tensors, some tokens at a time.
    """
    operation = OPERATIONS[case.op]
    training = case.mode == "training"
    leaves = _leaves(case, contender, tensors)
    with torch.set_grad_enabled(case.mode != "inference"):
        raw = contender.results(*leaves)
    found = [*contender.give(*(value.detach() for value in raw))]
    if training:
        grads = torch.autograd.grad(raw, leaves, contender.cotangents(*cotangents))
        found += contender.gradients(*grads)
    own = len(tensors) - operation.parameters
    count = len(cotangents)
    errors, norms = [0.0] * len(found), [0.0] * len(found)
    sums: dict[int, Tensor] = {}
    for start in range(0, case.tokens, CHUNK):
        part = slice(start, start + CHUNK)
        wide = [t[part].double() if i < own else t.double() for i, t in enumerate(tensors)]
        wide = [value.requires_grad_(training) for value in wide]
        truths = list(_tuple(operation.reference(*wide)))
        if training:
            truths += torch.autograd.grad(truths, wide, [g[part].double() for g in cotangents])
        for index, truth in enumerate(truths[: len(found)]):
            if index >= count + own:  # of a parameter: a sum over all tokens
                sums[index] = sums.get(index, torch.zeros_like(truth)) + truth.detach()
                continue
            value = found[index][part].double().view_as(truth)
            errors[index] += (value - truth).square().sum().item()
            norms[index] += truth.square().sum().item()
    for index, truth in sums.items():
        errors[index] = (found[index].double().view_as(truth) - truth).square().sum().item()
        norms[index] = truth.square().sum().item()
    pairs = zip(errors, norms, strict=True)
    return max((e / n) ** 0.5 if n else e**0.5 for e, n in pairs)


def table(record: Record) -> str:
    """A run as text: a line for each contender of each case."""
    tabulate = require("tabulate", "mhc-tile perf run", "perf").tabulate
    bandwidth = record.environment["copy_bytes_per_s"]
    lines = []
    for case in record.cases:
        rows = record.of(case)
        rivals = [r.us for r in rows if r.us and r.contender.startswith(tuple(ADAPTERS))]
        for row in rows:
            size = f"{row.tokens} x {row.hidden_size}"
            cells: list[Any] = [row.op, row.mode, size, row.contender]
            if row.us is None:
                lines.append([*cells, row.status, row.fault[:60], "", "", "", ""])
                continue
            share = records.percent_of_roofline(row, bandwidth)
            mark = "*" if row.captured is False else ""
            best = f"{min(rivals) / row.us:.2f}x" if rivals and row.contender == OURS else ""
            lines.append(
                [
                    *cells,
                    f"{row.us:.1f}{mark}",
                    f"{row.p20:.1f} to {row.p80:.1f}",
                    "" if row.bytes is None else f"{row.bytes / row.us * 1e-3:.0f}",
                    "" if share is None else f"{share:.0f}%",
                    best,
                    f"{row.error:.0e}",
                ]
            )
    heads = ["op", "mode", "T x C", "contender", "us", "p20 to p80", "GB/s", "of roofline"]
    text = tabulate([*lines], headers=[*heads, "best peer / us", "error"], disable_numparse=True)
    place = f"{record.environment['device']}; copy {bandwidth / 1e12:.2f} TB/s"
    absent = [n for n in ADAPTERS if record.environment["packages"].get(n) is None]
    notes = ["* launched call by call, the host included"]
    notes += [f"not installed: {', '.join(absent)}"] if absent else []
    return "\n".join([place, "", text, "", *notes])


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


def _leaves(case: Case, contender: Contender, tensors: Sequence[Tensor]) -> list[Tensor]:
    graph = case.mode != "inference"
    return [value.detach().requires_grad_(graph) for value in contender.take(*tensors)]


def _tuple(results: Any) -> Results:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _wanted(name: str, names: tuple[str, ...]) -> bool:
    return not names or name.startswith(names)


def _slug(environment: dict[str, Any]) -> str:
    return "_".join((environment["gpu"] or "cpu").lower().split())


def _one_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}".rstrip(": ")


def _say(*texts: str) -> None:
    sys.stdout.write("".join(f"{text}\n" for text in texts))
    sys.stdout.flush()

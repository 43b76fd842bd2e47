"""`mhc-tile perf overhead`: what the residual connection costs a training step, the 6.7% question.

A slice of a named model (some layers without embedding and head, in bf16, connections in fp32) runs
forward and backward, and optionally an optimizer's step. Plain residuals, HC and mHC, by this
library, its reference and other packages, join the same layers. Contenders take turns, step by
step. The overhead is what a step takes longer than with plain residuals under torch.compile.
"""

import dataclasses
import functools
import gc
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch._inductor.config
from torch import nn

from mhc_tile.autotune._options import Options
from mhc_tile.autotune.timing import rounds
from mhc_tile.models import CONFIGS

from . import output, session, tables
from .bench import Bench
from .breakdown import breakdown, steps_under_load
from .peers import is_asked, left_out
from .records import Row
from .slices import (
    BATCH,
    LAYERS,
    NAMES,
    ON_REQUEST,
    PLAIN,
    SEQUENCE,
    TF32,
    UNCHECKED,
    Slice,
    Step,
    Sublayers,
    names_here,
)

TURNS = 16
# Relative error of output and gradient: layers in bf16, and experts chosen by rounded affinities.
TOLERANCE = 0.1

_MODEL: Any = Literal.__getitem__(tuple(CONFIGS))
DEFAULTS: dict[str, Any] = {
    "model": ("paper-27b", "paper-27b-dense"),
    "batch": BATCH,
    "sequence": SEQUENCE,
    "turns": TURNS,
    "device": "cuda",
}
OPTIONS: Options = {
    "model": (tuple[_MODEL, ...], f"which slices (default: {' '.join(DEFAULTS['model'])})"),
    "layers": (int, f"of each slice (default: {LAYERS}, or fewer if that is what fits)"),
    "batch": (int, f"sequences (default: {BATCH})"),
    "sequence": (int, f"tokens of each (default: {SEQUENCE})"),
    "optimizer": (bool, "with a step of AdamW"),
    "contender": (
        tuple[str, ...],
        "by the beginnings of their names (default: all but (eager) and (graphs))",
    ),
    "turns": (int, f"of each contender (default: {TURNS})"),
    "device": (str, "cuda or cpu (default: cuda)"),
    "out": (Path, "result file (default: overhead-<gpu>.json)"),
    "figures": (Path, "folder for what a step is made of as PNG, too"),
}


def run(args: SimpleNamespace) -> int:
    """Measure, print tables and write the result.

    Returns:
        0, or 1 if this library is wrong or fails.

    Raises:
        ValueError: The arguments are out of range.
        KeyboardInterrupt: After Ctrl-C, with what was measured in the file.
    """
    numbers = {name: getattr(args, name) for name in ("layers", "batch", "sequence")}
    output.check_positive("perf overhead", **numbers)
    bench, where, path = session.begin(
        "overhead", args, (*NAMES, *ON_REQUEST), names_here(args.device)
    )
    shape = (args.layers or LAYERS, args.batch, args.sequence, args.optimizer, args.device)
    where["denominator"] = {}
    if missing := left_out(("pre", "merge"), functools.partial(is_asked, names=args.contender)):
        where["left_out"] = missing
        output.say(*missing)

    def measured(piece: Slice, rows: dict[str, Row], progress: output.Progress) -> None:
        while True:
            where["denominator"][piece.key] = piece.denominator
            options = (progress, args.contender, args.turns, rows)
            if measure(piece, bench, *options, must_fit=not args.layers):
                break
            del where["denominator"][piece.key]
            piece = dataclasses.replace(piece, layers=piece.layers // 2)
            progress.say(f"memory is out: {piece.key} instead")
        output.say(tables.overhead(piece.denominator, list(rows.values())))

    slices = [Slice(model, *shape) for model in dict.fromkeys(args.model)]
    record = session.measure_all("overhead", slices, measured, bench, where, path)
    return session.end(record, path, args.figures)


@output.without_advice()
def measure(
    piece: Slice,
    bench: Bench,
    progress: output.Progress,
    wanted: tuple[str, ...] = (),
    turns: int = TURNS,
    rows: dict[str, Row] | None = None,
    *,
    must_fit: bool = False,
) -> dict[str, Row]:
    """One slice: the steps of plain residuals and of contenders that are wanted, in turns.

    With `must_fit`, a slice of several layers ends where a contender runs out of memory.

    Returns:
        `rows`, a row for each contender by name, which come as they are measured, the plain one
        first; none if it ended for memory.

    Raises:
        UnusableError: A contender left the GPU so that nothing works on it any more.
    """
    rows = {} if rows is None else rows
    torch._dynamo.reset()
    # what is not compiled must not pass for compiled
    limits: dict[str, Any] = {"fail_on_recompile_limit_hit": True}
    limits["recompile_limit"] = 64 + 8 * piece.layers  # every sublayer of four contenders
    limits["accumulated_recompile_limit"] = 16 * limits["recompile_limit"]
    # Inductor dismisses workers that rest for a minute. A run stood still where it compiled about
    # then; whether for that reason is not known.
    workers: dict[str, Any] = {"quiesce_async_compile_pool": False}
    with torch._dynamo.config.patch(**limits), torch._inductor.config.patch(**workers):
        try:
            _measure(piece, bench, progress, wanted, turns, rows, must_fit and piece.layers > 1)
        except _FullError:
            rows.clear()
    gc.collect()  # else a slice leaves its memory to the next one
    bench.recover()
    return rows


def _measure(
    piece: Slice,
    bench: Bench,
    progress: output.Progress,
    wanted: tuple[str, ...],
    turns: int,
    rows: dict[str, Row],
    must_fit: bool,
) -> None:
    steps: dict[str, Step] = {}
    chosen = [n for n in names_here(piece.device) if n == PLAIN or is_asked(n, wanted)]
    if not wanted:
        chosen = [name for name in chosen if name not in ON_REQUEST]
    checked = [name for name in chosen if not name.startswith(UNCHECKED)]

    def failed(names: Sequence[str], what: str, error: Exception) -> None:
        fault = output.fault_of(error, what)
        if must_fit and fault["status"] == "out of memory":
            raise _FullError from error
        for name in names:
            rows[name] = _row(piece, name).replace(**fault)
        output.recover(bench, rows[names[0]])

    progress.say(f"{piece.key}: layers")
    try:
        sublayers = Sublayers(piece)
    except torch.OutOfMemoryError as error:
        return failed(chosen, "the layers do not fit", error)
    try:
        if checked:
            sublayers.truth  # noqa: B018
    except Exception as error:
        failed(checked, "the reference, which results are checked against, fails", error)
    of_layers = [p for layer in sublayers.layers for p in layer.parameters()]
    shared, shared_ids = _optimizer(piece, of_layers), {id(p) for p in of_layers}
    for name, build in sublayers.contenders().items():
        if name not in chosen or name in rows:
            continue
        progress.say(f"{piece.key}: {name}")
        row, step = _row(piece, name), None
        try:
            model = build()
            own = _optimizer(piece, (p for p in model.parameters() if id(p) not in shared_ids))
            tf32 = name.endswith(TF32)
            step = Step(model, *sublayers.inputs(name), [*shared, *own], tf32=tf32)
            row = row.replace(error=sublayers.error(name, model, step.x))
            if row.error is not None and not row.error < TOLERANCE:
                fault = (
                    f"relative error {row.error:.1e} of output or gradient against the reference"
                )
                known = row.error if math.isfinite(row.error) else None  # JSON has no NaN
                row = row.replace(status="wrong", fault=fault, error=known)
            else:
                step()  # compiles
                step.free()  # else the next one's gradients would seem to cost nothing
                peak, _ = bench.memory(lambda step=step: step() or (), None)
                row, steps[name] = row.replace(peak_bytes=peak), step
        except Exception as error:
            row = row.replace(**output.fault_of(error))
        if step:
            step.free()
        rows[name] = row
        if row.status == "out of memory" and must_fit:
            raise _FullError
        if row.status != "ok":
            output.recover(bench, row)
    progress.say(f"{piece.key}: {turns} turns of {len(steps)}")
    _time(piece, rows, steps, bench, turns)


class _FullError(Exception):
    """A slice of several layers does not fit."""


def _time(
    piece: Slice, rows: dict[str, Row], steps: dict[str, Step], bench: Bench, turns: int
) -> None:
    """Let the contenders take turns; overheads follow, and what the steps are made of."""
    clocks = {name: _Clock(step, bench.device) for name, step in steps.items()}

    def failed(name: str, error: Exception) -> None:
        steps.pop(name).free()
        rows[name] = _row(piece, name).replace(**output.fault_of(error))
        output.recover(bench, rows[name])

    for _ in rounds(clocks, 1, failed):
        pass  # the first turn warms up
    for clock in clocks.values():
        clock.taken.clear()
    for samples in rounds({name: clocks[name] for name in steps}, turns, failed):
        plain = clocks[PLAIN].taken if PLAIN in samples else []
        for name, sample in samples.items():
            taken = [round(us, 1) for us in clocks[name].taken]
            details: dict[str, Any] = {"layers": piece.layers, "denominator": piece.denominator}
            details["turns_us"] = taken
            if plain:
                over, error = longer(clocks[name].taken, plain)
                details |= {"overhead_percent": 100 * over, "overhead_error": 100 * error}
                details["sublayer_us"] = over * samples[PLAIN].us / (2 * piece.layers)
            rows[name] = rows[name].timed(sample).replace(captured=False, details=details)
    for name, step in steps.items() if bench.device == "cuda" else ():
        try:
            found = breakdown(step, rows[name].us or 0.0)
            details = {**rows[name].details, "kernels": found.kernels, "profiled_us": found.us}
            rows[name] = rows[name].replace(parts=found.parts, details=details)
        except Exception as error:  # the times are there all the same
            details = {**rows[name].details, "breakdown": output.one_line(error)}
            rows[name] = rows[name].replace(details=details)
        step.free()


def longer(steps: Sequence[float], plain: Sequence[float]) -> tuple[float, float]:
    """By how much steps are longer than the plain ones of their rounds, and the standard error.

    The mean over rounds without an eighth at either end. No median: at its power limit a GPU has
    two states, each of which lasts for seconds and in which one and the same step takes 2% more or
    less, and a median jumps from one to the other.
    """
    ratios = sorted(one / other - 1 for one, other in zip(steps, plain, strict=True))
    cut = len(ratios) // 8
    kept = ratios[cut : len(ratios) - cut]
    drawn_in = [*kept[:1] * cut, *kept, *kept[-1:] * cut]  # winsorised
    share = len(kept) / len(ratios)
    deviation = statistics.stdev(drawn_in) if len(ratios) > 1 else 0.0
    return statistics.fmean(kept), deviation / share / math.sqrt(len(ratios))


class _Clock:
    """A timer of a step: microseconds, the mean of some in a row under their own load.

    The first reading is of one step, to learn how long they take.
    """

    def __init__(self, step: Step, device: str) -> None:
        self._step, self._device, self._count = step, device, 1
        self.taken: list[float] = []  # every reading

    def __call__(self) -> float:
        if self._device == "cpu":
            start = time.perf_counter()
            self._step()
            taken = (time.perf_counter() - start) * 1e6
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._run()  # the load before is another contender's
            begin.record()
            self._run()
            end.record()
            end.synchronize()
            taken = begin.elapsed_time(end) * 1000 / self._count
            self._count = steps_under_load(taken)
        self._step.free()
        self.taken.append(taken)
        return taken

    def _run(self) -> None:
        for _ in range(self._count):
            self._step()


def _optimizer(piece: Slice, parameters: Iterable[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """AdamW with a learning rate of 0: every contender keeps the same weights."""
    chosen = list(parameters) if piece.optimizer else []
    return [torch.optim.AdamW(chosen, lr=0.0, fused=True)] if chosen else []


def _row(piece: Slice, name: str) -> Row:
    shape = (piece.batch * piece.sequence, piece.config.hidden_size, 4)
    return Row(piece.key, name, "step", "training", *shape, "bfloat16")

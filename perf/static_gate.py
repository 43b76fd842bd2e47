"""What every op launches and moves, counted without a GPU, against the record perf/static/ops.json.

An op's own CUDA code runs on tensors without values, with default configurations; its launches are
noted instead of made. Of each op, at many tokens and at few:

    launches: GPU kernels of a call, those of torch's own ops (copies, fills) included
    torch: these alone
    bytes: that must move, by the kernels' `traffic()`
    passed: bytes of all tensors that are passed to launches, once for each launch that gets them

`bytes` is a floor and grows if the definition of the work does; `passed` grows if a tensor is read
once more, or a temporary one appears. Growth of any of them is an error, less asks to be recorded.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_tile import MHCConfig
from mhc_tile.autotune.problems import Problem
from mhc_tile.autotune.registry import KERNELS
from mhc_tile.kernels.boundary import launch as boundary
from mhc_tile.kernels.common.architectures import multiprocessors_of
from mhc_tile.kernels.common.programs import dry_run
from mhc_tile.kernels.common.quantities import Samples
from mhc_tile.ops import _dispatch
from mhc_tile.ops._definition import DEFINITIONS
from mhc_tile.perf import program_gate as _gate

from . import resources

RECORD = resources.RECORDS / "ops.json"
WRITE = "mhc-tile perf gate --static --write"
ARCHITECTURES = ("sm_90a", "sm_80")  # the others run the forms of sm_80
TOKENS = tuple(_gate.GROUPS.values())
STREAMS, CHANNELS, DTYPE = 4, 2560, "bfloat16"
PARTED = " with grad_x_part"  # an op that is given what it may do without
# Ops that have no kernel of their own name in the registry, by what they do.
PARTS = {
    "expand_backward": ("collapse",),
    "collapse_backward": ("expand",),
    "boundary_backward": ("pre_backward", "merge_backward"),
    f"pre_backward{PARTED}": ("pre_backward",),
}
OTHERS = {**dataclasses.asdict(MHCConfig.paper()), "eps": 0.0, "num_streams": 4, "mode": "mean"}

Counts = dict[str, int]
Record = dict[str, dict[str, Counts]]


def measure(architectures: Sequence[str] = ARCHITECTURES) -> Record:
    """Counts by architecture and by "<op> at <tokens>".

    Args:
        architectures: some of `CHECKED`.

    Example:
        >>> measure(["sm_90a"])["sm_90a"]["merge at 64"]["launches"]
        1
    """
    return {
        arch: {f"{op} at {tokens}": count(op, arch, tokens) for op in names() for tokens in TOKENS}
        for arch in architectures
    }


def names() -> list[str]:
    """Every op that has kernels, twice if it has an optional tensor."""
    given = {name.lstrip("_"): op for name, op in DEFINITIONS.items() if op.kernel}
    return sorted([*given, *(f"{name}{PARTED}" for name, op in given.items() if op.optional)])


def count(op: str, arch: str, tokens: int) -> Counts:
    """Run an op's CUDA code on tensors without values and count; see the module's docstring.

    Args:
        op: of `names()`.
        arch: one of `CHECKED`.
        tokens: T.
    """
    name = op.removesuffix(PARTED)
    positional, keywords = arguments(op, tokens)
    pinned = _dispatch.BATCH_INVARIANT
    _dispatch.set_batch_invariant(False)
    try:
        with dry_run(arch, multiprocessors_of(arch)) as asked, _TorchKernels() as own:
            _dispatch.LAUNCHERS[name](*positional, **keywords)
    finally:
        _dispatch.set_batch_invariant(pinned)
    passed = [value for *_, given in asked.launches for value in given if isinstance(value, Tensor)]
    launches = sum(_kernels(factory, constants) for factory, constants, _ in asked.launches)
    return {
        "launches": launches + len(own.names),
        "torch": len(own.names),
        "bytes": must_move(op, tokens),
        "passed": sum(value.nbytes for value in passed) + own.bytes,
    }


def arguments(op: str, tokens: int) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments of a call, its tensors without values.

    Args:
        op: of `names()`.
        tokens: T.
    """
    name = op.removesuffix(PARTED)
    known = DEFINITIONS.get(name) or DEFINITIONS[f"_{name}"]
    make = Samples(tokens, STREAMS, CHANNELS, getattr(torch, DTYPE), "meta")
    return known.call_of(make.get, OTHERS, known.optional if op != name else ())


def must_move(op: str, tokens: int) -> int:
    """Bytes that an op must move, by `traffic()` of its kernels.

    Args:
        op: of `names()`.
        tokens: T.
    """
    if op == "boundary":
        return boundary.traffic(Problem("boundary", STREAMS, CHANNELS, DTYPE, tokens))
    moved = 0
    for part in PARTS.get(op, (op,)):
        kernel = KERNELS[part]
        moved += kernel.traffic(Problem(part, STREAMS, CHANNELS, DTYPE, tokens))
    if op == "pre_backward":  # the registry's has grad_x_part
        moved -= tokens * STREAMS * CHANNELS * getattr(torch, DTYPE).itemsize
    return moved


def differences(record: Record, now: Record) -> tuple[list[str], list[str]]:
    """What is more than recorded, and what only waits to be recorded.

    Args:
        record: of the file.
        now: of `measure`.

    Example:
        >>> old = {"sm_80": {"merge at 64": {"launches": 1, "bytes": 10}}}
        >>> differences(old, {"sm_80": {"merge at 64": {"launches": 2, "bytes": 9}}})
        (['sm_80: merge at 64: launches 1 -> 2'], ['sm_80: merge at 64: bytes 10 -> 9'])
    """
    more: list[str] = []
    other: list[str] = []
    for arch, counted in now.items():
        kept = record.get(arch, {})
        for name, counts in counted.items():
            if name not in kept:
                other.append(f"{arch}: {name}: is not recorded")
                continue
            for key, value in counts.items():
                before = kept[name].get(key, 0)
                if before != value:
                    line = f"{arch}: {name}: {key} {before} -> {value}"
                    (more if value > before else other).append(line)
        other += [f"{arch}: {name}: is no more" for name in kept if name not in counted]
    return more, other


def read(path: Path | None = None) -> Record:
    """The record.

    Args:
        path: of the file; RECORD if None.

    Raises:
        ValueError: There is none, or it holds something else.
    """
    path = path or RECORD
    try:
        record = json.loads(path.read_text())
        if not all(
            isinstance(value, int)
            for counted in record.values()
            for counts in counted.values()
            for value in counts.values()
        ):
            raise ValueError("something that is no count")
        return record
    except (OSError, AttributeError, ValueError) as error:
        raise ValueError(f"record: {path} must hold counts of ops, got {error}; {WRITE}") from error


def run(architectures: Sequence[str], *, fresh: bool = False, write: bool = False) -> list[str]:
    """The whole static gate: of every kernel what it takes, of every op what it launches.

    Args:
        architectures: some of `CHECKED`.
        fresh: whether to compile programs that are recorded, too.
        write: whether to record what there is now, instead of comparing with the record.

    Returns:
        What is wrong.

    Raises:
        ValueError: There is no record, or no checkout to write one in.
    """
    if write:
        resources.check_writable()
    counted = measure([arch for arch in ARCHITECTURES if arch in architectures])
    found: list[str] = []
    if write:
        _write(counted)
    else:
        found, other = differences(read(), counted)
        for line in other:
            sys.stdout.write(f"{line}; record it with `{WRITE}`\n")
        found = [f"{line}; if it must be, {WRITE}" for line in found]
    for arch, taken in resources.measure(architectures, fresh=fresh).items():
        faults = resources.judge(arch, taken, write=write)
        ops_too = f", {len(counted[arch])} calls of ops" if arch in counted else ""
        sys.stdout.write(f"{arch}: {len(taken.kernels)} kernels{ops_too}\n")
        found += faults
    return found


def _write(counted: Record) -> None:
    try:
        kept = read()
    except ValueError:
        kept = {}
    draft = RECORD.with_suffix(".draft")
    draft.write_text(json.dumps({**kept, **counted}, indent=1) + "\n")
    draft.replace(RECORD)


class _TorchKernels(TorchDispatchMode):
    """Notes torch's own ops that launch kernels: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not (func.is_view or "empty" in name or name in ("detach", "_unsafe_view")):
            self.names.append(name)
            values = [*args, *(results if isinstance(results, (list, tuple)) else [results])]
            self.bytes += sum(value.nbytes for value in values if isinstance(value, Tensor))
        return results


@functools.cache
def _kernels(factory: Any, constants: tuple[Any, ...]) -> int:
    """How many kernels a program is."""
    from tilelang import tvm

    roots = []

    def visit(node: Any) -> None:
        if isinstance(node, tvm.tirx.SBlock) and node.name_hint == "tilelang_root":
            roots.append(node)

    tvm.tirx.stmt_functor.post_order_visit(factory(*constants).body, visit)
    return len(roots)

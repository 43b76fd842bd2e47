"""What every op launches and moves, counted without a GPU, against the record perf/static/ops.json.

An op's own CUDA code runs on tensors without values, with default configurations; its launches are
noted instead of made. Of each op, at many tokens and at few:

    launches: GPU kernels of a call, those of torch's own ops (copies, fills) included
    torch: these alone
    bytes: that must move, by the kernels' `traffic()`
    passed: bytes of all tensors that are passed to launches, once for each launch that gets them

`bytes` is a floor and grows if the definition of the work does; `passed` grows if a tensor is read
once more, or a temporary one appears. Growth of any of them is an error, less asks to be recorded.
`run` is the whole gate, which also compares what the programs take.
"""

import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_tile.autotune.problems import Problem
from mhc_tile.autotune.registry import KERNELS
from mhc_tile.kernels.boundary import launch as boundary
from mhc_tile.kernels.common import files
from mhc_tile.kernels.common.programs import ITEM_BYTES
from mhc_tile.ops._definition import DEFINITIONS, Op

from . import program_gate
from .environment import ROOT, is_checkout
from .program_gate import CHANNELS, DTYPE, GROUPS, STREAMS, WRITE, call, launching

ARCHITECTURES = ("sm_90a", "sm_80")  # the others run the forms of sm_80
TOKENS = tuple(GROUPS.values())

Counts = dict[str, int]
Record = dict[str, dict[str, Counts]]


def measure(architectures: Sequence[str] = ARCHITECTURES) -> Record:
    """Counts by architecture and by "<op> at <tokens>".

    Example:
        >>> measure(["sm_90a"])["sm_90a"]["merge at 64"]["launches"]
        1
    """
    return {
        arch: {f"{op} at {tokens}": count(op, arch, tokens) for op in ops() for tokens in TOKENS}
        for arch in architectures
    }


@functools.cache
def ops() -> dict[str, tuple[Op, tuple[str, ...]]]:
    """Every op that has kernels, and those of its optional tensors that are given, by name."""
    found: dict[str, tuple[Op, tuple[str, ...]]] = {}
    for op in DEFINITIONS.values():
        if op.kernel:
            name = op.name.lstrip("_")
            found[name] = op, ()
            if op.optional:
                found[f"{name} with {op.optional[0]}"] = op, op.optional
    return dict(sorted(found.items(), key=lambda item: item[0]))


def count(name: str, arch: str, tokens: int) -> Counts:
    """Run the CUDA code of one of `ops` on tensors without values and count."""
    op, optional = ops()[name]
    launch = call(op, tokens, optional)
    with launching(arch) as asked, _TorchKernels() as own:
        launch()
    passed = [value for *_, given in asked.launches for value in given if isinstance(value, Tensor)]
    launches = sum(_kernels(factory, constants) for factory, constants, _ in asked.launches)
    return {
        "launches": launches + len(own.names),
        "torch": len(own.names),
        "bytes": _must_move(op, optional, tokens),
        "passed": sum(value.nbytes for value in passed) + own.bytes,
    }


def _must_move(op: Op, optional: Sequence[str], tokens: int) -> int:
    def traffic(kernel: str) -> int:
        of = boundary if kernel == "boundary" else KERNELS[kernel]
        return of.traffic(Problem(kernel, STREAMS, CHANNELS, DTYPE, tokens))

    if op.name == "boundary_backward":
        return traffic("pre_backward") + traffic("merge_backward")
    moved = traffic(op.kernel if isinstance(op.kernel, str) else op.name)
    if op.name == "pre_backward" and not optional:  # the registry's has grad_x_part
        moved -= tokens * STREAMS * CHANNELS * ITEM_BYTES[DTYPE]
    return moved


def differences(record: Record, now: Record) -> tuple[list[str], list[str]]:
    """What is more than recorded, and what only waits to be recorded.

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


def read() -> Record:
    """The record; ValueError where there is none, or it holds something else."""
    path = program_gate.RECORDS / "ops.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"record: {path} must hold counts of ops, got {error}; {WRITE}") from error


def run(architectures: Sequence[str], *, fresh: bool = False, write: bool = False) -> list[str]:
    """The whole static gate: of every kernel what it takes, of every op what it launches.

    Returns:
        What is wrong.

    Raises:
        ValueError: There is no record, no checkout to write one in, or a program does not compile.
    """
    if write and not is_checkout():
        raise ValueError(
            f"perf gate: --write must run in a checkout, got the installed package {ROOT}; "
            "clone the repository, and install it from there with `pip install -e .`"
        )
    counted = measure([arch for arch in ARCHITECTURES if arch in architectures])
    found: list[str] = []
    if write:
        _write(counted)
    else:
        found, other = differences(read(), counted)
        for line in other:
            sys.stdout.write(f"{line}; record it with `{WRITE}`\n")
        found = [f"{line}; if it must be, {WRITE}" for line in found]
    for arch, taken in program_gate.measure(architectures, fresh=fresh).items():
        for kernel, values in taken.kernels.items() if len(architectures) == 1 else ():
            shared = values["dynamic_smem"] + values["static_smem"]
            sys.stdout.write(
                f"{arch:8} {kernel:44} {values['registers']:4} registers {shared:7} bytes shared "
                f"{values['threads']:4} threads\n"
            )
        ops_too = f", {len(counted[arch])} calls of ops" if arch in counted else ""
        sys.stdout.write(f"{arch}: {len(taken.kernels)} kernels{ops_too}\n")
        found += [f"{arch}: {fault}" for fault in _judge(arch, taken, write=write)]
    return found


def _judge(arch: str, now: program_gate.Record, *, write: bool) -> list[str]:
    """What is wrong with an architecture's kernels; what only waits to be recorded is printed."""
    found, path = program_gate.faults(arch, now), program_gate.RECORDS / f"{arch}.json"
    if write:
        now.write(path)
        return found
    try:
        record = program_gate.Record.read(path)
    except ValueError as error:
        return [*found, str(error)]
    if names := program_gate.unrecorded(record, now):
        sys.stdout.write(f"{program_gate.reminder(arch, names)}\n")
    return found + program_gate.differences(record, now)


def _write(counted: Record) -> None:
    try:
        kept = read()
    except ValueError:
        kept = {}
    path = program_gate.RECORDS / "ops.json"
    files.write(path, json.dumps({**kept, **counted}, indent=1) + "\n")


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

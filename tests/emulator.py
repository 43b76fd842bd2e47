"""Runs a TileLang kernel's generated CUDA source on the CPU, one fiber per CUDA thread.

    run = emulate(program(channels=256), arch="sm_80")
    run(x=x, h_pre=h_pre, layer_input=layer_input)  # CPU tensors by name; writes layer_input

What the GPU would do is done, as late and in as awkward an order as it may; what a kernel must not
do is an EmulationError with block, thread and source line:

* a tensor or shared memory accessed out of bounds, a misaligned vector access, a bad local index;
* shared memory read that nobody wrote, or a cp.async's destination before its wait;
* a race: two threads touch the same bytes with no barrier in between, one writes another value;
* a barrier that not all threads reach, lanes of a warp at different instructions;
* a result that depends on the order in which threads run (each schedule must give the same bits);
* a launch that no GPU of the architecture accepts.

It knows sm_80's instructions: mma.sync, ldmatrix, cp.async, shuffles, barriers. TMA, mbarriers,
wgmma, tcgen05 and clusters are refused by name, with the pass configuration that does without
them. It says nothing about speed, and its functions such as `expf` are the C library's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from emulator_build import EmulationError, available
from emulator_launch import SCHEDULES, Library
from mhc_tile.kernels.common.lowering import Lowered, evaluate, lower
from mhc_tile.kernels.common.static import FLAGS

__all__ = ["EmulationError", "available", "emulate", "emulate_source", "poisoned"]


def emulate(
    prim_func: Any,
    arch: str = "sm_80",
    pass_configs: dict[str, Any] | None = None,
    *,
    schedules: Sequence[str] = SCHEDULES,
    instrument: bool = True,
) -> Callable[..., None]:
    """Lower and build a program; the result runs it on CPU tensors.

    Args:
        prim_func: what a `@T.prim_func` factory returns.
        arch: the architecture to generate code for.
        pass_configs: as for `tilelang.compile`.
        schedules: orders in which threads and blocks run; every one must give the same bits.
            "blockwise", where a block runs as far as it can alone, is for cooperative launches.
        instrument: report the kernel's own loads and stores. Without it a run is faster, and only
            barriers, the schedules and (after the run) writes beyond a tensor are checked.

    Returns:
        A callable that takes every tensor and scalar of the program by name and writes its outputs
        in place. Dynamic sizes follow from the tensors' shapes.

    Raises:
        EmulationError: The kernel uses what cannot be emulated, or does not compile.
    """
    run = emulate_source(
        lower(prim_func, arch, pass_configs),
        arch,
        schedules=schedules,
        instrument=instrument,
        flush="-ftz=true" in (pass_configs or {}).get(FLAGS, ()),
    )

    def checked(**values: Any) -> None:
        run(**values, **bind(prim_func, values))

    return checked


def emulate_source(
    lowered: Lowered,
    arch: str = "sm_80",
    *,
    schedules: Sequence[str] = SCHEDULES,
    instrument: bool = True,
    flush: bool = False,
) -> Callable[..., None]:
    """`emulate` for CUDA source, from `lower` or by hand; shapes and dtypes are not checked.

    With `flush` subnormal numbers are zero, except for tensor cores and IEEE intrinsics.
    """
    library = Library(lowered, arch, instrument, flush)
    cooperative = any(function.cooperative for function in lowered.functions)

    def run(**values: Any) -> None:
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        scalars = {name: value for name, value in values.items() if name not in tensors}
        results: dict[str, Tensor] = {}
        for schedule in schedules:
            if schedule == "blockwise" and not cooperative:
                continue  # one block at a time anyway
            copies = {name: tensor.clone() for name, tensor in tensors.items()}
            library.run(copies, scalars, schedule)
            results = results or copies
            for name in results:
                _check_same_bits(name, results[name], copies[name], (schedules[0], schedule))
        for name, result in results.items():
            tensors[name].copy_(result)

    return run


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor for an output: NaN everywhere, or the largest value of an integer type."""
    value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
    return torch.full(shape, value, dtype=dtype)


def bind(prim_func: Any, values: dict[str, Any]) -> dict[str, int]:
    """Check a program's arguments as its host code does on a GPU machine.

    Returns:
        The dynamic sizes that `values` does not name.

    Raises:
        TypeError: An argument is missing, unknown or not a tensor.
        ValueError: A tensor has another dtype, shape, device or stride than the program's.
    """
    name = str(prim_func.attrs["global_symbol"])
    buffers = {buffer.name: buffer for buffer in prim_func.buffer_map.values()}
    scalars = {p.name for p in prim_func.params if p not in prim_func.buffer_map}
    if missing := (set(buffers) | scalars) - set(values):
        raise TypeError(f"{name}: missing {', '.join(sorted(missing))}")
    sizes = {key: value for key, value in values.items() if isinstance(value, int)}
    for key, buffer in buffers.items():
        _check_tensor(f"{name}: {key}", values[key], _torch_dtype(str(buffer.dtype)))
        for extent, got in zip(buffer.shape, values[key].shape, strict=False):
            if hasattr(extent, "name"):
                sizes.setdefault(extent.name, got)
    for key, buffer in buffers.items():
        expected = [evaluate(extent, sizes) for extent in buffer.shape]
        if expected != list(values[key].shape):
            symbols = ", ".join(str(extent) for extent in buffer.shape)
            raise ValueError(
                f"{name}: {key} must have shape [{symbols}] = {expected}, "
                f"got {list(values[key].shape)}"
            )
    if unknown := set(values) - set(buffers) - scalars - set(sizes):
        raise TypeError(f"{name}: unknown {', '.join(sorted(unknown))}")
    return {key: value for key, value in sizes.items() if key not in values}


def _torch_dtype(name: str) -> torch.dtype:
    """What holds a TileLang dtype: tf32 values are passed as float32."""
    return torch.float32 if "tfloat32" in name else getattr(torch, name)


def _check_tensor(argument: str, tensor: Any, dtype: torch.dtype) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise ValueError(f"{argument} must have dtype {dtype}, got {tensor.dtype}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{argument} must be on the CPU, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{argument} must be contiguous, got strides {list(tensor.stride())}")


def _check_same_bits(name: str, first: Tensor, other: Tensor, schedules: tuple[str, str]) -> None:
    size = first.element_size()
    differs = (first.view(-1).view(torch.uint8) != other.view(-1).view(torch.uint8)).view(-1, size)
    if differs.any():
        index = int(differs.any(-1).nonzero()[0])
        raise EmulationError(
            f"{name} depends on the order of threads: {schedules[0]} and {schedules[1]} give "
            f"other bits, first at element {index} of {first.numel()}; a barrier is missing"
        )

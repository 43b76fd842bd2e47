"""Launches the kernels of a built library: arguments, launch limits, messages with source lines."""

import ctypes
import functools
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

from torch import Tensor

import emulator_build
from emulator_build import EmulationError
from mhc_tile.kernels.common.architectures import shared_limit
from mhc_tile.kernels.common.lowering import DeviceFunction, Lowered, evaluate

SCHEDULES = ("forward", "reverse", "shuffled", "blockwise")  # `Schedule` of simt/state.h
_SEED = 0x9E3779B9
_MOST_BLOCKS = (2**31 - 1, 65535, 65535)
_MOST_THREADS = (1024, 1024, 64)
_ONE_AT_A_TIME = threading.Lock()
_SCALARS: dict[str, Any] = {
    "int32": ctypes.c_int32,
    "int64": ctypes.c_int64,
    "uint32": ctypes.c_uint32,
    "float32": ctypes.c_float,
    "float64": ctypes.c_double,
    "bool": ctypes.c_bool,
}


class Library:
    """The kernels of some CUDA source, ready to run on the CPU.

    Args:
        lowered: source and kernels.
        arch: whose launch limits hold.
        instrument: whether the kernel's own loads and stores are checked.
        flush: whether subnormal numbers are zero, as nvcc's -ftz=true has it.
    """

    def __init__(self, lowered: Lowered, arch: str, instrument: bool, flush: bool = False):
        self.lowered = lowered
        self._arch = arch
        self._instrument = instrument
        self._flush = flush
        self._path = emulator_build.build(lowered, instrument)
        self._library = ctypes.CDLL(str(self._path))
        self._library.simt_launch.restype = ctypes.c_char_p

    def run(self, tensors: dict[str, Tensor], values: dict[str, Any], schedule: str) -> None:
        """Launch every kernel in order, with its threads in the order of `schedule`.

        Args:
            tensors: by name; written in place.
            values: sizes and scalars by name.
            schedule: one of SCHEDULES.

        Raises:
            EmulationError: A kernel did what it must not do.
        """
        for function in self.lowered.functions:
            self._launch(function, tensors, values, schedule)

    def _launch(
        self,
        function: DeviceFunction,
        tensors: dict[str, Tensor],
        values: dict[str, Any],
        schedule: str,
    ) -> None:
        sizes = {name: value for name, value in values.items() if isinstance(value, int)}
        grid = [evaluate(extent, sizes) for extent in function.grid]
        self._check_launch(function, grid)
        slots: list[Any] = []
        records = []
        for name, dtype in function.parameters:
            if name in tensors:
                records.append(_Tensor.of(name, tensors[name], argument=len(slots)))
                slots.append(ctypes.c_void_p())
            elif name in values and dtype in _SCALARS:
                slots.append(_SCALARS[dtype](values[name]))
            else:
                raise EmulationError(
                    f"{function.name}: the emulator passes tensors, sizes and scalars by name, "
                    f"and has no {dtype} {name}"
                )
        entry = getattr(self._library, emulator_build.entry_name(function))
        request = _Launch(
            kernel=ctypes.cast(entry, ctypes.c_void_p),
            arguments=(ctypes.c_void_p * len(slots))(*[ctypes.addressof(slot) for slot in slots]),
            grid=(ctypes.c_uint * 3)(*grid),
            block=(ctypes.c_uint * 3)(*function.block),
            dynamic_shared=function.dynamic_shared,
            cooperative=function.cooperative,
            schedule=SCHEDULES.index(schedule),
            seed=_SEED,
            flush=self._flush,
            instrumented=self._instrument,
            tensors=(_Tensor * len(records))(*records),
            tensor_count=len(records),
        )
        with _ONE_AT_A_TIME:
            message = self._library.simt_launch(ctypes.byref(request))
        if message is not None:
            raise EmulationError(f"{function.name}: {self._with_lines(message.decode())}")

    def _check_launch(self, function: DeviceFunction, grid: list[int]) -> None:
        limit = shared_limit(self._arch)
        if function.dynamic_shared > limit:
            raise EmulationError(
                f"{function.name}: dynamic shared memory must be at most {limit} bytes on "
                f"{self._arch}, got {function.dynamic_shared}"
            )
        for what, got, most in (
            ("grid", grid, _MOST_BLOCKS),
            ("block", function.block, _MOST_THREADS),
        ):
            if any(not 1 <= extent <= limit for extent, limit in zip(got, most, strict=True)):
                raise EmulationError(
                    f"{function.name}: {what} must be between (1, 1, 1) and {most}, got "
                    f"{tuple(got)}; a launcher does not launch where there is nothing to do"
                )
        if function.threads > 1024:
            raise EmulationError(
                f"{function.name}: a block must have at most 1024 threads, got {function.threads}"
            )

    def _with_lines(self, message: str) -> str:
        """Replace code addresses, written as @0x12ab@, by lines of the CUDA source."""
        text = self.lowered.source.split("\n")
        for address in set(re.findall(r"@(0x[0-9a-f]+|\(nil\))@", message)):
            number = _source_line(self._path, address)
            shown = f"line {number}: {text[number - 1].strip()[:120]}" if number else "(no line)"
            message = message.replace(f"@{address}@", shown)
        return message


class _Tensor(ctypes.Structure):
    """`Tensor` of simt/state.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("item_bytes", ctypes.c_uint),
        ("argument", ctypes.c_uint),
    )

    @classmethod
    def of(cls, name: str, tensor: Tensor, argument: int) -> "_Tensor":
        size = tensor.element_size()
        return cls(name.encode(), tensor.data_ptr(), tensor.nbytes, size, argument)


class _Launch(ctypes.Structure):
    """`Launch` of simt/state.h."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic_shared", ctypes.c_size_t),
        ("cooperative", ctypes.c_int),
        ("schedule", ctypes.c_int),
        ("seed", ctypes.c_uint32),
        ("flush", ctypes.c_int),
        ("instrumented", ctypes.c_int),
        ("tensors", ctypes.POINTER(_Tensor)),
        ("tensor_count", ctypes.c_uint),
    )


@functools.cache
def _source_line(library: Path, address: str) -> int | None:
    """The line of the CUDA source behind an address; None if there is none, or no addr2line."""
    command = ["addr2line", "-i", "-e", str(library), address]
    try:
        output = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return None
    match = re.search(r"kernel\.cu:(\d+)", output)
    return int(match[1]) if match else None

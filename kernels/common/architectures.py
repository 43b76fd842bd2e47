"""What kernels know of a GPU architecture: one record each, nothing of it anywhere else.

An architecture is named as nvcc names it, such as "sm_90a". Nothing here imports TileLang.
"""

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """One compute capability: CUDA C++ programming guide, technical specifications.

    nvcc does not check shared memory: a launch that asks for too much fails.
    """

    shared_bytes: int  # that a block may ask for; a multiprocessor has SYSTEM_SHARED_BYTES more
    threads: int  # that a multiprocessor runs at once
    blocks: int  # likewise
    multiprocessors: int | None = None  # of its largest GPU; None where no program is checked


REGISTERS = 65536  # of a multiprocessor
SYSTEM_SHARED_BYTES = 1024  # of each block


# By base name: sm_90a and sm_90 have one record.
_KNOWN = {
    "sm_80": Architecture(166_912, 2048, 32, 108),
    "sm_86": Architecture(101_376, 1536, 16),
    "sm_87": Architecture(166_912, 1536, 16),
    "sm_89": Architecture(101_376, 1536, 24, 142),
    "sm_90": Architecture(232_448, 2048, 32, 132),
    "sm_100": Architecture(232_448, 2048, 32, 148),
    "sm_103": Architecture(232_448, 2048, 32),
    "sm_110": Architecture(232_448, 1536, 24),
    "sm_120": Architecture(101_376, 1536, 24, 170),
    "sm_121": Architecture(101_376, 1536, 24),
}
# The architectures that every program must compile for, as their targets are named.
CHECKED = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")
# What a block may ask for on every supported GPU.
LEAST_SHARED_BYTES = min(known.shared_bytes for known in _KNOWN.values())


def architecture_of(arch: str) -> Architecture:
    """The record of an architecture; ValueError if there is none.

    Example:
        >>> architecture_of("sm_90a").shared_bytes
        232448
    """
    base = arch.rstrip("af")
    if base not in _KNOWN:
        known = ", ".join(_KNOWN)
        raise ValueError(f"architecture: arch must be one of {known}, got {arch}")
    return _KNOWN[base]


@functools.cache
def shared_limit(arch: str) -> int:
    """Dynamic shared memory that a block may ask for, in bytes; the least of all if unknown."""
    try:
        return architecture_of(arch).shared_bytes
    except ValueError:
        return LEAST_SHARED_BYTES


def multiprocessors_of(arch: str) -> int:
    """How many multiprocessors the largest GPU of a checked architecture has; else ValueError."""
    count = architecture_of(arch).multiprocessors
    if count is None:
        raise ValueError(f"architecture: arch must be one of {', '.join(CHECKED)}, got {arch}")
    return count


@functools.cache
def overlaps(arch: str) -> bool:
    """Whether a launch may start before the one ahead of it has ended (programmatic dependence)."""
    return int("".join(filter(str.isdigit, arch))) >= 90

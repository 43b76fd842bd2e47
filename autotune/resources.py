"""How many blocks of a kernel a multiprocessor holds."""

from ..kernels.common.static import Resources

# Per multiprocessor: threads, blocks, bytes of shared memory (CUDA C++ programming guide, technical
# specifications per compute capability). One KiB of shared memory a block is the system's.
_MULTIPROCESSOR = {
    "sm_80": (2048, 32, 167_936),
    "sm_86": (1536, 16, 102_400),
    "sm_87": (1536, 16, 167_936),
    "sm_89": (1536, 24, 102_400),
    "sm_90": (2048, 32, 233_472),
    "sm_100": (2048, 32, 233_472),
    "sm_103": (2048, 32, 233_472),
    "sm_120": (1536, 24, 102_400),
    "sm_121": (1536, 24, 102_400),
}
_REGISTERS = 65536
_RESERVED = 1024


def occupancy(taken: Resources, arch: str) -> float | None:
    """Share of a multiprocessor's threads that run at once, from 0 to 1.

    Args:
        taken: by the kernel.
        arch: such as "sm_90a".

    Returns:
        The share; None for an architecture that is not in the table.

    Example:
        >>> occupancy(Resources("merge", 96, 0, 0, 0, 0, 0, 160), "sm_90a")
        0.3125
    """
    if (limits := _MULTIPROCESSOR.get(arch.rstrip("af"))) is None:
        return None
    threads, blocks, shared = limits
    warps = -(-taken.threads // 32)
    registers = -(-taken.registers * 32 // 256) * 256 * warps  # a warp's are granted by 256
    shared_bytes = taken.dynamic_smem + taken.static_smem + _RESERVED
    resident = min(threads // (warps * 32), blocks, shared // shared_bytes)
    if registers:
        resident = min(resident, _REGISTERS // registers)
    return resident * warps * 32 / threads

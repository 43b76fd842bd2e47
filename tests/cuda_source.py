"""CUDA kernels written by hand, for tests of the emulator itself."""

from collections.abc import Callable

from emulator import emulate_source
from mhc_tile.kernels.common.lowering import DeviceFunction, Lowered


def cuda(
    parameters: str,
    body: str,
    *,
    block: int = 32,
    grid: int = 1,
    shared: int = 0,
    cooperative: bool = False,
    **options,
) -> Callable[..., None]:
    """A callable that runs `body` as kernel `k`.

    The body starts at line 3 of the source; with `shared` bytes of dynamic shared memory, line 3
    declares them as `pool` and the body follows.
    """
    head = f'extern "C" __global__ void k({parameters});\n'
    head += f'extern "C" __global__ void __launch_bounds__({block}) k({parameters}) {{\n'
    if shared:
        head += "  extern __shared__ __align__(1024) uchar pool[];\n"
    pairs = (parameter.rsplit(" ", 1) for parameter in parameters.split(", "))
    function = DeviceFunction(
        name="k",
        parameters=tuple((name, "handle" if "*" in kind else "int32") for kind, name in pairs),
        grid=(grid, 1, 1),
        block=(block, 1, 1),
        dynamic_shared=shared,
        cooperative=cooperative,
    )
    lines = body.strip("\n")
    return emulate_source(Lowered(f"{head}{lines}\n}}\n", (function,)), **options)

"""From a TileLang program to CUDA source and launch parameters, on any machine.

Nothing is compiled here and no GPU is needed. `static.py` compiles the source and reads what ptxas
reports; `tests/emulator.py` runs it on the CPU.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DeviceFunction:
    """One CUDA kernel of a program, and how it is launched.

    name: as in the source. parameters: (name, dtype) in order, "handle" for a tensor. grid, block:
    (x, y, z), each an int or a TVM expression of the program's sizes; see `evaluate`.
    dynamic_shared: bytes. cooperative: the launch must have all blocks resident at once.
    """

    name: str
    parameters: tuple[tuple[str, str], ...]
    grid: tuple[Any, Any, Any]
    block: tuple[int, int, int]
    dynamic_shared: int
    cooperative: bool

    @property
    def threads(self) -> int:
        """Threads of a block."""
        x, y, z = self.block
        return x * y * z


@dataclass(frozen=True)
class Lowered:
    """A program's CUDA source and its kernels, in the order in which they are launched."""

    source: str
    functions: tuple[DeviceFunction, ...]


def lower(prim_func: Any, arch: str, pass_configs: dict[str, Any] | None = None) -> Lowered:
    """CUDA source of a `@T.prim_func` for an architecture and what launches of its kernels need."""
    import tilelang
    from tilelang import tvm

    # Passes name target and configuration by their context, not by an argument.
    configs = {getattr(key, "value", key): value for key, value in (pass_configs or {}).items()}
    target = tvm.target.Target({"kind": "cuda", "arch": arch})
    with target, tvm.transform.PassContext(opt_level=3, config=configs):
        artifact = tilelang.lower(prim_func, target=target)
    functions = device_functions(artifact.device_mod)
    order = _launches(artifact.host_mod, functions)
    return Lowered(artifact.kernel_source, tuple(functions[name] for name in order))


def evaluate(expression: Any, sizes: dict[str, int]) -> int:
    """The value of a TVM expression, such as a grid extent; ValueError where a size is missing."""
    if isinstance(expression, int):
        return expression
    from tilelang import tvm

    values = {}

    def bind(node: Any) -> None:
        if isinstance(node, tvm.tirx.Var) and node.name in sizes:
            values[node] = tvm.tirx.IntImm(node.dtype, sizes[node.name])

    tvm.tirx.stmt_functor.post_order_visit(expression, bind)
    result = tvm.arith.Analyzer().simplify(tvm.tirx.stmt_functor.substitute(expression, values))
    if not isinstance(result, tvm.tirx.IntImm):
        raise ValueError(f"evaluate: {expression} must follow from {sizes}, left with {result}")
    return int(result)


def device_functions(module: Any) -> dict[str, DeviceFunction]:
    """The kernels of a lowered module, such as `JITKernel.artifact.device_mod`, by name."""
    found = (_device_function(function) for function in module.functions.values())
    return {function.name: function for function in found}


def _device_function(function: Any) -> DeviceFunction:
    attributes = function.attrs
    extents = {str(name): value for name, value in attributes["thread_extent"].items()}
    grid, block = (
        tuple(_plain(extents.get(f"{index}.{axis}", 1)) for axis in "xyz")
        for index in ("blockIdx", "threadIdx")
    )
    return DeviceFunction(
        name=str(attributes["global_symbol"]),
        parameters=tuple((p.name, str(p.dtype)) for p in function.params),
        grid=grid,
        block=block,
        dynamic_shared=int(attributes.get("dyn_shared_memory_buf", 0)),
        cooperative="use_cooperative_groups" in attributes,
    )


def _plain(extent: Any) -> Any:
    """An int where the extent is a constant."""
    try:
        return int(extent)
    except (TypeError, ValueError):
        return extent


def _launches(host: Any, functions: dict[str, DeviceFunction]) -> list[str]:
    """Names of the kernels in the order in which the host program calls them."""
    if len(functions) == 1:
        return list(functions)
    from tilelang import tvm

    order: list[str] = []

    def visit(node: Any) -> None:
        if isinstance(node, tvm.tirx.Call) and node.args:
            name = getattr(node.args[0], "value", None)
            if isinstance(name, str) and name in functions:
                order.append(name)

    for function in host.functions.values():
        tvm.tirx.stmt_functor.post_order_visit(function.body, visit)
    if set(order) != set(functions):
        raise RuntimeError(f"lower: found no launch order of {list(functions)} in the host program")
    return order

"""Calls of ops without Python: launch plans and autograd in C++; see csrc.

The first call of an op with its shapes, dtypes and constants runs in Python, which leaves a plan:
a dry run on tensors without values says what the call allocates and launches. Later calls of the
same kind replay the plan.
"""

import ctypes
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# numbers of torch's ScalarType
_DTYPES = {torch.bfloat16: 15, torch.float16: 5, torch.float32: 6, torch.int32: 3, torch.uint8: 0}
_ALIGNED = 256  # bytes, of each buffer within the scratch memory

library: ctypes.CDLL | None = None

# The configuration that served each kernel in the call that is to be planned.
served: ContextVar[dict[Any, Any] | None] = ContextVar("served", default=None)


class Unplanned(Exception):
    """A call does more than to allocate and launch."""


class _Allocations(TorchDispatchMode):
    """Collects the tensors that a dry run makes."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func._schema.name
        if name in ("aten::empty", "aten::empty_like", "aten::new_empty"):
            self.tensors.append(result)
        elif not func.is_view:
            raise Unplanned(f"a plan has allocations and launches, got {name}")
        return result


def wanted() -> bool:
    """Whether the op that runs on this thread is to leave a plan."""
    return library is not None and library.mhc_tile_wanted()


def add(kernel: Callable[..., Any], args: Sequence[Any], constants: dict[str, Any], device: torch.device, functions=None) -> None:
    """Leave the plan of the call that runs on this thread."""
    assert library is not None
    try:
        words = _words(kernel, args, constants, device, functions or _function)
    except Unplanned:
        return
    library.mhc_tile_add((ctypes.c_int64 * len(words))(*words))


def _words(kernel, args, constants, device, functions) -> list[int]:
    from mhc_tile.kernels.common.programs import dry_run, target_of

    target = target_of(device)
    inputs = [v.new_empty(v.shape, device="meta") if isinstance(v, Tensor) else v for v in args]
    with dry_run(target.arch, target.multiprocessors) as asked, _Allocations() as made:
        results = kernel(*inputs, **constants)
    results = (results,) if isinstance(results, Tensor) else results
    tensors = [*[v for v in inputs if isinstance(v, Tensor)], *results]
    places = {_storage(value): (index, 0) for index, value in enumerate(tensors)}
    scratch = 0
    for value in made.tensors:
        if _storage(value) not in places:
            places[_storage(value)] = (-1, scratch)
            scratch += -(-value.untyped_storage().nbytes() // _ALIGNED) * _ALIGNED
    words = [int(device.type == "cuda"), device.index or 0, len(results)]
    for value in results:
        words += _shaped(value)
    words += [scratch, len(asked.launches)]
    for factory, built, arguments in asked.launches:
        words += [functions(factory, built, target.arch), len(arguments)]
        for value in arguments:
            source, start = places[_storage(value)]
            words += [source, start + value.storage_offset() * value.element_size()]
            words += _shaped(value)
    return words


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _shaped(tensor: Tensor) -> list[int]:
    if not tensor.is_contiguous():
        raise Unplanned("a plan has contiguous tensors")
    return [_DTYPES[tensor.dtype], tensor.dim(), *tensor.shape]


def _function(build: Any, constants: Any, arch: str) -> int:
    """The compiled host function of a program."""
    kernel = build.build(arch, *constants)
    executable = kernel.adapter.get_exportable_executable()
    module = executable.jit() if hasattr(executable, "jit") else executable
    function = module["main"] if True else None
    _ALIVE.append(function)
    return function.__chandle__()


_ALIVE: list[Any] = []


def load(path: str, ops, on_cpu: bool = False) -> None:
    global library
    import tvm_ffi
    library = ctypes.CDLL(path)
    library.mhc_tile_wanted.restype = ctypes.c_bool
    for number, op in enumerate(ops):
        library.mhc_tile_serve(op.name.encode(), ctypes.c_int64(number), ctypes.c_bool(on_cpu))
        words = _formula(op) if op.gradient else [0]
        library.mhc_tile_differentiate(op.name.encode(), (ctypes.c_int64 * len(words))(*words), ctypes.c_bool(on_cpu))


def _formula(op: Any) -> list[int]:
    backward = op.backward
    cotangents = {f"grad_{name}": index for index, name in enumerate(op.results)}
    inputs = [*op.tensors, *op.arguments]
    words = [len(op.tensors), len(op.results), len(op.kept), len(backward.tensors)]
    for name in backward.tensors:
        if name in cotangents:
            words += [0, cotangents[name]]
        elif name in op.returned:
            words += [2, op.returned.index(name)]
        else:
            words += [1, op.tensors.index(name)]
    words.append(len(backward.arguments))
    for name in backward.arguments:
        if name in inputs:
            words.append(inputs.index(name))
        else:
            tensor, dim = op._counted
            words.append(-1 - tensor * 8 + dim)
    return words

"""Launch plans: what a call of an op allocates and launches, for csrc/plans.cpp to replay.

The first call of an op with its shapes, dtypes and constants runs in Python. Then the same call on
tensors without values, with the configurations that have just served, says what there is to replay.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import _native

# numbers of torch's ScalarType
_DTYPES = {torch.bfloat16: 15, torch.float16: 5, torch.float32: 6, torch.int32: 3}
_ALIGNED = 256  # bytes, of each buffer within the scratch memory

# By kernel and sizes, the configurations that served the call that is to be planned.
served: ContextVar[dict[Any, Any] | None] = ContextVar("served", default=None)


class Unplanned(Exception):
    """A call does more than to allocate and to launch."""


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
    return _native.library is not None and _native.library.mhc_tile_wanted()


def clear() -> None:
    """Forget all plans: a switch or a configuration has changed."""
    if _native.library is not None:
        _native.library.mhc_tile_clear()


def calls() -> tuple[int, int]:
    """Calls of ops that plans served, and those that went on to Python, in this process."""
    counts = _native.words([0, 0])
    if _native.library is not None:
        _native.library.mhc_tile_calls(counts)
    return counts[0], counts[1]


@contextmanager
def paused() -> Iterator[None]:
    """Let every op run in Python for a while, in every thread."""
    library = _native.library
    if library is not None:
        library.mhc_tile_pause(ctypes.c_bool(True))
    try:
        yield
    finally:
        if library is not None:
            library.mhc_tile_pause(ctypes.c_bool(False))


def call(
    kernel: Callable[..., Any], args: Sequence[Any], constants: dict[str, Any], device: torch.device
) -> Any:
    """The results of a call, which leaves a plan."""
    token = served.set({})
    try:
        results = kernel(*args, **constants)
        found = _words(kernel, args, constants, device, _function)
        assert _native.library is not None
        _native.library.mhc_tile_add(_native.words(found))
    except Unplanned:
        pass
    finally:
        served.reset(token)
    return results


def _words(
    kernel: Callable[..., Any], args: Sequence[Any], constants: dict[str, Any],
    device: torch.device, function: Callable[..., int],
) -> list[int]:  # fmt: skip
    """A plan as csrc/plans.cpp reads it; `function` finds the compiled program's handle."""
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
        words += [function(factory, built, target.arch), len(arguments)]
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


def _function(factory: Any, constants: Any, arch: str) -> int:
    """The compiled host function of a program; the program's kernel keeps it alive."""
    executable = factory.build(arch, *constants).adapter.get_exportable_executable()
    jitted = getattr(executable, "jit", None)  # a fresh compilation; the disk cache has a module
    function = (jitted() if jitted else executable)["main"]
    _ALIVE[function.__chandle__()] = function
    return function.__chandle__()


_ALIVE: dict[int, Any] = {}

"""What every kernel shares: compiling a program for a named target, pass configurations, sizes.

A kernel module writes its program as a factory of constants that returns a `T.prim_func`, under
`@program()`. Calling the decorated factory compiles it once per architecture and arguments.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import tilelang
import tilelang.language as T
import torch

from . import toolchain as _toolchain
from .problem import Target

F32 = "float32"
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

# Warp specialisation gains nothing on kernels that memory bounds and raced where A is in registers
# (TileLang 0.1.15). The baseline reducer is the one whose cross-lane sum is always emitted. 32-byte
# loads of sm_100 split mixed bf16 and fp32 accesses into 8-byte ones.
PASS_CONFIGS = {
    "tl.disable_warp_specialized": True,
    "tl.disable_tma_lower": True,
    "tl.disable_vectorize_256": True,
    "tl.reducer_force_baseline": True,
}
# For programs that guard their own tails: a guard added to an index would split 16-byte accesses.
UNGUARDED = {**PASS_CONFIGS, "tl.disable_safe_memory_legalize": True}


@dataclass
class DryRun:
    """What launchers ask for on a GPU that need not exist, in order.

    programs: (factory, constants, configs) of what would be compiled. launches: (factory,
    constants, arguments) of what would be launched.
    """

    arch: str
    multiprocessors: int
    programs: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = field(
        default_factory=list
    )
    launches: list[tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]] = field(
        default_factory=list
    )


_dry_run: ContextVar[DryRun | None] = ContextVar("dry_run", default=None)


@contextlib.contextmanager
def dry_run(arch: str, multiprocessors: int) -> Iterator[DryRun]:
    """Note programs and launches instead of making them; tensors are on the meta device."""
    asked = DryRun(arch, multiprocessors)
    token = _dry_run.set(asked)
    try:
        yield asked
    finally:
        _dry_run.reset(token)


def program(pass_configs: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Decorate a factory of a PrimFunc: `decorated(arch, *constants)` is the compiled kernel.

    The factory itself stays reachable as `decorated.factory`, its pass configurations as
    `decorated.pass_configs`, for the emulator and for static checks; None are `PASS_CONFIGS`.
    """
    configs = dict(PASS_CONFIGS if pass_configs is None else pass_configs)

    def decorate(factory: Callable[..., Any]) -> Any:
        @functools.cache
        def compiled(arch: str, *constants: Any) -> Any:
            target = {"kind": "cuda", "arch": arch}
            try:
                return tilelang.compile(factory(*constants), target=target, pass_configs=configs)
            except Exception as error:
                name = f"{factory.__module__}.{factory.__name__}"
                raise RuntimeError(
                    f"{name}: TileLang {tilelang.__version__} must compile it for {arch} with "
                    f"{constants}, got {type(error).__name__}: {error}; `mhc-tile doctor` checks "
                    "the compilers"
                ) from error

        @functools.wraps(factory)
        def build(arch: str, *constants: Any) -> Any:
            if (asked := _dry_run.get()) is None:
                return compiled(arch, *constants)
            asked.programs.append((factory, constants, configs))
            return lambda *arguments: asked.launches.append((factory, constants, arguments))

        build.factory = factory  # type: ignore[attr-defined]
        build.pass_configs = configs  # type: ignore[attr-defined]
        factory.build = build
        return build

    return decorate


def macro(function: Callable[..., Any]) -> Callable[..., Any]:
    """`T.macro`, parsed when a program first uses it.

    Parsing takes 10 to 40 ms, which a process whose kernels are in the cache would spend on macros
    of programs that it never asks for: a quarter of a second before its first call of `pre`.
    """

    @functools.cache
    def parsed() -> Any:
        return T.macro(function)

    @functools.wraps(function)
    def use(*args: Any, **kwargs: Any) -> Any:
        return parsed()(*args, **kwargs)

    return use


def architecture(device: torch.device) -> str:
    """The target architecture of a CUDA device, such as "sm_90a"."""
    asked = _dry_run.get()
    return asked.arch if asked else _architecture(device)


@functools.cache
def _architecture(device: torch.device) -> str:
    return _toolchain.target(torch.cuda.get_device_capability(device))["arch"]


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a CUDA device has."""
    asked = _dry_run.get()
    return asked.multiprocessors if asked else _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def target_of(device: torch.device) -> Target:
    """The target of a CUDA device."""
    return Target(architecture(device), multiprocessors(device))


def dtype_name(tensor: torch.Tensor) -> str:
    """TileLang's name of a tensor's dtype: "bfloat16", "float16" or "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def ceil_div(value: int, divisor: int) -> int:
    """Smallest integer at or above value / divisor."""
    return -(-value // divisor)


def logits_per_token(n: int) -> int:
    """Rows of phi: pre (n), post (n), res (n * n)."""
    return n * n + 2 * n

"""The kernels that can be tuned, each with its inputs, its launcher and its configurations.

The kernel modules own `default_config`, `candidates` and `traffic` and know nothing of this; here
their signatures become one. Nothing is imported from TileLang before it is needed.

What a configuration may change is speed, and for some of its fields the order in which a token's
sums are formed: `Kernel.order` tells these apart, so that a table can keep one order for every
number of tokens.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configs import type_name
from .inputs import Inputs
from .problems import Problem

# Fields of configurations that decide who computes when, not in which order a token's sums are
# formed. A field that is not here counts as one that does.
SCHEDULING = frozenset(
    {"ahead", "apply_warps", "blocks", "groups", "lag", "min_blocks", "owners", "registers"}
    | {"splits", "stages", "teams", "warps"}
)
MANY = 1 << 17  # tokens: beyond every threshold between few and many
# The paper's constants, as `MHCConfig.paper()`: what is compiled here is what its models run.
_EPSILONS = {"norm_eps": 1e-20, "pre_eps": 0.0}
_MAPPING = {"pre_eps": 0.0, "post_scale": 2.0}
_SINKHORN = {"iters": 20, "sinkhorn_eps": 0.0}

Order = tuple[Any, ...]


@dataclass(frozen=True)
class Target:
    """The GPU that configurations are for.

    Attributes:
        arch: such as "sm_90a".
        multiprocessors: how many there are.
    """

    arch: str
    multiprocessors: int


class Knobs(NamedTuple):
    """How a kernel's module is asked for configurations.

    default: from the module, a problem, a target and `batch_invariant=`, a configuration.
    candidates: from the module, a problem and a target, those worth measuring.
    """

    default: Callable[..., Any]
    candidates: Callable[..., Any]


def _rowwise(backward: bool) -> Knobs:
    """`merge` and `pre_apply`: direction, tokens, n, C, dtype."""

    def sizes(problem: Problem) -> tuple[Any, ...]:
        return backward, problem.tokens, problem.n, problem.channels, problem.dtype

    return Knobs(
        default=lambda kernel, p, target, **pin: kernel.default_config(*sizes(p), **pin),
        candidates=lambda kernel, p, target: kernel.candidates(*sizes(p)),
    )


def _projecting() -> Knobs:
    """`mapping` and `pre`: tokens, n, C and the target by name."""

    def sizes(problem: Problem) -> tuple[Any, ...]:
        return problem.tokens, problem.n, problem.channels

    return Knobs(
        default=lambda kernel, p, target, **pin: kernel.default_config(
            *sizes(p), **dataclasses.asdict(target), **pin
        ),
        candidates=lambda kernel, p, target: kernel.candidates(
            *sizes(p), **dataclasses.asdict(target)
        ),
    )


def _columns() -> Knobs:
    """`mapping_backward` and `pre_backward`: tokens, C, n, dtype and the target in order."""

    def sizes(problem: Problem, target: Target) -> tuple[Any, ...]:
        dtype = getattr(torch, problem.dtype)
        place = target.multiprocessors, target.arch
        return problem.tokens, problem.channels, problem.n, dtype, *place

    return Knobs(
        default=lambda kernel, p, target, **pin: kernel.default_config(*sizes(p, target), **pin),
        candidates=lambda kernel, p, target: kernel.candidates(*sizes(p, target)),
    )


def _constant(candidates: Callable[..., Any]) -> Knobs:
    """`streams` and `sinkhorn`: one default for every size."""
    return Knobs(
        default=lambda kernel, p, target, **pin: kernel.default_config(),
        candidates=candidates,
    )


@dataclass(frozen=True)
class Kernel:
    """One direction of one kernel, as tables and the tuner see it.

    Attributes:
        module: of `mhc_tile.kernels`.
        inputs: from an `Inputs`, the tensors of a call.
        call: from the module, these tensors and `config=`, the results as a tuple.
        traffic: from the module and a problem, bytes that must move.
        knobs: the configurations that it has.
        sums: whether a configuration can change the order of a token's sums.
        parameter_grads: results, the last ones, that sum over tokens.
        of_channels: whether C and dtype matter.
        tensor_cores: whether x in fp32, or a C that is no multiple of 8, takes another kernel.
        divides_channels: whether blocks share one token's C: an order of sums is then made for one
            C, and that of a neighbour's table is not taken over.
    """

    module: str
    inputs: Callable[[Inputs], tuple[Tensor, ...]]
    call: Callable[..., tuple[Tensor, ...]]
    traffic: Callable[[ModuleType, Problem], int]
    knobs: Knobs
    sums: bool = False
    parameter_grads: int = 0
    of_channels: bool = True
    tensor_cores: bool = False
    divides_channels: bool = False

    def load(self) -> ModuleType:
        """The kernel's module, with TileLang."""
        return importlib.import_module(f"..kernels.{self.module}", __package__)

    def untunable(self, problem: Problem) -> str | None:
        """Why a problem has nothing to tune; None if it has."""
        if self.tensor_cores and (problem.dtype == "float32" or problem.channels % 8):
            return "x in float32, or C no multiple of 8, takes a kernel of one configuration"
        return None

    def order(self, config: Any) -> Order:
        """What decides the order in which a token's sums are formed: equal orders, equal bits."""
        if not self.sums:
            return ()
        fields = dataclasses.asdict(config).items()
        return type_name(config), *(item for item in fields if item[0] not in SCHEDULING)

    def pins(self) -> bool:
        """Whether the kernel has one regime for few tokens and one for many, and can pin it."""
        parameters = inspect.signature(self.load().default_config).parameters
        return "batch_invariant" in parameters


def _identity(kernel: ModuleType, tensors: tuple[Tensor, ...], config: Any) -> Any:
    return (kernel.forward(*tensors, config=config),)


def _direction(name: str) -> Callable[[ModuleType, Problem], int]:
    def traffic(kernel: ModuleType, problem: Problem) -> int:
        sizes = problem.tokens, problem.n, problem.channels, problem.dtype
        return kernel.traffic(*sizes)[name][0]

    return traffic


def _moved(kernel: ModuleType, problem: Problem) -> int:
    return kernel.traffic(problem.tokens, problem.n, problem.channels, problem.dtype)["bytes"]


def _columns_traffic(**terms: bool) -> Callable[[ModuleType, Problem], int]:
    def traffic(kernel: ModuleType, problem: Problem) -> int:
        item = getattr(torch, problem.dtype).itemsize
        sizes = problem.tokens, problem.channels, problem.n, item
        return kernel.traffic(*sizes, **terms)["backward"][0]

    return traffic


KERNELS: dict[str, Kernel] = {
    "merge": Kernel(
        "merge",
        lambda make: (make.x, make.hidden, make.vector, make.matrix),
        _identity,
        _direction("forward"),
        _rowwise(False),
    ),
    "merge_backward": Kernel(
        "merge",
        lambda make: (make.x, make.x, make.hidden, make.vector, make.matrix),
        lambda kernel, tensors, config: kernel.backward(*tensors, config=config),
        _direction("backward"),
        _rowwise(True),
        sums=True,
    ),
    "merge_backward_maps": Kernel(
        "merge",
        lambda make: (make.x, make.x, make.hidden, make.vector),
        lambda kernel, tensors, config: kernel.backward(*tensors, None, config=config)[1:],
        _direction("backward without grad_x"),
        _rowwise(True),
        sums=True,
    ),
    "pre_apply": Kernel(
        "pre_apply",
        lambda make: (make.x, make.vector),
        _identity,
        _direction("forward"),
        _rowwise(False),
    ),
    "pre_apply_backward": Kernel(
        "pre_apply",
        lambda make: (make.hidden, make.x, make.vector),
        lambda kernel, tensors, config: kernel.backward(*tensors, config=config),
        _direction("backward"),
        _rowwise(True),
        sums=True,
    ),
    "expand": Kernel(
        "streams",
        lambda make: (make.hidden, make.problem.n),  # type: ignore[arg-type,return-value]
        lambda kernel, tensors, config: (kernel.expand(*tensors, config=config),),
        _direction("expand"),
        _constant(lambda kernel, problem, target: kernel.candidates()),
    ),
    "collapse": Kernel(
        "streams",
        lambda make: (make.x,),
        lambda kernel, tensors, config: (kernel.collapse(*tensors, mean=False, config=config),),
        _direction("collapse"),
        _constant(lambda kernel, problem, target: kernel.candidates()),
    ),
    "sinkhorn": Kernel(
        "sinkhorn",
        lambda make: (make.matrix,),
        lambda kernel, tensors, config: (
            kernel.forward(*tensors, iters=20, eps=0.0, config=config),
        ),
        lambda kernel, problem: kernel.traffic(problem.tokens, problem.n)["forward"][0],
        _constant(lambda kernel, p, target: kernel.candidates(False, p.n, 20)),
        of_channels=False,
    ),
    "sinkhorn_backward": Kernel(
        "sinkhorn",
        lambda make: (make.matrix, make.matrix),
        lambda kernel, tensors, config: (
            kernel.backward(*tensors, iters=20, eps=0.0, config=config),
        ),
        lambda kernel, problem: kernel.traffic(problem.tokens, problem.n)["backward"][0],
        _constant(lambda kernel, p, target: kernel.candidates(True, p.n, 20)),
        of_channels=False,
    ),
    "mapping": Kernel(
        "mapping",
        lambda make: (make.x, *make.parameters),
        lambda kernel, tensors, config: kernel.forward(
            *tensors, **_EPSILONS, post_scale=2.0, config=config
        ),
        _moved,
        _projecting(),
        sums=True,
        tensor_cores=True,
        divides_channels=True,
    ),
    "mapping_backward": Kernel(
        "mapping_backward",
        lambda make: (
            make.vector, make.vector, make.matrix, make.x, *make.parameters, *make.saved
        ),
        lambda kernel, tensors, config: kernel.backward(*tensors, **_MAPPING, config=config),
        _columns_traffic(),
        _columns(),
        sums=True,
        parameter_grads=3,
    ),
    "pre": Kernel(
        "pre",
        lambda make: (make.x, *make.parameters),
        lambda kernel, tensors, config: kernel.forward(
            *tensors, **_EPSILONS, post_scale=2.0, **_SINKHORN, config=config
        ),
        _moved,
        _projecting(),
        sums=True,
        tensor_cores=True,
        divides_channels=True,
    ),
    "pre_backward": Kernel(
        "pre_backward",
        lambda make: (
            make.hidden, make.vector, make.matrix, make.x, *make.parameters, *make.saved,
            make.x, make.matrix,
        ),
        lambda kernel, tensors, config: kernel.backward(
            *tensors, **_MAPPING, **_SINKHORN, config=config
        ),
        _columns_traffic(with_part=True),
        _columns(),
        sums=True,
        parameter_grads=3,
    ),
}  # fmt: skip
"""Every tunable kernel by name; `<name>_backward` is the gradient of `<name>`."""


def default(problem: Problem, target: Target, *, batch_invariant: bool = False) -> Any:
    """What a launcher uses without a table.

    Args:
        problem: kernel and shape.
        target: the GPU.
        batch_invariant: the regime of many tokens, whatever their number.
    """
    kernel = KERNELS[problem.kernel]
    if batch_invariant and kernel.pins():
        return kernel.knobs.default(kernel.load(), problem, target, batch_invariant=True)
    return kernel.knobs.default(kernel.load(), problem, target)


def regime(problem: Problem, target: Target, *, batch_invariant: bool = False) -> str:
    """The regime "few" or "many" to whose order of sums the default promises to keep.

    Few are those numbers of tokens whose default forms sums in another order than the default of
    many does. Kernels with one order for all have one regime, "many".
    """
    kernel = KERNELS[problem.kernel]
    if batch_invariant or not kernel.sums:
        return "many"
    pinned = default(problem if kernel.pins() else problem.at(MANY), target, batch_invariant=True)
    return "many" if kernel.order(default(problem, target)) == kernel.order(pinned) else "few"


def candidates(problem: Problem, target: Target) -> list[Any]:
    """The default first, then the default of many tokens, then what the kernel offers, each once.

    Args:
        problem: kernel and shape.
        target: the GPU.

    Returns:
        Configurations, of one type or several; one alone where there is nothing to tune.
    """
    kernel = KERNELS[problem.kernel]
    first = default(problem, target)
    if kernel.untunable(problem):
        return [first]
    pinned = default(problem, target, batch_invariant=True)
    offered: Iterator[Any] = kernel.knobs.candidates(kernel.load(), problem, target)
    return list(dict.fromkeys((first, pinned, *offered)))


def programs(problem: Problem, config: Any, target: Target) -> list[tuple[Any, tuple[Any, ...]]]:
    """The programs that a call with a configuration launches, without a GPU.

    Returns:
        (decorated program, its constants) in the order of the launches; `program(arch, *constants)`
        compiles one.

    Raises:
        ValueError: The launcher refuses the configuration, as does RuntimeError.
    """
    from ..kernels._programs import catalogue

    kernel = KERNELS[problem.kernel]
    tensors = kernel.inputs(Inputs(problem, "meta"))
    with catalogue(target.arch, target.multiprocessors) as asked:
        kernel.call(kernel.load(), tensors, config)
    return [
        (getattr(importlib.import_module(factory.__module__), factory.__name__), constants)
        for factory, constants, _ in asked.programs
    ]

"""The kernels that can be tuned, each with its inputs, its launcher and its configurations.

The kernel modules own `default_config`, `candidates` and `traffic`, of a `Problem` and a `Target`,
and know nothing of this. Nothing is imported from TileLang before it is needed.

A configuration changes speed, and some of its fields the order in which a token's sums are formed:
`knob` marks these, and by `Kernel.order` a table keeps one order for every number of tokens.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..kernels.common.knobs import reduction_order
from ..kernels.common.problem import Target
from ..kernels.common.quantities import Samples
from .configs import type_name
from .problems import Problem

MANY = 1 << 17  # tokens: beyond every threshold between few and many
# The paper's constants, as `MHCConfig.paper()`: what is compiled here is what its models run.
_MAPPING = {"norm_eps": 1e-20, "pre_eps": 0.0, "post_scale": 2.0}
_PRE = {**_MAPPING, "iters": 20, "sinkhorn_eps": 0.0}
_SINKHORN = {"iters": 20, "eps": 0.0}

Order = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Kernel:
    """One direction of one kernel, as tables and the tuner see it.

    Attributes:
        module: of `mhc_tile.kernels`.
        tensors: names of the tensors of a call, see `kernels.quantities`.
        launch: from the module, these tensors, the other arguments by name and a configuration,
            the results as a tuple.
        constants: the other arguments that are compiled and timed.
        parameter_grads: results, the last ones, that sum over tokens.
        of_channels: whether C and dtype matter.
        tensor_cores: whether x in fp32, or a C that is no multiple of 8, takes another kernel.
        divides_channels: whether blocks share one token's C: an order of sums is then made for one
            C, and that of a neighbour's table is not taken over.
    """

    module: str
    tensors: tuple[str, ...]
    launch: Callable[[ModuleType, Sequence[Any], dict[str, Any], Any], tuple[Tensor, ...]]
    constants: dict[str, Any] = field(default_factory=dict)
    parameter_grads: int = 0
    of_channels: bool = True
    tensor_cores: bool = False
    divides_channels: bool = False

    def load(self) -> ModuleType:
        """The kernel's module, with TileLang."""
        return self._loaded

    @cached_property
    def _loaded(self) -> ModuleType:
        return importlib.import_module(f"..kernels.{self.module}", __package__)

    def call(self, tensors: Sequence[Any], others: dict[str, Any], config: Any) -> Any:
        """The results of a launch."""
        return self.launch(self.load(), tensors, others, config)

    def traffic(self, problem: Problem) -> int:
        """Bytes that must move."""
        return self.load().traffic(problem)

    def samples(self, problem: Problem, device: str, seed: int = 0) -> list[Tensor]:
        """Random tensors for a call."""
        dtype = getattr(torch, problem.dtype)
        channels = problem.channels if self.of_channels else 1
        make = Samples(problem.tokens, problem.n, channels, dtype, device, seed)
        return [make.get(name) for name in self.tensors]

    def others(self, problem: Problem) -> dict[str, Any]:
        """The other arguments of a call that is compiled or timed."""
        return {**self.constants, "num_streams": problem.n}

    def untunable(self, problem: Problem) -> str | None:
        """Why a problem has nothing to tune; None if it has."""
        if self.tensor_cores and not problem.fits_tensor_cores:
            return "x in float32, or C no multiple of 8, takes a kernel of one configuration"
        return None

    def order(self, config: Any) -> Order:
        """What decides the order in which a token's sums are formed: equal orders, equal bits."""
        marked = reduction_order(config)
        return (type_name(config), *marked) if marked else ()


def _forward(kernel: ModuleType, tensors: Sequence[Any], others: Any, config: Any) -> Any:
    return (kernel.forward(*tensors, config=config),)


def _backward(kernel: ModuleType, tensors: Sequence[Any], others: Any, config: Any) -> Any:
    return kernel.backward(*tensors, config=config)


def _mapped(kernel: ModuleType, tensors: Sequence[Any], others: Any, config: Any) -> Any:
    return kernel.forward(*tensors, **_constants(others), config=config)


def _mapped_backward(kernel: ModuleType, tensors: Sequence[Any], others: Any, config: Any) -> Any:
    return kernel.backward(*tensors, **_constants(others, "norm_eps"), config=config)


def _constants(others: dict[str, Any], *without: str) -> dict[str, Any]:
    return {key: value for key, value in others.items() if key not in ("num_streams", *without)}


_MERGED = ("x", "layer_output", "h_post", "h_res")
_PROJECTED = ("x", "phi", "alpha", "bias")
_SAVED = ("projection", "inv_rms")
KERNELS: dict[str, Kernel] = {
    "merge": Kernel("merge", _MERGED, _forward),
    "merge_backward": Kernel(
        "merge", ("grad_x_next", *_MERGED), _backward,
    ),
    "merge_backward_maps": Kernel(
        "merge",
        ("grad_x_next", *_MERGED[:-1]),
        lambda kernel, tensors, _, config: kernel.backward(*tensors, None, config=config)[1:],
    ),
    "pre_apply": Kernel(
        "pre_apply", ("x", "h_pre"), _forward
    ),
    "pre_apply_backward": Kernel(
        "pre_apply", ("grad_layer_input", "x", "h_pre"), _backward,
    ),
    "expand": Kernel(
        "streams",
        ("hidden",),
        lambda kernel, tensors, others, config: (
            kernel.collapse_backward(
                *tensors, others["num_streams"], mean=others.get("mode") == "mean", config=config
            ),
        ),
    ),
    "collapse": Kernel(
        "streams",
        ("x",),
        lambda kernel, tensors, others, config: (
            kernel.collapse(*tensors, mean=others.get("mode") == "mean", config=config),
        ),
    ),
    "sinkhorn": Kernel(
        "sinkhorn",
        ("logits",),
        lambda kernel, tensors, others, config: (
            kernel.forward(*tensors, **_constants(others), config=config),
        ),
        constants=_SINKHORN,
        of_channels=False,
    ),
    "sinkhorn_backward": Kernel(
        "sinkhorn",
        ("grad_h_res", "logits"),
        lambda kernel, tensors, others, config: (
            kernel.backward(
                *tensors,
                **_constants(others),
                config=kernel.fitting(config, tensors[1], others["iters"]),
            ),
        ),
        constants=_SINKHORN,
        of_channels=False,
    ),
    "mapping": Kernel(
        "mapping.launch", _PROJECTED, _mapped, _MAPPING,
        tensor_cores=True, divides_channels=True,
    ),
    "mapping_backward": Kernel(
        "mapping.backward",
        ("grad_h_pre", "grad_h_post", "grad_h_res_logits", *_PROJECTED, *_SAVED),
        _mapped_backward, _MAPPING,
        parameter_grads=3,
    ),
    "pre": Kernel(
        "pre.launch", _PROJECTED, _mapped, _PRE,
        tensor_cores=True, divides_channels=True,
    ),
    "pre_backward": Kernel(
        "pre_backward.launch",
        (
            "grad_layer_input", "grad_h_post", "grad_h_res", *_PROJECTED, *_SAVED,
            "grad_x_part", "h_res",
        ),
        _mapped_backward, _PRE,
        parameter_grads=3,
    ),
}  # fmt: skip
"""Every tunable kernel by name; `<name>_backward` is the gradient of `<name>`."""


def default(problem: Problem, target: Target, *, batch_invariant: bool = False) -> Any:
    """What a launcher uses without a table."""
    module = KERNELS[problem.kernel].load()
    return module.default_config(problem, target, batch_invariant=batch_invariant)


def regime(problem: Problem, target: Target, *, batch_invariant: bool = False) -> str:
    """The regime "few" or "many" to whose order of sums the default promises to keep.

    Few are those numbers of tokens whose default forms sums in another order than the default of
    many does. Kernels with one order for all have one regime, "many".
    """
    kernel = KERNELS[problem.kernel]
    if batch_invariant:
        return "many"
    pinned = default(problem.at(MANY), target, batch_invariant=True)
    return "many" if kernel.order(default(problem, target)) == kernel.order(pinned) else "few"


def candidates(problem: Problem, target: Target) -> list[Any]:
    """The default first, then the default of many tokens, then what the kernel offers, each once.

    Returns:
        Configurations, of one type or several; one alone where there is nothing to tune.
    """
    kernel = KERNELS[problem.kernel]
    first = default(problem, target)
    if kernel.untunable(problem):
        return [first]
    pinned = default(problem, target, batch_invariant=True)
    offered: Iterator[Any] = kernel.load().candidates(problem, target)
    return list(dict.fromkeys((first, pinned, *offered)))


def programs(problem: Problem, config: Any, target: Target) -> list[tuple[Any, tuple[Any, ...]]]:
    """The programs that a call with a configuration launches, without a GPU.

    Returns:
        (decorated program, its constants) in the order of the launches; `program(arch, *constants)`
        compiles one.

    Raises:
        ValueError: The launcher refuses the configuration, as does RuntimeError.
    """
    from ..kernels.common.programs import dry_run

    kernel = KERNELS[problem.kernel]
    tensors = kernel.samples(problem, "meta")
    with dry_run(target.arch, target.multiprocessors) as asked:
        kernel.call(tensors, kernel.others(problem), config)
    return [
        (getattr(importlib.import_module(factory.__module__), factory.__name__), constants)
        for factory, constants, _ in asked.programs
    ]

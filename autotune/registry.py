"""The kernels that can be tuned, each with its inputs, its launcher and its configurations.

The kernel modules own `default_config`, `candidates` and `traffic`, of a `Problem` and a `Target`.
Nothing is imported from TileLang before it is needed.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..kernels.common.knobs import reduction_order
from ..kernels.common.problem import Problem, Target
from ..kernels.common.quantities import Samples, quantity
from .configs import type_name

MANY = 1 << 17  # tokens: beyond every threshold between few and many
# The paper's constants, as `MHCConfig.paper()`: what is compiled here is what its models run.
_MAPPING_BACKWARD = {"pre_eps": 0.0, "post_scale": 2.0}
_MAPPING = {"norm_eps": 1e-20, **_MAPPING_BACKWARD}
_SINKHORN = {"iters": 20, "eps": 0.0}
_OF_PRE = {"iters": 20, "sinkhorn_eps": 0.0}


@dataclass(frozen=True, eq=False)
class Kernel:
    """One direction of one kernel, as tables and the tuner see it."""

    module: str  # of `mhc_tile.kernels`
    tensors: tuple[str, ...]  # of a call, by the names of `kernels.common.quantities`
    function: str = "forward"  # of the module: the launcher
    constants: dict[str, Any] = field(default_factory=dict)  # of the launcher, as they are tuned
    # In place of `function`, from the module, the tensors, the other arguments and a configuration.
    adapter: Callable[[ModuleType, Sequence[Any], dict[str, Any], Any], Any] | None = None
    # Whether blocks share a token's C on tensor cores. Then fp32 x, or C no multiple of 8, takes
    # another kernel; and a reduction order holds for one C, not for a neighbour's.
    divides_channels: bool = False

    @functools.cache  # noqa: B019 - as many as there are kernels
    def load(self) -> ModuleType:
        """The kernel's module, with TileLang."""
        return importlib.import_module(f"..kernels.{self.module}", __package__)

    @functools.cached_property
    def of_channels(self) -> bool:
        """Whether C and dtype matter."""
        return any(quantity(name).of_streams for name in self.tensors)

    @property
    def parameter_grads(self) -> int:
        """How many results, the last ones, sum over tokens: gradients of what has no tokens."""
        if self.function != "backward":
            return 0
        return sum(not quantity(name).per_token for name in self.tensors)

    def call(self, tensors: Sequence[Any], others: dict[str, Any], config: Any) -> Any:
        """The results of a launch as a tuple.

        The tensors have one dim for the tokens; `others` has the constants, and maybe more.
        """
        if self.adapter:
            results = self.adapter(self.load(), tensors, others, config)
        else:
            constants = {name: others[name] for name in self.constants}
            results = getattr(self.load(), self.function)(*tensors, **constants, config=config)
        return results if isinstance(results, tuple) else (results,)

    def traffic(self, problem: Problem) -> int:
        """Bytes that must move."""
        return self.load().traffic(problem)

    def samples(self, problem: Problem, device: str, seed: int = 0) -> list[Tensor]:
        """Random tensors for a call."""
        dtype, channels = getattr(torch, problem.dtype), problem.channels or 1
        make = Samples(problem.tokens, problem.n, channels, dtype, device, seed)
        return [make.get(name) for name in self.tensors]

    def others(self, problem: Problem) -> dict[str, Any]:
        """The other arguments of a call that is compiled or timed."""
        return {**self.constants, "num_streams": problem.n}

    def untunable(self, problem: Problem) -> str | None:
        """Why a problem has nothing to tune; None if it has."""
        if self.divides_channels and not problem.fits_tensor_cores:
            return "x in float32, or C no multiple of 8, takes a kernel of one configuration"
        return None

    def order(self, config: Any) -> tuple[Any, ...]:
        """The reduction order of a token's sums: equal orders give equal bits."""
        marked = reduction_order(config)
        return (type_name(config), *marked) if marked else ()


def _merge_backward_maps(kernel: Any, tensors: Sequence[Any], _: Any, config: Any) -> Any:
    return kernel.backward(*tensors, None, config=config)[1:]


def _expand(kernel: Any, tensors: Sequence[Any], others: dict[str, Any], config: Any) -> Any:
    mean = others.get("mode") == "mean"
    return kernel.collapse_backward(*tensors, others["num_streams"], mean=mean, config=config)


def _collapse(kernel: Any, tensors: Sequence[Any], others: dict[str, Any], config: Any) -> Any:
    return kernel.collapse(*tensors, mean=others.get("mode") == "mean", config=config)


def _sinkhorn_backward(
    kernel: Any, tensors: Sequence[Any], others: dict[str, Any], config: Any
) -> Any:
    config = kernel.fitting(config, tensors[1], others["iters"])
    return kernel.backward(*tensors, **{name: others[name] for name in _SINKHORN}, config=config)


_MERGED = ("x", "layer_output", "h_post", "h_res")
_PROJECTED = ("x", "phi", "alpha", "bias")
_OF_PRE_RESULTS = ("grad_layer_input", "grad_h_post", "grad_h_res")
_SAVED = ("projection", "inv_rms")
KERNELS: dict[str, Kernel] = {
    "merge": Kernel("merge", _MERGED),
    "merge_backward": Kernel("merge", ("grad_x_next", *_MERGED), "backward"),
    "merge_backward_maps": Kernel(
        "merge", ("grad_x_next", *_MERGED[:-1]), adapter=_merge_backward_maps
    ),
    "pre_apply": Kernel("pre_apply", ("x", "h_pre")),
    "pre_apply_backward": Kernel("pre_apply", ("grad_layer_input", "x", "h_pre"), "backward"),
    "expand": Kernel("streams", ("hidden",), adapter=_expand),
    "collapse": Kernel("streams", ("x",), adapter=_collapse),
    "sinkhorn": Kernel("sinkhorn", ("logits",), constants=_SINKHORN),
    "sinkhorn_backward": Kernel(
        "sinkhorn", ("grad_h_res", "logits"), constants=_SINKHORN, adapter=_sinkhorn_backward
    ),
    "mapping": Kernel("mapping.launch", _PROJECTED, constants=_MAPPING, divides_channels=True),
    "mapping_backward": Kernel(
        "mapping.backward",
        ("grad_h_pre", "grad_h_post", "grad_h_res_logits", *_PROJECTED, *_SAVED),
        "backward",
        _MAPPING_BACKWARD,
    ),
    "pre": Kernel(
        "pre.launch", _PROJECTED, constants={**_MAPPING, **_OF_PRE}, divides_channels=True
    ),
    "pre_backward": Kernel(
        "pre_backward.launch",
        (*_OF_PRE_RESULTS, *_PROJECTED, *_SAVED, "grad_x_part", "h_res"),
        "backward",
        {**_MAPPING_BACKWARD, **_OF_PRE},
    ),
}
"""Every tunable kernel by name; `<name>_backward` is the gradient of `<name>`."""


def default(problem: Problem, target: Target, *, batch_invariant: bool = False) -> Any:
    """What a launcher uses without a table; `batch_invariant` asks for what many tokens use."""
    module = KERNELS[problem.kernel].load()
    return module.default_config(problem, target, batch_invariant=batch_invariant)


def regime(problem: Problem, target: Target, *, batch_invariant: bool = False) -> str:
    """The regime, "few" or "many", whose reduction order the default keeps.

    Few are those numbers of tokens whose default has another reduction order than the default of
    many tokens. Kernels with one order for all have one regime, "many".
    """
    if batch_invariant:
        return "many"
    order = KERNELS[problem.kernel].order
    pinned = default(problem.at(MANY), target, batch_invariant=True)
    return "many" if order(default(problem, target)) == order(pinned) else "few"


def candidates(problem: Problem, target: Target) -> list[Any]:
    """The default first, then the default of many tokens, then what the kernel offers, each once.

    The default alone where there is nothing to tune.
    """
    kernel = KERNELS[problem.kernel]
    first = default(problem, target)
    if kernel.untunable(problem):
        return [first]
    pinned = default(problem, target, batch_invariant=True)
    return list(dict.fromkeys((first, pinned, *kernel.load().candidates(problem, target))))


def programs(problem: Problem, config: Any, target: Target) -> list[tuple[Any, tuple[Any, ...]]]:
    """The factories of the programs that a call launches, with their constants, in that order.

    Needs no GPU. ValueError or RuntimeError where the launcher refuses the configuration.
    """
    from ..kernels.common.programs import dry_run

    kernel = KERNELS[problem.kernel]
    tensors = kernel.samples(problem, "meta")
    with dry_run(target.arch, target.multiprocessors) as asked:
        kernel.call(tensors, kernel.others(problem), config)
    return [(factory, constants) for factory, constants, _ in asked.programs]

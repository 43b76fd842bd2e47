"""Other implementations as contenders: adapters alone.

Each takes our tensors and brings them into its own layout once, outside what is timed; what it
returns is brought back for the check. Where an op of ours has no counterpart, there is no adapter.
"""

import contextlib
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .bench import tf32_products
from .operations import MODES, Results

STREAMS = 4
ITERS = 20
EPS = 1e-6


def _same(*tensors: Tensor) -> list[Tensor]:
    return list(tensors)


def batched(*tensors: Tensor) -> list[Tensor]:
    """Tensors in a batch of one."""
    return [value[None] for value in tensors]


def unbatched(*tensors: Tensor) -> list[Tensor]:
    """The inverse of `batched`."""
    return [value[0] for value in tensors]


@dataclass(frozen=True)
class Contender:
    """One implementation of one op.

    Functions between layouts take tensors and return a list.
    """

    name: str
    call: Callable[..., Any]  # from its own tensors to its result or results
    take: Callable[..., list[Tensor]] = _same  # our tensors in its layout
    give: Callable[..., list[Tensor]] = _same  # its results, or their cotangents, in our layout
    cotangents: Callable[..., list[Tensor]] = _same  # of our results, in its layout
    gradients: Callable[..., list[Tensor]] = _same  # of its tensors, in our layout
    note: str = ""  # how it differs from the op by construction; empty if it computes the same
    tf32: bool = False  # whether PyTorch multiplies fp32 in tf32 meanwhile
    modes: tuple[str, ...] = MODES

    def setting(self) -> contextlib.AbstractContextManager[None]:
        """What it is called under, forward and backward."""
        return tf32_products() if self.tf32 else contextlib.nullcontext()

    def results(self, *tensors: Tensor) -> Results:
        """What it returns, as a tuple."""
        found = self.call(*tensors)
        return (found,) if isinstance(found, Tensor) else tuple(found)


def tile_kernels(op: str) -> Contender | None:
    """DeepSeek's TileKernels: the stages of version 2, or `pre` and `merge` of version 1.

    Without a graph of gradients that `pre` is one fused kernel. It has no backward of its own: that
    adds to what the backward of `merge` leaves.
    """
    if _has_stages():
        from . import stages

        return stages.tile_kernels(op)
    module = _tile_kernels_module()
    constants: dict[str, Any] = {"norm_eps": EPS, "mhc_mult": STREAMS, "post_mult_value": 2.0}
    constants |= {"pre_eps": 0.0, "sinkhorn_eps": EPS, "sinkhorn_repeat": ITERS}

    def pre(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Any:
        layer_input, maps = module.mhc_pre(x, phi, alpha, bias, **constants)
        return layer_input, *maps

    def sublayer(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
        layer_input, *maps = pre(x, phi, alpha, bias)
        return module.mhc_post(layer_input, x, *maps)

    def take(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> list[Tensor]:
        rows = _rows_by_input().to(phi.device)
        return [x[None], phi[rows].contiguous(), alpha, bias[rows].contiguous()]

    def gradients(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> list[Tensor]:
        rows = _rows_by_input().to(phi.device)  # a transposition: its own inverse
        return [x[0], phi[rows], alpha, bias[rows]]

    def pre_results(layer_input: Tensor, h_post: Tensor, h_res: Tensor) -> list[Tensor]:
        return [layer_input[0], h_post[0, ..., 0], h_res[0].transpose(-1, -2)]

    def pre_cotangents(layer_input: Tensor, h_post: Tensor, h_res: Tensor) -> list[Tensor]:
        return batched(layer_input, h_post[..., None], h_res.transpose(-1, -2).contiguous())

    def merge(x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
        return module.mhc_post(layer_output, x, h_post, h_res)

    def merge_take(x: Tensor, layer_output: Tensor, *maps: Tensor) -> list[Tensor]:
        return [x[None], *pre_cotangents(layer_output, *maps)]

    def merge_gradients(x: Tensor, layer_output: Tensor, *maps: Tensor) -> list[Tensor]:
        return [x[0], *pre_results(layer_output, *maps)]

    name = named("tile-kernels")
    return {
        "sublayer": Contender(name, sublayer, take, unbatched, batched, gradients),
        "pre": Contender(
            name, pre, take, pre_results, pre_cotangents, gradients, modes=("inference", "forward")
        ),
        "merge": Contender(name, merge, merge_take, unbatched, batched, merge_gradients),
    }.get(op)


def liger(op: str) -> Contender | None:
    """Liger-Kernel."""
    module = importlib.import_module("liger_kernel.ops.mhc")

    def pre(x: Tensor, phi: Tensor, bias: Tensor, *alphas: Tensor) -> Any:
        h_pre, h_post, h_res = module.LigerMHCCoeffsFunction.apply(
            x, phi, bias, *alphas, False, ITERS, EPS, 0.0, EPS, 2.0
        )
        return module.LigerMHCPreFunction.apply(x, h_pre), h_post, h_res

    def sublayer(x: Tensor, phi: Tensor, bias: Tensor, *alphas: Tensor) -> Tensor:
        layer_input, h_post, h_res = pre(x, phi, bias, *alphas)
        return module.LigerMHCPostResFunction.apply(x, layer_input, h_post, h_res)

    def take(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> list[Tensor]:
        return [x, phi.t().contiguous(), bias, *(value.clone() for value in alpha)]

    def gradients(x: Tensor, phi: Tensor, bias: Tensor, *alphas: Tensor) -> list[Tensor]:
        return [x, phi.t(), torch.stack(alphas), bias]

    name = named("liger-kernel")
    return {
        "sublayer": Contender(name, sublayer, take, gradients=gradients),
        "pre": Contender(name, pre, take, gradients=gradients),
        "merge": Contender(name, module.LigerMHCPostResFunction.apply),
    }.get(op)


def hyper_connections(op: str) -> Contender | None:
    """The package hyper-connections: a module with a mapping of its own, a stream at a time."""
    package = importlib.import_module("hyper_connections")
    if op != "sublayer":
        return None
    modules: dict[int, Any] = {}

    def sublayer(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
        width = x.shape[-1]
        if width not in modules:
            built = package.mHC(STREAMS, dim=width, branch=torch.nn.Identity(), layer_index=0)
            modules[width] = built.to(x.device)
        rows = x.transpose(0, 1).contiguous()  # it wants [batch * n, tokens, C]
        return modules[width](rows).transpose(0, 1)

    note = "a stream's maps come from that stream alone, by parameters of another shape"
    return Contender(named("hyper-connections"), sublayer, note=note)


ADAPTERS: dict[str, Callable[[str], Contender | None]] = {
    "tile-kernels": tile_kernels,
    "liger-kernel": liger,
    "hyper-connections": hyper_connections,
}
"""By package: from an op's name, the contender, or None where it has no such op.

An adapter raises ImportError where its package is not installed.
"""


def lacks(package: str) -> Mapping[str, str]:
    """Ops of ours that an installed package leaves to others, each with the reason."""
    if package == "hyper-connections":
        return dict.fromkeys(("pre", "merge"), "its module is a sublayer with a mapping of its own")
    if package != "tile-kernels" or not _has_stages():
        return {}
    from . import stages

    return stages.LACKS


def left_out(ops: Collection[str], wanted: Callable[[str], bool]) -> list[str]:
    """A line for every installed package and reason for which it takes no part in some ops.

    `wanted` says of a contender's name whether it is.
    """
    lines = []
    for package in ADAPTERS:
        reasons: dict[str, list[str]] = {}
        if version(package) and wanted(named(package)):
            for op, why in lacks(package).items():
                if op in ops:
                    reasons.setdefault(why, []).append(op)
        lines += [f"{named(package)} has no {', '.join(o)}: {why}" for why, o in reasons.items()]
    return lines


def _has_stages() -> bool:
    """Whether the TileKernels that is installed is of version 2 or later."""
    return int((version("tile-kernels") or "0").partition(".")[0]) >= 2


def _tile_kernels_module() -> ModuleType:
    """Its functions; it imports a module by the name that older releases of TileLang gave it."""
    old, new = "tilelang.utils.target", "tilelang.backend.target"
    try:
        return importlib.import_module("tile_kernels.modeling.mhc.functional")
    except ModuleNotFoundError as error:
        if error.name != old:
            raise
    sys.modules[old] = importlib.import_module(new)
    return importlib.import_module("tile_kernels.modeling.mhc.functional")


def version(package: str) -> str | None:
    """An installed package's version; None if it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def named(package: str) -> str:
    """A package's name as a contender, with its version where it is installed."""
    return f"{package} {version(package) or ''}".strip()


def is_asked(name: str, names: tuple[str, ...]) -> bool:
    """Whether a contender's name begins like one of some names, or there are none."""
    return not names or name.startswith(names)


def _rows_by_input() -> Tensor:
    """The rows of phi with those of h_res ordered [in, out]; ours are [out, in]."""
    first = 2 * STREAMS
    residual = torch.arange(STREAMS * STREAMS).view(STREAMS, STREAMS).t().flatten() + first
    return torch.cat([torch.arange(first), residual])

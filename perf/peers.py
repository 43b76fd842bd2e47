"""Other implementations of one mHC sublayer, as contenders of `perf.sublayer`: adapters alone.

Each takes our tensors, brings the parameters into its own layout once, outside what is timed, and
computes pre, an identity layer and merge. A package that is not installed is named as such.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STREAMS = 4
ITERS = 20
EPS = 1e-6


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: with the version, for a table.
        prepare: from x [T, 4, C], phi [24, 4C], alpha [3], bias [24] and grad_x_next, its tensors;
            first x, last grad_x_next, in its own shapes.
        sublayer: from all of these but the last, x_next.
    """

    name: str
    prepare: Callable[..., list[Tensor]]
    sublayer: Callable[..., Tensor]

    def forward(self, *values: Tensor) -> Tensor:
        """x_next without a graph of gradients."""
        with torch.no_grad():
            return self.sublayer(*values[:-1])

    def training(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Gradients of x and the parameters, after a forward pass."""
        leaves = [value.detach().requires_grad_() for value in values[:-1]]
        return torch.autograd.grad(self.sublayer(*leaves), leaves, values[-1])


def tile_kernels() -> Contender:
    """DeepSeek's TileKernels; its forward without gradients is one fused kernel.

    Raises:
        ImportError: It is not installed.
    """
    module = importlib.import_module("tile_kernels.modeling.mhc.functional")
    constants: dict[str, Any] = {"norm_eps": EPS, "mhc_mult": STREAMS, "post_mult_value": 2.0}
    constants |= {"pre_eps": 0.0, "sinkhorn_eps": EPS, "sinkhorn_repeat": ITERS}

    def prepare(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
        rows = _rows_by_input().to(phi.device)
        return [x[None], phi[rows].contiguous(), alpha, bias[rows].contiguous(), grad[None]]

    def sublayer(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
        layer_input, maps = module.mhc_pre(x, phi, alpha, bias, **constants)
        return module.mhc_post(layer_input, x, *maps)

    return Contender("tile-kernels", prepare, sublayer)


def liger() -> Contender:
    """Liger-Kernel.

    Raises:
        ImportError: It is not installed.
    """
    module = importlib.import_module("liger_kernel.ops.mhc")

    def prepare(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
        return [x, phi.t().contiguous(), bias, *(value.clone() for value in alpha), grad]

    def sublayer(x: Tensor, phi: Tensor, bias: Tensor, *alphas: Tensor) -> Tensor:
        h_pre, h_post, h_res = module.LigerMHCCoeffsFunction.apply(
            x, phi, bias, *alphas, False, ITERS, EPS, 0.0, EPS, 2.0
        )
        layer_input = module.LigerMHCPreFunction.apply(x, h_pre)
        return module.LigerMHCPostResFunction.apply(x, layer_input, h_post, h_res)

    return Contender("liger-kernel", prepare, sublayer)


ADAPTERS: dict[str, Callable[[], Contender]] = {"tile-kernels": tile_kernels, "liger-kernel": liger}


def _rows_by_input() -> Tensor:
    """The rows of phi with those of h_res ordered [in, out]; ours are [out, in]."""
    first = 2 * STREAMS
    residual = torch.arange(STREAMS * STREAMS).view(STREAMS, STREAMS).t().flatten() + first
    return torch.cat([torch.arange(first), residual])

"""TileKernels 2 as contender: stages, each a forward and a backward function without autograd.

The projection is in another package, DeepGEMM. So there is no counterpart of `pre` and of the ops
that contain it.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from .peers import ITERS, STREAMS, Contender, batched, named, unbatched

PACKAGE = "tile-kernels"
WITHOUT_PROJECTION = "TileKernels 2 leaves the projection to another package, DeepGEMM"
LACKS = dict.fromkeys(("mapping", "pre", "boundary", "sublayer"), WITHOUT_PROJECTION)
SINKHORN_EPS = 0.0  # ours has none

Grads = tuple[Tensor, ...]


def tile_kernels(op: str) -> Contender | None:
    """DeepSeek's TileKernels from version 2 on, as an adapter of `peers`."""
    module = importlib.import_module("tile_kernels.mhc")
    if op in ("expand", "collapse"):
        return _boundaries(module)[op]
    build = {"sinkhorn": _sinkhorn, "pre_apply": _pre_apply, "merge": _merge}.get(op)
    return build(module) if build else None


def _sinkhorn(module: ModuleType) -> Contender:
    def forward(logits: Tensor) -> Tensor:
        h_res = torch.empty_like(logits)
        module.mhc_sinkhorn_fwd(logits, h_res, ITERS, SINKHORN_EPS)
        return h_res

    def backward(grad_h_res: Tensor, logits: Tensor) -> Grads:
        grad_logits = torch.empty_like(logits)
        module.mhc_sinkhorn_bwd(grad_h_res, logits, grad_logits, ITERS, SINKHORN_EPS)
        return (grad_logits,)

    def by_input(matrix: Tensor) -> list[Tensor]:  # [out, in] to [in, out], or back
        return [matrix.transpose(-1, -2).contiguous()]

    return Contender(
        named(PACKAGE), _stage(forward, backward), by_input, by_input, by_input, by_input
    )


def _pre_apply(module: ModuleType) -> Contender:
    def forward(x: Tensor, h_pre: Tensor) -> Tensor:
        layer_input = torch.empty_like(x[:, 0])
        module.mhc_pre_apply_mix_fwd(x, h_pre, layer_input)
        return layer_input

    def backward(grad_layer_input: Tensor, x: Tensor, h_pre: Tensor) -> Grads:
        grad_x = torch.zeros_like(x)  # it adds to what is there
        return grad_x, module.mhc_pre_apply_mix_bwd(grad_layer_input, x, h_pre, grad_x)

    return Contender(named(PACKAGE), _stage(forward, backward))


def _merge(module: ModuleType) -> Contender:
    def backward(grad_x_next: Tensor, layer_output: Tensor, x: Tensor, *maps: Tensor) -> Grads:
        return cast(Grads, module.mhc_post_bwd(layer_output, x, *maps, grad_x_next))

    def take(x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor) -> list[Tensor]:
        by_input = h_res.transpose(-1, -2).contiguous()
        return [layer_output[None], x[None], h_post[None, ..., None], by_input[None]]

    def gradients(layer_output: Tensor, x: Tensor, h_post: Tensor, h_res: Tensor) -> list[Tensor]:
        return [x[0], layer_output[0], h_post[0, ..., 0], h_res[0].transpose(-1, -2)]

    stage = _stage(module.mhc_post_fwd, backward)
    return Contender(named(PACKAGE), stage, take, unbatched, batched, gradients)


def _boundaries(module: ModuleType) -> dict[str, Contender]:
    """`expand`, and `collapse`, which the package has as the backward of `expand`."""

    def copied(hidden: Tensor) -> Tensor:
        x = hidden.new_empty(hidden.shape[0], STREAMS, hidden.shape[1])
        module.expand_to_mhc_fwd(hidden, x)
        return x

    def summed(x: Tensor) -> Tensor:
        hidden = torch.empty_like(x[:, 0])
        module.expand_to_mhc_bwd(x, hidden)
        return hidden

    return {
        "expand": Contender(named(PACKAGE), _stage(copied, lambda grad, _: (summed(grad),))),
        "collapse": Contender(named(PACKAGE), _stage(summed, lambda grad, _: (copied(grad),))),
    }


def _stage(forward: Callable[..., Tensor], backward: Callable[..., Grads]) -> Callable[..., Any]:
    """A function with autograd; `backward` takes the result's cotangent and then the tensors."""

    class Stage(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensor:
            ctx.save_for_backward(*tensors)
            return forward(*tensors)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return backward(*grads, *ctx.saved_tensors)

    return cast(Callable[..., Any], Stage.apply)

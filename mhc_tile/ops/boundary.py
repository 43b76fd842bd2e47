"""`boundary`: the end of one sublayer and the start of the next, in one op."""

from typing import Any

import torch
from torch import Tensor

from mhc_tile.autotune import lookup

from .. import gradients, reference
from . import _dispatch
from ._definition import Op
from ._dispatch import flat, leading, question, tuned
from .merge import MERGE, check_merge
from .pre import CONSTANTS, PRE, check_pre, with_projection


def boundary(
    x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor,
    phi: Tensor, alpha: Tensor, bias: Tensor,
    *, norm_eps: float, pre_eps: float = 0.0, post_scale: float = 2.0, iters: int = 20,
    sinkhorn_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`merge` of a sublayer, then `pre` of the next one on the result (eqs. 7 and 14-19).

    On GPUs of sm_90a many tokens of n = 4 streams in bf16 or fp16 take one launch, which moves 10C
    elements a token where the two ops move 14C. The results are those of the two ops, bit by bit.

    `x_next[o, c] = sum_i h_res[o, i] * x[i, c] + h_post[o] * layer_output[c]`
    `layer_input, h_post_next, h_res_next = pre(x_next, phi, alpha, bias)`

    Args:
        x: [..., n, C], bf16, fp16, fp32 or fp64. A copy is made if it is not contiguous.
        layer_output: [..., C], dtype of x.
        h_post: [..., n], fp32 (fp64 where x is). This sublayer's.
        h_res: [..., n, n], dtype of h_post, [out, in]. This sublayer's.
        phi: [n*n + 2n, n*C], dtype of h_post. The NEXT sublayer's, as alpha and bias.
        alpha: [3], dtype of h_post.
        bias: [n*n + 2n], dtype of h_post.
        norm_eps: as in `pre`.
        pre_eps: as in `pre`.
        post_scale: as in `pre`.
        iters: as in `pre`.
        sinkhorn_eps: as in `pre`.

    Returns:
        x_next [..., n, C] and layer_input [..., C], dtype of x; h_post_next [..., n] and
        h_res_next [..., n, n], dtype of phi.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: A shape, dtype, device or constant is off; the message names it.

    Example:
        >>> x, layer_output, phi = torch.randn(7, 4, 64), torch.randn(7, 64), torch.randn(24, 256)
        >>> h_post, h_res = torch.ones(7, 4), torch.eye(4).expand(7, 4, 4)
        >>> x_next, layer_input, _, _ = boundary(
        ...     x, layer_output, h_post, h_res, phi, torch.ones(3), torch.zeros(24), norm_eps=1e-6)
        >>> torch.equal(x_next, x + layer_output.unsqueeze(-2))
        True
    """
    check_merge("boundary", x, layer_output, h_post, h_res)
    constants = check_pre(
        "boundary", x, phi, alpha, bias, norm_eps, pre_eps, post_scale, iters, sinkhorn_eps
    )
    return BOUNDARY.call(x, layer_output, h_post, h_res, phi, alpha, bias, **constants)[:4]


def _with_projection(
    x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor, *rest: Tensor, **constants: Any
) -> tuple[Tensor, ...]:
    """`reference.boundary`, and what the backward keeps."""
    x_next = reference.merge(x, layer_output, h_post, h_res)
    return (x_next, *with_projection(x_next, *rest, **constants))


def _kernel(*tensors: Tensor, **constants: Any) -> tuple[Tensor, ...]:
    from mhc_tile.kernels.boundary import launch as kernel

    x, tokens = tensors[0], tensors[0].shape[:-2]
    merged = (flat(x, 2), flat(tensors[1], 1), flat(tensors[2], 1), flat(tensors[3], 2))

    def launch(config: Any) -> tuple[Tensor, ...] | None:
        try:
            return kernel.forward(*merged, *tensors[4:], **constants, config=config)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if config == lookup.default(question("pre", x, merged[0].shape)):
                raise
            # the entry is that of `pre`, which may well run with it
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            _dispatch._warn_once(f"boundary: merge and pre run instead of one kernel: {said}")
            return None

    # `pre`'s entry of the table: its sums, and so its bits
    results = tuned("pre", x, merged[0].shape, launch)
    if results is not None:
        return tuple(leading(value, tokens) for value in results)
    x_next = MERGE.by_kernel(*tensors[:4])
    return (x_next, *PRE.by_kernel(x_next, *tensors[4:], **constants))


def _gradient_kernel(*tensors: Tensor, **constants: Any) -> tuple[Tensor, ...]:
    grad_x_next, inputs, x_next = tensors[0], tensors[4:8], tensors[-1]
    arguments = (*tensors[1:4], x_next, *tensors[8:-1], grad_x_next, None)
    grad_x_next, *grad_parameters = PRE.backward.by_kernel(*arguments, **constants)
    return (*MERGE.backward.by_kernel(grad_x_next, *inputs), *grad_parameters)


BOUNDARY = Op(
    "boundary",
    ("x", "layer_output", "h_post", "h_res", "phi", "alpha", "bias"),
    ("x_next", "layer_input", "h_post_next", "h_res_next"),
    _with_projection, gradients.boundary_backward,
    kernel=_kernel, gradient_kernel=_gradient_kernel,
    kept=("projection", "inv_rms"),
    # x_next again, not rebuilt: what reads it keeps it anyway
    reads=(
        "grad_x_next", "grad_layer_input", "grad_h_post_next", "grad_h_res_next",
        "x", "layer_output", "h_post", "h_res", "phi", "alpha", "bias",
        "projection", "inv_rms", "x_next",
    ),
    constants=CONSTANTS,
)  # fmt: skip

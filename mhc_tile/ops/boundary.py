"""`boundary`: the end of one sublayer and the start of the next, in one op."""

from typing import Any

import torch
from torch import Tensor

from .. import gradients, reference
from .._library import define, derive, rounded
from . import _dispatch
from ._dispatch import flat, leading, on_cuda, tuned
from ._saved import given, keep_projection
from .merge import check_merge, merge_backward_kernel, merge_kernel
from .pre import (
    CONSTANTS,
    check_pre,
    fake_pre,
    pre_backward_kernel,
    pre_kernel,
    with_projection,
)


def boundary(
    x: Tensor,
    layer_output: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    norm_eps: float,
    pre_eps: float = 0.0,
    post_scale: float = 2.0,
    iters: int = 20,
    sinkhorn_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`merge` of a sublayer, then `pre` of the next one on the result (eqs. 7 and 14-19).

    On GPUs of sm_90a many tokens of n = 4 streams in bf16 or fp16
    take one launch, which moves 10C elements a token where the two ops move 14C; the bits are
    theirs.

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
    return boundary_op(x, layer_output, h_post, h_res, phi, alpha, bias, **constants)[:4]


def _cpu(
    x: Tensor,
    layer_output: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    *parameters: Tensor,
    **constants: Any,
) -> tuple[Tensor, ...]:
    x_next = reference.merge(x, layer_output, h_post, h_res)
    return (x_next, *with_projection(x_next, *parameters, **constants))


def _cuda(
    x: Tensor,
    layer_output: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    *parameters: Tensor,
    **constants: Any,
) -> tuple[Tensor, ...]:
    from ..kernels import boundary as kernel

    inputs = (flat(x, 2), flat(layer_output, 1), flat(h_post, 1), flat(h_res, 2), *parameters)
    pinned = _dispatch.BATCH_INVARIANT

    def launch(config: Any) -> tuple[Tensor, ...] | None:
        try:
            return kernel.forward(*inputs, **constants, config=config, batch_invariant=pinned)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if config is None:
                raise
            # the entry is that of `pre`, which may well run with it
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            _dispatch._warn_once(f"boundary: merge and pre run instead of one kernel: {said}")
            return None

    # `pre`'s entry of the table: its sums, and so its bits
    results = tuned("pre", x, inputs[0].shape, launch)
    if results is not None:
        return tuple(leading(value, x.shape[:-2]) for value in results)
    x_next = merge_kernel(x, layer_output, h_post, h_res)
    return (x_next, *pre_kernel(x_next, *parameters, **constants))


def _fake(
    x: Tensor,
    layer_output: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    *parameters: Tensor,
    **constants: Any,
) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape), *fake_pre(x, *parameters, **constants))


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    keep_projection(ctx, inputs, keyword_only_inputs, output)
    # x_next again, not rebuilt: what reads it keeps it anyway
    ctx.save_for_backward(*inputs, *output[-2:], output[0])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
    return _boundary_backward(*given(ctx, grads[:4]), *ctx.saved_tensors, **ctx.constants)


def _backward_cpu(*tensors: Tensor, norm_eps: float, **constants: Any) -> tuple[Tensor, ...]:
    return rounded(gradients.boundary_backward(*tensors, **constants), *tensors[4:11])


def _backward_cuda(*tensors: Tensor, **constants: Any) -> tuple[Tensor, ...]:
    grad_x_next, inputs = tensors[0], tensors[4:8]
    arguments = (*tensors[1:4], tensors[-1], *tensors[8:-1], grad_x_next)
    grad_x_next, *grad_parameters = pre_backward_kernel(*arguments, **constants)
    return (*merge_backward_kernel(grad_x_next, *inputs), *grad_parameters)


def _backward_fake(*tensors: Tensor, **_: Any) -> tuple[Tensor, ...]:
    return tuple(value.new_empty(value.shape) for value in tensors[4:11])


def _backward_derived(*tensors: Tensor, norm_eps: float, **constants: Any) -> tuple[Tensor, ...]:
    tensors = tensors[:-3]
    x_next = reference.merge(*tensors[4:8])
    saved = reference.normalised_projection(x_next, tensors[8], norm_eps)
    return _backward_cpu(*tensors, *saved, x_next, norm_eps=norm_eps, **constants)


_boundary_backward = define(
    "boundary_backward(Tensor grad_x_next, Tensor grad_layer_input, Tensor grad_h_post_next, "
    "Tensor grad_h_res_next, Tensor x, Tensor layer_output, Tensor h_post, Tensor h_res, "
    "Tensor phi, Tensor alpha, Tensor bias, Tensor projection, Tensor inv_rms, Tensor x_next, *, "
    f"{CONSTANTS}) "
    "-> (Tensor grad_x, Tensor grad_layer_output, Tensor grad_h_post, Tensor grad_h_res, "
    "Tensor grad_phi, Tensor grad_alpha, Tensor grad_bias)",
    cpu=_backward_cpu,
    cuda=on_cuda(
        "boundary_backward",
        _backward_cuda,
        _backward_cpu,
        streams=lambda *tensors: (tensors[4], tensors[4].shape[-2]),
    ),
    fake=_backward_fake,
    **derive(_backward_derived),
)
boundary_op = define(
    "boundary(Tensor x, Tensor layer_output, Tensor h_post, Tensor h_res, Tensor phi, "
    f"Tensor alpha, Tensor bias, *, {CONSTANTS}) "
    "-> (Tensor x_next, Tensor layer_input, Tensor h_post_next, Tensor h_res_next, "
    "Tensor projection, Tensor inv_rms)",
    cpu=_cpu,
    cuda=on_cuda("boundary", _cuda, _cpu, streams=lambda x, *_: (x, x.shape[-2])),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)

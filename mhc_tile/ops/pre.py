"""`pre`: everything before the layer, in one op: mapping, sinkhorn and pre_apply."""

from typing import Any

from torch import Tensor

from .. import _checks, gradients, reference
from .._library import define, derive, rounded
from ._dispatch import flat, on_cuda
from ._saved import keep_projection


def pre(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    norm_eps: float,
    pre_eps: float = 0.0,
    post_scale: float = 2.0,
    iters: int = 20,
    sinkhorn_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Read the layer's input from the streams, and the maps that `merge` will need (eqs. 14-19).

    `h_pre, h_post, h_res_logits = mapping(x, phi, alpha, bias)`,
    `h_res = sinkhorn(h_res_logits)`, `layer_input[c] = sum_i h_pre[i] * x[i, c]`

    Args:
        x: [..., n, C], bf16, fp16, fp32 or fp64. A copy is made if it is not contiguous.
        phi: [n*n + 2n, n*C], fp32 (fp64 where x is), rows packed pre, post, res.
        alpha: [3], dtype of phi. Gates of pre, post and res.
        bias: [n*n + 2n], dtype of phi.
        norm_eps: added to the mean of squares; at least 0.
        pre_eps: added to h_pre; at least 0.
        post_scale: the upper bound of h_post; above 0.
        iters: Sinkhorn iterations; at least 1.
        sinkhorn_eps: the epsilon of `sinkhorn`; at least 0.

    Returns:
        layer_input [..., C], dtype of x; h_post [..., n] and h_res [..., n, n] ([out, in]), dtype
        of phi.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: A shape, dtype, device or constant is off; the message names it.

    Example:
        >>> x, phi = torch.randn(7, 4, 64), torch.randn(24, 256)
        >>> layer_input, h_post, h_res = pre(x, phi, torch.ones(3), torch.zeros(24), norm_eps=1e-6)
        >>> layer_input.shape, h_post.shape, h_res.shape
        (torch.Size([7, 64]), torch.Size([7, 4]), torch.Size([7, 4, 4]))
    """
    constants = check_pre(
        "pre", x, phi, alpha, bias, norm_eps, pre_eps, post_scale, iters, sinkhorn_eps
    )
    return _pre(x, phi, alpha, bias, **constants)[:3]


def check_pre(
    op: str,
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    norm_eps: float,
    pre_eps: float,
    post_scale: float,
    iters: int,
    sinkhorn_eps: float,
) -> dict[str, Any]:
    """The checks that `pre` shares with `boundary`; returns the constants by name."""
    _checks.parameters(op, x, phi, alpha, bias)
    _checks.at_least(op, 0, norm_eps=norm_eps, pre_eps=pre_eps, sinkhorn_eps=sinkhorn_eps)
    _checks.positive(op, post_scale=post_scale)
    _checks.at_least(op, 1, iters=iters)
    return {
        "norm_eps": norm_eps,
        "pre_eps": pre_eps,
        "post_scale": post_scale,
        "iters": iters,
        "sinkhorn_eps": sinkhorn_eps,
    }


CONSTANTS = "float norm_eps, float pre_eps=0.0, float post_scale=2.0, int iters=20, "
CONSTANTS += "float sinkhorn_eps=0.0"


def with_projection(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, norm_eps: float, **constants: Any
) -> tuple[Tensor, ...]:
    """`reference.pre` and, after its results, what the backward keeps."""
    projection, inv_rms = reference.normalised_projection(x, phi, norm_eps)
    results = reference.pre_from_projection(x, projection, alpha, bias, **constants)
    return (*results, projection, inv_rms)


def pre_kernel(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, **constants: Any
) -> tuple[Tensor, ...]:
    """`with_projection` by kernels."""
    from ..kernels import pre as kernel

    results = kernel.forward(flat(x, 2), phi, alpha, bias, **constants)
    return tuple(value.view(*x.shape[:-2], *value.shape[1:]) for value in results)


def fake_pre(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, **_: Any) -> tuple[Tensor, ...]:
    """Contiguous empties of `pre`'s results and of what its backward keeps."""
    tokens, (n, width) = x.shape[:-2], x.shape[-2:]
    shapes = ((*tokens, n), (*tokens, n, n), (*tokens, phi.shape[0]), tokens)
    return (x.new_empty((*tokens, width)), *(phi.new_empty(shape) for shape in shapes))


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
    return _pre_backward(*grads[:3], *ctx.saved_tensors, **ctx.constants)


def _backward_cpu(*tensors: Tensor, norm_eps: float, **constants: Any) -> tuple[Tensor, ...]:
    return rounded(gradients.pre_backward(*tensors, **constants), *tensors[3:7])


def pre_backward_kernel(
    grad_layer_input: Tensor,
    grad_h_post: Tensor,
    grad_h_res: Tensor,
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    projection: Tensor,
    inv_rms: Tensor,
    *,
    norm_eps: float,
    grad_x_part: Tensor | None = None,
    **constants: Any,
) -> tuple[Tensor, ...]:
    """`gradients.pre_backward` by kernels; grad_x_part, if given, is added to grad_x."""
    from ..kernels import pre_backward as kernel

    grad_outputs = (flat(grad_layer_input, 1), flat(grad_h_post, 1), flat(grad_h_res, 2))
    saved = (flat(projection, 1), flat(inv_rms, 0))
    part = None if grad_x_part is None else flat(grad_x_part, 2)
    grad_x, *grads = kernel.backward(
        *grad_outputs, flat(x, 2), phi, alpha, bias, *saved, part, **constants
    )
    return grad_x.view(x.shape), *grads


def _backward_fake(*tensors: Tensor, **_: Any) -> tuple[Tensor, ...]:
    return tuple(value.new_empty(value.shape) for value in tensors[3:7])


def _backward_derived(*tensors: Tensor, norm_eps: float, **constants: Any) -> tuple[Tensor, ...]:
    tensors = tensors[:-2]
    saved = reference.normalised_projection(tensors[3], tensors[4], norm_eps)
    return _backward_cpu(*tensors, *saved, norm_eps=norm_eps, **constants)


_pre_backward = define(
    "pre_backward(Tensor grad_layer_input, Tensor grad_h_post, Tensor grad_h_res, Tensor x, "
    f"Tensor phi, Tensor alpha, Tensor bias, Tensor projection, Tensor inv_rms, *, {CONSTANTS}) "
    "-> (Tensor grad_x, Tensor grad_phi, Tensor grad_alpha, Tensor grad_bias)",
    cpu=_backward_cpu,
    cuda=on_cuda(
        "pre_backward",
        pre_backward_kernel,
        _backward_cpu,
        streams=lambda *tensors: (tensors[3], tensors[3].shape[-2]),
        tensor_cores=True,
    ),
    fake=_backward_fake,
    **derive(_backward_derived),
)
_pre = define(
    f"pre(Tensor x, Tensor phi, Tensor alpha, Tensor bias, *, {CONSTANTS}) "
    "-> (Tensor layer_input, Tensor h_post, Tensor h_res, Tensor projection, Tensor inv_rms)",
    cpu=with_projection,
    cuda=on_cuda(
        "pre",
        pre_kernel,
        with_projection,
        streams=lambda x, *_: (x, x.shape[-2]),
        tensor_cores=True,
    ),
    fake=fake_pre,
    setup_context=keep_projection,
    backward=_backward,
)

"""The specification: what mHC computes, in plain PyTorch, one short function per quantity.

It is each op's CPU implementation, the truth in every test and the baseline in every measurement.
Equation numbers are those of arXiv 2512.24880v2.

Names and shapes, with n streams of hidden size C and any leading dims (none, or of size zero, too):

    x              [..., n, C]       the residual streams
    layer_input    [..., C]          what a layer reads
    layer_output   [..., C]          what it returns
    phi            [n*n + 2n, n*C]   projection; rows packed pre (n), post (n), res (n*n, [out, in])
    alpha          [3]               gates of pre, post, res
    bias           [n*n + 2n]        packed like phi's rows
    inv_rms        [...]             inverse root mean square of a token
    projection     [..., n*n + 2n]   phi applied to the RMS-normalised streams
    h_pre, h_post  [..., n]          read-out and write-in weights
    h_res          [..., n, n]       residual mixing, [out, in], doubly stochastic

Precision: sums and maps are computed in at least float32 (float64 if x is) and stay so;
`layer_input`, `x_next` and `hidden` are rounded once, to x's dtype. Every function is
differentiable; `gradients.py` writes the same gradients out as formulas.
"""

from typing import Any

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of maps and sums: float32, or float64 where x is."""
    return torch.promote_types(x.dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """The values of x in its compute dtype."""
    return x.to(compute_dtype(x))


def inverse_rms(x: Tensor, norm_eps: float) -> Tensor:
    """Inverse root mean square of a token's n*C values (eq. 15).

    `inv_rms = 1 / sqrt(sum_{i,c} x[i, c]^2 / (n*C) + norm_eps)`

    A token whose squares sum to zero has no direction: its inv_rms is defined as 0, so that its
    logits are the bias and no gradient reaches x through them, whatever norm_eps is. In float32
    that includes tokens of |x| below 2.6e-23, whose squares underflow; subnormal squares count.
    """
    mean_square = wide(x).square().mean((-2, -1))
    zero = mean_square == 0
    return torch.rsqrt(mean_square.masked_fill(zero, 1.0) + norm_eps).masked_fill(zero, 0.0)


def project(x: Tensor, phi: Tensor, inv_rms: Tensor) -> Tensor:
    """Projection of the normalised streams, normalised after the product (eqs. 14 and 16).

    `projection[k] = inv_rms * sum_{i,c} phi[k, i*C + c] * x[i, c]`
    """
    return (wide(x).flatten(-2) @ phi.t()) * inv_rms.unsqueeze(-1)


def normalised_projection(x: Tensor, phi: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """`project` with the `inverse_rms` of x; returns both."""
    inv_rms = inverse_rms(x, norm_eps)
    return project(x, phi, inv_rms), inv_rms


def spread(alpha: Tensor, n: int) -> Tensor:
    """One gate per logit: alpha_pre n times, alpha_post n times, alpha_res n*n times."""
    return torch.cat([alpha[0:1].expand(n), alpha[1:2].expand(n), alpha[2:3].expand(n * n)])


def split(packed: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unpack [..., n*n + 2n] into pre [..., n], post [..., n] and res [..., n, n] ([out, in])."""
    pre, post, res = packed.split([n, n, n * n], dim=-1)
    return pre, post, res.unflatten(-1, (n, n))


def maps(
    projection: Tensor, alpha: Tensor, bias: Tensor, n: int, *, pre_eps: float, post_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, biases and sigmoids (eqs. 16-18): h_pre, h_post and h_res_logits [..., n, n].

    `logits[k] = alpha[part of k] * projection[k] + bias[k]`,
    `h_pre = sigmoid(logits_pre) + pre_eps`, `h_post = post_scale * sigmoid(logits_post)`
    """
    pre, post, res = split(projection * spread(alpha, n) + bias, n)
    return torch.sigmoid(pre) + pre_eps, post_scale * torch.sigmoid(post), res


def mapping(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor,
    *, norm_eps: float, pre_eps: float = 0.0, post_scale: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """From the streams to h_pre, h_post and h_res_logits [..., n, n] (eqs. 14-18)."""
    projection, _ = normalised_projection(x, phi, norm_eps)
    return maps(projection, alpha, bias, x.shape[-2], pre_eps=pre_eps, post_scale=post_scale)


def normalise(matrix: Tensor, dim: int, eps: float) -> tuple[Tensor, Tensor]:
    """`matrix / total` and `total = sum over dim of matrix + eps`."""
    total = matrix.sum(dim, keepdim=True) + eps
    return matrix / total, total


def first_iteration(logits: Tensor, eps: float) -> Tensor:
    """Columns, then rows, from the logits; in the log domain where no epsilon keeps rows positive.

    A row that is far below the others in every column underflows to zeros as soon as the columns
    are normalised, and 0/0 follows. Normalising the columns as logarithms avoids it at any scale;
    afterwards every sum stays above 1/n^2.
    """
    if eps == 0:
        return torch.softmax(torch.log_softmax(logits, -2), -1)
    return normalise(torch.softmax(logits, -2) + eps, -1, eps)[0]


def sinkhorn(logits: Tensor, iters: int = 20, eps: float = 0.0) -> Tensor:
    """Doubly stochastic matrix by `iters` normalisations of columns, then rows (eqs. 9 and 19).

    `M = exp(logits)`, then `iters` times: `M[o, i] /= sum_o M[o, i]`, `M[o, i] /= sum_i M[o, i]`,
    with logits and M [..., n, n], [out, in].

    With eps, in the convention of DeepSeek-V4: eps is added to the entries after the first column
    normalisation and to every later denominator. The iteration ends on rows, so without eps every
    row sums to 1 and only the column sums can be off.
    """
    h_res = first_iteration(logits, eps)
    for _ in range(iters - 1):
        h_res, _ = normalise(h_res, -2, eps)
        h_res, _ = normalise(h_res, -1, eps)
    return h_res


def pre_apply(x: Tensor, h_pre: Tensor) -> Tensor:
    """What the layer reads: `layer_input[c] = sum_i h_pre[i] * x[i, c]`."""
    return (h_pre.unsqueeze(-1) * wide(x)).sum(-2).to(x.dtype)


def merge(x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """The streams after the sublayer (eq. 7), x_next [..., n, C].

    `x_next[o, c] = sum_i h_res[o, i] * x[i, c] + h_post[o] * layer_output[c]`
    """
    written = h_post.unsqueeze(-1) * wide(layer_output).unsqueeze(-2)
    return (h_res @ wide(x) + written).to(x.dtype)


def pre(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor,
    *, norm_eps: float, pre_eps: float = 0.0, post_scale: float = 2.0, iters: int = 20,
    sinkhorn_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Everything before the layer: `mapping`, `sinkhorn`, `pre_apply`.

    Returns layer_input, h_post, h_res.
    """
    projection, _ = normalised_projection(x, phi, norm_eps)
    scales = {"pre_eps": pre_eps, "post_scale": post_scale}
    return pre_from_projection(
        x, projection, alpha, bias, iters=iters, sinkhorn_eps=sinkhorn_eps, **scales
    )


def pre_from_projection(
    x: Tensor, projection: Tensor, alpha: Tensor, bias: Tensor,
    *, iters: int, sinkhorn_eps: float, **scales: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What of `pre` follows the projection: maps, Sinkhorn and the weighted sum of the streams."""
    h_pre, h_post, h_res_logits = maps(projection, alpha, bias, x.shape[-2], **scales)
    return pre_apply(x, h_pre), h_post, sinkhorn(h_res_logits, iters, sinkhorn_eps)


def boundary(
    x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor,
    phi: Tensor, alpha: Tensor, bias: Tensor, **constants: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`merge` of one sublayer and `pre` of the next, which reads the rounded x_next.

    The constants are those of `pre`. Returns x_next, layer_input, h_post_next, h_res_next.
    """
    x_next = merge(x, layer_output, h_post, h_res)
    return (x_next, *pre(x_next, phi, alpha, bias, **constants))


def expand(hidden: Tensor, num_streams: int) -> Tensor:
    """Copy the hidden state into every stream: `x[i, c] = hidden[c]`, [..., C] -> [..., n, C]."""
    return hidden.unsqueeze(-2).repeat(*(1,) * (hidden.dim() - 1), num_streams, 1)


def collapse(x: Tensor, mode: str = "sum") -> Tensor:
    """Sum or mean of the streams, [..., n, C] -> [..., C], rounded once to x's dtype.

    `hidden[c] = sum_i x[i, c]`, divided by n where mode is "mean".
    """
    hidden = wide(x).sum(-2)
    return (hidden / x.shape[-2] if mode == "mean" else hidden).to(x.dtype)


def head(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, norm_eps: float, pre_eps: float = 0.0
) -> Tensor:
    """The learned exit of DeepSeek-V4: a weighted sum of the streams, weights from the streams.

    `weights[i] = sigmoid(alpha * projection[i] + bias[i]) + pre_eps`,
    `hidden[c] = sum_i weights[i] * x[i, c]`, with phi [n, n*C], alpha [1] and bias [n].
    """
    projection, _ = normalised_projection(x, phi, norm_eps)
    return pre_apply(x, torch.sigmoid(projection * alpha + bias) + pre_eps)


def hc_mapping(
    x: Tensor, theta: Tensor, alpha: Tensor, bias: Tensor, *, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The maps of unconstrained Hyper-Connections (eq. 5), used as they come: h_pre, h_post, h_res.

    With `response[k, i] = tanh(sum_c theta[k, c] * x[i, c] * inv_rms_i)`, normalised per stream,
    `h_pre[i] = alpha[0] * response[0, i] + bias[i]`,
    `h_post[o] = alpha[1] * response[1, o] + bias[n + o]`,
    `h_res[o, i] = alpha[2] * response[2 + o, i] + bias[2n + o*n + i]`.

    theta is [2 + n, C], its rows packed pre (1), post (1), res (n, by out).
    """
    n = x.shape[-2]
    streams = x.unsqueeze(-2)  # [..., n, 1, C]: each stream is normalised on its own
    response = torch.tanh(project(streams, theta, inverse_rms(streams, norm_eps)))
    packed = response.transpose(-1, -2).flatten(-2)  # [..., (2 + n) * n]
    return split(packed * spread(alpha, n) + bias, n)

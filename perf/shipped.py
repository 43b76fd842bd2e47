"""Every program of the library with its default configurations."""

import torch
from torch import Tensor

from mhc_tile.kernels import merge, pre_apply, sinkhorn, streams
from mhc_tile.kernels.boundary import launch as boundary
from mhc_tile.kernels.common.architectures import multiprocessors_of
from mhc_tile.kernels.common.programs import Catalogue, catalogue, logits_per_token
from mhc_tile.kernels.mapping import backward as mapping_backward
from mhc_tile.kernels.mapping import launch as mapping
from mhc_tile.kernels.pre import launch as pre
from mhc_tile.kernels.pre_backward import launch as pre_backward


def launch_all(tokens: int, n: int, channels: int, dtype: torch.dtype, device: str) -> None:
    """Call every launcher once, forward and backward, on tensors without values."""

    def floats(*size: int) -> Tensor:
        return torch.empty(size, device=device)

    T, C, rows = tokens, channels, logits_per_token(n)
    x = torch.empty(T, n, C, dtype=dtype, device=device)
    hidden = torch.empty(T, C, dtype=dtype, device=device)
    post, res = floats(T, n), floats(T, n, n)
    parameters = (floats(rows, n * C), floats(3), floats(rows))
    saved = (floats(T, rows), floats(T))
    scales = {"pre_eps": 0.0, "post_scale": 2.0}
    steps = {"iters": 20, "sinkhorn_eps": 0.0}
    streams.expand(hidden, n)
    streams.collapse(x, mean=False)
    sinkhorn.forward(res, iters=20, eps=0.0)
    sinkhorn.backward(res, res, iters=20, eps=0.0)
    pre_apply.forward(x, post)
    pre_apply.backward(hidden, x, post)
    merge.forward(x, hidden, post, res)
    for mixing in (res, None):
        merge.backward(x, x, hidden, post, mixing)
    mapping.forward(x, *parameters, norm_eps=1e-6, **scales)
    mapping_backward.backward(post, post, res, x, *parameters, *saved, **scales)
    pre.forward(x, *parameters, norm_eps=1e-6, **scales, **steps)
    boundary.forward(x, hidden, post, res, *parameters, norm_eps=1e-6, **scales, **steps)
    for part in ((), (x,), (x, res)):
        pre_backward.backward(hidden, post, res, x, *parameters, *saved, *part, **scales, **steps)


def programs(
    arch: str, tokens: int, n: int = 4, channels: int = 2560, dtype: torch.dtype = torch.bfloat16
) -> Catalogue:
    """The programs that `launch_all` needs on an architecture, without such a GPU."""
    with catalogue(arch, multiprocessors_of(arch)) as asked:
        launch_all(tokens, n, channels, dtype, "meta")
    return asked

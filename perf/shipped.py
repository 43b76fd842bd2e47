"""Every program of the library with its default configurations."""

import torch
from torch import Tensor

from mhc_tile.autotune.registry import KERNELS, default
from mhc_tile.kernels import merge, pre_apply, sinkhorn, streams
from mhc_tile.kernels.boundary import launch as boundary
from mhc_tile.kernels.common.architectures import multiprocessors_of
from mhc_tile.kernels.common.programs import (
    DryRun,
    dry_run,
    logits_per_token,
    problem_of,
    target_of,
)
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
    target = target_of(x.device)
    own = {name: {"config": default(problem_of(name, x), target)} for name in KERNELS}
    streams.expand(hidden, n, **own["expand"])
    streams.collapse(x, mean=False, **own["collapse"])
    sinkhorn.forward(res, iters=20, eps=0.0, **own["sinkhorn"])
    sinkhorn.backward(res, res, iters=20, eps=0.0, **own["sinkhorn_backward"])
    pre_apply.forward(x, post, **own["pre_apply"])
    pre_apply.backward(hidden, x, post, **own["pre_apply_backward"])
    merge.forward(x, hidden, post, res, **own["merge"])
    for mixing in (res, None):
        merge.backward(x, x, hidden, post, mixing, **own["merge_backward"])
    mapping.forward(x, *parameters, norm_eps=1e-6, **scales, **own["mapping"])
    mapping_backward.backward(
        post, post, res, x, *parameters, *saved, **scales, **own["mapping_backward"]
    )
    whole = {**scales, **steps}
    pre.forward(x, *parameters, norm_eps=1e-6, **whole, **own["pre"])
    boundary.forward(x, hidden, post, res, *parameters, norm_eps=1e-6, **whole, **own["pre"])
    for part in ((), (x,), (x, res)):
        pre_backward.backward(
            hidden, post, res, x, *parameters, *saved, *part, **whole, **own["pre_backward"]
        )


def programs(
    arch: str, tokens: int, n: int = 4, channels: int = 2560, dtype: torch.dtype = torch.bfloat16
) -> DryRun:
    """The programs that `launch_all` needs on an architecture, without such a GPU."""
    with dry_run(arch, multiprocessors_of(arch)) as asked:
        launch_all(tokens, n, channels, dtype, "meta")
    return asked

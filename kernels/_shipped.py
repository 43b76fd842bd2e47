"""Every program of the library with its default configurations, and what each takes on a GPU."""

import torch
from torch import Tensor

from . import (
    _static,
    mapping,
    mapping_backward,
    merge,
    pre,
    pre_apply,
    pre_backward,
    sinkhorn,
    streams,
)
from ._programs import Catalogue, catalogue, logits_per_token

MULTIPROCESSORS = {"sm_80": 108, "sm_89": 142, "sm_90a": 132, "sm_100a": 148, "sm_120a": 170}


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
    merge.backward(x, x, hidden, post, res)
    mapping.forward(x, *parameters, norm_eps=1e-6, **scales)
    mapping_backward.backward(post, post, res, x, *parameters, *saved, **scales)
    pre.forward(x, *parameters, norm_eps=1e-6, **scales, **steps)
    for part in (None, x):
        pre_backward.backward(hidden, post, res, x, *parameters, *saved, part, **scales, **steps)


def programs(
    arch: str, tokens: int, n: int = 4, channels: int = 2560, dtype: torch.dtype = torch.bfloat16
) -> Catalogue:
    """The programs that `launch_all` needs on an architecture, without such a GPU."""
    with catalogue(arch, MULTIPROCESSORS[arch]) as asked:
        launch_all(tokens, n, channels, dtype, "meta")
    return asked


def record(arch: str, n: int = 4, channels: int = 2560) -> dict[str, dict[str, int]]:
    """Registers, spills, stack and shared memory of every program at many tokens and at few.

    Args:
        arch: one of `_static.ARCHITECTURES`.
        n: streams.
        channels: C.

    Returns:
        By kernel, those of few tokens as "few tokens: <kernel>" where they differ; several programs
        of one name are numbered.
    """
    taken: dict[str, dict[str, int]] = {}
    seen = set()
    for prefix, tokens in (("", 8192), ("few tokens: ", 64)):
        numbers: dict[str, int] = {}
        for factory, constants, configs in programs(arch, tokens, n, channels).programs:
            if (factory, constants) in seen:
                continue
            seen.add((factory, constants))
            entries = _static.resources(factory(*constants), arch, configs)
            for kernel, values in _static.as_record(entries).items():
                numbers[kernel] = numbers.get(kernel, 0) + 1
                suffix = f" {numbers[kernel]}" if numbers[kernel] > 1 else ""
                taken[f"{prefix}{kernel}{suffix}"] = values
    return taken


def faults(arch: str, taken: dict[str, dict[str, int]]) -> list[str]:
    """Why kernels of a record must not ship: "<kernel>: spills 8 bytes to local memory"."""
    return [
        f"{kernel}: {fault}"
        for kernel, values in taken.items()
        for fault in _static.Resources(kernel, **values).faults(arch)
    ]

"""Which CUDA tensors the kernels take; the PyTorch reference serves the others.

A fallback warns once and says why. With the environment variable MHC_TILE_REFERENCE=1 every op runs
its reference, for comparisons.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import _toolchain

HALVES = (torch.bfloat16, torch.float16)
REFERENCE_ONLY = os.environ.get("MHC_TILE_REFERENCE", "0") not in ("", "0")


def on_cuda(
    op: str,
    kernel: Callable[..., Any],
    fallback: Callable[..., Any],
    *,
    streams: Callable[..., tuple[Tensor, int]],
    tensor_cores: bool = False,
) -> Callable[..., Any]:
    """The CUDA implementation of an op: its kernel, or the reference where no kernel fits.

    Args:
        op: the op's name, for the warning.
        kernel: takes the op's arguments.
        fallback: takes the same.
        streams: from the op's arguments, a tensor whose dtype and last dim C decide, and n.
        tensor_cores: the kernel needs bf16 or fp16 and C a multiple of 8.

    Returns:
        The function to register for CUDA.
    """

    @functools.wraps(fallback)
    def implementation(*args: Any, **kwargs: Any) -> Any:
        x, n = streams(*args)
        if REFERENCE_ONLY or x.dtype == torch.float64:
            return fallback(*args, **kwargs)
        if why := _unfit(x.device.index, n, x.shape[-1], x.dtype, tensor_cores):
            _warn_once(f"{op}: the PyTorch reference runs instead of a kernel: {why}")
            return fallback(*args, **kwargs)
        with _current(x.device):
            return kernel(*map(_aligned, args), **kwargs)

    return implementation


@functools.cache
def _unfit(device: int, n: int, width: int, dtype: torch.dtype, tensor_cores: bool) -> str | None:
    """Why no kernel takes such tensors; None if one does."""
    capability = torch.cuda.get_device_capability(device)
    if capability < _toolchain.MINIMUM_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, kernels need 8.0"
    if _toolchain.tilelang_version() is None:
        return f"TileLang is not installed (pip install tilelang=={_toolchain.REQUIRED_TILELANG})"
    if n not in _toolchain.STREAMS:
        return f"kernels take n in {_toolchain.STREAMS}, got {n}"
    if tensor_cores and dtype not in HALVES:
        return f"its kernel takes bfloat16 and float16, got {dtype}".replace("torch.", "")
    if tensor_cores and width % 8:
        return f"its kernel takes C that is a multiple of 8, got {width}"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The device as torch's current one, which is where kernels launch."""
    if device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _aligned(value: Any) -> Any:
    """The value; a tensor that does not start at 16 bytes, as a copy: kernels read 16 at once.

    A contiguous view into a flat buffer, such as a sharded parameter, may start anywhere.
    """
    if isinstance(value, Tensor) and value.data_ptr() % 16:
        return value.clone()
    return value


def flat(value: Tensor, dims: int) -> Tensor:
    """The leading dims as one, in front of the last `dims`: [..., n, C] to [T, n, C]."""
    return value.reshape(-1, *value.shape[value.dim() - dims :])

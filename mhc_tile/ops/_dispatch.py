"""Which CUDA tensors the kernels take; the PyTorch reference serves the others.

A fallback warns once and says why. With the environment variable MHC_TILE_REFERENCE=1 every op runs
its reference, for comparisons; with MHC_TILE_BATCH_INVARIANT=1 kernels have one configuration for
every number of tokens.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mhc_tile.autotune import lookup
from mhc_tile.kernels.common import toolchain as _toolchain

from .. import _checks
from .._environment import BATCH_INVARIANT, REFERENCE_ONLY
from . import _native, _plans

lookup.LISTENERS.append(_plans.clear)


def set_batch_invariant(enabled: bool) -> None:
    """Choose whether a token's bits are the same in a batch of any size, in every direction.

    A token's bits never depend on its neighbours. But in `pre`, its backward, and the backward of
    `merge` and `pre_apply` few tokens take other kernels than many, with another reduction order.
    With this switch the kernels and the tuned configurations of many tokens serve every number of
    them: few tokens take longer, many do not. Gradients of parameters sum over the tokens and still
    depend on their number. The reference is not affected.

    The switch holds for every thread of the process and is read when an op runs, by compiled
    functions too; a CUDA graph keeps the value of its capture. The environment variable
    MHC_TILE_BATCH_INVARIANT sets the first value; it is off by default.

    Args:
        enabled: whether one configuration serves every number of tokens.

    Raises:
        TypeError: It is no bool.

    Example:
        >>> set_batch_invariant(True)
        >>> set_batch_invariant(False)
    """
    global BATCH_INVARIANT
    _checks.flag("set_batch_invariant", enabled=enabled)
    BATCH_INVARIANT = enabled
    _plans.clear()


def tuned(kernel: str, x: Tensor, sizes: Sequence[int], launch: Callable[[Any], Any]) -> Any:
    """Launch a kernel with the configuration that a table has for it, else with its default.

    A configuration that fails where the default does not is never used again. `kernel` is a name of
    `autotune.registry.KERNELS`, x a tensor of the device and the dtype that decide; sizes are T, n
    and C (0 for kernels that see none). `launch` returns the results of a configuration.
    """
    asked, served, place = question(kernel, x, sizes), _plans.served.get(), (kernel, *sizes)
    if not x.is_cuda:  # a dry run
        from mhc_tile.kernels.common.programs import target_of

        config = served.get(place) if served else None
        return launch(config or lookup.default(asked, target_of(x.device)))
    config = lookup.config(asked) if sizes[0] else lookup.default(asked)
    try:
        results = launch(config)
        if served is not None:
            served[place] = config
        return results
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        own = lookup.default(asked)
        if config == own:
            raise
        results = launch(own)  # fails too where the configuration is not to blame
        lookup.reject(asked, error)
        return results


def question(kernel: str, x: Tensor, sizes: Sequence[int]) -> lookup.Asked:
    """What `tuned` asks the tables, of the same arguments."""
    tokens, n, channels = sizes
    return kernel, n, channels, x.dtype, tokens, x.device.index, BATCH_INVARIANT


def on_cuda(
    op: str, kernel: Callable[..., Any], fallback: Callable[..., Any],
    *, streams: Callable[..., tuple[Tensor, int]], dims: int = 2,
) -> Callable[..., Any]:  # fmt: skip
    """The CUDA implementation of an op: its kernel, or `fallback` where no kernel fits.

    `streams` returns, from the op's arguments, the tensor whose device, dtype and tokens decide,
    and n. The last `dims` dims of that tensor are no tokens.
    """

    @functools.wraps(fallback)
    def implementation(*args: Any, **kwargs: Any) -> Any:
        x, n = streams(*args)
        if REFERENCE_ONLY or x.dtype == torch.float64:
            return fallback(*args, **kwargs)
        why, most = _unfit(x.device.index, n), _toolchain.MOST_TOKENS
        if x.numel() > most:  # rare, and cheaper to ask than the tokens
            tokens = x.shape[:-dims].numel()
            if tokens > most:
                why = why or f"kernels take at most {most} tokens, got {tokens}"
        if why:
            _warn_once(f"{op}: the PyTorch reference runs instead of a kernel: {why}")
            return fallback(*args, **kwargs)
        with _current(x.device):
            args = tuple(map(_aligned, args))
            if _plans.wanted():
                return _plans.call(kernel, args, kwargs, x.device)
            _native.begin()
            return kernel(*args, **kwargs)

    return implementation


@functools.cache
def _unfit(device: int, n: int) -> str | None:
    """Why no kernel takes n streams on a device; None if one does."""
    capability = torch.cuda.get_device_capability(device)
    if capability < _toolchain.MINIMUM_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, kernels need 8.0"
    if _toolchain.tilelang_version() is None:
        return f"TileLang is not installed (pip install tilelang=={_toolchain.REQUIRED_TILELANG})"
    if n not in _toolchain.STREAMS:
        return f"kernels take n in {_toolchain.STREAMS}, got {n}"
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
    count = value.dim() - dims
    if count == 1:
        return value
    return value.flatten(0, count - 1) if count else value.unsqueeze(0)


def leading(value: Tensor, sizes: torch.Size) -> Tensor:
    """The reverse of `flat`: [T, n, C] to [..., n, C] with these leading dims."""
    if len(sizes) == 1:
        return value
    return value.unflatten(0, sizes) if sizes else value.squeeze(0)

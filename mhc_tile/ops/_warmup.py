"""Everything before the first step: what kernels will run with, and their compilation."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from mhc_tile.autotune import lookup
from mhc_tile.autotune.problems import Problem
from mhc_tile.autotune.registry import KERNELS
from mhc_tile.kernels.common.quantities import Samples

from .. import _checks
from ..config import MHCConfig
from . import _dispatch, _native
from .boundary import BOUNDARY
from .merge import MERGE, MERGE_BACKWARD_MAPS
from .pre import PRE
from .streams import COLLAPSE, EXPAND

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def warmup(
    config: MHCConfig,
    hidden_size: int,
    *,
    tokens: int | Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    threads: int = 8,
    progress: bool = True,
) -> None:
    """Compile and load every kernel that a model's forward and backward pass will use.

    Runs the ops that the modules of this package run, on random tensors of the model's sizes, so
    that its first step compiles nothing. Kernels come from the disk cache where they are there. On
    a device that is no GPU there is nothing to do.

    Args:
        config: of the model's mHC layers.
        hidden_size: C.
        tokens: T, or all T that will occur: batch size times sequence length.
        dtype: of the streams: bf16, fp16 or fp32.
        device: a GPU; the current one if None.
        threads: ops that compile at the same time.
        progress: whether to show a bar, where tqdm is installed.

    Raises:
        ValueError: A size, threads or the dtype is off; the message names it.
        RuntimeError: A kernel does not compile; the message says what to do.

    Example:
        >>> warmup(MHCConfig.paper(), 2560, tokens=8192, device="cpu")  # nothing to do there
    """
    counts = _counts("warmup", hidden_size, tokens, dtype)
    _checks.count("warmup", threads=threads)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type != "cuda":
        return
    _native.prepare()
    total = len(counts) * len(_calls(config, hidden_size, 1, dtype, torch.device("cpu")))
    bar = _bar(total) if progress else None
    with torch.cuda.device(place), ThreadPoolExecutor(threads) as pool:
        for count in counts:
            calls = _calls(config, hidden_size, count, dtype, place)
            for _ in pool.map(lambda call: call(), calls.values()):
                if bar is not None:
                    bar.update()
    torch.cuda.synchronize(place)
    if bar is not None:
        bar.close()


def kernels_info(
    config: MHCConfig,
    hidden_size: int,
    *,
    tokens: int | Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    device: int | None = None,
) -> list[lookup.Decision]:
    """Which configuration each kernel would run with on a GPU, and why.

    Args:
        config: of the model's mHC layers.
        hidden_size: C.
        tokens: T, or several.
        dtype: of the streams: bf16, fp16 or fp32.
        device: index of a GPU; the current one if None.

    Returns:
        For each number of tokens and each kernel a decision; `print(decision)` says it in a line.
        `why` is "exact" (a table's entry for this shape), "nearest" (adapted from a neighbour's),
        "default", or "reference" where no kernel takes this GPU or n; `detail` names the entry or
        says why, `source` is the table's file.

    Raises:
        ValueError: A size or the dtype is off; the message names it.
        RuntimeError: There is no GPU.

    Example:
        >>> if torch.cuda.is_available():
        ...     for decision in kernels_info(MHCConfig.paper(), 2560, tokens=8192):
        ...         print(decision)
    """
    counts = _counts("kernels_info", hidden_size, tokens, dtype)
    if not torch.cuda.is_available():
        raise RuntimeError("kernels_info: torch must see a CUDA device, got none")
    index = torch.cuda.current_device() if device is None else device
    n, why = config.num_streams, _dispatch._unfit(index, config.num_streams)
    found = []
    for count, (name, kernel) in itertools.product(counts, KERNELS.items()):
        if why:
            problem = Problem(name, n, hidden_size, str(dtype).removeprefix("torch."), count)
            found.append(lookup.Decision(problem, None, "reference", why))
            continue
        sizes = (hidden_size, dtype) if kernel.of_channels else (0, torch.float32)
        asked = (name, n, *sizes, count, index, _dispatch.BATCH_INVARIANT)
        found.append(lookup.explain(asked))
    return found


def _counts(
    op: str, hidden_size: int, tokens: int | Sequence[int], dtype: torch.dtype
) -> list[int]:
    given: Iterable[Any] = [tokens]
    if isinstance(tokens, Iterable) and getattr(tokens, "ndim", 1) > 0:  # else a scalar tensor
        given = tokens
    counts = [_checks.whole(op, "tokens", count) for count in given]
    if not counts:
        raise ValueError(f"{op}: tokens must be a number or some numbers, got {tokens!r}")
    _checks.count(op, hidden_size=hidden_size)
    if dtype not in DTYPES:
        raise ValueError(f"{op}: dtype must be one of {[str(d) for d in DTYPES]}, got {dtype}")
    return counts


def _calls(
    config: MHCConfig, hidden_size: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """Calls of the ops of a model, by name."""
    # one tensor of a name: a model has as many at once
    tensor = functools.cache(Samples(tokens, config.num_streams, hidden_size, dtype, device).get)
    others = dataclasses.asdict(config) | {"num_streams": config.num_streams, "mode": "mean"}
    forward = (PRE, BOUNDARY, MERGE, EXPAND, COLLAPSE)
    backward = (PRE.backward, MERGE.backward, MERGE_BACKWARD_MAPS, EXPAND.backward)
    made: dict[str, Callable[[], Any]] = {}
    for op in (*forward, *backward, COLLAPSE.backward):
        for optional in dict.fromkeys([(), op.optional]):
            positional, keywords = op.call_of(tensor, others, optional)
            name = " with ".join((op.name, *optional))
            made[name] = functools.partial(op.call, *positional, **keywords)
    made["collapse by sum"] = functools.partial(COLLAPSE.call, tensor("x"), "sum")
    return made


def _bar(total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc="kernels")

"""What an op costs the host: microseconds of Python and C++ before a call returns.

    python -m mhc_tile.perf.host_time [--calls 50] [--repeats 5]

The calls are queued behind a kernel that sleeps, so that the host never waits for the GPU; it is
checked that the kernel still sleeps when the last call returns. `forward` runs without a graph of
gradients, `training` is a forward and a backward pass. A sublayer is `pre`, an identity layer and
`merge`; a multiplication by PyTorch stands beside as the cost of one launch.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import mhc_tile
from mhc_tile.autotune import _arguments as given
from mhc_tile.autotune.device import describe

TOKENS, STREAMS, WIDTH = 64, 4, 1280
SLEEP_CYCLES = 200_000_000  # 0.1 s at 2 GHz
CONSTANTS: dict[str, Any] = {"norm_eps": 1e-6}
Call = Callable[..., Any]


def sublayer(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    """`pre`, an identity layer, `merge`."""
    return mhc_tile.sublayer(x, lambda value: value, phi, alpha, bias, **CONSTANTS)


def calls() -> dict[str, tuple[Call, tuple[Tensor, ...]]]:
    """Name -> function and its tensors, of every op that has a kernel."""
    n, logits = STREAMS, STREAMS * (STREAMS + 2)
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda")

    x, hidden = normal(TOKENS, n, WIDTH).bfloat16(), normal(TOKENS, WIDTH).bfloat16()
    phi = normal(logits, n * WIDTH) * (n * WIDTH) ** -0.5
    mapped = (x, phi, normal(3), normal(logits))
    merged = (x, hidden, normal(TOKENS, n), normal(TOKENS, n, n))
    return {
        "torch.mul": (torch.mul, (x, x)),
        "expand": (lambda value: mhc_tile.expand(value, n), (hidden,)),
        "collapse": (mhc_tile.collapse, (x,)),
        "sinkhorn": (mhc_tile.sinkhorn, merged[3:]),
        "pre_apply": (mhc_tile.pre_apply, (x, merged[2])),
        "merge": (mhc_tile.merge, merged),
        "mapping": (lambda *values: mhc_tile.mapping(*values, **CONSTANTS), mapped),
        "pre": (lambda *values: mhc_tile.pre(*values, **CONSTANTS), mapped),
        "boundary": (
            lambda *values: mhc_tile.boundary(*values, **CONSTANTS),
            (*merged, *mapped[1:]),
        ),
        "sublayer": (sublayer, mapped),
    }


def host_time(call: Callable[[], Any], count: int, repeats: int) -> float:
    """Median microseconds of one call.

    Raises:
        RuntimeError: The GPU woke before the last call returned.
    """
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
        awake = torch.cuda.Event()
        awake.record()
        start = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - start) / count * 1e6)
        if awake.query():
            raise RuntimeError("host_time: calls must be few enough for the GPU to sleep meanwhile")
    torch.cuda.synchronize()
    return statistics.median(times)


def measure(function: Call, tensors: Sequence[Tensor], count: int, repeats: int) -> list[float]:
    """Microseconds of a forward pass, and of one with its backward pass."""
    leaves = [value.detach().requires_grad_() for value in tensors]
    with torch.no_grad():
        results = function(*tensors)
    results = (results,) if isinstance(results, Tensor) else results
    grads = [torch.randn_like(value) for value in results]

    def forward() -> Any:
        with torch.no_grad():
            return function(*tensors)

    def training() -> Any:
        return torch.autograd.grad(function(*leaves), leaves, grads)

    return [host_time(call, count, repeats) for call in (forward, training)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=given.count, default=50, help="calls of one measurement")
    parser.add_argument(
        "--repeats", type=given.count, default=5, help="measurements; medians are printed"
    )
    args = parser.parse_args(argv)
    try:
        device = describe()
    except RuntimeError as error:
        parser.error(str(error))
    say = sys.stdout.write
    say(f"{device}; torch {torch.__version__}; {TOKENS} x {WIDTH}, n = {STREAMS}, bf16\n")
    say("host us       forward   training\n")
    for name, (function, tensors) in calls().items():
        forward, training = measure(function, tensors, args.calls, args.repeats)
        say(f"{name:<12}{forward:9.1f}{training:11.1f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

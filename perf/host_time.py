"""What an op costs the host: microseconds of Python and C++ before a call returns.

    python -m mhc_tile.perf.host_time [--calls 50] [--repeats 5]

The calls are queued after a kernel that sleeps, so that the host never waits for the GPU. The
kernel must still sleep when the last call returns. `forward` runs without a graph of gradients,
`training` is a forward and a backward pass. A multiplication by PyTorch is the cost of one launch.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mhc_tile.autotune import _arguments as given
from mhc_tile.autotune.device import describe

from .accuracy import as_tuple
from .operations import OPERATIONS, Call, Case, Inputs

TOKENS, STREAMS, WIDTH = 64, 4, 1280
SLEEP_CYCLES = 200_000_000  # 0.1 s at 2 GHz


def calls() -> dict[str, tuple[Call, list[Tensor]]]:
    """Name -> function and its tensors, of torch.mul and every op."""
    make = Inputs(Case("sublayer", "training", TOKENS, WIDTH, STREAMS), "cuda", 0)
    found: dict[str, tuple[Call, list[Tensor]]] = {"torch.mul": (torch.mul, [make.get("x")] * 2)}
    for name, operation in OPERATIONS.items():
        found[name] = operation.ours, [make.get(one) for one in operation.names]
    return found


def host_time(call: Callable[[], Any], count: int, repeats: int) -> float:
    """Median microseconds of one call; ValueError if the GPU woke before the last one returned."""
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
            raise ValueError(f"--calls must be so few that the GPU sleeps meanwhile, got {count}")
    torch.cuda.synchronize()
    return statistics.median(times)


def measure(function: Call, tensors: Sequence[Tensor], count: int, repeats: int) -> list[float]:
    """Microseconds of a forward pass, and of one with its backward pass."""
    leaves = [value.detach().requires_grad_() for value in tensors]
    with torch.no_grad():
        grads = [torch.randn_like(value) for value in as_tuple(function(*tensors))]

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
        try:
            forward, training = measure(function, tensors, args.calls, args.repeats)
        except ValueError as error:
            parser.error(str(error))
        say(f"{name:<12}{forward:9.1f}{training:11.1f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

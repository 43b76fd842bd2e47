"""What an op costs the host: microseconds of Python and C++ before a call returns.

    python -m mhc_tile.perf.host_time [--calls 50] [--repeats 5]

The calls are queued after a kernel that sleeps, so that the host never waits for the GPU. The
kernel must still sleep when the last call returns. `forward` runs without a graph of gradients,
`training` is a forward and a backward pass. A multiplication by PyTorch is the cost of one launch:
`muls` are multiples of it. The stack is one of 8 sublayers around identities at C = 768; its times
are those of one sublayer.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mhc_tile import HyperConnectedStack, ManifoldHyperConnection
from mhc_tile.autotune import _arguments as given
from mhc_tile.autotune.device import describe
from mhc_tile.ops import _native

from .accuracy import as_tuple
from .operations import OPERATIONS, Call, Case, Inputs

TOKENS, STREAMS, WIDTH = 64, 4, 1280
DEPTH, STACK_WIDTH = 8, 768
SLEEP_CYCLES = 200_000_000  # 0.1 s at 2 GHz


def calls() -> dict[str, tuple[Call, list[Tensor]]]:
    """Name -> function and its tensors, of torch.mul, a residual add and every op."""
    make = Inputs(Case("sublayer", "training", TOKENS, WIDTH, STREAMS), "cuda", 0)
    pair = [make.get("x")] * 2
    found: dict[str, tuple[Call, list[Tensor]]] = {
        "torch.mul": (torch.mul, pair), "residual add": (torch.add, pair),
    }  # fmt: skip
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


def measure_stack(count: int, repeats: int) -> list[float]:
    """`measure` of a sublayer of a fused stack, with gradients of x and of all parameters."""
    connections = [
        ManifoldHyperConnection(torch.nn.Identity(), STACK_WIDTH, device="cuda")
        for _ in range(DEPTH)
    ]
    stack = HyperConnectedStack(connections)
    x = torch.randn(TOKENS, STREAMS, STACK_WIDTH, device="cuda").bfloat16()
    leaf = x.clone().requires_grad_()
    leaves, grad = [leaf, *stack.parameters()], torch.randn_like(x)

    def forward() -> Any:
        with torch.no_grad():
            return stack(x)

    def training() -> Any:
        return torch.autograd.grad(stack(leaf), leaves, grad)

    calls = max(1, count // DEPTH)
    return [host_time(call, calls, repeats) / DEPTH for call in (forward, training)]


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
    _native.prepare()
    say = sys.stdout.write
    rows: dict[str, Callable[[int, int], list[float]]] = {
        name: functools.partial(measure, *call) for name, call in calls().items()
    }
    rows["stack, a sublayer"] = measure_stack
    say(f"{device}; torch {torch.__version__}; {TOKENS} x {WIDTH}, n = {STREAMS}, bf16; ")
    say(f"ops in {'Python' if _native.library is None else 'C++'}\n")
    say("host us            forward   muls  training   muls\n")
    launch = None
    for name, row in rows.items():
        try:
            times = row(args.calls, args.repeats)
        except ValueError as error:
            parser.error(str(error))
        launch = launch or times[0]
        say(f"{name:<18}" + "".join(f"{us:8.1f}{us / launch:7.1f} " for us in times) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

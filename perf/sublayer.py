"""What one mHC sublayer costs on this GPU: `pre` and `merge` around an identity layer.

    python -m mhc_tile.perf.sublayer [--tokens 8192 --width 2560] [--out result.json]

Forward, and forward with backward, through the torch ops as a model calls them. Every size runs on
several input sets, larger together than the L2 cache, all in one CUDA graph; the time is the median
of its replays over the number of sets. Beside it the floor of two separate ops: the elements that
must move, 14C a token forward and 41C with backward (n = 4), over the copy bandwidth measured in
the same run. The results are checked against the reference first.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mhc_tile
from mhc_tile import merge, pre, reference
from mhc_tile.autotune.device import describe

SIZES = ((8192, 1280), (8192, 2560), (8192, 4096), (4096, 7168), (64, 7168))
STREAMS = 4
CONSTANTS: dict[str, Any] = {"norm_eps": 1e-6}
ROTATED_BYTES = 300e6  # several times the L2 of any GPU


def inputs(tokens: int, width: int, seed: int) -> list[Tensor]:
    """x, phi, alpha, bias, grad_x_next on the GPU; the parameters of one sublayer."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda")

    n = STREAMS
    x, grad = (normal(tokens, n, width).bfloat16() for _ in range(2))
    phi = normal(n * (n + 2), n * width) * (n * width) ** -0.5
    return [x, phi, normal(3), normal(n * (n + 2)), grad]


def sublayer(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    """`pre`, an identity layer, `merge`."""
    layer_input, h_post, h_res, x = pre(x, phi, alpha, bias, **CONSTANTS, return_x=True)
    return merge(x, layer_input, h_post, h_res)


def forward(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, _: Tensor) -> Any:
    """One forward pass without a graph of gradients."""
    with torch.no_grad():
        return sublayer(x, phi, alpha, bias)


def training(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, grad: Tensor) -> Any:
    """One forward and backward pass."""
    leaves = [value.detach().requires_grad_() for value in (x, phi, alpha, bias)]
    return torch.autograd.grad(sublayer(*leaves), leaves, grad)


def graph_time(function: Callable[..., Any], sets: Sequence[Sequence[Tensor]]) -> list[float]:
    """Microseconds of one call: one per replay of a graph that calls it on every set."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for values in sets[:2]:
            function(*values)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for values in sets:
                function(*values)
        times = []
        for replay in range(25):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            stream.synchronize()
            if replay >= 5:
                times.append(begin.elapsed_time(end) * 1000 / len(sets))
    return times


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy kernel (a memcpy node is slower)."""
    source = torch.randn(256 * 2**20, device="cuda")
    target = torch.empty_like(source)
    times = graph_time(lambda value: torch.mul(value, 1.0, out=target), [[source]])
    return 2 * source.numel() * 4 / (statistics.median(times) * 1e-6)


def check(values: Sequence[Tensor]) -> float:
    """Relative error of x_next against the reference in float64, on at most 512 tokens."""
    x, phi, alpha, bias, _ = values
    x = x[:512]
    wide = x.double()
    parameters = (phi.double(), alpha.double(), bias.double())
    layer_input, h_post, h_res = reference.pre(wide, *parameters, **CONSTANTS)
    truth = reference.merge(wide, layer_input, h_post, h_res)
    actual = sublayer(x, phi, alpha, bias).double()
    return ((actual - truth).norm() / truth.norm()).item()


def measure(tokens: int, width: int, bandwidth: float) -> dict[str, Any]:
    """One row of the table."""
    count = max(2, min(32, int(ROTATED_BYTES / (tokens * width * STREAMS * 2)) + 1))
    sets = [inputs(tokens, width, seed) for seed in range(count)]
    error = check(sets[0])
    if not error < 0.01:
        raise RuntimeError(f"sublayer: {tokens} x {width} must match the reference, got {error}")
    row: dict[str, Any] = {"tokens": tokens, "width": width, "error": error}
    for name, function, elements in (("forward", forward, 14), ("training", training, 41)):
        times = sorted(graph_time(function, sets))
        floor = elements * tokens * width * 2 / bandwidth * 1e6
        median = statistics.median(times)
        row[name] = {"us": median, "p20": times[4], "p80": times[-5], "floor_us": floor}
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, help="with --width: this size only")
    parser.add_argument("--width", type=int, help="C, with --tokens")
    parser.add_argument("--out", type=Path, help="JSON file for the full result")
    args = parser.parse_args(argv)
    device = describe()
    bandwidth = copy_bandwidth()
    sizes = ((args.tokens, args.width),) if args.tokens and args.width else SIZES
    rows = [measure(tokens, width, bandwidth) for tokens, width in sizes]
    say = sys.stdout.write
    say(f"{device}; copy {bandwidth / 1e12:.2f} TB/s; torch {torch.__version__}\n")
    say("tokens x C      forward us (floor, %)     forward + backward us (floor, %)   error\n")
    for row in rows:
        cells = []
        for name in ("forward", "training"):
            cell = row[name]
            share = 100 * cell["floor_us"] / cell["us"]
            cells.append(f"{cell['us']:9.1f} ({cell['floor_us']:6.1f}, {share:3.0f}%)")
        size = f"{row['tokens']} x {row['width']}"
        say(f"{size:<14}{cells[0]:>24}{cells[1]:>34}   {row['error']:.1e}\n")
    if args.out:
        environment: dict[str, Any] = {"device": str(device), "torch": torch.__version__}
        environment |= {"mhc_tile": mhc_tile.__version__, "copy_bytes_per_s": bandwidth}
        args.out.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

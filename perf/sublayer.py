"""What one mHC sublayer costs on this GPU: `pre` and `merge` around an identity layer.

    python -m mhc_tile.perf.sublayer [--tokens 8192 --width 2560] [--peers] [--out result.json]

Forward, and forward with backward, through the torch ops as a model calls them. Every size runs on
several input sets, larger together than the L2 cache, all in one CUDA graph; the time is the median
of its replays over the number of sets. Beside it the floor of two separate ops: the elements that
must move, 14C a token forward and 41C with backward (n = 4), over the copy bandwidth measured in
the same run. The results are checked against the reference first: x_next and its gradient of x.

With --peers other implementations that are installed take turns with ours, replay by replay. What
cannot be captured in a graph is timed launch by launch and marked; what fails, or computes
something else, is named and not timed.
"""

import argparse
import contextlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mhc_tile
from mhc_tile import merge, pre, reference
from mhc_tile.autotune.bench import copy_bandwidth
from mhc_tile.autotune.device import describe
from mhc_tile.autotune.timing import Timer, interleaved

from .peers import ADAPTERS, STREAMS, Contender

SIZES = ((8192, 1280), (8192, 2560), (8192, 4096), (4096, 7168), (64, 7168))
CONSTANTS: dict[str, Any] = {"norm_eps": 1e-6}
ROTATED_BYTES = 300e6  # several times the L2 of any GPU
WARM = 5  # replays before the first that counts


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


OURS = Contender("mhc_tile", lambda *values: list(values), sublayer)


def capture(function: Callable[..., Any], sets: Sequence[Sequence[Tensor]]) -> Timer:
    """A timer of a graph that calls a function on every set: microseconds of one call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for values in sets[:2]:
            function(*values)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for values in sets:
                function(*values)
    return _timer(graph.replay, stream, len(sets))


def launch(function: Callable[..., Any], sets: Sequence[Sequence[Tensor]]) -> Timer:
    """The same, launched call by call: small sizes then measure the host."""
    stream = torch.cuda.Stream()

    def calls() -> None:
        for values in sets:
            function(*values)

    return _timer(calls, stream, len(sets))


def _timer(run: Callable[[], Any], stream: torch.cuda.Stream, calls: int) -> Timer:
    def timer() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            begin.record()
            run()
            end.record()
        stream.synchronize()
        return begin.elapsed_time(end) * 1000 / calls

    return timer


def check(contender: Contender, values: Sequence[Tensor]) -> float:
    """The larger relative error of x_next and of its gradient of x against float64, 512 tokens.

    Raises:
        RuntimeError: It is not the reference's sublayer.
    """
    x, phi, alpha, bias, grad = values
    x, grad = x[:512], grad[:512]
    leaves = [value.double().requires_grad_() for value in (x, phi, alpha, bias)]
    layer_input, h_post, h_res = reference.pre(*leaves, **CONSTANTS)
    truth = reference.merge(leaves[0], layer_input, h_post, h_res)
    truths = (truth.detach(), torch.autograd.grad(truth, leaves[0], grad.double())[0])
    own = contender.prepare(x, phi, alpha, bias, grad)
    results = (contender.forward(*own), contender.training(*own)[0])
    errors = [
        ((value.double().view_as(other) - other).norm() / other.norm()).item()
        for value, other in zip(results, truths, strict=True)
    ]
    if not max(errors) < 0.01:
        raise RuntimeError(f"{contender.name} must match the reference, got errors {errors}")
    return max(errors)


def measure(
    tokens: int, width: int, bandwidth: float, contenders: Sequence[Contender]
) -> dict[str, Any]:
    """One size: what each contender takes, in turns, and the floor."""
    count = max(2, min(32, int(ROTATED_BYTES / (tokens * width * STREAMS * 2)) + 1))
    sets = [inputs(tokens, width, seed) for seed in range(count)]
    rows: dict[str, Any] = {c.name: {"error": 0.0, "fault": ""} for c in contenders}
    result: dict[str, Any] = {"tokens": tokens, "width": width, "contenders": rows}
    prepared: dict[Contender, list[list[Tensor]]] = {}
    for contender in contenders:
        with _noting(contender, rows, "check"):
            rows[contender.name]["error"] = check(contender, sets[0])
            prepared[contender] = [contender.prepare(*values) for values in sets]
    for name, elements in (("forward", 14), ("training", 41)):
        result[f"{name}_floor_us"] = elements * tokens * width * 2 / bandwidth * 1e6
        timers: dict[str, Timer] = {}
        for contender, values in prepared.items():
            row = rows[contender.name]
            with _noting(contender, rows, name):
                timer, row[f"{name}_captured"] = _graph_or_launches(
                    getattr(contender, name), values
                )
                for _ in range(WARM):
                    timer()
                timers[contender.name] = timer
        for rival, sample in zip(timers, interleaved(list(timers.values())), strict=True):
            rows[rival][name] = {"us": sample.us, "p20": sample.low, "p80": sample.high}
    return result


@contextlib.contextmanager
def _noting(contender: Contender, rows: dict[str, Any], step: str) -> Iterator[None]:
    """A peer may fail in any way, which is noted; ours may not."""
    try:
        yield
    except Exception as error:
        if contender is OURS:
            raise
        why = str(error).partition("\n")[0][:160]
        rows[contender.name]["fault"] = f"{step}: {type(error).__name__}: {why}"


def _graph_or_launches(
    function: Callable[..., Any], sets: Sequence[Sequence[Tensor]]
) -> tuple[Timer, bool]:
    try:
        return capture(function, sets), True
    except RuntimeError:
        torch.cuda.synchronize()
        return launch(function, sets), False


def peers() -> tuple[list[Contender], list[str]]:
    """Those that are installed, and why others are not."""
    found, missing = [], []
    for name, adapter in ADAPTERS.items():
        try:
            found.append(adapter())
        except Exception as error:
            missing.append(f"{name} is left out: {type(error).__name__}: {error}")
    return found, missing


HEADER = "tokens x C    implementation   forward us (of floor)   forward + backward us   error"


def lines(result: dict[str, Any]) -> list[str]:
    """A line for each contender of a size; * marks what was launched call by call."""
    found = []
    size = f"{result['tokens']} x {result['width']}"
    for name, row in result["contenders"].items():
        cells = []
        for part in ("forward", "training"):
            if part not in row:
                cells.append("-")
                continue
            share = 100 * result[f"{part}_floor_us"] / row[part]["us"]
            mark = "" if row[f"{part}_captured"] else "*"
            cells.append(f"{row[part]['us']:.1f}{mark} ({share:.0f}%)")
        found.append(f"{size:<14}{name:<16}{cells[0]:>20}{cells[1]:>24}   {row['error']:.1e}")
        if row["fault"]:
            found.append(f"{'':<14}{name}: {row['fault']}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, help="with --width: this size only")
    parser.add_argument("--width", type=int, help="C, with --tokens")
    parser.add_argument("--peers", action="store_true", help="other implementations in turns")
    parser.add_argument("--out", type=Path, help="JSON file for the full result")
    args = parser.parse_args(argv)
    if (args.tokens is None) != (args.width is None):
        parser.error("--tokens and --width must be given together")
    device = describe()
    bandwidth = copy_bandwidth()
    others, missing = peers() if args.peers else ([], [])
    _say(f"{device}; copy {bandwidth / 1e12:.2f} TB/s; torch {torch.__version__}")
    _say(*missing, HEADER)
    results = []
    for tokens, width in ((args.tokens, args.width),) if args.tokens else SIZES:
        results.append(measure(tokens, width, bandwidth, [OURS, *others]))
        _say(*lines(results[-1]))
    if args.out:
        environment: dict[str, Any] = {"device": str(device), "torch": torch.__version__}
        environment |= {"mhc_tile": mhc_tile.__version__, "copy_bytes_per_s": bandwidth}
        environment |= {name: _version(name) for name in ADAPTERS}
        args.out.write_text(json.dumps({"environment": environment, "rows": results}, indent=1))
    return 0


def _say(*texts: str) -> None:
    sys.stdout.write("".join(f"{text}\n" for text in texts))
    sys.stdout.flush()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    sys.exit(main())

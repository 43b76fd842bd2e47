"""`mhc-tile perf overhead`: what the residual connection costs a training step, the 6.7% question.

A slice of a named model - some layers without embedding and head, parameters in bf16, those of the
connections in fp32 - runs forward and backward from a given gradient, and optionally an optimizer's
step. The same layers are joined by plain residuals, HC and mHC, the latter by this library, by its
reference and by other packages; contenders take turns, step by step. The overhead is what a step
takes longer than with plain residuals under torch.compile.

Axes: B batch, S sequence, n streams, C hidden size.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhc_tile import HyperConnectedStack, HyperConnection, ManifoldHyperConnection, Residual
from mhc_tile.autotune._extras import require
from mhc_tile.autotune.timing import interleaved
from mhc_tile.models import CONFIGS, Decoder, ModelConfig, model_config

from . import records
from .bench import Bench, bench_of
from .breakdown import breakdown
from .connections import PeerConnection, ReferenceConnection
from .records import OURS, Record, Row

PLAIN = "residual (compiled)"
MODELS = ("paper-27b", "paper-27b-dense")
LAYERS, BATCH, SEQUENCE = 4, 2, 4096
TURNS = 10
TOLERANCE = (
    0.1  # relative error of the output: bf16 layers, and experts chosen by rounded affinities
)
PEERS = ("tile-kernels", "liger-kernel")


@dataclass(frozen=True)
class Slice:
    """What is measured: layers of a model and the shape of a step.

    Attributes:
        model: a key of `CONFIGS`.
        layers: how many.
        batch: B.
        sequence: S, tokens.
        optimizer: whether a step of AdamW is part of the step.
        device: "cuda" or "cpu".
    """

    model: str
    layers: int = LAYERS
    batch: int = BATCH
    sequence: int = SEQUENCE
    optimizer: bool = False
    device: str = "cuda"

    @property
    def key(self) -> str:
        """The name in a result file.

        Example:
            >>> Slice("paper-27b").key
            'paper-27b/step/B2xS4096/L4'
        """
        step = "step+adamw" if self.optimizer else "step"
        return f"{self.model}/{step}/B{self.batch}xS{self.sequence}/L{self.layers}"

    @property
    def config(self) -> ModelConfig:
        """The model cut to these layers, every one with experts where the model has any."""
        changes: dict[str, Any] = {"num_layers": self.layers, "vocab_size": 1}
        changes["context_length"] = self.sequence
        if CONFIGS[self.model].moe:
            changes["moe"] = {"leading_dense_layers": 0}
        return model_config(self.model, **changes)

    @property
    def denominator(self) -> str:
        """What 100% is, in words."""
        what = "forward, backward and AdamW" if self.optimizer else "forward and backward"
        return (
            f"{what} of {self.layers} layers of {self.model} without embedding and head, "
            f"{self.batch} x {self.sequence} tokens, bf16, plain residuals under torch.compile"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mhc-tile perf overhead`."""
    add = parser.add_argument
    add("--model", nargs="+", choices=tuple(CONFIGS), default=list(MODELS), help="which slices")
    add("--layers", type=int, default=LAYERS, help=f"of each slice (default: {LAYERS})")
    add("--batch", type=int, default=BATCH, help=f"sequences (default: {BATCH})")
    add("--sequence", type=int, default=SEQUENCE, help=f"tokens of each (default: {SEQUENCE})")
    add("--optimizer", action="store_true", help="with a step of AdamW")
    add("--contender", nargs="+", default=[], help="by the beginnings of their names; default: all")
    add("--device", default="cuda", help="cuda or cpu (default: cuda)")
    add("--out", type=Path, metavar="FILE", help="result file (default: overhead-<gpu>.json)")


def run(args: argparse.Namespace) -> int:
    """Measure, print tables and write the result.

    Returns:
        0, or 1 if this library is wrong or fails.

    Raises:
        ValueError: The arguments are out of range.
        OSError: The result cannot be written.
        KeyboardInterrupt: After Ctrl-C, with what was measured in the file.
    """
    bench = bench_of(args.device)
    for name in ("layers", "batch", "sequence"):
        if getattr(args, name) < 1:
            raise ValueError(
                f"perf overhead: --{name} must be at least 1, got {getattr(args, name)}"
            )
    shape = (args.layers, args.batch, args.sequence, args.optimizer, args.device)
    slices = [Slice(model, *shape) for model in args.model]
    environment = records.environment(bench.bandwidth(), args.device)
    environment["denominator"] = {piece.key: piece.denominator for piece in slices}
    default = f"overhead-{environment['gpu'] or 'cpu'}.json".lower().replace(" ", "_")
    path = args.out or Path(default)
    rows: list[Row] = []
    try:
        for piece in slices:
            found = measure(piece, bench, tuple(args.contender))
            rows += found
            _say(table(piece, found))
    finally:  # whatever ends the run, what was measured is kept
        records.write(Record("overhead", environment, rows), path)
    _say(f"result: {path}")
    return int(any(row.status != "ok" for row in rows if row.contender.startswith(OURS)))


class Sublayers:
    """The layers of a slice and every way to join them; layers and parameters are shared.

    Args:
        piece: what to build.
    """

    def __init__(self, piece: Slice) -> None:
        self.piece, config = piece, piece.config
        torch.manual_seed(0)
        with torch.device(piece.device):
            stack = Decoder(config, "mhc").stack.to(torch.bfloat16)
        self.ours = [c for c in stack.connections if isinstance(c, ManifoldHyperConnection)]
        self.layers = [connection.layer for connection in self.ours]
        self.width = config.hidden_size
        self.streams = self.ours[0].config.num_streams
        for connection in self.ours:  # a mapping that follows its token, as after training
            nn.init.constant_(connection.alpha, 0.1)

    def contenders(self) -> dict[str, Callable[[], nn.Module]]:
        """How to build each, by name; those with plain residuals first."""
        compiled = functools.cache(lambda: [torch.compile(layer) for layer in self.layers])

        def joined(connect: Callable[[int, nn.Module], nn.Module]) -> Callable[[], nn.Module]:
            return lambda: nn.Sequential(*(connect(i, f) for i, f in enumerate(compiled())))

        def around(index: int, layer: nn.Module) -> ManifoldHyperConnection:
            """The connection of ours, around another form of its layer."""
            own = self.ours[index]
            copy = ManifoldHyperConnection(layer, self.width, own.config, device=own.phi.device)
            copy.phi, copy.alpha, copy.bias = own.phi, own.alpha, own.bias
            return copy

        def hyper(index: int, layer: nn.Module) -> nn.Module:
            device = self.ours[0].phi.device
            return HyperConnection(layer, self.width, layer_index=index, device=device)

        found: dict[str, Callable[[], nn.Module]] = {
            PLAIN: lambda: torch.compile(nn.Sequential(*map(Residual, self.layers))),
            "residual (layers compiled)": joined(lambda _, layer: Residual(layer)),
            OURS: lambda: torch.compile(HyperConnectedStack(self.ours)),
            f"{OURS} (layers compiled)": lambda: HyperConnectedStack(
                around(i, layer) for i, layer in enumerate(compiled())
            ),
            "hc (compiled)": lambda: nn.Sequential(
                *(torch.compile(hyper(i, layer)) for i, layer in enumerate(self.layers))
            ),
            "hc (layers compiled)": joined(hyper),
            "reference (compiled)": lambda: nn.Sequential(
                *(torch.compile(ReferenceConnection(own)) for own in self.ours)
            ),
            "reference (layers compiled)": joined(lambda i, f: ReferenceConnection(around(i, f))),
        }
        for package in PEERS:
            if records.version(package):
                found[package] = joined(
                    lambda i, f, package=package: PeerConnection(around(i, f), package)
                )
        return found

    def inputs(self, name: str) -> tuple[Tensor, Tensor]:
        """What a slice reads, and the gradient of what it returns; streams but for residuals."""
        piece = self.piece
        shape: tuple[int, ...] = (piece.batch, piece.sequence, self.streams, self.width)
        if name.startswith("residual"):
            shape = (*shape[:2], self.width)
        generator = torch.Generator(piece.device).manual_seed(1)
        x, grad = (
            torch.randn(shape, generator=generator, device=piece.device).bfloat16()
            for _ in range(2)
        )
        return x.requires_grad_(), grad


class Step:
    """One contender's training step.

    Args:
        model: the joined layers.
        x: what they read.
        grad: the gradient of their output.
        optimizers: whose steps belong to it.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, grad: Tensor, optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        self.model, self.x, self.grad, self.optimizers = model, x, grad, optimizers
        self._leaves = [x, *model.parameters()]

    def __call__(self) -> None:
        """Forward, backward, optimizers."""
        for leaf in self._leaves:
            leaf.grad = None
        self.model(self.x).backward(self.grad)
        for optimizer in self.optimizers:
            optimizer.step()

    def free(self) -> None:
        """Let go of the gradients: contenders share the memory."""
        for leaf in self._leaves:
            leaf.grad = None


def measure(piece: Slice, bench: Bench, wanted: Sequence[str] = ()) -> list[Row]:
    """One slice: every contender's step.

    Args:
        piece: what.
        bench: where.
        wanted: beginnings of contenders' names; all if empty. Plain residuals always take part.

    Returns:
        A row for each, the plain one first.
    """
    sublayers = Sublayers(piece)
    shared = _optimizer(piece, (p for layer in sublayers.layers for p in layer.parameters()))
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    truth: list[Tensor] = []
    for name, build in sublayers.contenders().items():
        if wanted and name != PLAIN and not name.startswith(tuple(wanted)):
            continue
        _progress(f"{piece.key}: {name}")
        row = _row(piece, name)
        try:
            model = build()
            own = [p for p in _own(model, sublayers.layers)]
            step = Step(model, *sublayers.inputs(name), [*shared, *_optimizer(piece, iter(own))])
            error = _error(model, step.x, name, truth)
            if error is not None and not error < TOLERANCE:
                fault = f"relative error {error:.1e} of the output against {OURS}"
                row = row.replace(status="wrong", error=error, fault=fault)
            else:
                peak, _ = bench.memory(lambda step=step: step() or (), None)
                rows[name] = row = row.replace(error=error, peak_bytes=peak)
                steps[name] = step
            step.free()
        except torch.OutOfMemoryError as problem:
            row = row.replace(status="out of memory", fault=_one_line(problem))
        except Exception as problem:
            row = row.replace(status="failed", fault=_one_line(problem))
        if row.status != "ok" and not bench.recover():
            raise RuntimeError(f"perf overhead: {name} left the GPU unusable: {row.fault}")
        rows[name] = row
    return _timed(piece, rows, steps, bench)


def _timed(piece: Slice, rows: dict[str, Row], steps: dict[str, Step], bench: Bench) -> list[Row]:
    """Let the contenders take turns; overheads follow."""
    timers = []
    for step in steps.values():
        clock = _Clock(step, bench.device)
        clock()
        timers.append(clock)
    _progress(f"{piece.key}: {TURNS} turns of {len(timers)}")
    for name, sample in zip(steps, interleaved(timers, TURNS), strict=True):
        rows[name] = rows[name].replace(
            us=sample.us, p20=sample.low, p80=sample.high, turns=sample.turns, captured=False
        )
    plain = rows[PLAIN].us
    for name, row in rows.items():
        if row.us is None:
            continue
        details: dict[str, Any] = {"layers": piece.layers, "denominator": piece.denominator}
        if plain:
            details["overhead_percent"] = 100 * (row.us / plain - 1)
            details["sublayer_us"] = (row.us - plain) / (2 * piece.layers)
        parts = breakdown(steps[name], row.us) if bench.device == "cuda" else {}
        steps[name].free()
        rows[name] = row.replace(details=details, parts=parts)
    return list(rows.values())


class _Clock:
    """A timer of a step: microseconds."""

    def __init__(self, step: Step, device: str) -> None:
        self._step, self._device = step, device

    def __call__(self) -> float:
        if self._device == "cpu":
            import time

            start = time.perf_counter()
            self._step()
            self._step.free()
            return (time.perf_counter() - start) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._step()  # the one before is another contender's
        begin.record()
        self._step()
        end.record()
        end.synchronize()
        self._step.free()
        return begin.elapsed_time(end) * 1000


def _error(model: nn.Module, x: Tensor, name: str, truth: list[Tensor]) -> float | None:
    """The output's relative error against ours, which comes first; None for other architectures."""
    with torch.no_grad():
        output = model(x)
    if name == OURS:
        truth.append(output)
    if not truth or name.startswith(("residual", "hc")):
        return None
    difference = (output.float() - truth[0].float()).norm() / truth[0].float().norm()
    return difference.item()


def _optimizer(piece: Slice, parameters: Iterator[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """AdamW with a learning rate of 0: every contender keeps the same weights."""
    chosen = list(parameters) if piece.optimizer else []
    if not chosen:
        return []
    return [torch.optim.AdamW(chosen, lr=0.0, fused=True)]


def _own(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    """Parameters of a contender that are not the layers'."""
    shared = {id(p) for layer in layers for p in layer.parameters()}
    return (p for p in model.parameters() if id(p) not in shared)


def table(piece: Slice, rows: Sequence[Row]) -> str:
    """A slice as text: steps and overheads, then where the time goes."""
    tabulate = require("tabulate", "mhc-tile perf overhead", "perf").tabulate
    lines = []
    for row in rows:
        if row.us is None:
            lines.append([row.contender, row.status, row.fault[:70], "", "", ""])
            continue
        details = row.details
        lines.append(
            [
                row.contender,
                f"{row.us / 1000:.2f}",
                f"{details.get('overhead_percent', 0):+.1f}%",
                f"{details.get('sublayer_us', 0):.0f}",
                "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f}",
                "" if row.error is None else f"{row.error:.0e}",
            ]
        )
    heads = ["contender", "step ms", "overhead", "us a sublayer", "peak GiB", "error"]
    text = [f"100% is {piece.denominator}", "", tabulate(lines, heads, disable_numparse=True), ""]
    names = list(dict.fromkeys(part for row in rows for part in row.parts))
    if names:
        spent = [
            [row.contender, *(f"{row.parts.get(name, 0) / 1000:.2f}" for name in names)]
            for row in rows
            if row.parts
        ]
        text += [tabulate(spent, ["ms of a step", *names], disable_numparse=True), ""]
    return "\n".join(text)


def _row(piece: Slice, name: str) -> Row:
    config = piece.config
    return Row(
        case=piece.key,
        contender=name,
        op="step",
        mode="training",
        tokens=piece.batch * piece.sequence,
        hidden_size=config.hidden_size,
        streams=4,
        dtype="bfloat16",
    )


def _one_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}".rstrip(": ")


def _progress(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()

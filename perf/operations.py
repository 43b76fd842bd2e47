"""What is measured: every op with inputs, its reference and its bytes, and the cases of a run.

Axes: T tokens, n streams, C hidden size. A sublayer is `pre`, an identity layer and `merge`, as a
model calls them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import mhc_tile
from mhc_tile import reference
from mhc_tile.autotune.problems import Problem
from mhc_tile.autotune.registry import KERNELS
from mhc_tile.kernels.common.quantities import Samples, quantity
from mhc_tile.ops._definition import DEFINITIONS

MODES = ("inference", "forward", "training")
CONSTANTS: dict[str, Any] = {"norm_eps": 1e-20}  # the paper's
MAIN = (8192, 2560)
SIZES = ((8192, 1280), MAIN, (8192, 4096), (4096, 7168), (64, 7168))
DECODE = ((1, 2560), (16, 2560), (256, 2560), (1, 7168), (16, 7168), (256, 7168))
MORE_TOKENS = ((512, 2560), (2048, 2560), (32768, 2560))
MORE_WIDTHS = ((8192, 1920), (8192, 5120), (8192, 7168))
CPU_SIZES = ((64, 64), (256, 128))

Results = tuple[Tensor, ...]
Call = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """An op, a key of `OPERATIONS`, at a shape, and how it is called."""

    op: str
    mode: str  # "inference" (no graph of gradients), "forward" (with one), "training" (both passes)
    tokens: int
    hidden_size: int
    streams: int = 4
    dtype: str = "bfloat16"

    @property
    def key(self) -> str:
        """The name in a result file.

        Example:
            >>> Case("merge", "training", 8192, 2560).key
            'merge/training/8192x2560/n4/bfloat16'
        """
        size = f"{self.tokens}x{self.hidden_size}"
        return f"{self.op}/{self.mode}/{size}/n{self.streams}/{self.dtype}"

    @classmethod
    def of(cls, key: str) -> "Case":
        """The case of a name.

        Raises:
            ValueError: It is no case's name.

        Example:
            >>> Case.of("merge/training/8192x2560/n4/bfloat16").hidden_size
            2560
        """
        try:
            op, mode, size, streams, dtype = key.split("/")
            tokens, _, hidden_size = size.partition("x")
            case = cls(op, mode, int(tokens), int(hidden_size), int(streams[1:]), dtype)
        except ValueError as error:
            raise ValueError(
                f"perf: a case must be named op/mode/TxC/n/dtype, got {key}"
            ) from error
        if op not in OPERATIONS or mode not in MODES or not hasattr(torch, dtype):
            raise ValueError(f"perf: a case must have a known op, mode and dtype, got {key}")
        return case


@dataclass(frozen=True)
class Operation:
    """An op of the library, and the bytes that it must move.

    Attributes:
        names: its tensors, of `Inputs`, in order.
        ours: the op.
        reference: the same by `mhc_tile.reference`.
        kernels: forward, then backward: keys of `autotune.registry.KERNELS`, whose bytes it must
            move.
        twice: how many times n * C elements a token its kernels count that the op need not move,
            in the forward and in both: what one kernel writes and another reads, or a gradient of x
            by others.
    """

    names: tuple[str, ...]
    ours: Call
    reference: Call
    kernels: tuple[tuple[Any, ...], tuple[Any, ...]]
    twice: tuple[int, int] = (0, 0)

    @property
    def parameters(self) -> int:
        """How many tensors, the last ones, all tokens share."""
        return sum(not quantity(name).per_token for name in self.names)

    def moved(self, case: Case) -> int | None:
        """Bytes that a call must move, by the kernels' `traffic`; None without TileLang."""
        training = case.mode == "training"
        tokens, n, channels, dtype = case.tokens, case.streams, case.hidden_size, case.dtype
        try:
            moved = sum(
                KERNELS[name].traffic(Problem(name, n, channels, dtype, tokens))
                for name in self.kernels[0] + self.kernels[1] * training
            )
        except ImportError:
            return None
        return moved - self.twice[training] * tokens * n * channels * getattr(torch, dtype).itemsize


class Inputs(Samples):
    """Random tensors of a case by name, the maps in the ranges that models have."""

    def __init__(self, case: Case, device: str, seed: int) -> None:
        dtype = getattr(torch, case.dtype)
        super().__init__(case.tokens, case.streams, case.hidden_size, dtype, device, seed)

    def get(self, name: str) -> Tensor:
        """A new tensor of a name."""
        values = super().get(name)
        if name in ("h_pre", "h_post"):
            return values.sigmoid() * (2 if name == "h_post" else 1)
        return reference.sinkhorn(values) if name == "h_res" else values

    def like(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Cotangents of results."""
        return [self.normal(value.shape, value.dtype) for value in results]


def _operation(name: str, kernels: Any = None, twice: Any = (0, 0), **constants: Any) -> Operation:
    """A public op and the function of its name in `mhc_tile.reference`, with constants."""
    op = DEFINITIONS[name]
    ours, truth = getattr(mhc_tile, name), getattr(reference, name)
    return Operation(
        op.tensors,
        lambda *tensors: ours(*tensors, **constants),
        lambda *tensors: truth(*tensors, **constants),
        kernels or ((op.kernel,), (op.gradient_kernel,)),
        twice,
    )


def _sublayer(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    return mhc_tile.sublayer(x, _identity, phi, alpha, bias, **CONSTANTS)


def _identity(value: Tensor) -> Tensor:
    return value


def _sublayer_reference(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    layer_input, h_post, h_res = reference.pre(x, phi, alpha, bias, **CONSTANTS)
    return reference.merge(x, layer_input, h_post, h_res)


OPERATIONS: dict[str, Operation] = {
    "mapping": _operation("mapping", **CONSTANTS),
    "sinkhorn": _operation("sinkhorn"),
    "pre_apply": _operation("pre_apply"),
    "merge": _operation("merge"),
    "expand": _operation("expand", num_streams=4),
    "collapse": _operation("collapse"),
    "pre": _operation("pre", twice=(0, 1), **CONSTANTS),
    "boundary": _operation(
        "boundary",
        (("merge", "pre"), ("pre_backward", "merge_backward")),
        twice=(1, 3),
        **CONSTANTS,
    ),
    "sublayer": Operation(
        DEFINITIONS["pre"].tensors,
        _sublayer,
        _sublayer_reference,
        (("pre", "merge"), ("merge_backward_maps", "pre_backward")),
    ),
}
"""Every op by name; n is 4 in `expand`."""


def cases(*, quick: bool = False, device: str = "cuda", ops: Sequence[str] = ()) -> list[Case]:
    """The cases of a run, on a CPU small ones; `ops` are these only, all if empty."""
    chosen = list(dict.fromkeys(ops)) or list(OPERATIONS)
    if device == "cpu":
        small = CPU_SIZES[:1] if quick else CPU_SIZES
        grid = [(op, mode, size) for op in chosen for size in small for mode in MODES]
        return [Case(op, mode, *size, dtype="float32") for op, mode, size in grid]
    found: list[Case] = []
    for op in chosen:
        sizes: tuple[tuple[int, int], ...] = (MAIN,)
        if op in ("sublayer", "pre", "merge"):
            sizes = (MAIN, (64, 7168)) if quick else SIZES
        found += [Case(op, mode, *size) for size in sizes for mode in ("inference", "training")]
        if op == "sublayer":
            found += [Case(op, "forward", *size) for size in sizes]
        if op == "sublayer" and not quick:
            found += [Case(op, "inference", *size) for size in DECODE]
            sweep = (*MORE_TOKENS, *MORE_WIDTHS)
            found += [Case(op, mode, *size) for size in sweep for mode in ("inference", "training")]
    return found


def chosen_cases(args: SimpleNamespace) -> list[Case]:
    """The cases that the options of `mhc-tile perf run` leave.

    Raises:
        ValueError: They leave none.
    """
    known = cases(quick=args.quick, device=args.device, ops=args.op)
    for name, attribute in (("tokens", "tokens"), ("hidden", "hidden_size")):
        sizes = sorted({getattr(case, attribute) for case in known})
        if wrong := [size for size in getattr(args, name) if size not in sizes]:
            among = ", ".join(map(str, sizes))
            raise ValueError(f"perf run: --{name} must be among {among} here, got {wrong[0]}")
    chosen = [
        case
        for case in known
        if (not args.mode or case.mode in args.mode)
        and (not args.tokens or case.tokens in args.tokens)
        and (not args.hidden or case.hidden_size in args.hidden)
    ]
    if not chosen:
        raise ValueError(
            "perf run: --op, --mode, --tokens and --hidden must leave a case, got none"
        )
    return chosen

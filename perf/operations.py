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
    """An op at a shape, and how it is called.

    Attributes:
        op: a key of `OPERATIONS`.
        mode: "inference" (no graph of gradients), "forward" (with one) or "training" (forward and
            backward).
        tokens: T.
        hidden_size: C.
        streams: n.
        dtype: of the streams.
    """

    op: str
    mode: str
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
    """An op of the library.

    Attributes:
        names: its tensors, of `Inputs`, in order.
        ours: the op.
        reference: the same by `mhc_tile.reference`.
        kernels: forward, then backward: keys of `autotune.registry.KERNELS`, whose bytes it must
            move; None for the backward of `expand` and `collapse`, which is the other's forward.
        parameters: how many tensors, the last ones, all tokens share.
        twice: how many times n * C elements a token its kernels count that the op need not move,
            in the forward and in both: what one kernel writes and another reads, or a gradient of x
            by others.
    """

    names: tuple[str, ...]
    ours: Call
    reference: Call
    kernels: tuple[tuple[str, ...], tuple[str, ...]]
    parameters: int = 0
    twice: tuple[int, int] = (0, 0)

    def moved(self, case: Case) -> int | None:
        """Bytes that a call must move, by the kernels' `traffic`; None without TileLang."""
        from mhc_tile.autotune.registry import KERNELS

        parts = self.kernels[0] + (self.kernels[1] if case.mode == "training" else ())
        try:
            moved = sum(
                KERNELS[name].traffic(
                    Problem(name, case.streams, case.hidden_size, case.dtype, case.tokens),
                )
                for name in parts
            )
        except ImportError:
            return None
        streams = (
            case.tokens * case.streams * case.hidden_size * getattr(torch, case.dtype).itemsize
        )
        return moved - self.twice[case.mode == "training"] * streams


class Inputs:
    """Tensors of a case by name, normal ones where nothing else is meant.

    Args:
        case: op and shape.
        device: where they are made.
        seed: of the random numbers.
    """

    def __init__(self, case: Case, device: str, seed: int) -> None:
        self._case = case
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def make(self, name: str) -> Tensor:
        """One tensor."""
        case, n, width = self._case, self._case.streams, self._case.hidden_size
        dtype = getattr(torch, case.dtype)
        if name == "x":
            return self._normal(case.tokens, n, width).to(dtype)
        if name in ("layer_output", "hidden"):
            return self._normal(case.tokens, width).to(dtype)
        if name == "phi":
            return self._normal(n * (n + 2), n * width) * (n * width) ** -0.5
        if name == "alpha":
            return self._normal(3)
        if name == "bias":
            return self._normal(n * (n + 2))
        if name == "h_pre":
            return self._normal(case.tokens, n).sigmoid()
        if name == "h_post":
            return 2 * self._normal(case.tokens, n).sigmoid()
        logits = self._normal(case.tokens, n, n)
        return reference.sinkhorn(logits) if name == "h_res" else logits

    def like(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Cotangents of results."""
        return [self._normal(*value.shape).to(value.dtype) for value in results]

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator, device=self._device)


def _sublayer(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    return mhc_tile.sublayer(x, _identity, phi, alpha, bias, **CONSTANTS)


def _identity(value: Tensor) -> Tensor:
    return value


def _sublayer_reference(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    layer_input, h_post, h_res = reference.pre(x, phi, alpha, bias, **CONSTANTS)
    return reference.merge(x, layer_input, h_post, h_res)


def _boundary_reference(
    x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor, *parameters: Tensor
) -> Results:
    x_next = reference.merge(x, layer_output, h_post, h_res)
    return (x_next, *reference.pre(x_next, *parameters, **CONSTANTS))


_PARAMETERS = ("phi", "alpha", "bias")
_MERGED = ("x", "layer_output", "h_post", "h_res")
OPERATIONS: dict[str, Operation] = {
    "mapping": Operation(
        ("x", *_PARAMETERS),
        lambda *tensors: mhc_tile.mapping(*tensors, **CONSTANTS),
        lambda *tensors: reference.mapping(*tensors, **CONSTANTS),
        (("mapping",), ("mapping_backward",)),
        parameters=3,
    ),
    "sinkhorn": Operation(
        ("logits",), mhc_tile.sinkhorn, reference.sinkhorn, (("sinkhorn",), ("sinkhorn_backward",))
    ),
    "pre_apply": Operation(
        ("x", "h_pre"),
        mhc_tile.pre_apply,
        reference.pre_apply,
        (("pre_apply",), ("pre_apply_backward",)),
    ),
    "merge": Operation(_MERGED, mhc_tile.merge, reference.merge, (("merge",), ("merge_backward",))),
    "expand": Operation(
        ("hidden",),
        lambda hidden: mhc_tile.expand(hidden, 4),
        lambda hidden: reference.expand(hidden, 4),
        (("expand",), ("collapse",)),
    ),
    "collapse": Operation(
        ("x",), mhc_tile.collapse, reference.collapse, (("collapse",), ("expand",))
    ),
    "pre": Operation(
        ("x", *_PARAMETERS),
        lambda *tensors: mhc_tile.pre(*tensors, **CONSTANTS),
        lambda *tensors: reference.pre(*tensors, **CONSTANTS),
        (("pre",), ("pre_backward",)),
        parameters=3,
        twice=(0, 1),
    ),
    "boundary": Operation(
        (*_MERGED, *_PARAMETERS),
        lambda *tensors: mhc_tile.boundary(*tensors, **CONSTANTS),
        _boundary_reference,
        (("merge", "pre"), ("pre_backward", "merge_backward")),
        parameters=3,
        twice=(1, 3),
    ),
    "sublayer": Operation(
        ("x", *_PARAMETERS),
        _sublayer,
        _sublayer_reference,
        (("pre", "merge"), ("merge_backward_maps", "pre_backward")),
        parameters=3,
    ),
}
"""Every op by name; n is 4 in `expand`."""


def cases(*, quick: bool = False, device: str = "cuda", ops: Sequence[str] = ()) -> list[Case]:
    """The cases of a run.

    Args:
        quick: those of `mhc-tile perf run --quick`.
        device: "cuda", or "cpu" for small ones.
        ops: these only; all if empty.
    """
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

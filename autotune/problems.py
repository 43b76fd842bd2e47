"""What is tuned: one kernel at one shape, and the shapes of the presets."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..kernels.common.problem import Problem
from .registry import KERNELS

DTYPES = ("bfloat16", "float16", "float32")
TOKENS = tuple(4**power for power in range(9))  # 1 to 65536


@dataclass(frozen=True, order=True)
class Shape:
    """What a user tunes for: n, C and dtype, at some numbers of tokens."""

    channels: int
    n: int = 4
    dtype: str = "bfloat16"
    tokens: tuple[int, ...] = TOKENS


# hidden sizes of the 3B, 9B and 27B models, arXiv 2512.24880
_PAPER = (Shape(1280), Shape(1920), Shape(2560))
_DEEPSEEK_V4 = (Shape(4096), Shape(7168))
PRESETS: dict[str, tuple[Shape, ...]] = {
    "paper": _PAPER,
    "deepseek-v4": _DEEPSEEK_V4,
    "all": (
        *_PAPER,
        *_DEEPSEEK_V4,
        Shape(5120),
        Shape(2560, n=2),
        Shape(2560, n=8),
        Shape(2560, dtype="float16"),
        Shape(2560, dtype="float32"),
    ),
}
"""Shapes by name; "all" is what the shipped tables are made of."""


def bucket(tokens: int) -> int:
    """The power of two at or below a number of tokens: what tables are keyed by.

    Example:
        >>> bucket(1), bucket(1023), bucket(4096)
        (1, 512, 4096)
    """
    return 1 << max(tokens, 1).bit_length() - 1


def problems(shapes: Iterable[Shape], kernels: Iterable[str]) -> list[Problem]:
    """Every kernel at every shape, each once, the numbers of tokens of a shape in a row."""
    found: dict[Problem, None] = {}
    for shape in shapes:
        for name in kernels:
            sized = KERNELS[name].of_channels
            channels, dtype = (shape.channels, shape.dtype) if sized else (0, "float32")
            for tokens in sorted(shape.tokens, reverse=True):
                found[Problem(name, shape.n, channels, dtype, tokens)] = None
    return list(found)

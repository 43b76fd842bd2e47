"""How the channels of a row are spread over the threads of a block."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .knobs import check
from .problem import Problem
from .programs import ITEM_BYTES, ceil_div

WARP = 32
MAX_THREADS = 1024


def vector_width(C: int, dtype: str) -> int:
    """Elements of the widest access, at most 16 bytes, that tiles every row of C elements.

    Example:
        >>> vector_width(2560, "bfloat16"), vector_width(127, "bfloat16")
        (8, 1)
    """
    width = 16 // ITEM_BYTES[dtype]
    while C % width:
        width //= 2
    return width


def block_threads(C: int, dtype: str, vectors: int, blocks: int) -> int:
    """Threads, in whole warps, of each of `blocks` blocks that share a row."""
    pieces = C // vector_width(C, dtype)
    return ceil_div(ceil_div(pieces, vectors * blocks), WARP) * WARP


def is_block(threads: int) -> bool:
    """Whether a block can have this many threads: whole warps, at most 1024 threads."""
    return WARP <= threads <= MAX_THREADS and threads % WARP == 0


@dataclass(frozen=True)
class RowConfig:
    """Launch knobs of a forward that moves rows."""

    threads: int
    vectors: int = 1  # of at most 16 bytes that a thread handles
    op: ClassVar[str]

    def __post_init__(self):
        threads = is_block(self.threads), "a multiple of 32 up to 1024"
        check(self.op, self, "vectors", threads=threads)


def default_row(problem: Problem) -> tuple[int, int]:
    """Threads and vectors of a forward that moves rows: one block a token where it fits."""
    pieces = problem.channels // vector_width(problem.channels, problem.dtype)
    vectors = 2 if pieces > 256 and problem.n <= 4 else 1
    blocks = ceil_div(pieces, 512 * vectors)
    return block_threads(problem.channels, problem.dtype, vectors, blocks), vectors


def candidate_rows(problem: Problem) -> Iterator[tuple[int, int]]:
    """Threads and vectors worth measuring, one to sixteen blocks a token."""
    pieces = problem.channels // vector_width(problem.channels, problem.dtype)
    for vectors in (1, 2) if problem.n <= 4 else (1,):
        for blocks in (1, 2, 4, 8, 16):
            threads = block_threads(problem.channels, problem.dtype, vectors, blocks)
            if is_block(threads) and threads * vectors * (blocks - 1) < pieces:
                yield threads, vectors

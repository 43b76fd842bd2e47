"""How the channels of a row are spread over the threads of a block."""

from .programs import ITEM_BYTES, ceil_div

WARP = 32
MAX_THREADS = 1024


def vector_width(channels: int, dtype: str) -> int:
    """Elements of the widest access, at most 16 bytes, that tiles every row of `channels`.

    Example:
        >>> vector_width(2560, "bfloat16"), vector_width(127, "bfloat16")
        (8, 1)
    """
    width = 16 // ITEM_BYTES[dtype]
    while channels % width:
        width //= 2
    return width


def block_threads(channels: int, dtype: str, vectors: int, blocks: int) -> int:
    """Threads, in whole warps, of each of `blocks` blocks that share a row."""
    pieces = channels // vector_width(channels, dtype)
    return ceil_div(ceil_div(pieces, vectors * blocks), WARP) * WARP


def is_block(threads: int) -> bool:
    """Whether a block can have this many threads: whole warps, at most 1024 threads."""
    return WARP <= threads <= MAX_THREADS and threads % WARP == 0

"""Two bf16 of a 32-bit word as fp32, by one instruction each.

A cast of an element in the upper half of a register takes two: it is brought down, then shifted up
again. Loops whose warps have little else to wait for read words: `T.view(lane, (4,), WORD)` of a
local buffer of eight bf16.
"""

from typing import Any

import tilelang.language as T

from .programs import F32

WORD = "uint32"
_UPPER = 0xFFFF0000


def lower(word: Any) -> Any:
    """The element of the lower address."""
    return T.reinterpret(word << 16, F32)


def upper(word: Any) -> Any:
    """The element of the higher address."""
    return T.reinterpret(word & T.uint32(_UPPER), F32)

"""Numbers as tensor cores take them: rounded to tf32, scaled by powers of two, as pairs high + low.

`high` is a value rounded to bf16, fp16 or tf32, and `low` what the rounding left over. NaN and
infinity stay what they are in `high`, and `low` is zero beside them: infinity - infinity is NaN.
"""

from typing import Any

import tilelang.language as T

from .programs import F32

_HALF, _TF32 = T.uint32(0x1000), T.uint32(0xFFFFE000)  # of tf32's last place, tf32's bits
LARGEST = 2.0**128 - 2.0**104  # of float32
_ROUNDS_TO_INFINITY = 2.0**128 - 2.0**116  # from here on, in tf32


def round_tf32(value: Any) -> Any:
    """Value rounded to tf32's 10 mantissa bits; a tensor core itself would truncate.

    What would become infinity is truncated. Neither NaN nor infinity is added to: the bits of NaN
    could wrap around to a zero.
    """
    half = T.Select(T.abs(value) < T.float32(_ROUNDS_TO_INFINITY), _HALF, T.uint32(0))
    return T.reinterpret(T.reinterpret(value, "uint32") + half & _TF32, F32)


def round_rest(value: Any) -> Any:
    """As `round_tf32`, of what that left over, in two instructions fewer.

    What is left of NaN and infinity need not be right: the token's gradients are NaN anyway.
    """
    return T.reinterpret(T.reinterpret(value, "uint32") + _HALF & _TF32, F32)


def rest(value: Any, high: Any) -> Any:
    """What rounding to `high` left over of value, fp32; 0 where high is not finite."""
    left = value - T.cast(high, F32)
    return T.Select(T.abs(left) <= T.float32(LARGEST), left, T.float32(0.0))


def exponent_of(value: Any) -> Any:
    """The biased exponent of a float, within what `scale_of` and `unscale_of` can express."""
    bits = T.reinterpret(value, "int32") >> 23 & 255
    return T.min(T.max(bits, 15), 254)


def scale_of(exponent: Any) -> Any:
    """The power of two that brings a value of this exponent to 2^14 up to 2^15: fp16's range."""
    return T.reinterpret((268 - exponent) << 23, F32)


def unscale_of(exponent: Any) -> Any:
    """1 / scale_of(exponent)."""
    return T.reinterpret((exponent - 14) << 23, F32)

"""Messages between the CTAs of a group, through global memory (L2): one message is one word.

A message is a float whose last mantissa bit is a phase bit. The phase bit of a mailbox stage flips
whenever the stage is reused, so a message validates itself: a reader polls the word until its phase
is the expected one. There is no fence and no separate flag.
"""

from typing import Any

import tilelang.language as T

from .programs import F32

EMPTY = 1  # of a mailbox before its first use: the first messages have phase 0


def stage_of(tile: Any, stages: int) -> Any:
    """The mailbox stage of a tile of tokens."""
    return T.cast(tile % stages, "int64")


def send(entry: Any, value: Any, tile: Any, stages: int) -> Any:
    """Store a float as the message of a tile."""
    message = (T.reinterpret(value, "int32") & -2) | (tile // stages % 2)
    return T.atomic_store(entry, message, memory_order="relaxed")


def peek(entry: Any) -> Any:
    """The message that is there now, stale or not."""
    return T.atomic_load(entry, memory_order="relaxed")


def staleness(message: Any, tile: Any, stages: int) -> Any:
    """A number whose last bit is 1 while a message is not the tile's."""
    return message ^ (tile // stages)


def value_of(message: Any) -> Any:
    """The float that a message carries."""
    return T.reinterpret(message & -2, F32)

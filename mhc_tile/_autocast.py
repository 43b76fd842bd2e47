"""Autocast of devices that have it; for others, such as meta, torch raises when asked."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# Asked once: torch.compile of 2.10 and 2.11 cannot trace the question.
_WITH_AUTOCAST = frozenset(
    device_type
    for device_type in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu")
    if torch.amp.is_autocast_available(device_type)
)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A block in which operands keep their dtypes."""
    if device_type in _WITH_AUTOCAST:
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of autocast; None where it is off."""
    if device_type in _WITH_AUTOCAST and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None

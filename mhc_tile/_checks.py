"""The checks that every public op makes, so that every message reads alike.

`<op>: <argument> must <rule>, got <value>`. They read metadata only (no device sync), run once per
public call, and hand back the sizes they derived.
"""

import math
import operator
from typing import Any

import torch
from torch import Tensor

from .reference import compute_dtype

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def is_tensor(op: str, name: str, value: object) -> None:
    """Check that something is a tensor at all."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def streams(op: str, x: Tensor, name: str = "x") -> tuple[int, int]:
    """Check the residual streams [..., n, C]; returns n and C."""
    is_tensor(op, name, x)
    if x.dtype not in FLOATS:
        names = ", ".join(_dtype(dtype) for dtype in FLOATS)
        raise ValueError(f"{op}: {name} must have a dtype of {names}, got {_dtype(x.dtype)}")
    if x.dim() < 2:
        raise ValueError(f"{op}: {name} must have shape [..., n, C], got {list(x.shape)}")
    num_streams, width = x.shape[-2:]
    if num_streams < 1 or width < 1:
        raise ValueError(f"{op}: {name} must have n >= 1 and C >= 1, got {list(x.shape)}")
    return num_streams, width


def hidden(op: str, name: str, value: Tensor) -> int:
    """Check a hidden state [..., C] that stands alone; returns C."""
    is_tensor(op, name, value)
    if value.dim() < 1:
        raise ValueError(f"{op}: {name} must have shape [..., C], got a scalar")
    streams(op, value.unsqueeze(-2), name)
    return value.shape[-1]


def square(op: str, name: str, value: Tensor) -> int:
    """Check matrices of a map's dtype, [..., n, n]; returns n."""
    is_tensor(op, name, value)
    if value.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: {name} must be float32 or float64, got {_dtype(value.dtype)}")
    if value.dim() < 2 or value.shape[-1] != value.shape[-2] or value.shape[-1] < 1:
        raise ValueError(f"{op}: {name} must have shape [..., n, n], got {list(value.shape)}")
    return value.shape[-1]


def like(op: str, name: str, value: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Check a tensor that shares x's dtype, such as layer_output [..., C]."""
    _matches(op, name, value, shape, x, x.dtype)


def map_of(op: str, name: str, value: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Check a map or parameter: x's device, float32 (float64 where x is)."""
    _matches(op, name, value, shape, x, compute_dtype(x))


def _matches(
    op: str, name: str, value: Tensor, shape: tuple[int, ...], x: Tensor, dtype: torch.dtype
) -> None:
    is_tensor(op, name, value)
    if value.shape != shape:
        raise ValueError(
            f"{op}: {name} must have shape {list(shape)} to match x of shape {list(x.shape)}, "
            f"got {list(value.shape)}"
        )
    if value.dtype != dtype:
        raise ValueError(
            f"{op}: {name} must be {_dtype(dtype)} where x is {_dtype(x.dtype)}, "
            f"got {_dtype(value.dtype)}"
        )
    if value.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {value.device}")


def parameters(op: str, x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> tuple[int, int]:
    """Check x with the parameters of its mapping; returns n and C."""
    num_streams, width = streams(op, x)
    logits = num_streams * (num_streams + 2)
    map_of(op, "phi", phi, (logits, num_streams * width), x)
    map_of(op, "alpha", alpha, (3,), x)
    map_of(op, "bias", bias, (logits,), x)
    return num_streams, width


def count(op: str, *, minimum: int = 1, **named: Any) -> int:
    """Check an integer, given by its name, that must be at least 1; returns it as Python's int."""
    ((name, value),) = named.items()
    whole = as_int(value)
    if whole is None or whole < minimum:
        raise ValueError(f"{op}: {name} must be an int of at least {minimum}, got {value!r}")
    if isinstance(whole, int) and whole >= 2**63:
        raise ValueError(f"{op}: {name} must be below 2**63, got {value!r}")
    return whole


def as_int(value: Any) -> Any:
    """The integer that a value is, NumPy's among them; None where it is none: a bool."""
    if isinstance(value, (int, torch.SymInt)):  # an index of a SymInt would fix its value
        if isinstance(value, int):
            return None if isinstance(value, bool) else int(value)  # an IntEnum is another class
        return value
    try:
        return None if _is_bool(value) else operator.index(value)
    except (TypeError, ValueError):
        return None


def as_number(value: Any) -> Any:
    """The number that a value is, NumPy's among them; None where it is none: a bool, a str."""
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value
    if isinstance(value, float):
        return float(value)  # NumPy's float64 is another class
    if isinstance(value, int):
        return None if isinstance(value, bool) else _within_float(value)
    if _is_bool(value) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # an array or a tensor of several
        return None


def _within_float(value: int) -> int | float:
    """The value; infinity where no float is as large."""
    try:
        float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    return int(value)


def flag(op: str, **values: Any) -> None:
    """Check values that must be True or False: a text such as "no" is true for Python."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def _is_bool(value: Any) -> bool:
    """Whether a NumPy value or a tensor is of bools."""
    return str(getattr(value, "dtype", None)) in ("bool", "torch.bool")


def at_least(op: str, minimum: float, **values: float) -> None:
    """Check numbers against a lower bound, NaN included."""
    for name, value in values.items():
        if not minimum <= _number(op, name, value) < math.inf:
            raise ValueError(f"{op}: {name} must be finite and at least {minimum}, got {value}")


def positive(op: str, **values: float) -> None:
    """Check numbers that must be above 0, NaN included."""
    for name, value in values.items():
        if not 0 < _number(op, name, value) < math.inf:
            raise ValueError(f"{op}: {name} must be finite and above 0, got {value}")


def _number(op: str, name: str, value: Any) -> Any:
    number = as_number(value)
    if number is None:
        raise ValueError(f"{op}: {name} must be a number, got {value!r}")
    return number

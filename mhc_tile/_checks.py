"""The checks of arguments, so that every message reads `<op>: <argument> must <rule>, got <value>`.

The checks of tensors read metadata only (no device sync) and return the sizes that they derived.
The checks of numbers accept those of NumPy and torch, return Python's, and refuse True and False.
"""

import dataclasses
import math
import operator
import textwrap
import traceback
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from .reference import compute_dtype

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class WrongTypeError(TypeError, ValueError):
    """A value of the wrong type; a ValueError too, because the ops document that for numbers."""


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


def map_of(
    op: str, name: str, value: Tensor, shape: tuple[int, ...], x: Tensor,
    dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Check a map or parameter: x's device, float32 (float64 where x is) or another dtype."""
    is_tensor(op, name, value)
    dtype = dtype or compute_dtype(x)
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


def count(op: str, *, minimum: int = 1, **values: Any) -> None:
    """Check integers that must be at least 1, or another minimum."""
    for name, value in values.items():
        whole(op, name, value, minimum)


def at_least(op: str, minimum: float, **values: Any) -> None:
    """Check numbers against a lower bound, NaN included."""
    for name, value in values.items():
        number(op, name, value, minimum)


def flag(op: str, **values: Any) -> None:
    """Check values that must be True or False: a text such as "no" is true for Python."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise WrongTypeError(f"{op}: {name} must be True or False, got {value!r}")


def one_of(op: str, name: str, value: Any, choices: Collection[str]) -> str:
    """Check a name against the known ones; returns it as Python's str."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{op}: {name} must be one of {list(choices)}, got {value!r}")
    return str.__str__(value)  # an Enum of str is another class


def whole(op: str, name: str, value: Any, minimum: int = 1, bits: int = 63) -> Any:
    """Check an integer of at least `minimum` and below 2**bits; returns it as Python's int."""
    found = value if type(value) is int else as_int(value)
    rule = f"must be an int of at least {minimum}"
    if found is None:
        raise WrongTypeError(f"{op}: {name} {rule}, got {value!r}")
    if found < minimum:
        raise ValueError(f"{op}: {name} {rule}, got {value!r}")
    if isinstance(found, int) and found >= 2**bits:
        raise ValueError(f"{op}: {name} must be below 2**{bits}, got {value!r}")
    return found


def number(op: str, name: str, value: Any, minimum: float = 0, *, above: bool = False) -> Any:
    """Check a finite number of at least, or above, `minimum`; returns it as Python's float."""
    found = value if type(value) is float else as_number(value)
    if found is None:
        raise WrongTypeError(f"{op}: {name} must be a number, got {value!r}")
    if not (minimum < found if above else minimum <= found) or not found < math.inf:
        rule = "above" if above else "at least"
        raise ValueError(f"{op}: {name} must be finite and {rule} {minimum}, got {value}")
    return found


def fields(
    config: Any,
    *,
    at_least_0: Collection[str] = (),
    above_0: Collection[str] = (),
    bits: Mapping[str, int] | None = None,
) -> None:
    """Check the fields of a frozen dataclass by their declared types; store Python's own classes.

    Ints are at least 1, or 0 where named in `at_least_0`, and have at most 63 `bits`. Floats are at
    least 0, or above 0 where named in `above_0`. Errors: WrongTypeError and ValueError.
    """
    kind = type(config).__name__
    for field in dataclasses.fields(config):
        name, value, declared = field.name, getattr(config, field.name), field.type
        kinds = get_args(declared) or (declared,)
        if value is None and type(None) in kinds:
            continue
        if int in kinds:
            minimum = 0 if name in at_least_0 else 1
            value = whole(kind, name, value, minimum, (bits or {}).get(name, 63))
        elif float in kinds:
            value = number(kind, name, value, above=name in above_0)
        elif bool in kinds:
            flag(kind, **{name: value})
        elif get_origin(declared) is Literal:
            value = one_of(kind, name, value, kinds)
        elif not isinstance(value, kinds):
            names = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
            raise WrongTypeError(f"{kind}: {name} must be of {names}, got {value!r}")
        elif isinstance(value, str):
            value = str.__str__(value)
        object.__setattr__(config, name, value)


def as_int(value: Any) -> Any:
    """The integer that a value is, NumPy's among them; None where it is none: a bool."""
    if isinstance(value, torch.SymInt):  # an index of a SymInt would fix its value
        return value
    if isinstance(value, int):
        return None if isinstance(value, bool) else int(value)  # an IntEnum is another class
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
    if isinstance(value, bool) or _is_bool(value) or not hasattr(value, "__float__"):
        return None
    try:
        found = float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):  # an array or a tensor of several
        return None
    return int(value) if isinstance(value, int) else found


def _is_bool(value: Any) -> bool:
    """Whether a NumPy value or a tensor is of bools."""
    return str(getattr(value, "dtype", None)) in ("bool", "torch.bool")


def reason(error: BaseException) -> str:
    """An exception's class and the first lines of its text, in one line for a message."""
    lines = "".join(traceback.format_exception_only(error)).split("\n")
    return textwrap.shorten(" ".join(lines[:2]), 200, placeholder=" ...")

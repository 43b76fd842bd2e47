"""Configurations of kernels as plain values, named by module and class."""

import dataclasses
import importlib
import re
from typing import Any

# Types by the names that they had while every kernel was one file; older tables hold these.
_FORMER = {
    "mapping.Config": "mapping.launch.Config",
    "_mapping_columns.Config": "mapping.grad_x_pass.Config",
    "pre.Config": "pre.launch.Config",
    "pre_team.Config": "pre.persistent.Config",
    "pre_backward_team.Config": "pre_backward.persistent.Config",
}
_FORMER_KNOBS = {"batches": 1}  # gone from their types, with the one value that older tables have


def type_name(config: Any) -> str:
    """Module and class of a configuration, such as "merge.BackwardConfig"."""
    kind: type = type(config)
    return f"{kind.__module__.partition('.kernels.')[2]}.{kind.__qualname__}"


def encode(config: Any) -> dict[str, Any]:
    """A configuration as plain values: its fields, and its type by name."""
    return {"type": type_name(config), **dataclasses.asdict(config)}


def decode(values: Any) -> Any:
    """The configuration that `encode` made values of.

    ValueError where the type is gone, has other fields, or rejects their values.
    """
    if not isinstance(values, dict) or not re.fullmatch(r"\w+(\.\w+)+", str(values.get("type"))):
        raise ValueError(f"decode: values must name a type such as 'merge.Config', got {values}")
    name = str(values["type"])
    module, _, name = _FORMER.get(name, name).rpartition(".")
    try:
        kind = getattr(importlib.import_module(f"..kernels.{module}", __package__), name)
    except (ImportError, AttributeError):
        kind = None
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ValueError(f"decode: type must be a configuration of a kernel, got {values['type']}")
    knobs = {
        key: value
        for key, value in values.items()
        if key != "type" and _FORMER_KNOBS.get(key) != value
    }
    fields = {field.name for field in dataclasses.fields(kind)}
    if set(knobs) != fields or not all(type(value) in (int, bool) for value in knobs.values()):
        raise ValueError(
            f"decode: {values['type']} must have integers {sorted(fields)}, got {knobs}"
        )
    return kind(**knobs)

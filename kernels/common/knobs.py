"""What every configuration shares: its knobs, their rules, and which change the order of sums."""

import dataclasses
from typing import Any

_KEY = "reduction_order"


def knob(default: Any = dataclasses.MISSING, *, reduction_order: bool = False) -> Any:
    """A field of a configuration.

    `reduction_order` says that it changes the order in which the sums of a token are formed, and so
    their last bits.
    """
    return dataclasses.field(default=default, metadata={_KEY: reduction_order})


def check(op: str, config: Any, *positive: str, **rules: tuple[bool, str]) -> None:
    """Reject knobs that cannot launch; `rules` are, by knob, whether one holds and what it is."""
    rules = {name: (getattr(config, name) >= 1, "at least 1") for name in positive} | rules
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"{op}: config.{name} must be {rule}, got {getattr(config, name)}")


def reduction_order(config: Any) -> tuple[tuple[str, Any], ...]:
    """The knobs that change the order of a token's sums, by name: equal ones, equal bits."""
    fields = dataclasses.fields(config)
    return tuple((f.name, getattr(config, f.name)) for f in fields if f.metadata.get(_KEY))


def knobs_of(config: Any) -> tuple[Any, ...]:
    """All knobs in their order; `dataclasses.astuple` takes seven times as long."""
    return tuple(vars(config).values())

"""The checks of what modules are given, so that every message reads alike."""

from torch import Tensor

from .. import _checks
from ..config import MHCConfig


def check_layer(kind: str, layer: object) -> None:
    """Check what a connection is put around."""
    if not callable(layer):
        raise TypeError(f"{kind}: layer must be a module, got {type(layer).__name__}")


def check_count(kind: str, name: str, value: object, minimum: int = 1) -> None:
    """Check a size or an index."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{kind}: {name} must be an int of at least {minimum}, got {value}")


def check_config(kind: str, config: MHCConfig | None) -> MHCConfig:
    """Check the constants of a mapping; returns them, the paper's if None."""
    if config is None:
        return MHCConfig.paper()
    if not isinstance(config, MHCConfig):
        raise TypeError(f"{kind}: config must be an MHCConfig, got {type(config).__name__}")
    return config


def check_streams(kind: str, x: Tensor, num_streams: int, hidden_size: int) -> None:
    """Check the residual streams at the entrance of a module of this size."""
    if isinstance(x, Tensor) and x.shape[-2:] != (num_streams, hidden_size):
        raise ValueError(
            f"{kind}: x must have shape [..., {num_streams}, {hidden_size}], got {list(x.shape)}"
        )
    _checks.streams(kind, x)

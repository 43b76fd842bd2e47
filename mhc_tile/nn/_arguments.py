"""The checks of the arguments of modules and of what layers return."""

from typing import Any

from torch import Tensor, nn

from ..config import MHCConfig

Extras = tuple[Any, ...]
"""What a layer returns after its output."""


def check_module(kind: str, name: str, value: object) -> None:
    """Check that something is a module: no parameter of another callable would be found."""
    if isinstance(value, nn.Module):
        return
    how = "; wrap it in a torch.nn.Module that calls it in forward and holds the modules it uses"
    said = type(value).__name__ + (how if callable(value) else "")
    raise TypeError(f"{kind}: {name} must be a module, got {said}")


def check_config(kind: str, config: MHCConfig | None, name: str = "config") -> MHCConfig:
    """Check the constants of a mapping; returns them, the paper's if None."""
    if config is None:
        return MHCConfig.paper()
    if not isinstance(config, MHCConfig):
        raise TypeError(f"{kind}: {name} must be an MHCConfig, got {type(config).__name__}")
    return config


def check_output(kind: str, layer_input: Tensor, result: Any) -> Any:
    """Check what a layer returned: its output, or a tuple of its output and extras.

    Returns the same, the output in the dtype of layer_input: autocast may change it.
    """
    if isinstance(result, Tensor):  # at once, as every layer of a model passes here
        return result if result.dtype is layer_input.dtype else result.to(layer_input.dtype)
    output, extras = split_extras(result)
    if not isinstance(output, Tensor):
        of = "" if extras is None else f" of {type(output).__name__}"
        raise TypeError(
            f"{kind}: layer must return a torch.Tensor of shape {list(layer_input.shape)}, alone "
            f"or as the first of a tuple, got {type(result).__name__}{of}"
        )
    return join_extras(output.to(layer_input.dtype), extras)


def split_extras(result: Any) -> tuple[Any, Extras | None]:
    """The first of a tuple, and the others; None for these where it is no tuple."""
    if not isinstance(result, tuple):
        return result, None
    return (result[0] if result else None), tuple(result[1:])


def join_extras(first: Tensor, extras: Extras | None) -> Any:
    """The inverse of `split_extras`."""
    return first if extras is None else (first, *extras)

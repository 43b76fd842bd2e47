"""Third-party packages of the extra `mhc-tile[train]`, imported where they are used."""

from types import ModuleType

from ..autotune import _extras
from ..autotune._extras import MissingExtraError

__all__ = ["MissingExtraError", "require"]


def require(module: str, purpose: str) -> ModuleType:
    """Import a module of the extra, or say how to install it.

    Args:
        module: dotted name, such as "matplotlib.figure".
        purpose: what it is wanted for; starts the error message.

    Returns:
        The module.

    Raises:
        MissingExtraError: It is not installed; the message names the extra.

    Example:
        >>> require("json", "a demonstration").dumps([1])
        '[1]'
    """
    return _extras.require(module, purpose, "train")

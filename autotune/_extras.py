"""Third-party packages of an extra, imported where they are used."""

import importlib
from types import ModuleType


class MissingExtraError(RuntimeError):
    """A package of an extra is not installed."""


def require(module: str, purpose: str, extra: str = "tune") -> ModuleType:
    """Import a module of an extra, or say how to install it.

    Args:
        module: dotted name, such as "matplotlib.figure".
        purpose: what it is wanted for; starts the error message.
        extra: that brings the package.

    Returns:
        The module.

    Raises:
        MissingExtraError: It is not installed; the message names the extra.

    Example:
        >>> require("json", "a demonstration").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose}: the package {module.split('.')[0]!r} must be installed, got "
            f"{type(error).__name__} ({error}); pip install 'mhc-tile[{extra}]' brings it"
        ) from error

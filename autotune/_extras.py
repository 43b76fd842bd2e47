"""Third-party packages of an extra, imported where they are used."""

import importlib
from types import ModuleType


class MissingExtraError(RuntimeError):
    """A package of an extra is not installed."""


def require(module: str, purpose: str, extra: str = "tune") -> ModuleType:
    """Import a module, such as "matplotlib.figure", or say which extra brings it.

    `purpose`, what the module is wanted for, starts the message of the MissingExtraError.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose}: the package {module.split('.')[0]!r} must be installed, got "
            f"{type(error).__name__} ({error}); pip install 'mhc-tile[{extra}]' brings it"
        ) from error

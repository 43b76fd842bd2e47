"""Paths that users give, and folders that one process owns at a time."""

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK = ".lock"
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class FolderInUseError(ValueError):
    """A folder has files already, or another process works in it."""


def full_path(path: str | Path, argument: str) -> Path:
    """The absolute path, with `~` expanded; links stay in it, except for those before a "..".

    An empty path, which would be the working directory, is a ValueError that names the argument.
    """
    if not os.fspath(path).strip():
        raise ValueError(f"{argument} must not be empty, got {str(path)!r}")
    full = Path(os.path.expanduser(path)).absolute()  # pathlib raises for an unknown user
    parts = full.parts
    end = max((index + 1 for index, part in enumerate(parts) if part == ".."), default=0)
    return Path(*parts[:end]).resolve().joinpath(*parts[end:]) if end else full


def require_unused(folder: Path, argument: str) -> None:
    """Refuse a file, or a folder that has anything but a lock in it."""
    if folder.is_dir():
        used = any(path.name != _LOCK for path in folder.iterdir())
    else:
        used = folder.exists()
    if used:
        raise FolderInUseError(f"{argument} must not exist yet or be empty, got {str(folder)!r}")


@contextmanager
def owned(folder: Path, argument: str, *, new: bool = False) -> Iterator[None]:
    """Own a folder, which may not exist yet, in this block; `new` refuses one with files.

    A FolderInUseError names the argument where another process owns the folder. The lock ends with
    the process, however that ends.
    """
    if new:
        require_unused(folder, argument)  # before a lock is left in a folder of somebody else
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(folder / _LOCK))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FolderInUseError(
            f"{argument} must not be in use by another process, got {str(folder)!r}"
        ) from error
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _WITHOUT_LOCKS:
            raise
        warnings.warn(
            f"{argument} {str(folder)!r} cannot be locked on this file system: "
            "let no other process write there",
            stacklevel=3,
        )
    try:
        if new:
            require_unused(folder, argument)
        yield
    finally:
        lock.release()

"""What commands are given: types for `add_argument`, and folders that the environment names.

An unset variable of a shell arrives as an empty text, and `--out=~/x` with its tilde.
"""

import argparse
import tempfile
from pathlib import Path


def text(value: str) -> str:
    """A text that is not empty.

    Raises:
        argparse.ArgumentTypeError: It is.
    """
    if not value.strip():
        raise argparse.ArgumentTypeError(f"must not be empty, got {value!r}")
    return value


def path(value: str) -> Path:
    """A file or folder; `~` and `~user` are home folders.

    Raises:
        argparse.ArgumentTypeError: It is empty, or there is no such user.

    Example:
        >>> path("runs/new.json").name
        'new.json'
    """
    try:
        return Path(text(value)).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"must name a home folder, got {value!r}") from error


def output(value: str) -> str:
    """A file to write, or - for the terminal.

    Raises:
        argparse.ArgumentTypeError: As `path`.
    """
    return value if value == "-" else str(path(value))


def count(value: str) -> int:
    """A whole number from 1 on.

    Raises:
        argparse.ArgumentTypeError: It is another one, or none.
    """
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {value!r}")
    return number


def check_folder(command: str, folder: Path, what: str, variable: str) -> None:
    """Fail if no file can be written in a folder that no argument names; it is made.

    Args:
        command: for the message.
        folder: the folder.
        what: is kept there.
        variable: of the environment, that names another one.

    Raises:
        OSError: Nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"{command}: {what} must be where files can be written, got {folder} "
            f"({error.strerror or error}); the variable {variable} names another place"
        ) from error

"""What commands are given: numbers, and folders to write in."""

import argparse
import tempfile
from pathlib import Path


def count(value: str) -> int:
    """A whole number from 1 on, as a type for `add_argument`.

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


def check_folder(what: str, folder: Path, named: Path | None = None, *, variable: str = "") -> None:
    """Make a folder and fail if no file can be written in it.

    Raises:
        OSError: Nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        said = f"{what} must be where files can be written, got {named or folder} "
        said += f"({error.strerror or error})"
        said += f"; the variable {variable} names another place" if variable else ""
        raise OSError(said) from error

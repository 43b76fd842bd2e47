"""Files that are replaced in one step: a reader, or a crash, sees the old content or the new."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path, draft: Path | None = None) -> Iterator[BinaryIO]:
    """Open a draft to write; when the block ends, it replaces the file, whose folder must exist.

    An error in the block removes the draft and leaves the file as it was. By default the draft has
    a new name, so that several processes may write one file. A fixed name in the same folder leaves
    at most one draft behind when processes are killed. OSError if the file cannot be written, or if
    the path names something that is no file, such as a device.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a"
        >>> with replacing(path) as file:
        ...     _ = file.write(b"new")
        >>> path.read_bytes()
        b'new'
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} must be a file, got something else of that name")
    mode = "wb" if draft else "xb"
    draft = draft or path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(draft, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write(path: Path, content: str | bytes) -> None:
    """Write a file in one step, as `replacing`; a text is encoded in UTF-8."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)

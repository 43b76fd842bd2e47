"""A table's file by types, which msgspec decodes."""

from pathlib import Path
from typing import Annotated

import msgspec

from .table import SCHEMA, Entry, TableError, UnreadableError

_Count = Annotated[int, msgspec.Meta(ge=1)]


class _Head(msgspec.Struct):
    """What a file of any schema has."""

    schema: int


class Family(msgspec.Struct):
    """A family as the file has it."""

    kernel: str
    n: _Count
    C: Annotated[int, msgspec.Meta(ge=0)]
    dtype: str
    regime: str
    order: str
    tilelang: str
    driver: str
    date: str
    tokens: Annotated[dict[_Count, Entry], msgspec.Meta(min_length=1)]


class File(msgspec.Struct):
    """A file of schema 1."""

    gpu: str
    multiprocessors: int
    families: list[Family]


def decode(path: Path) -> File:
    """Read a file; TableError if it is of another schema, UnreadableError if it is no table."""
    text = path.read_bytes()
    try:
        schema = msgspec.json.decode(text, type=_Head).schema
        if schema != SCHEMA:
            raise TableError(f"{path}: schema must be {SCHEMA}, got {schema!r}; update mhc-tile")
        return msgspec.json.decode(text, type=File)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise UnreadableError(f"{path}: must be a table in JSON, got: {error}") from error

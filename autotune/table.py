"""Tables of tuned configurations: the file format, where files are, reading, and safe writing.

A table belongs to one GPU model. It holds families: the entries of one kernel, n, C, dtype and
regime (few tokens or many), by number of tokens, a power of two. All entries of a family have one
reduction order, so a family of another order replaces the whole family. docs/tables.md shows a
file.
"""

import contextlib
import errno
import itertools
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..kernels.common.files import write
from ._switches import NO
from .device import Device
from .problems import Problem

SCHEMA = 1
SHIPPED = Path(__file__).parent / "tables"
VARIABLE = "MHC_TILE_TABLES"
OFF = "off"


class TableError(ValueError):
    """A table's file cannot be used; the message begins with its path."""


class UnreadableError(TableError):
    """The file is no table at all, or a broken one."""


class Key(NamedTuple):
    """What a family is for; channels is 0 for kernels that see none."""

    kernel: str
    n: int
    channels: int
    dtype: str
    regime: str

    def problem(self, tokens: int) -> Problem:
        """The kernel and the shape at a number of tokens."""
        return Problem(self.kernel, self.n, self.channels, self.dtype, tokens)

    def __str__(self) -> str:
        """One line for a person."""
        width = f" x {self.channels}" if self.channels else ""
        return f"{self.kernel}{width}, n {self.n}, {self.dtype}, {self.regime} tokens"


@dataclass(frozen=True)
class Entry:
    """The configuration for one number of tokens."""

    config: dict[str, Any]  # as `configs.encode` returns it
    default: bool  # whether this is the kernel's default, because nothing was faster
    us: float  # microseconds of a call
    default_us: float  # the same with the default, measured in turns with it
    tilelang: str = ""  # the version that generated the code, where it is not the family's
    source: str = ""  # the file that it was read from, where it is not the family's


@dataclass
class Family:
    """Entries by number of tokens, and what they were measured with."""

    key: Key
    order: str  # the reduction order of all entries, as a text
    tilelang: str  # the version that generated the code
    driver: str  # of the newest entry
    date: str  # of the newest entry, YYYY-MM-DD
    entries: dict[int, Entry] = field(default_factory=dict)
    source: str = ""  # the file that it was read from

    def updated(self, newer: "Family") -> "Family":
        """This family with a newer one's entries; the newer one alone if its order is another."""
        if self.order != newer.order:
            return newer
        kept = {}
        for tokens, entry in self.entries.items():
            tilelang, source = entry.tilelang or self.tilelang, entry.source or self.source
            kept[tokens] = replace(
                entry,
                tilelang="" if tilelang == newer.tilelang else tilelang,
                source="" if source == newer.source else source,
            )
        return replace(newer, entries={**kept, **newer.entries})


@dataclass
class Table:
    """The families of one GPU model."""

    gpu: str  # the vendor's name
    multiprocessors: int  # the name alone does not tell
    families: dict[Key, Family] = field(default_factory=dict)
    aside: Path | None = None  # where `update` has put a file that it could not read


def user_folder() -> Path:
    """Where a user's own tables are."""
    import platformdirs

    return platformdirs.user_data_path("mhc_tile", appauthor=False) / "tables"


def user_path(device: Device) -> Path:
    """The file that the tuner writes for a GPU."""
    return user_folder() / f"{device.slug}.json"


def is_off() -> bool:
    """Whether tables are switched off by MHC_TILE_TABLES=off, or another word for no."""
    return bool(given := _given()) and given.lower() in NO


def _given() -> str:
    return os.environ.get(VARIABLE, "").strip()


def misnamed() -> str:
    """Why MHC_TILE_TABLES names nothing that can be read; empty if it does, or is not set."""
    given = _given()
    if not given or is_off():
        return ""
    path = os.path.expanduser(given)
    if os.access(path, os.R_OK):
        return ""
    what = "it may not be read" if os.path.exists(path) else "nothing that may be read is there"
    return f"{VARIABLE}: must be a table, a folder of tables or {OFF}, got {given}: {what}"


def sources(device: Device) -> list[Path]:
    """Files that may hold a table for a GPU, the one that counts most first; not all exist.

    $MHC_TILE_TABLES names a file, or a folder of files by GPU; then comes the user's data folder,
    then what is shipped.
    """
    if is_off():
        return []
    name = f"{device.slug}.json"
    found = [user_folder() / name, SHIPPED / name]
    if given := _given():
        path = Path(os.path.expanduser(given))  # leaves a name of no user as it is
        is_file = path.suffix == ".json" or os.path.isfile(path)
        found.insert(0, path if is_file and not os.path.isdir(path) else path / name)
    return found


def read(path: Path, device: Device | None = None) -> Table:
    """Read a table; TableError if it is corrupt, of a newer schema, or not for a given device."""
    from ._table_file import decode  # with msgspec, which `import mhc_tile` does without

    found = decode(path)
    if device and (found.gpu, found.multiprocessors) != (device.name, device.multiprocessors):
        raise TableError(
            f"{path}: must be for {device.name} with {device.multiprocessors} multiprocessors, "
            f"got one for {found.gpu} with {found.multiprocessors}"
        )
    table = Table(found.gpu, found.multiprocessors)
    for row in found.families:
        key = Key(row.kernel, row.n, row.C, row.dtype, row.regime)
        order = row.order.replace(", ('batches', 1)", "")  # a knob that is gone, in older tables
        made = row.tilelang, row.driver, row.date
        table.families[key] = Family(key, order, *made, row.tokens, str(path))
    return table


def render(table: Table) -> str:
    """The file's text: a line an entry, sorted, so that equal tables are equal files."""
    families = []
    for key, family in sorted(table.families.items()):
        head = {"kernel": key.kernel, "n": key.n, "C": key.channels, "dtype": key.dtype}
        head |= {"regime": key.regime, "order": family.order, "tilelang": family.tilelang}
        head |= {"driver": family.driver, "date": family.date}
        entries = ",\n".join(
            f'   "{tokens}": {json.dumps(_values(entry))}'
            for tokens, entry in sorted(family.entries.items())
        )
        families.append(f'  {json.dumps(head)[:-1]}, "tokens": {{\n{entries}\n  }}}}')
    own = f' "gpu": {json.dumps(table.gpu)},\n "multiprocessors": {table.multiprocessors},\n'
    body = ",\n".join(families)
    return f'{{\n "schema": {SCHEMA},\n{own} "families": [\n{body}\n ]\n}}\n'


def _values(entry: Entry) -> dict[str, Any]:
    """What the file has of an entry."""
    values = asdict(replace(entry, source=""))
    return {name: value for name, value in values.items() if value != ""}


def check(path: Path, device: Device) -> None:
    """Fail if `update` would, before anything is measured: with TableError or OSError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            if not path.is_file():
                raise FileExistsError(errno.EEXIST, "something else of that name is there")
            with contextlib.suppress(UnreadableError):
                read(path, device)
    except OSError as error:
        raise type(error)(
            f"autotune: the table must be a file that can be written, got {path} "
            f"({error.strerror or error}); --output names another"
        ) from error


def update(path: Path, device: Device, families: Iterable[Family]) -> Table:
    """Merge families, iterated under the file's lock, into a file in one step; what it now holds.

    A file that cannot be read is kept beside the new one as `<name>.unreadable`, or `.unreadable.1`
    and so on. One of a newer schema or another GPU is left alone: TableError.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        table = Table(device.name, device.multiprocessors)
        if path.exists():
            try:
                table = read(path, device)
            except UnreadableError:
                names = (f"{path}.unreadable{f'.{i}' if i else ''}" for i in itertools.count())
                table.aside = next(place for name in names if not (place := Path(name)).exists())
                os.replace(path, table.aside)
        for family in families:
            known = table.families.get(family.key)
            table.families[family.key] = known.updated(family) if known else family
        write(path, render(table))
    return table

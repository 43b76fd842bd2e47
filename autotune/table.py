"""Tables of tuned configurations: the file format, where files are, reading, and safe writing.

A table belongs to one GPU model. It holds families: the entries of one kernel, n, C, dtype and
regime (few tokens or many), by number of tokens, a power of two. All entries of a family have one
reduction order, so a family is replaced as a whole by one of another order. README.md beside this
file has an example.
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
    """The configuration for one number of tokens.

    Attributes:
        config: as `configs.encode` returns it.
        default: whether this is the kernel's default, because nothing was faster.
        us: microseconds of a call.
        default_us: the same with the default, measured beside it.
        tilelang: the version that generated the code, where it is not the family's.
        source: the file that it was read from, where it is not the family's.
    """

    config: dict[str, Any]
    default: bool
    us: float
    default_us: float
    tilelang: str = ""
    source: str = ""


@dataclass
class Family:
    """Entries by number of tokens, and what they were measured with.

    Attributes:
        key: what they are for.
        order: how a token's sums are formed, the same for all of them; a text.
        tilelang: the version that generated the code.
        driver: the GPU driver's version, of the newest entry.
        date: of the newest entry's measurement, YYYY-MM-DD.
        entries: by number of tokens.
        source: the file that it was read from.
    """

    key: Key
    order: str
    tilelang: str
    driver: str
    date: str
    entries: dict[int, Entry] = field(default_factory=dict)
    source: str = ""

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
    """The families of one GPU model.

    Attributes:
        gpu: the vendor's name of the model.
        multiprocessors: how many it has; a model's name alone does not tell.
        families: by key.
        aside: where `update` has put a file that it could not read.
    """

    gpu: str
    multiprocessors: int
    families: dict[Key, Family] = field(default_factory=dict)
    aside: Path | None = None

    def add(self, families: Iterable[Family]) -> None:
        """Merge newer families into this table."""
        for family in families:
            known = self.families.get(family.key)
            self.families[family.key] = known.updated(family) if known else family


def user_folder() -> Path:
    """Where a user's own tables are."""
    import platformdirs

    return platformdirs.user_data_path("mhc_tile", appauthor=False) / "tables"


def user_path(device: Device) -> Path:
    """The file that the tuner writes for a GPU."""
    return user_folder() / f"{device.slug}.json"


def is_off() -> bool:
    """Whether tables are switched off by MHC_TILE_TABLES=off, or another word for no."""
    given = _given()
    return bool(given) and given.lower() in NO


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

    $MHC_TILE_TABLES names a file, or a folder of files by GPU; then come the user's data folder and
    what is shipped.
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
    """Read a table.

    Args:
        path: the file.
        device: the GPU that it must be for; any if None.

    Raises:
        TableError: It is corrupt, of a newer schema, or for another GPU.
        OSError: It cannot be read.
    """
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
        made = row.tilelang, row.driver, row.date
        table.families[key] = Family(key, row.order, *made, row.tokens, str(path))
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
    """Fail if `update` would, before anything is measured.

    Args:
        path: of the table.
        device: the GPU that is to be measured.

    Raises:
        TableError: The file has a newer schema or is for another GPU.
        OSError: It cannot be written.
    """
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
    """Merge families into a file, under its lock and in one step.

    A file that cannot be read is kept beside the new one as `<name>.unreadable`, or `.unreadable.1`
    and so on.

    Args:
        path: the file; it and its folder need not exist.
        device: the GPU that was measured.
        families: what was measured; iterated under the lock.

    Returns:
        What the file now holds.

    Raises:
        TableError: The file has a newer schema or is for another GPU: it is left alone.
        OSError: It cannot be written.
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
        table.add(families)
        write(path, render(table))
    return table

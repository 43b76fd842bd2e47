"""What the measuring commands share: checks before they start, result files, progress, errors."""

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mhc_tile.autotune._arguments import check_folder
from mhc_tile.autotune._extras import require

from .bench import Bench
from .records import Kind, Record, Row, escaped, read, slug, write


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Silence Inductor's advice on speed, which it repeats for every graph."""
    with warnings.catch_warnings():
        for start in ("TensorFloat32 tensor cores", r"\s*Online softmax is disabled"):
            warnings.filterwarnings("ignore", message=start, category=UserWarning)
        yield


# Checks before a command spends minutes; `command` starts each message. What does not fit is a
# ValueError, what cannot be written an OSError.


def result_path(kind: str, environment: Mapping[str, Any], wanted: Path | None) -> Path:
    """Where a result is written: the wanted path, or `<kind>-<gpu>.json`; its folder is made."""
    path = wanted or Path(f"{kind}-{slug(environment.get('gpu'))}.json")
    check_file("perf", "out", path)
    return path


def check_file(command: str, option: str, path: Path, *, replaced: bool = True) -> None:
    """Fail if the file of an option cannot be written; its folder is made.

    A file that is to be `replaced` must not be a device.
    """
    if os.path.isdir(path):  # Path.is_dir raises where permissions hide the path
        raise ValueError(f"{command}: --{option} must be a file, got the folder {path}")
    if os.path.exists(path) and not os.path.isfile(path):
        if replaced:
            raise ValueError(f"{command}: --{option} must be a file, got the device {path}")
        return
    check_folder(f"{command}: --{option}", path.parent, path)


def check_figures(command: str, folder: Path | None) -> None:
    """Fail if matplotlib is missing or the folder cannot be written; None asks for no pictures."""
    if folder:
        require("matplotlib", f"mhc-tile {command}", "perf")
        check_folder(f"{command}: --figures", folder)


def check_apart(command: str, read: Mapping[str, Path | None], written: Mapping[str, Path]) -> None:
    """Refuse to write over a file that is read, or to write one file twice.

    Files are by argument and option; None is not given.

    Example:
        >>> check_apart("perf compare", {"base": Path("a")}, {"json": Path("./a")})
        Traceback (most recent call last):
        ValueError: perf compare: --json must be another file than base, got a
    """
    taken = {path.resolve(): name for name, path in read.items() if path}
    for option, path in written.items():
        if os.path.exists(path) and not os.path.isfile(path):
            continue  # several results may go to one device
        if other := taken.get(path.resolve()):
            raise ValueError(f"{command}: --{option} must be another file than {other}, got {path}")
        taken[path.resolve()] = f"--{option}"


def check_positive(command: str, **values: int | None) -> None:
    """Refuse numbers below 1; None is an option that is not given.

    Example:
        >>> check_positive("perf run", turns=0)
        Traceback (most recent call last):
        ValueError: perf run: --turns must be at least 1, got 0
    """
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{command}: --{name} must be at least 1, got {value}")


def check_names(
    command: str, asked: Sequence[str], known: Sequence[str], here: Sequence[str]
) -> None:
    """Refuse beginnings of names that no contender has, or none that can be measured here.

    `known` are all names, `here` those that can be measured, packages with their versions.

    Example:
        >>> check_names("perf run", ["ours"], ["mhc_tile", "reference (eager)"], ["mhc_tile"])
        Traceback (most recent call last):
        ValueError: perf run: --contender must begin one of mhc_tile, reference (eager), got ours
    """
    for name in asked:
        if not any(one.startswith(name) for one in (*known, *here)):
            raise ValueError(
                f"{command}: --contender must begin one of {', '.join(known)}, got {name}"
            )
    if asked and not any(one.startswith(tuple(asked)) for one in here):
        raise ValueError(
            f"{command}: --contender must leave one that can be measured here, of "
            f"{', '.join(here)}, got {', '.join(asked)}"
        )


# Results and pictures.


def keep(
    kind: Kind,
    environment: Mapping[str, Any],
    parts: Iterable[Mapping[str, Row]],
    path: Path | None,
) -> Record:
    """Write the rows of each case by contender to `kept_at`; without rows no file is replaced.

    "cases_left" in the environment marks a run that has not ended.
    """
    rows = [row for part in parts for row in part.values()]
    record = Record(kind, dict(environment), rows)
    if path and (rows or not path.exists()):
        write(record, kept_at(record, path))
    if path and "cases_left" not in environment:
        _partial(path).unlink(missing_ok=True)
    return record


def kept_at(record: Record, path: Path) -> Path:
    """The file that `keep` writes.

    It is `<name>.partial.json` for a run that has not ended, if the path has the result of one that
    has, or any other file.
    """
    if "cases_left" not in record.environment or not path.exists():
        return path
    with contextlib.suppress(ValueError, OSError):
        if "cases_left" in read(path).environment:
            return path
    return _partial(path)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.stem}.partial{path.suffix}")


def say_unfinished(record: Record, path: Path | None) -> None:
    """Print how many cases are left and where the rows are, if the run did not end."""
    left = record.environment.get("cases_left")
    if path and left and record.rows:
        cases = f"{left} case{'s' * (left != 1)}"
        sys.stderr.write(f"\n{cases} left; what was measured is in {kept_at(record, path)}\n")


def draw(record: Record, folder: Path) -> None:
    """Save the pictures of a result."""
    from . import figures

    save(figures.draw(record), folder)


def save(drawn: Mapping[str, Any], folder: Path) -> None:
    """Save figures by name as PNG and print where; the folder is made."""
    from . import figures

    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figures.save(figure, folder / f"{name}.png", "png")
        say(f"picture: {folder / name}.png")
    if not drawn:
        say("no pictures: the result has too few numbers for any")


# Contenders that fail.


def one_line(error: BaseException) -> str:
    r"""The type of an error and the first line of its message.

    Example:
        >>> one_line(RuntimeError("it  broke\nin many ways")), one_line(AssertionError())
        ('RuntimeError: it broke', 'AssertionError')
    """
    text = escaped(str(error))
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def fault_of(error: Exception, what: str = "") -> dict[str, str]:
    """Status and fault of the row of a contender that failed, or for which `what` failed.

    Example:
        >>> fault_of(torch.OutOfMemoryError("CUDA out of memory"))["status"]
        'out of memory'
    """
    status = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
    return {"status": status, "fault": f"{what}: {one_line(error)}".removeprefix(": ")}


class UnusableError(RuntimeError):
    """An error left this process without a usable GPU."""


def recover(bench: Bench, row: Row) -> None:
    """Free what a failed contender has left.

    Raises:
        UnusableError: The GPU does not answer any more.
    """
    if not bench.recover():
        raise UnusableError(f"{row.contender} left the GPU unusable at {row.case}: {row.fault}")


# The terminal.


class Progress:
    """Progress on stderr: a bar on a terminal, elsewhere lines with the seconds."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._bar: Any = None

    def over(self, items: Iterable[Any], purpose: str) -> Iterator[Any]:
        """Iterate, with a bar on a terminal; `purpose` starts the message if tqdm is missing."""
        self._bar = require("tqdm", purpose, "perf").tqdm(items, disable=None)
        yield from self._bar

    @property
    def _has_bar(self) -> bool:
        return self._bar is not None and not self._bar.disable

    def say(self, text: str) -> None:
        """Name the case that begins."""
        if self._has_bar:
            self.detail(text)
        else:
            self.note(text)

    def detail(self, text: str) -> None:
        """Name a part of the case, on a terminal only."""
        if self._has_bar:
            self._bar.set_description(text)

    def note(self, text: str) -> None:
        """Print a line that stays, above the bar if there is one."""
        line = f"{time.monotonic() - self._start:7.1f} s  {text}"
        if self._has_bar:
            self._bar.write(line, file=sys.stderr)
        else:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


def say(*texts: str) -> None:
    """Print lines."""
    sys.stdout.write("".join(f"{text}\n" for text in texts))
    sys.stdout.flush()

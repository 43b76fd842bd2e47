"""What the measuring commands share: where a result goes, progress, errors in one line."""

import contextlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mhc_tile.autotune._extras import require

from .bench import Bench
from .records import Record, Row, read, slug, write


def result_path(kind: str, environment: Mapping[str, Any], wanted: Path | None) -> Path:
    """Where a result is written; its folder is made.

    Args:
        kind: "perf" or "overhead", the beginning of the file's name.
        environment: of the result.
        wanted: the path that was asked for, if any.

    Raises:
        ValueError: It is a folder or a device.
        OSError: It cannot be written.
    """
    path = wanted or Path(f"{kind}-{slug(environment.get('gpu'))}.json")
    check_file("perf", "out", path)
    return path


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Without Inductor's advice on speed, which it repeats for every graph."""
    with warnings.catch_warnings():
        for start in ("TensorFloat32 tensor cores", r"\s*Online softmax is disabled"):
            warnings.filterwarnings("ignore", message=start, category=UserWarning)
        yield


def check_file(command: str, option: str, path: Path, *, replaced: bool = True) -> None:
    """Fail if a file could not be written, before minutes are spent; its folder is made.

    Args:
        command: for the message.
        option: that names the file.
        path: of the file.
        replaced: whether a new file takes its place, which must not happen to a device.

    Raises:
        ValueError: It is a folder, or a device that would be replaced.
        OSError: It cannot be written.
    """
    if os.path.isdir(path):  # os.path says no of what may not be looked at, where Path raises
        raise ValueError(f"{command}: --{option} must be a file, got the folder {path}")
    if os.path.exists(path) and not os.path.isfile(path):
        if replaced:
            raise ValueError(f"{command}: --{option} must be a file, got the device {path}")
        return
    check_folder(command, option, path.parent, path)


def check_folder(command: str, option: str, folder: Path, path: Path | None = None) -> None:
    """Fail if no file could be written in a folder; it is made.

    Args:
        command: for the message.
        option: that names it, or a file in it.
        folder: where files are to be.
        path: what the option names, where it is a file.

    Raises:
        OSError: Nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = f"{command}: --{option} must be where files can be written, got {path or folder}"
        raise OSError(f"{what} ({error.strerror or error})") from error


def check_figures(command: str, folder: Path | None) -> None:
    """Fail if pictures could not be drawn or saved, before minutes are spent.

    Args:
        command: for the message.
        folder: of --figures; None asks for none.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: The folder cannot be made, or nothing written there.
    """
    if folder:
        require("matplotlib", f"mhc-tile {command}", "perf")
        check_folder(command, "figures", folder)


def check_apart(command: str, read: Mapping[str, Path | None], written: Mapping[str, Path]) -> None:
    """Refuse to write over a file that is read, or over another one that is written.

    Args:
        command: for the message.
        read: files by argument; None where it is not given.
        written: files by option.

    Raises:
        ValueError: Two are the same.

    Example:
        >>> check_apart("perf compare", {"base": Path("a")}, {"json": Path("./a")})
        Traceback (most recent call last):
        ValueError: perf compare: --json must be another file than base, got a
    """
    taken = {path.resolve(): name for name, path in read.items() if path}
    for option, path in written.items():
        if os.path.exists(path) and not os.path.isfile(path):
            continue  # a device takes everything
        if other := taken.get(path.resolve()):
            raise ValueError(f"{command}: --{option} must be another file than {other}, got {path}")
        taken[path.resolve()] = f"--{option}"


def keep(
    kind: str, environment: Mapping[str, Any], parts: Iterable[Mapping[str, Row]], path: Path | None
) -> Record:
    """Write what is measured so far; nothing yet does not replace a file.

    A run that has not ended does not take the place of a file of one that has, or of another kind
    of file: it is kept beside that one, as `kept_at` says, until it ends.

    Args:
        kind: of the result.
        environment: of the result.
        parts: rows by contender, of each case.
        path: of the file; None writes nothing.

    Raises:
        OSError: It cannot be written.
    """
    rows = [row for part in parts for row in part.values()]
    record = Record(kind, dict(environment), rows)
    if path and (rows or not path.exists()):
        write(record, kept_at(record, path))
    if path and "cases_left" not in environment:
        _beside(path).unlink(missing_ok=True)
    return record


def kept_at(record: Record, path: Path) -> Path:
    """The file that `keep` writes: beside the path while that holds something whole.

    Args:
        record: the result so far.
        path: where it is to be in the end.
    """
    if "cases_left" not in record.environment or not path.exists():
        return path
    try:
        whole = "cases_left" not in read(path).environment
    except (ValueError, OSError):
        whole = True  # whatever it is
    return _beside(path) if whole else path


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}.partial{path.suffix}")


def say_unfinished(record: Record, path: Path | None) -> None:
    """Say of a run that did not end where what was measured is; of one that did, nothing.

    Args:
        record: the result.
        path: as in `keep`.
    """
    left = record.environment.get("cases_left")
    if path and left and record.rows:
        cases = f"{left} case{'s' * (left != 1)}"
        sys.stderr.write(f"\n{cases} left; what was measured is in {kept_at(record, path)}\n")


def draw(record: Record, folder: Path) -> None:
    """Draw what a result has numbers for, as PNG, and say where.

    Args:
        record: the result.
        folder: where; it is made.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: They cannot be written.
    """
    from . import figures

    save(figures.draw(record), folder)


def save(drawn: Mapping[str, Any], folder: Path) -> None:
    """Save pictures as PNG and say where.

    Args:
        drawn: figures by name.
        folder: where; it is made.

    Raises:
        OSError: They cannot be written.
    """
    from . import figures

    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figures.save(figure, folder / f"{name}.png", "png")
        say(f"picture: {folder / name}.png")
    if not drawn:
        say("no pictures: the result has too few numbers for any")


def check_positive(command: str, **values: int | None) -> None:
    """Refuse numbers below 1; None is none.

    Raises:
        ValueError: One is below 1.

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
    """Refuse the name of a contender that there is not, instead of measuring nothing.

    Args:
        command: for the message.
        asked: beginnings of names.
        known: all of them, whatever is installed.
        here: those that can be measured, packages with their versions.

    Raises:
        ValueError: No known name begins like one that is asked for, or none of them is here.

    Example:
        >>> check_names("perf run", ["ours"], ["mhc_tile", "reference (eager)"], ["mhc_tile"])
        Traceback (most recent call last):
        ValueError: perf run: --contender must begin one of mhc_tile, reference (eager), got ours
    """
    for name in asked:
        if not any(one.startswith(name) for one in (*known, *here)):
            all_ = ", ".join(known)
            raise ValueError(f"{command}: --contender must begin one of {all_}, got {name}")
    if asked and not any(one.startswith(tuple(asked)) for one in here):
        raise ValueError(
            f"{command}: --contender must leave one that can be measured here, of "
            f"{', '.join(here)}, got {', '.join(asked)}"
        )


def one_line(error: BaseException) -> str:
    r"""An error's kind and the first line that it says.

    Example:
        >>> one_line(RuntimeError("it  broke\nin many ways"))
        'RuntimeError: it broke'
        >>> one_line(AssertionError())
        'AssertionError'
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def fault_of(error: Exception, what: str = "") -> dict[str, str]:
    """Status and fault of the row of a contender that failed.

    Args:
        error: that ended it.
        what: has failed, where it is not the contender itself.

    Example:
        >>> fault_of(torch.OutOfMemoryError("CUDA out of memory"))["status"]
        'out of memory'
    """
    full = isinstance(error, torch.OutOfMemoryError)
    fault = f"{what}: {one_line(error)}" if what else one_line(error)
    return {"status": "out of memory" if full else "failed", "fault": fault}


class UnusableError(RuntimeError):
    """After an error the GPU answers no more, in this process."""


def recover(bench: Bench, row: Row) -> None:
    """Go on after a contender failed.

    Args:
        bench: where.
        row: of the contender, with its fault.

    Raises:
        UnusableError: Nothing works on the GPU any more.
    """
    if not bench.recover():
        fault = f"{row.contender} left the GPU unusable at {row.case}: {row.fault}"
        raise UnusableError(fault)


class Progress:
    """What is under way, on stderr: a bar on a terminal, elsewhere a line with the seconds."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._bar: Any = None

    def over(self, items: Iterable[Any], purpose: str) -> Iterator[Any]:
        """Go through items, with a bar on a terminal.

        Args:
            items: what is gone through.
            purpose: the command, for a message that tqdm is missing.

        Raises:
            MissingExtraError: tqdm is not installed.
        """
        self._bar = require("tqdm", purpose, "perf").tqdm(items, disable=None)
        yield from self._bar

    def say(self, text: str) -> None:
        """Name what begins."""
        if self._bar is not None and not self._bar.disable:
            self._bar.set_description(text)
            return
        self.note(text)

    def detail(self, text: str) -> None:
        """Name a part of what is under way, on a terminal alone."""
        if self._bar is not None and not self._bar.disable:
            self._bar.set_description(text)

    def note(self, text: str) -> None:
        """Say what stays to be read, above the bar if there is one."""
        line = f"{time.monotonic() - self._start:7.1f} s  {text}"
        if self._bar is not None and not self._bar.disable:
            self._bar.write(line, file=sys.stderr)
            return
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def say(*texts: str) -> None:
    """Print lines."""
    sys.stdout.write("".join(f"{text}\n" for text in texts))
    sys.stdout.flush()

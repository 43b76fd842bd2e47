"""Metrics as JSON lines, valid whenever the process ends, and as TensorBoard events.

Each line is one object with "kind" and "step". The kinds: "run" (the configuration), "compile" (the
mode of torch.compile and the seconds it took), "step", "gain", "validation" and "warning". A value
that is not finite is written as null.
"""

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import msgspec

from mhc_tile.kernels.common.files import replacing

from .. import _checks
from .extras import require

Row = dict[str, Any]


class _Row(msgspec.Struct):
    kind: str
    step: int


class _Kind(msgspec.Struct, tag_field="kind", tag=lambda name: name[1:].lower()):
    """What a resumed run reads of the rows of a kind."""


class _Step(_Kind):
    step: int
    loss: float | None


class _Validation(_Kind):
    loss: float | None


class _Gain(_Kind):
    forward: Annotated[list[float | None], msgspec.Meta(min_length=1)]
    backward: Annotated[list[float | None], msgspec.Meta(min_length=1)]
    composite_forward: float | None
    composite_backward: float | None


class _Config(msgspec.Struct):
    steps: int


class _Run(_Kind):
    config: _Config


class _Compile(_Kind):
    pass


class _Warning(_Kind):
    pass


def check_rows(rows: list[Row], path: Path) -> None:
    """Check that the rows of a file have the values that a resumed run reads."""
    try:
        msgspec.convert(rows, list[_Step | _Validation | _Gain | _Run | _Compile | _Warning])
    except msgspec.ValidationError as error:
        raise ValueError(
            f"metrics: every row must have the values of its kind, got {error} of {str(path)!r}"
        ) from error


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [_finite(item) for item in value] if isinstance(value, list) else value


def to_json_line(row: Row) -> str:
    """One line of strict JSON, with its line end.

    Example:
        >>> to_json_line({"kind": "step", "step": 1, "loss": float("nan")}).strip()
        '{"kind": "step", "step": 1, "loss": null}'
    """
    return json.dumps({key: _finite(value) for key, value in row.items()}, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics file; a last line that a power failure cut off is left out.

    Raises:
        ValueError: Another line is damaged; the message names the file and the line.
    """
    lines = path.read_bytes().split(b"\n")
    return [_row(path, number, line) for number, line in enumerate(lines[:-1], 1)]


def _row(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
        msgspec.convert(row, _Row)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, another structure
        raise ValueError(
            f"metrics: every line must be a JSON object with 'kind' and 'step', "
            f"got {line[:40]!r} in line {number} of {str(path)!r}"
        ) from error
    return row


def write_whole(path: Path, text: str) -> None:
    """Replace a file of a folder that this process owns, in one step."""
    with replacing(path, path.with_suffix(".partial")) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def replace_metrics(path: Path, rows: list[Row]) -> None:
    """Write a whole metrics file, as `write_whole`."""
    write_whole(path, "".join(map(to_json_line, rows)))


def last_config(rows: list[Row]) -> dict[str, Any]:
    """The configuration in the last row of kind "run"; empty if there is none."""
    return next((row["config"] for row in reversed(rows) if row["kind"] == "run"), {})


def kept_rows(run_dir: Path, step: int) -> list[Row]:
    """The rows of a run up to a step, as `read_metrics`; none where there is no file."""
    path = run_dir / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return [row for row in rows if row["step"] <= step]


def require_tensorboard() -> ModuleType:
    """Import torch's TensorBoard writer, or name the package that it misses."""
    for module in ("numpy", "tensorboard"):
        require(module, "TensorBoard metrics")
    return require("torch.utils.tensorboard", "TensorBoard metrics")


class MetricsLog:
    """Appends rows to `<run_dir>/metrics.jsonl` and, on request, `<run_dir>/tensorboard`.

    The rows of later steps than `resumed_step`, 0 for a new run, are dropped first.
    """

    def __init__(self, run_dir: Path, *, resumed_step: int = 0, tensorboard: bool = False):
        self.path = run_dir / "metrics.jsonl"
        self.kept = kept_rows(run_dir, resumed_step)
        if self.path.exists():
            replace_metrics(self.path, self.kept)
        self.writer = None
        if tensorboard:
            module = require_tensorboard()
            with self._tensorboard():
                folder = str(run_dir / "tensorboard")
                self.writer = module.SummaryWriter(folder, purge_step=resumed_step + 1)
        # Unbuffered: rows are in the file when `write` returns.
        self.file = self.path.open("ab", buffering=0)
        self.size = self.path.stat().st_size

    def write(self, rows: list[Row]) -> None:
        """Append all rows, or none of them and raise an OSError."""
        rest = content = "".join(map(to_json_line, rows)).encode()
        if self.path.stat().st_size > self.size:  # half a line, which could not be removed
            self.file.truncate(self.size)
        try:
            while rest:  # an unbuffered write may take a part
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            with suppress(OSError):
                self.file.truncate(self.size)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.size += len(content)
        if self.writer is not None:
            with self._tensorboard():
                for row in rows:
                    for key, value in row.items():
                        if isinstance(value, float):
                            self.writer.add_scalar(f"{row['kind']}/{key}", value, row["step"])

    def close(self) -> None:
        """Close the files."""
        self.file.close()
        if self.writer is not None:
            with self._tensorboard():
                self.writer.close()

    @contextmanager
    def _tensorboard(self) -> Iterator[None]:
        """Continue without TensorBoard where it fails: the metrics file has all values."""
        try:
            yield
        except Exception as error:  # any exception of its writing thread
            self.writer = None
            warnings.warn(
                f"metrics: TensorBoard's events end here ({_checks.reason(error)})",
                RuntimeWarning,
                stacklevel=3,
            )

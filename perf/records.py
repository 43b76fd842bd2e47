"""A result of `mhc-tile perf`: what a file holds, where it was measured, reading and writing.

A file is JSON: schema, kind ("run" or "overhead"), environment, rows. A row is one contender on one
case; numbers that were not measured are null. Fields that later versions add are kept apart by the
schema's number: a file of another schema is refused by name.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from mhc_tile.autotune import table
from mhc_tile.autotune.device import Device
from mhc_tile.autotune.timing import Sample

SCHEMA = 1
KINDS = ("run", "overhead")
OURS = "mhc_tile"
STATUSES = ("ok", "wrong", "failed", "out of memory")


@dataclass(frozen=True)
class Row:
    """One contender on one case.

    Attributes:
        case: key of the case, the same in every run: "<op>/<mode>/<tokens>x<C>/n<n>/<dtype>" of a
            run, "<model>/<step>/B<batch>xS<sequence>" of an overhead.
        contender: "mhc_tile", "reference (eager)", ..., or a peer with its version.
        op: "merge", "pre", ..., or "step" of an overhead.
        mode: "forward", "training" (forward and backward) or "inference".
        tokens: T.
        hidden_size: C.
        streams: n.
        dtype: of the streams, such as "bfloat16".
        status: one of `STATUSES`; only "ok" has times.
        fault: why not, one line; empty where ok.
        error: relative RMS error against the reference in fp64, the largest over its results.
        us: microseconds of one call: median.
        p20: their 20th percentile.
        p80: their 80th percentile.
        turns: how many times were taken.
        captured: whether a CUDA graph was replayed; if not, the times include the host.
        bytes: that must move, by the kernels' `traffic()`.
        launches: GPU kernels of one call.
        host_us: microseconds before a call returns.
        peak_bytes: device memory above that before the call, at most.
        saved_bytes: kept between forward and backward, beyond the inputs.
        parts: microseconds of a step by what they are spent on (overhead).
        details: anything else, for people.
    """

    case: str
    contender: str
    op: str
    mode: str
    tokens: int
    hidden_size: int
    streams: int
    dtype: str
    status: str = "ok"
    fault: str = ""
    error: float | None = None
    us: float | None = None
    p20: float | None = None
    p80: float | None = None
    turns: int = 0
    captured: bool | None = None
    bytes: int | None = None
    launches: int | None = None
    host_us: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sample(self) -> Sample | None:
        """Median and spread, if it was timed."""
        if self.us is None or self.p20 is None or self.p80 is None:
            return None
        return Sample(self.us, self.p20, self.p80, self.turns)

    def timed(self, sample: Sample) -> "Row":
        """A copy with a median and its spread."""
        return self.replace(us=sample.us, p20=sample.low, p80=sample.high, turns=sample.turns)

    def replace(self, **changes: Any) -> "Row":
        """A copy with other values."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Record:
    """A result file.

    Attributes:
        kind: one of `KINDS`.
        environment: of `environment.environment()`; "gpu", "commit", "copy_bytes_per_s" and "date"
            are always there (null where there is none).
        rows: in the order of measuring.
    """

    kind: str
    environment: Mapping[str, Any]
    rows: Sequence[Row]

    def of(self, case: str) -> list[Row]:
        """The rows of one case."""
        return [row for row in self.rows if row.case == case]

    @property
    def cases(self) -> list[str]:
        """Keys of the cases, each once, in order."""
        return list(dict.fromkeys(row.case for row in self.rows))


def is_ours(contender: str) -> bool:
    """Whether a contender is this library, in whatever way it is compiled.

    Example:
        >>> is_ours("mhc_tile (layers compiled)"), is_ours("tile-kernels 1.0.0")
        (True, False)
    """
    return contender == OURS or contender.startswith(f"{OURS} (")


def plain_of(steps: Sequence[Row]) -> Row | None:
    """The step with plain residuals, the first whose contender says so; None without one.

    Args:
        steps: of one case of `mhc-tile perf overhead`.
    """
    return next((row for row in steps if row.contender.startswith("residual")), None)


def overhead(row: Row, steps: Sequence[Row]) -> float | None:
    """By how much a step is longer than the plain one: by its `details`, else by their times.

    Args:
        row: of `steps`.
        steps: of one case.
    """
    percent = row.details.get("overhead_percent")
    if isinstance(percent, (int, float)):
        return percent / 100
    plain = plain_of(steps)
    return row.us / plain.us - 1 if plain and plain.us and row.us else None


def percent_of_roofline(row: Row, copy_bytes_per_s: float | None) -> float | None:
    """How much of its time a row's bytes would take at the copy bandwidth, in percent.

    Args:
        row: with `bytes` and `us`, else the answer is None.
        copy_bytes_per_s: measured in the same run.

    Example:
        >>> row = Row("merge/forward", OURS, "merge", "forward", 1, 8, 4, "bfloat16", us=2.0,
        ...           bytes=4_000_000)
        >>> percent_of_roofline(row, 4e12)
        50.0
    """
    if not row.us or row.bytes is None or not copy_bytes_per_s:
        return None
    return 100 * row.bytes / copy_bytes_per_s * 1e6 / row.us


def slug(gpu: str | None) -> str:
    """A GPU's model as part of a file name; "cpu" for none.

    Args:
        gpu: the vendor's name of the model.

    Example:
        >>> slug("NVIDIA H200"), slug(None)
        ('nvidia_h200', 'cpu')
    """
    return Device(gpu, (0, 0), 0, 0, 0, "").slug if gpu else "cpu"


def write(record: Record, path: Path) -> None:
    """Write a result file, whole or not at all.

    Args:
        record: the result.
        path: of the file; its folder is made.

    Raises:
        OSError: It cannot be written.
    """
    text = json.dumps({"schema": SCHEMA, **dataclasses.asdict(record)}, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    table.write(path, text)


def read(path: Path) -> Record:
    """Read a result file.

    Args:
        path: of the file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no result of `mhc-tile perf`, or one of another schema.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "run.json"
        ...     write(Record("run", {"gpu": None}, []), path)
        ...     read(path).kind
        'run'
    """
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        what = f"perf: {path} must be a result file that can be read, got: {error.strerror}"
        raise type(error)(what) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"perf: {path} must be a JSON result file, got {error}") from error
    if not isinstance(data, dict) or "schema" not in data:
        raise ValueError(f"perf: {path} must be a result of `mhc-tile perf`, got other JSON")
    if data["schema"] != SCHEMA:
        raise ValueError(
            f"perf: {path} must have schema {SCHEMA}, got {data['schema']}: measure again, or read "
            f"it with the version of mhc_tile that wrote it"
        )
    if data.get("kind") not in KINDS:
        raise ValueError(f"perf: {path} must be of kind {KINDS}, got {data.get('kind')!r}")
    try:
        rows = [_checked(Row(**row)) for row in data["rows"]]
        return Record(data["kind"], _checked_environment(dict(data["environment"])), rows)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"perf: {path} must hold rows of schema {SCHEMA}, got {error}") from error


def _checked(row: Row) -> Row:
    """A row whose values are of their fields' types.

    Raises:
        ValueError: One is not.
    """
    for one in dataclasses.fields(Row):
        value = getattr(row, one.name)
        if not _is(value, one.type):
            raise ValueError(f"{one.name} {value!r} in the row of {row.contender}, {row.case}")
    if row.status not in STATUSES:
        raise ValueError(f"status {row.status!r} in the row of {row.contender}, {row.case}")
    return row


def _is(value: Any, kind: Any) -> bool:
    """Whether a value of a file may be a field's; an integer may be a float, a bool is neither."""
    if get_origin(kind) in (Mapping, dict):
        content = get_args(kind)[1]
        return isinstance(value, dict) and all(_is(v, content) for v in value.values())
    if get_origin(kind) is list:
        (content,) = get_args(kind)
        return isinstance(value, list) and all(_is(one, content) for one in value)
    kinds = get_args(kind) or (kind,)
    if Any in kinds or (value is None and type(None) in kinds):
        return True
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int):
        return int in kinds or float in kinds
    if isinstance(value, float):
        return float in kinds and math.isfinite(value)
    return isinstance(value, str) and str in kinds


_ENVIRONMENT = {
    "gpu": str | None,
    "copy_bytes_per_s": float | None,
    "cases_left": int | None,
    "packages": dict[str, Any],
    "settings": dict[str, Any],
    "tables": list[Any],
    "left_out": list[str],
}


def _checked_environment(values: dict[str, Any]) -> dict[str, Any]:
    """An environment in which what programs read is of its type.

    Raises:
        ValueError: Something is not.
    """
    for name, kind in _ENVIRONMENT.items():
        if name in values and not _is(values[name], kind):
            raise ValueError(f"environment {name} {values[name]!r}")
    return values

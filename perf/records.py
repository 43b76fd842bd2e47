"""A result of `mhc-tile perf`: what a file has, where it was measured, reading and writing.

A file is JSON: schema, kind ("run" or "overhead"), environment, rows. A row is one contender on one
case; numbers that were not measured are null. A file of another schema is refused.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from mhc_tile.autotune.device import Device
from mhc_tile.autotune.timing import Sample
from mhc_tile.kernels.common import files

SCHEMA = 1
OURS = "mhc_tile"
Kind = Literal["run", "overhead"]


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One contender on one case; times are in microseconds."""

    # The same in every run: "<op>/<mode>/<tokens>x<C>/n<n>/<dtype>" of a run,
    # "<model>/<step>/B<batch>xS<sequence>" of an overhead.
    case: str
    contender: str  # "mhc_tile", "reference (eager)", ..., or a peer with its version
    op: str  # "step" in an overhead
    mode: str  # "forward", "training" (forward and backward) or "inference"
    tokens: int
    hidden_size: int
    streams: int
    dtype: str  # of the streams, such as "bfloat16"
    status: Literal["ok", "wrong", "failed", "out of memory"] = "ok"  # only "ok" has times
    fault: str = ""  # one line
    error: float | None = None  # relative RMS against the reference in fp64, the largest
    us: float | None = None  # of one call, the median
    p20: float | None = None
    p80: float | None = None
    turns: int = 0
    captured: bool | None = None  # False: no CUDA graph was replayed, times include the host
    bytes: int | None = None  # that must move, by the kernels' `traffic()`
    launches: int | None = None  # GPU kernels of one call
    host_us: float | None = None  # before a call returns
    peak_bytes: int | None = None  # the most device memory of a call, above that before it
    saved_bytes: int | None = None  # kept for backward, beyond the inputs
    parts: dict[str, float] = msgspec.field(default_factory=dict)  # times of a step's parts
    details: dict[str, Any] = msgspec.field(default_factory=dict)

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
        return msgspec.structs.replace(self, **changes)


class Record(msgspec.Struct, frozen=True):
    """A result file; its rows are in the order of measuring."""

    kind: Kind
    environment: dict[str, Any]  # of `environment.environment()`
    rows: list[Row]

    def of(self, case: str) -> list[Row]:
        """The rows of one case."""
        return [row for row in self.rows if row.case == case]

    @property
    def cases(self) -> list[str]:
        """Keys of the cases, each once, in order."""
        return list(dict.fromkeys(row.case for row in self.rows))


class _Head(msgspec.Struct):
    """What a file of any schema has."""

    schema: int


class _Environment(msgspec.Struct):
    """What programs read of an environment, where it is there; the rest is for people."""

    gpu: str | None = None
    copy_bytes_per_s: float | None = None
    cases_left: int | None = None
    packages: dict[str, Any] = msgspec.field(default_factory=dict)
    settings: dict[str, Any] = msgspec.field(default_factory=dict)
    tables: list[Any] = msgspec.field(default_factory=list)
    left_out: list[str] = msgspec.field(default_factory=list)


def is_ours(contender: str) -> bool:
    """Whether a contender is this library, in whatever way it is compiled.

    Example:
        >>> is_ours("mhc_tile (layers compiled)"), is_ours("tile-kernels 1.0.0")
        (True, False)
    """
    return contender == OURS or contender.startswith(f"{OURS} (")


def plain_of(steps: Sequence[Row]) -> Row | None:
    """The first step of a case that has plain residuals; None without one."""
    return next((row for row in steps if row.contender.startswith("residual")), None)


def overhead(row: Row, steps: Sequence[Row]) -> float | None:
    """By how much a step of a case is longer than the plain one: by `details`, else by times."""
    percent = row.details.get("overhead_percent")
    if isinstance(percent, (int, float)):
        return percent / 100
    plain = plain_of(steps)
    return row.us / plain.us - 1 if plain and plain.us and row.us else None


def percent_of_roofline(row: Row, copy_bytes_per_s: float | None) -> float | None:
    """The time of a row's bytes at the copy bandwidth of the same run, in percent of its time.

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
    """A GPU's name as part of a file name; "cpu" for None.

    Example:
        >>> slug("NVIDIA H200"), slug(None)
        ('nvidia_h200', 'cpu')
    """
    return Device(gpu, (0, 0), 0, 0, 0).slug if gpu else "cpu"


def escaped(text: str) -> str:
    r"""Text that a result can have: bytes of a file name that are not UTF-8 become escapes.

    Example:
        >>> print(escaped("caf\udce9.json"))
        caf\udce9.json
    """
    return text.encode(errors="backslashreplace").decode()


def write(record: Record, path: Path) -> None:
    """Write a result file, whole or not at all; its folder is made.

    Raises:
        OSError: It cannot be written.
    """
    content = msgspec.json.encode({"schema": SCHEMA, **msgspec.structs.asdict(record)})
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, msgspec.json.format(content, indent=1).decode() + "\n")


def read(path: Path) -> Record:
    """Read a result file.

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
        content = path.read_bytes()
        schema = msgspec.json.decode(content, type=_Head).schema
        if schema == SCHEMA:
            record = msgspec.json.decode(content, type=Record)
            msgspec.convert({"environment": record.environment}, dict[str, _Environment])
            return record
    except OSError as error:
        what = f"perf: {path} must be a result file that can be read, got: {error.strerror}"
        raise type(error)(what) from error
    except (msgspec.MsgspecError, RecursionError) as error:
        what = f"perf: {path} must be a result of `mhc-tile perf` in JSON, got: {error}"
        raise ValueError(what) from error
    raise ValueError(
        f"perf: {path} must have schema {SCHEMA}, got {schema}: measure again, or read it with the "
        "version of mhc_tile that wrote it"
    )

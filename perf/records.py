"""A result of `mhc-tile perf`: what a file holds, where it was measured, reading and writing.

A file is JSON: schema, kind ("run" or "overhead"), environment, rows. A row is one contender on one
case; numbers that were not measured are null. Fields that later versions add are kept apart by the
schema's number: a file of another schema is refused by name.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import mhc_tile
from mhc_tile.autotune.device import Device, describe, driver_version
from mhc_tile.autotune.timing import Sample

SCHEMA = 1
KINDS = ("run", "overhead")
OURS = "mhc_tile"
STATUSES = ("ok", "wrong", "failed", "out of memory", "absent")
PACKAGES = ("triton", "tilelang", "tile-kernels", "liger-kernel", "hyper-connections")


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
        environment: of `environment()`; "gpu", "commit", "copy_bytes_per_s" and "date" are always
            there (null where there is none).
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


def plain_of(steps: Sequence[Row]) -> Row | None:
    """The step with plain residuals, the first whose contender says so; None without one.

    Args:
        steps: of one case of `mhc-tile perf overhead`.
    """
    return next((row for row in steps if row.contender.startswith("residual")), None)


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
    if row.us is None or row.bytes is None or not copy_bytes_per_s:
        return None
    return 100 * row.bytes / copy_bytes_per_s * 1e6 / row.us


def environment(copy_bytes_per_s: float | None, device: str = "cuda") -> dict[str, Any]:
    """Where and with what a run is made.

    Args:
        copy_bytes_per_s: bytes read and written a second by a large copy, of this run.
        device: "cuda" or "cpu".
    """
    gpu = describe(torch.cuda.current_device()) if device == "cuda" else None
    return {
        "gpu": gpu.name if gpu else None,
        "device": str(gpu) if gpu else f"CPU, {platform.machine()}, {os.cpu_count()} cores",
        "driver": driver_version() if gpu else None,
        "copy_bytes_per_s": copy_bytes_per_s,
        "mhc_tile": mhc_tile.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: version(name) for name in PACKAGES},
        "command": ["mhc-tile", *sys.argv[1:]],
    }


def slug(gpu: str | None) -> str:
    """A GPU's model as part of a file name; "cpu" for none.

    Args:
        gpu: the vendor's name of the model.

    Example:
        >>> slug("NVIDIA H200"), slug(None)
        ('nvidia_h200', 'cpu')
    """
    return Device(gpu, (0, 0), 0, 0, 0, "").slug if gpu else "cpu"


def version(package: str) -> str | None:
    """An installed package's version; None if it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
        rows = [Row(**row) for row in data["rows"]]
        return Record(data["kind"], dict(data["environment"]), rows)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"perf: {path} must hold rows of schema {SCHEMA}, got {error}") from error


def _commit() -> str | None:
    """The checkout's commit, with "+" behind it if files differ from it; None outside of one."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return result.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None

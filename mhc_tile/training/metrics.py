"""Metrics as JSON lines, valid whenever the process ends, and as TensorBoard events.

Each line is one object with "kind" and "step". The kinds: "run" (the configuration), "step",
"gain", "validation" and "warning". A value that is not finite is written as null.
"""

import json
import math
from pathlib import Path
from typing import Any

from .extras import require

Row = dict[str, Any]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def to_json_line(row: Row) -> str:
    """One line of strict JSON, with its line end.

    Example:
        >>> to_json_line({"kind": "step", "step": 1, "loss": float("nan")}).strip()
        '{"kind": "step", "step": 1, "loss": null}'
    """
    return json.dumps({key: _finite(value) for key, value in row.items()}, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics file; a last line that was cut off by a power failure is left out.

    Args:
        path: of the file.

    Returns:
        One row per line.

    Raises:
        ValueError: Another line is damaged; the message names the file and the line.
    """
    lines = path.read_bytes().split(b"\n")
    return [_row(path, number, line) for number, line in enumerate(lines[:-1], 1)]


def _row(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
    except ValueError:  # bad JSON or bad UTF-8
        row = None
    if not isinstance(row, dict) or "kind" not in row or not isinstance(row.get("step"), int):
        raise ValueError(
            f"metrics: every line must be a JSON object with 'kind' and 'step', "
            f"got {line[:40]!r} in line {number} of {str(path)!r}"
        )
    return row


def replace_metrics(path: Path, rows: list[Row]) -> None:
    """Write a whole metrics file at once: the old content or the new one, never a part."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(map(to_json_line, rows)), encoding="utf-8")
    partial.replace(path)


class MetricsLog:
    """Appends rows to `<run_dir>/metrics.jsonl` and, on request, to TensorBoard.

    Args:
        run_dir: of the run; exists.
        resumed_step: rows of later steps are dropped first; 0 for a new run.
        tensorboard: also write `<run_dir>/tensorboard`.

    Raises:
        RuntimeError: TensorBoard is asked for and not installed.
    """

    def __init__(self, run_dir: Path, *, resumed_step: int = 0, tensorboard: bool = False):
        path = run_dir / "metrics.jsonl"
        self.kept: list[Row] = []
        if path.exists():
            self.kept = [row for row in read_metrics(path) if row["step"] <= resumed_step]
            replace_metrics(path, self.kept)
        self.writer = None
        if tensorboard:
            module = require("torch.utils.tensorboard", "TensorBoard metrics")
            folder = str(run_dir / "tensorboard")
            self.writer = module.SummaryWriter(folder, purge_step=resumed_step + 1)
        # Unbuffered: rows reach the file whole, in one system call.
        self.file = path.open("ab", buffering=0)

    def write(self, rows: list[Row]) -> None:
        """Append rows."""
        if rows:
            self.file.write("".join(map(to_json_line, rows)).encode())
        if self.writer is not None:
            for row in rows:
                for key, value in row.items():
                    if isinstance(value, float):
                        self.writer.add_scalar(f"{row['kind']}/{key}", value, row["step"])

    def close(self) -> None:
        """Close the files."""
        self.file.close()
        if self.writer is not None:
            self.writer.close()

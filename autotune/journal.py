"""What has been measured so far: a file to which every outcome is appended as soon as it is known.

A run that is killed loses the candidate in flight; the next one goes on after it. A line is one
write, so several tuners may share a file. Lines of other kernel sources or another TileLang are
ignored.
"""

import datetime
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec

from .device import Device
from .measuring import Outcome
from .problems import Problem


def folder() -> Path:
    """Where journals, logs and reports are."""
    import platformdirs

    return platformdirs.user_cache_path("mhc_tile", appauthor=False) / "autotune"


def path_of(device: Device) -> Path:
    """The journal of a GPU model."""
    return folder() / f"{device.slug}_{device.multiprocessors}.jsonl"


def name_of(config: dict[str, Any]) -> str:
    """An encoded configuration as a key."""
    return json.dumps(config, sort_keys=True)


class _Line(msgspec.Struct, omit_defaults=True):
    """A bandwidth, a problem's outcome, or whether a problem is complete."""

    code: str
    bandwidth: float | None = None
    problem: Problem | None = None
    config: dict[str, Any] | None = None
    outcome: Outcome | None = None
    complete: bool | None = None
    date: str = "unknown"
    driver: str = "unknown"


_DECODER = msgspec.json.Decoder(_Line)


class Journal:
    """Outcomes by problem and configuration, in memory and in a file.

    Neither file nor folder need exist. `code` is the `compiling.fingerprint` that was measured.
    """

    def __init__(self, path: Path, code: str) -> None:
        self.path = path
        # What is known of a problem, by `name_of` the configuration.
        self.outcomes: dict[Problem, dict[str, Outcome]] = defaultdict(dict)
        # Date (YYYY-MM-DD) and driver of the problems that were measured to the end.
        self.complete: dict[Problem, tuple[str, str]] = {}
        self.bandwidth = 0.0  # bytes per second of a large copy; 0 if it was never measured
        self._code = code
        self._seen = 0  # bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.refresh()
        if os.fstat(self._file).st_size > self._seen:  # the writer of the last line was killed
            os.write(self._file, b"\n")

    def refresh(self) -> None:
        """Read what has been appended since, by this process or another."""
        with open(self.path, "rb") as file:
            file.seek(self._seen)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._seen += len(whole)
        for line in whole.splitlines():
            self._read(line)

    def add(self, problem: Problem, config: dict[str, Any], outcome: Outcome) -> None:
        """Keep an outcome; a later one replaces an earlier one."""
        self._append(problem=problem, config=config, outcome=outcome)

    def finish(self, problem: Problem, driver: str = "") -> None:
        """Note that a problem is measured to the end, today, with this version of the driver."""
        date = datetime.date.today().isoformat()
        self._append(problem=problem, complete=True, date=date, driver=driver)

    def forget(self, problem: Problem) -> None:
        """Note that what came before is not to be used."""
        self._append(problem=problem, complete=False)

    def note_bandwidth(self, bandwidth: float) -> None:
        """Keep the bandwidth of a large copy."""
        self._append(bandwidth=bandwidth)

    def _append(self, **values: Any) -> None:
        line = msgspec.json.encode(_Line(self._code, **values)) + b"\n"
        if os.write(self._file, line) != len(line):  # a full disk; else it reaches the file whole
            os.write(self._file, b"\n")  # the next line is one of its own
            raise OSError(
                f"autotune: the journal must take a whole line, got a part of it in {self.path}"
            )
        self.refresh()

    def _read(self, text: bytes) -> None:
        try:
            line = _DECODER.decode(text)
        except (ValueError, RecursionError):
            return  # the torn line of a writer that was killed
        if line.code != self._code:
            return
        if line.bandwidth is not None:
            self.bandwidth = line.bandwidth
        elif line.problem and line.outcome:
            self.outcomes[line.problem][name_of(line.config or {})] = line.outcome
        elif line.problem and line.complete:
            self.complete[line.problem] = line.date, line.driver
        elif line.problem:
            self.complete.pop(line.problem, None)
            self.outcomes.pop(line.problem, None)

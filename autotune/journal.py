"""What has been measured so far: a file to which every outcome is appended as soon as it is known.

A run that is killed loses the candidate in flight; the next one goes on behind it. A line is one
write, so several tuners may share a file. Lines of other kernel sources or another TileLang are
passed over.
"""

import datetime
import json
import os
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .device import Device
from .measuring import Outcome
from .problems import Problem
from .timing import Sample


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


class Journal:
    """Outcomes by problem and configuration, in memory and in a file.

    Args:
        path: of the file; it and its folder need not exist.
        code: what the outcomes are of, as `compiling.fingerprint`.

    Attributes:
        bandwidth: bytes per second of a large copy, measured last; 0 if it never was.
    """

    def __init__(self, path: Path, code: str) -> None:
        self.path = path
        self._code = code
        self._outcomes: dict[Problem, dict[str, Outcome]] = defaultdict(dict)
        self._complete: dict[Problem, tuple[str, str]] = {}
        self._seen = 0  # bytes
        self.bandwidth = 0.0
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

    def outcomes(self, problem: Problem) -> dict[str, Outcome]:
        """What is known of a problem, by `name_of` the configuration."""
        return self._outcomes[problem]

    def complete(self, problem: Problem) -> bool:
        """Whether a problem was measured to the end."""
        return problem in self._complete

    def problems(self) -> list[Problem]:
        """Those that were measured to the end."""
        return sorted(self._complete)

    def measured(self, problem: Problem) -> tuple[str, str]:
        """When a complete problem was measured, YYYY-MM-DD, and with which driver."""
        return self._complete[problem]

    def add(self, problem: Problem, config: dict[str, Any], outcome: Outcome) -> None:
        """Keep an outcome; a later one replaces an earlier one."""
        self._append({"config": config, "outcome": asdict(outcome)}, problem)

    def finish(self, problem: Problem, driver: str = "") -> None:
        """Note that a problem is measured to the end, today, with this version of the driver."""
        date = datetime.date.today().isoformat()
        self._append({"complete": True, "date": date, "driver": driver}, problem)

    def forget(self, problem: Problem) -> None:
        """Note that what came before is not to be used."""
        self._append({"complete": False}, problem)

    def note_bandwidth(self, bandwidth: float) -> None:
        """Keep the bandwidth of a large copy."""
        self._write({"code": self._code, "bandwidth": bandwidth})

    def _append(self, values: dict[str, Any], problem: Problem) -> None:
        self._write({"code": self._code, "problem": asdict(problem), **values})

    def _write(self, values: dict[str, Any]) -> None:
        line = json.dumps(values).encode() + b"\n"
        if os.write(self._file, line) != len(line):  # a full disk; else it reaches the file whole
            os.write(self._file, b"\n")  # the next line is one of its own
            raise OSError(
                f"autotune: the journal must take a whole line, got a part of it in {self.path}"
            )
        self.refresh()

    def _read(self, line: bytes) -> None:
        try:
            values = json.loads(line)
            if values["code"] != self._code:
                return
            if "bandwidth" in values:
                self.bandwidth = float(values["bandwidth"])
                return
            problem = Problem(**values["problem"])
            if "outcome" in values:
                fields = dict(values["outcome"])
                sample = fields.pop("sample")
                outcome = Outcome(**fields, sample=Sample(**sample) if sample else None)
                self._outcomes[problem][name_of(values["config"])] = outcome
            elif values["complete"]:
                measured = str(values.get("date", "unknown")), str(values.get("driver", "unknown"))
                self._complete[problem] = measured
            else:
                self._complete.pop(problem, None)
                self._outcomes.pop(problem, None)
        except (ValueError, KeyError, TypeError):
            return  # the torn line of a writer that was killed

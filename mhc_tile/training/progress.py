"""The output of a command while it works. A stream that takes nothing raises nothing."""

import os
import sys
import time
from contextlib import suppress
from typing import Any, TextIO

from .extras import require
from .metrics import Row

_SECONDS = 30.0  # between two lines where there is no terminal
_SHOWN = {  # kind of a row: the name, key and format of its value
    "step": ("loss", "loss", ".3f"),
    "validation": ("validation", "loss", ".3f"),
    "gain": ("composite gain", "composite_forward", ".3g"),
}


def say(text: str = "") -> None:
    """Write a line to stdout, if it takes it."""
    write_line(sys.stdout, text)


def write_line(stream: TextIO, text: str) -> None:
    """Write a line to a stream, or nothing where the stream is full or closed.

    Characters that the stream's encoding lacks are escaped.
    """
    with suppress(OSError, ValueError):  # ValueError: it has been closed
        try:
            stream.write(text + "\n")
        except UnicodeEncodeError:
            stream.write(text.encode("ascii", "backslashreplace").decode() + "\n")
        stream.flush()


def settle(stream: TextIO) -> None:
    """Drop buffered text that a stream cannot take: at its end Python would exit with 120."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except ValueError:  # it has been closed
        pass


class Progress:
    """Shows the metrics rows of a run: a bar on a terminal, elsewhere a line now and then.

    The number of `steps` is read from the rows if None; `corpus` has it say what was read.
    """

    def __init__(self, name: str, steps: int | None, *, corpus: bool = True):
        self.name, self.steps, self.step = name, steps, 0
        self.shown: dict[str, str] = {}
        self._corpus, self._due = corpus, time.monotonic()
        self._bar: Any = None
        with suppress(OSError, ValueError):  # stderr is closed or gone
            if sys.stderr.isatty():
                tqdm = require("tqdm", "progress bar").tqdm
                self._bar = tqdm(total=steps, desc=f"{name:>10}", unit="step")

    def __call__(self, rows: list[Row]) -> None:
        """Show rows."""
        for row in rows:
            self._take(row)
        runs = [row["corpus"] for row in rows if row["kind"] == "run" and "corpus" in row]
        if runs and self._corpus:
            self._say(_describe(runs[-1]))
            self._corpus = False
        if rows and rows[-1]["kind"] == "compile":  # earlier ones are of the run before a resume
            self._say(_describe_compile(rows[-1]))
        if rows and (rows[-1]["kind"], rows[-1]["step"]) == ("validation", self.steps):
            self._close()
        elif self._bar is not None:
            self._draw()
        elif self.step and time.monotonic() >= self._due:
            of = "" if self.steps is None else f" of {self.steps}"
            say(f"{self.name}: step {self.step}{of}, {self._values()}")
            self._due = time.monotonic() + _SECONDS

    def _take(self, row: Row) -> None:
        kind = row["kind"]
        if kind == "run":
            self.steps = row["config"]["steps"]
        elif kind == "warning":
            self._say(row["message"])
        elif kind in _SHOWN:
            name, key, form = _SHOWN[kind]
            self.shown[name] = "not finite" if row[key] is None else f"{row[key]:{form}}"
            self.step = row["step"] if kind == "step" else self.step

    def _values(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.shown.items())

    def _say(self, text: str) -> None:
        with suppress(OSError, ValueError, AttributeError):  # there may be no bar
            self._bar.clear()
        say(f"{self.name}: {text}")

    def _draw(self) -> None:
        try:
            self._bar.total = self.steps
            self._bar.update(self.step - self._bar.n)
            self._bar.set_postfix(self.shown)
        except (OSError, ValueError):  # the terminal is gone
            self._bar = None

    def _close(self) -> None:
        if self._bar is None:
            say(f"{self.name}: {self._values()}")
        else:
            self._draw()
            with suppress(OSError, ValueError, AttributeError):
                self._bar.close()


def _describe_compile(row: Row) -> str:
    graphs = " for CUDA graphs" if row["mode"] == "graphs" else ""
    if row["seconds"] is None:
        return f"compiling forward and backward{graphs}"
    return f"compiled forward and backward{graphs} in {row['seconds']:.0f} s"


def _describe(corpus: dict[str, Any]) -> str:
    files = "1 file" if corpus["files"] == 1 else f"{corpus['files']:,} files"
    left_out = ""
    if corpus["left_out"]:
        left_out = f", {corpus['left_out']:,} left out (hidden, empty, not UTF-8 text, or of a run)"
    return (
        f"{files} read from {corpus['name']}{left_out}: "
        f"{corpus['train']:,} bytes to train on, {corpus['validation']:,} held out"
    )

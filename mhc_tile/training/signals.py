"""Signals that ask a run to end: Ctrl-C, and those of schedulers and of closing terminals."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ENDING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP came; the first argument is its number."""


def exit_code(number: int) -> int:
    """What a shell reports for a process that this signal ended."""
    return 128 + number


@contextmanager
def _handling(handler: Any, numbers: list[signal.Signals]) -> Iterator[dict[signal.Signals, Any]]:
    """Handle signals in this block, which gets the handlers from before.

    Only the main thread can. A signal that is ignored, as in a background job or under nohup, or
    whose handler is not Python's, keeps its handler.
    """
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    keeping = (signal.SIG_IGN, None)
    previous = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) not in keeping}
    for number in previous:
        signal.signal(number, handler)
    try:
        yield previous
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class StopRequest:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP in a block into a request to stop.

    A second Ctrl-C does what it did before the block. Further SIGTERM and SIGHUP change nothing:
    senders often reach a process twice, by itself and by its group.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> "StopRequest":
        self._block = _handling(self._request, _ENDING)
        self._previous = self._block.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._block.__exit__(*error)

    def _request(self, number: int, _frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
        if number == signal.SIGINT:
            signal.signal(number, self._previous[signal.SIGINT])


@contextmanager
def raising() -> Iterator[None]:
    """Raise `Ended` in the main thread when SIGTERM or SIGHUP comes in this block."""

    def end(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # it may come twice
        raise Ended(number)

    with _handling(end, [number for number in _ENDING if number != signal.SIGINT]):
        yield

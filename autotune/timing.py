"""Times that can be compared: medians with a spread, taken in turns, and what counts as faster.

A timer is a function that runs a call once or more and returns microseconds of one call. Candidates
take turns with the default, so that a clock that drifts drifts for all of them.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Timer = Callable[[], float]

MARGIN = 0.015  # of the slower: differences below are not told apart
SLOW = 1.2  # times the fastest impression, beyond which a candidate is not measured further
FIRST_TURNS = 3
TURNS = 20
_SPREAD = 1.683  # standard deviations between the 20th and the 80th percentile
_MEDIAN = 1.253  # standard error of a median by that of a mean


@dataclass(frozen=True)
class Sample:
    """Microseconds of a call: median, 20th and 80th percentile of some turns."""

    us: float
    low: float
    high: float
    turns: int

    @property
    def error(self) -> float:
        """The standard error of the median by the percentiles: one slow turn does not widen it.

        Example:
            >>> round(Sample(100, 99, 101, 16).error, 2)
            0.37
        """
        return _MEDIAN * (self.high - self.low) / _SPREAD / math.sqrt(max(self.turns, 1))


def summarise(times: Sequence[float]) -> Sample:
    """Median and spread of at least one time."""
    ordered = sorted(times)
    last = len(ordered) - 1
    low, high = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    return Sample(statistics.median(ordered), low, high, len(ordered))


def faster(one: Sample, other: Sample) -> bool:
    """Whether one is faster beyond the margin and beyond both spreads; measured in turns."""
    return one.us < other.us * (1 - MARGIN) and one.high < other.low


def impression(timer: Timer) -> float:
    """Microseconds of a call by a few turns, after one to warm up."""
    timer()
    return statistics.median(timer() for _ in range(FIRST_TURNS))


def rounds(
    timers: Mapping[str, Timer], turns: int, failed: Callable[[str, Exception], None]
) -> Iterator[dict[str, Sample]]:
    """Let timers take turns, each round beginning with another one, every second one backwards.

    A GPU's speed depends for a moment on what it has just run, so no timer always follows the same.
    After each round, yields the samples so far. A timer that raises is reported to `failed` and
    takes no further turns.
    """
    times: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(turns):
        names, way = list(times), -1 if turn % 2 else 1
        for place in range(len(names)):
            name = names[(turn + way * place) % len(names)]
            try:
                times[name].append(timers[name]())
            except Exception as error:
                del times[name]
                failed(name, error.with_traceback(None))  # its frames hold memory
        yield {name: summarise(values) for name, values in times.items()}


def interleaved(timers: Sequence[Timer], turns: int = TURNS) -> list[Sample]:
    """A sample of each timer, which take turns as in `rounds`; what a timer raises is raised."""

    def failed(name: str, error: Exception) -> None:
        raise error

    *_, samples = rounds({str(i): timer for i, timer in enumerate(timers)}, turns, failed)
    return list(samples.values())

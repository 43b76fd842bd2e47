"""A GPU that is not there: times and mistakes by configuration, in a real worker process.

$FAKE_BENCH is JSON, {"160,1": 12.5, "96,2": "hangs"}: microseconds of the configuration with these
values, or what it does wrong. Others take 10 us. $FAKE_BENCH_LOG is a file to which every
configuration that runs is appended.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mhc_tile.autotune.problems import Problem
from mhc_tile.autotune.timing import FIRST_TURNS


def name(config: Any) -> str:
    """The values of a configuration, as $FAKE_BENCH has them."""
    return ",".join(str(value) for value in vars(config).values())


def bandwidth() -> float:
    """Bytes per second."""
    return 4e12


def no_bandwidth() -> float:
    """A GPU whose memory is full."""
    raise RuntimeError("out of memory")


def echo() -> Callable[[str], Iterator[str]]:
    """A handler of a worker process that answers a task with itself, or does what it says."""

    def handle(task: str) -> Iterator[str]:
        if task == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        if task == "exits":
            os._exit(3)
        if task == "hangs":
            time.sleep(3600)
        print("a line of output")  # noqa: T201 - what a worker prints goes to its log
        yield f"{task} by {os.getpid()}"

    return handle


class FakeBench:
    """The same results for every configuration, unless one is planted that is wrong."""

    def __init__(self, problem: Problem) -> None:
        self._planted = json.loads(os.environ.get("FAKE_BENCH", "{}"))
        self._broken = False
        values = torch.arange(1, 65, dtype=torch.float32)
        self._right = (values, values / problem.tokens)

    def results(self, config: Any) -> Iterator[tuple[Tensor, ...]]:
        """Three times the results."""
        if log := os.environ.get("FAKE_BENCH_LOG"):
            with open(log, "a") as file:
                file.write(f"{name(config)}\n")
        does = self._planted.get(name(config))
        if does == "hangs":
            time.sleep(3600)
        if does == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        if does in ("crashes", "breaks the GPU"):
            self._broken = does == "breaks the GPU"
            raise RuntimeError("an illegal memory access\nwas encountered")
        if does == "asserts":
            raise AssertionError
        for turn in range(3):
            values, sums = (value.clone() for value in self._right)
            if does == "is wrong":
                values[7] += 1
            if does == "leaves a hole":
                sums[-1] = float("nan")
            if does == "races" and turn == 2:
                values[7] *= 1 + 1e-6
            if does == "adds in another order":
                values, sums = values * (1 + 1e-6), sums * (1 + 1e-6)
            if does == "rounds the sums":
                sums *= 1 + 1e-6
            yield values, sums

    def timer(self, config: Any) -> Callable[[], float]:
        """The planted time."""
        planted = self._planted.get(name(config), 10.0)
        if planted == "tires":
            return self._tiring()
        return lambda: planted if isinstance(planted, float) else 10.0

    def _tiring(self) -> Callable[[], float]:
        turns = iter([9.0] * (FIRST_TURNS + 1))

        def turn() -> float:
            for us in turns:
                return us
            raise RuntimeError("unspecified launch failure")

        return turn

    def healthy(self) -> bool:
        """Whether no configuration has broken it."""
        return not self._broken

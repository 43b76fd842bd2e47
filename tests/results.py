"""Results of `mhc-tile perf` that nobody measured, for the tests of what reads them."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from mhc_tile.autotune.timing import summarise
from mhc_tile.perf.records import OURS, Record, Row

ENVIRONMENT: dict[str, Any] = {
    "gpu": "NVIDIA H200",
    "device": "NVIDIA H200, compute capability 9.0, 132 multiprocessors, 140 GiB, L2 63 MB",
    "driver": "580.65.06",
    "copy_bytes_per_s": 4.2e12,
    "mhc_tile": "0.1.0",
    "commit": "0123456789ab",
    "date": "2026-11-24T12:00:00+00:00",
    "python": "3.12.3",
    "torch": "2.11.0",
    "cuda": "13.0",
    "packages": {"tilelang": "0.1.15", "triton": "3.6.0", "liger-kernel": None},
    "command": ["mhc-tile", "perf", "run"],
}
OPS = ("merge", "pre", "pre_apply", "mapping", "sinkhorn", "boundary")
SHAPES = ((64, 7168), (4096, 7168), (8192, 1280), (8192, 2560), (8192, 4096))
MODES = ("forward", "training")


def row(
    us: float | None = 90.0,
    *,
    case: str = "merge/forward/8192x2560/n4/bfloat16",
    contender: str = OURS,
    spread: float = 0.01,
    **more: Any,
) -> Row:
    """A row whose turns lie within `spread` of the median, both ways."""
    op, mode, size, streams, dtype = case.split("/")
    tokens, width = map(int, size.split("x"))
    times: dict[str, Any] = {}
    if us is not None:
        times = {"us": us, "p20": us * (1 - spread), "p80": us * (1 + spread), "turns": 20}
    shape = (op, mode, tokens, width, int(streams.removeprefix("n")), dtype)
    return Row(case, contender, *shape, **{**times, "captured": True, **more})


def record(*rows: Row, kind: str = "run", **environment: Any) -> Record:
    """A result; `environment` replaces values of ENVIRONMENT."""
    return Record(kind, {**ENVIRONMENT, **environment}, list(rows))


def true_times(shapes: Sequence[tuple[int, int]] = SHAPES) -> dict[str, float]:
    """60 cases, from 2.4 us to a few hundred."""
    times = {}
    for index, op in enumerate(OPS):
        for mode, factor in zip(MODES, (1.0, 2.9), strict=True):
            for tokens, width in shapes:
                moved = tokens * width * 2 * (3 + 2 * index)
                key = f"{op}/{mode}/{tokens}x{width}/n4/bfloat16"
                times[key] = factor * (2.4 + moved / 4.2e6)
    return times


def process(
    times: dict[str, float],
    rng: random.Random,
    slowdown: Callable[[str], float] = lambda case: 1.0,
    turns: int = 20,
) -> Record:
    """What a process measures: a drift for each case, then turns that scatter around it.

    The drift keeps two processes within 1.6% of each other above 20 us, within 6% from 2 to 6 us.
    A tenth of the turns is disturbed and takes longer.
    """
    rows = []
    for case, us in times.items():
        drift = 0.008 if us > 20 else 0.03 if us <= 6 else 0.18 / us
        centre = us * slowdown(case) * (1 + rng.uniform(-drift, drift))
        taken = [
            centre * (1 + abs(rng.gauss(0, 0.05)) if rng.random() < 0.1 else rng.gauss(1, 0.006))
            for _ in range(turns)
        ]
        sample = summarise(taken)
        values = {"us": sample.us, "p20": sample.low, "p80": sample.high, "turns": turns}
        rows.append(row(None, case=case).replace(**values))
    return record(*rows, copy_bytes_per_s=4.2e12 * math.exp(rng.gauss(0, 0.003)))

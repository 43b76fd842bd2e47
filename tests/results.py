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
OTHER = "merge/forward/64x7168/n4/bfloat16"
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


PEER = "liger-kernel 0.6.4"
TILE = "tile-kernels 1.0"
EAGER, COMPILED = "reference (eager)", "reference (compiled)"


def full() -> Record:
    """A run as it is in earnest: contenders that fail or are wrong, sweeps over T and C."""
    rng = random.Random(0)
    rows = []
    sweep = [(4**power, 2560) for power in range(3, 9)] + [(8192, c) for c in (640, 2048, 5120)]
    for op in OPS:
        for mode in MODES:
            for tokens, width in dict.fromkeys([*SHAPES, *sweep]):
                moved = int(
                    tokens * width * 2 * (3 + 2 * OPS.index(op)) * (1 + 2 * (mode != "forward"))
                )
                case = f"{op}/{mode}/{tokens}x{width}/n4/bfloat16"
                base = 2.4 + moved / 4.2e6 / rng.uniform(0.75, 0.98)
                ours = row(base, case=case, bytes=moved, launches=1 + (op == "pre"), host_us=8.2)
                rows.append(
                    ours.replace(error=2.1e-3, peak_bytes=moved // 3, saved_bytes=moved // 9)
                )
                if (tokens, width) not in SHAPES:
                    continue
                for name, factor in ((PEER, 2.3), (TILE, 1.5), (EAGER, 9.0), (COMPILED, 3.2)):
                    other = row(base * factor * rng.uniform(0.8, 1.2), case=case, contender=name)
                    rows.append(other.replace(bytes=moved, launches=int(factor * 3), error=3e-3))
    rows[1] = row(None, case=rows[1].case, contender=PEER, status="failed", fault="<b>no & no</b>")
    rows[7] = row(None, case=rows[7].case, contender=TILE, status="wrong", fault="error 1e-1")
    rows[5] = rows[5].replace(captured=False)
    return record(*rows)


def overhead(**environment: Any) -> Record:
    """Steps of a model with three kinds of residual."""
    rows = []
    spent = {"matrix products": 61e3, "attention": 18e3, "optimizer": 9e3, "other": 6e3}
    for batch in (4, 8):
        for name, more in (("residual", 0.0), (OURS, 6.2e3), ("mHC, eager", 88e3)):
            parts = {key: value * batch / 8 for key, value in spent.items()}
            if more:
                parts["mHC"] = more * batch / 8
            us = sum(parts.values()) * 1.01
            details = {"profiled_us": us}
            if more:
                details["sublayer_us"] = more * 1.01 * batch / 64
            rows.append(
                Row(
                    f"3b/training/B{batch}xS4096", name, "step", "training", batch * 4096, 1280, 4,
                    "bfloat16", us=us, p20=us * 0.99, p80=us * 1.01, turns=10, parts=parts,
                    peak_bytes=30_000_000_000, error=0.04 if more else None, details=details,
                )
            )  # fmt: skip
    failed = {"us": None, "p20": None, "p80": None, "parts": {}, "status": "out of memory"}
    rows.append(rows[-1].replace(contender="mHC, compiled", **failed))
    return record(*rows, kind="overhead", **environment)

"""Two results side by side: what is slower than noise explains, and what fails.

A time is a regression if it exceeds the base's by more than the threshold and by more than the
noise between two runs of the same code, `noise_us`. What a training step takes longer than the
plain one, a small part of its time, is judged as well. Only rows of mhc_tile decide; peers are
shown.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from .records import OURS, Record, Row, is_ours

THRESHOLD = 0.05
# Between processes that run the same code: up to 1.6% where a kernel takes 100 us and more, and 3
# to 6% of 2 to 6 us in 8 of 430 configurations, at most 0.36 us (H200, 2026-11-24).
DRIFT = 0.016
DRIFT_US = 0.4
# Of the plain step. Three runs of one code, dense, H200, 2026-11-28: +6.2, +6.5 and +6.7%.
OVERHEAD_DRIFT = 0.01
ERRORS = 3.0  # standard errors of a median that count as noise
# GPUs of one model differ; beyond this a result is one of another GPU, or of a disturbed one.
MOST_PACE = 0.05
REPEATS = 2  # more measurements of a suspected case until it is believed

VERDICTS = ("regression", "failing", "missing", "improvement", "new", "same")

Measure = Callable[[Record], Record]


class Pair(msgspec.Struct, frozen=True):
    """One contender on one case, in both results."""

    case: str
    contender: str
    verdict: str  # one of `VERDICTS`
    base: Row | None
    new: Row | None
    change: float | None = None  # new over base time, less 1; None unless both are timed
    allowed: float | None = None  # the change up to which the pair is "same"
    notes: tuple[str, ...] = ()  # other differences

    @property
    def ours(self) -> bool:
        """Whether it is mhc_tile's."""
        return is_ours(self.contender)


@dataclass(frozen=True)
class Comparison:
    """A new result against a base."""

    base: Record
    new: Record
    threshold: float
    pace: float  # copy bandwidth of the base over that of the new result; 1 if one is not known
    pairs: tuple[Pair, ...]  # in the base's order, then the new ones
    differences: tuple[str, ...]  # of the environments, "<key>: <base's> -> <new's>"

    def of(self, *verdicts: str, ours: bool = True) -> list[Pair]:
        """The pairs of some verdicts, of mhc_tile alone or of all contenders."""
        return [pair for pair in self.pairs if pair.verdict in verdicts and pair.ours >= ours]

    def faults(self, *, complete: bool = False) -> list[Pair]:
        """Regressions, failures and, if `complete`, cases of the base that were not measured."""
        return self.of("regression", "failing", *(("missing",) if complete else ()))

    @property
    def judged(self) -> set[str]:
        """Our cases that both results have."""
        return {pair.case for pair in self.of("regression", "failing", "improvement", "same")}

    @property
    def mean_change(self) -> float | None:
        """Geometric mean of our times over the base's, less 1; None if nothing was timed."""
        changes = [p.change for p in self.pairs if p.ours and p.change is not None]
        if not changes:
            return None
        return math.exp(sum(math.log1p(change) for change in changes) / len(changes)) - 1


def compare(
    base: Record, new: Record, *, threshold: float = THRESHOLD, force: bool = False
) -> Comparison:
    """Match rows by case and contender, and judge each.

    A slowdown up to the `threshold` is allowed where noise is smaller.

    Raises:
        ValueError: The threshold is below 0, or as `check_comparable`.

    Example:
        >>> row = Row("merge", OURS, "merge", "forward", 8192, 2560, 4, "bfloat16",
        ...           us=90.0, p20=89.5, p80=90.5, turns=20)
        >>> slower = row.replace(us=99.0, p20=98.5, p80=99.5)
        >>> found = compare(Record("run", {}, [row]), Record("run", {}, [slower]))
        >>> [(pair.case, pair.verdict, round(pair.change, 2)) for pair in found.faults()]
        [('merge', 'regression', 0.1)]
    """
    if not threshold >= 0:
        raise ValueError(f"compare: threshold must be at least 0, got {threshold}")
    differences = (*check_comparable(base, new, force=force), *_differences(base, new))
    pace, old, now = _pace(base, new), _by_key(base), _by_key(new)
    pairs = tuple(
        _judge(key, old.get(key), now.get(key), threshold, pace)
        for key in dict.fromkeys([*old, *now])
    )
    return Comparison(base, new, threshold, pace, pairs, differences)


def check_comparable(base: Record, new: Record, *, force: bool = False) -> list[str]:
    """Why times of two results cannot be compared, "<key>: <base's> -> <new's>".

    They are of another GPU or kind, or the copy bandwidths are too far apart.

    Raises:
        ValueError: They cannot, and `force` is not set.
    """
    wrong, pace = [], _pace(base, new)
    if base.kind != new.kind:
        wrong.append(f"kind: {base.kind} -> {new.kind}")
    old, now = base.environment.get("gpu"), new.environment.get("gpu")
    if old != now:
        wrong.append(f"gpu: {old or 'none'} -> {now or 'none'}")
    elif not 1 / (1 + MOST_PACE) <= pace <= 1 + MOST_PACE:
        wrong.append(f"copy bandwidth: {1 / pace - 1:+.1%}")
    if wrong and not force:
        raise ValueError(
            "compare: results must agree in gpu, kind, copy bandwidth, got "
            f"{'; '.join(wrong)}; --force compares them all the same"
        )
    return wrong


def gate(
    base: Record, measure: Measure, *, threshold: float = THRESHOLD, force: bool = False
) -> Comparison:
    """Measure the cases of a base and compare; what looks slower is measured again.

    A case is slower if it is so each time. Of several measurements the fastest counts: a
    disturbance makes a GPU slower, never faster. Rows of others than mhc_tile are left out.
    `measure` makes from a result a new one of the same cases; ValueError is raised as by `compare`.
    """
    replace = msgspec.structs.replace
    base = replace(base, rows=[row for row in base.rows if row.contender == OURS])
    new = measure(base)
    for _ in range(REPEATS):
        found = compare(base, new, threshold=threshold, force=force)
        suspects = {pair.case for pair in found.of("regression")}
        if not suspects or new.environment.get("cases_left"):  # the GPU answers no more
            return found
        again = measure(replace(base, rows=[row for row in base.rows if row.case in suspects]))
        new = _fastest(new, again)
        if again.environment.get("cases_left"):  # nor now
            break
    return compare(base, new, threshold=threshold, force=force)


def timed(record: Record) -> list[str]:
    """The contenders that a result has times of."""
    return list(dict.fromkeys(row.contender for row in record.rows if _timed(row)))


def noise_us(base: Row, new: Row) -> float:
    """Microseconds by which two medians of the same code may differ; both rows are timed.

    `max(DRIFT * us, DRIFT_US) + ERRORS * sqrt(error(base)^2 + error(new)^2)`, with the standard
    errors of the medians (`Sample.error`). The drift between processes shrinks with no number of
    turns; the scatter within a run does.

    Example:
        >>> row = Row("merge", OURS, "merge", "forward", 8192, 2560, 4, "bfloat16",
        ...           us=90.0, p20=89.5, p80=90.5, turns=20)
        >>> round(noise_us(row, row), 2)
        2.15
    """
    errors = (row.sample.error if row.sample else 0.0 for row in (base, new))
    return max(DRIFT * _timed(base), DRIFT_US) + ERRORS * math.hypot(*errors)


def _pace(base: Record, new: Record) -> float:
    old, now = (record.environment.get("copy_bytes_per_s") for record in (base, new))
    return old / now if old and now else 1.0


def _differences(base: Record, new: Record) -> list[str]:
    """Other differences of the environments, in what both results have."""
    old, now = _compared(base.environment), _compared(new.environment)
    if (before := timed(base)) and (after := timed(new)):  # in turns with others cases take longer
        old["contenders"], now["contenders"] = ", ".join(before), ", ".join(after)
    return [
        f"{name}: {old[name] or 'none'} -> {now[name] or 'none'}"
        for name in old
        if name in now and old[name] != now[name]
    ]


def _compared(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an environment that is compared: neither date nor command."""
    kept = ("commit", "mhc_tile", "driver", "python", "torch", "cuda", "float32_matmul_precision")
    found = {key: environment[key] for key in kept if key in environment}
    for key in ("settings", "packages"):
        found |= environment.get(key) or {}
    if "tables" in environment:
        found["tables"] = ", ".join(map(str, environment["tables"]))
    return found


def _by_key(record: Record) -> dict[tuple[str, str], Row]:
    """Rows by case and contender."""
    return {(row.case, row.contender): row for row in record.rows}


def _judge(
    key: tuple[str, str], base: Row | None, new: Row | None, threshold: float, pace: float
) -> Pair:
    def pair(verdict: str, *notes: str, **times: Any) -> Pair:
        return Pair(*key, verdict, base, new, notes=notes, **times)

    if new is None:
        return pair("missing" if base and _timed(base) else "same", "not measured")
    worked = base is None or base.status == "ok"
    if new.status != "ok":
        why = f"{new.status}: {new.fault}".removesuffix(": ")
        return pair("failing" if worked else "same", why)
    if base is None:
        return pair("new")
    if not worked:
        return pair("new", f"was {base.status}")
    notes = _notes(base, new)
    old, now = _timed(base), _timed(new)
    if not now:
        return pair("missing", "not timed any more", *notes) if old else pair("same", *notes)
    if not old:
        return pair("new", *notes)
    if base.captured and new.captured is False:
        return pair("failing", "no CUDA graph captures it any more", *notes)
    # A GPU that copies more slowly is allowed as much; one that copies faster need not be faster.
    margin = max(old * threshold, noise_us(base, new))
    slowest, fastest = old * max(pace, 1) + margin, old * min(pace, 1) - margin
    verdict = "regression" if now > slowest else "improvement" if now < fastest else "same"
    if grown := _grown_overhead(base, new):
        verdict, notes = "regression", [grown, *notes]
    return pair(verdict, *notes, change=now / old - 1, allowed=slowest / old - 1)


def _grown_overhead(base: Row, new: Row) -> str:
    """A note if what a step adds to the plain one has grown beyond noise; else nothing."""
    told: list[Any] = [
        row.details.get(f"overhead_{key}") for row in (base, new) for key in ("percent", "error")
    ]
    if not all(isinstance(value, (int, float)) for value in told):
        return ""
    old, old_error, now, now_error = told
    allowed = max(100 * OVERHEAD_DRIFT, ERRORS * math.hypot(old_error, now_error))
    grown = now - old > allowed
    return f"overhead {old:+.1f}% -> {now:+.1f}%, allowed {old + allowed:+.1f}%" if grown else ""


def _timed(row: Row) -> float:
    """The time, 0 if there is none."""
    return row.us if row.us and math.isfinite(row.us) else 0.0


def _notes(base: Row, new: Row) -> list[str]:
    """Differences beside the time, of what was counted in both."""
    names = ("launches", "bytes", "peak_bytes", "saved_bytes")
    counts = [(name, getattr(base, name), getattr(new, name)) for name in names]
    return [
        f"{name.replace('_', ' ')} {old} -> {now}"
        for name, old, now in counts
        if None not in (old, now) and old != now
    ]


def _fastest(first: Record, again: Record) -> Record:
    """The first result, with the rows that were measured again where these are faster."""
    others = _by_key(again)

    def chosen(row: Row) -> Row:
        other = others.get((row.case, row.contender))
        if other is None or row.us is None:
            return row
        if other.status == "ok" and (other.us is None or other.us >= row.us):
            return row
        return other  # faster, or not working any more

    return msgspec.structs.replace(first, rows=[chosen(row) for row in first.rows])

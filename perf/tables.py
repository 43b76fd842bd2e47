"""Results as text, for a terminal."""

from collections.abc import Mapping, Sequence

from mhc_tile.autotune._extras import require

from .breakdown import GAPS
from .peers import ADAPTERS
from .records import OURS, Record, Row, percent_of_roofline

MOST_IDLE = 0.05  # of a step: compiled steps on a host that keeps up have 1 to 2%


def run(record: Record) -> str:
    """A run: a line for each contender of each case, then what did not work."""
    tabulate = require("tabulate", "mhc-tile perf run", "perf").tabulate
    bandwidth = record.environment["copy_bytes_per_s"]
    lines = []
    for case in record.cases:
        rows = record.of(case)
        rivals = [r.us for r in rows if r.us and r.contender.startswith(tuple(ADAPTERS))]
        best = min(rivals) if rivals else None
        lines += [_line(row, bandwidth, best if row.contender == OURS else None) for row in rows]
    heads = ["op", "mode", "T x C", "contender", "us", "p20 to p80", "GB/s", "of roofline"]
    heads += ["best peer / us", "error", "launches", "host us", "peak MB", "kept MB"]
    text = tabulate(lines, headers=heads, disable_numparse=True)
    place = f"{record.environment['device']}; copy {bandwidth / 1e12:.2f} TB/s"
    absent = [n for n in ADAPTERS if record.environment["packages"].get(n) is None]
    notes = [f"not installed: {', '.join(absent)}"] if absent else []
    if any(row.captured is False for row in record.rows):
        notes.insert(0, "* launched call by call, the host included")
    notes += record.environment.get("left_out", [])
    return "\n".join([place, "", text, "", *notes, *faults(record.rows)])


def _line(row: Row, bandwidth: float, best: float | None) -> list[str]:
    cells = [row.op, row.mode, f"{row.tokens} x {row.hidden_size}", row.contender]
    if row.us is None:
        return [*cells, untimed(row)]
    share = percent_of_roofline(row, bandwidth)
    return [
        *cells,
        f"{row.us:.1f}{'*' if row.captured is False else ''}",
        f"{row.p20:.1f} to {row.p80:.1f}",
        shown(row.bytes, ".0f", 1e-3 / row.us),
        shown(share, ".0%", 0.01),
        "" if best is None else f"{best / row.us:.2f}x",
        shown(row.error, ".0e"),
        shown(row.launches, ".0f"),
        shown(row.host_us, ".1f"),
        shown(row.peak_bytes, ".1f", 1e-6),
        shown(row.saved_bytes, ".1f", 1e-6),
    ]


def overhead(denominator: str, rows: Sequence[Row]) -> str:
    """The steps of a slice: times and overheads, where the time goes, what did not work.

    `denominator` is what 100% is, in words.
    """
    tabulate = require("tabulate", "mhc-tile perf overhead", "perf").tabulate
    lines = []
    for row in rows:
        if row.us is None:
            lines.append([row.contender, untimed(row)])
            continue
        cells = [
            row.contender,
            _ms(row.us),
            f"{_ms(row.p20)} to {_ms(row.p80)}",
            with_error(*map(row.details.get, ("overhead_percent", "overhead_error"))),
            shown(row.details.get("sublayer_us"), ".0f"),
            shown(row.peak_bytes, ".2f", 1e-9),
            shown(row.error, ".0e"),
        ]
        lines.append(cells)
    heads = ["contender", "step ms", "p20 to p80", "overhead", "us a sublayer", "peak GB", "error"]
    text = [f"100% is {denominator}", "", tabulate(lines, heads, disable_numparse=True), ""]
    spent = [row for row in rows if row.parts]
    names = list(dict.fromkeys(part for row in spent for part in row.parts))
    if names:
        lines = [
            [r.contender, *map(_ms, (r.details.get("profiled_us"), *map(r.parts.get, names)))]
            for r in spent
        ]
        heads = ["ms under the profiler", "step", *names]
        text += [tabulate(lines, heads, disable_numparse=True), ""]
    return "\n".join([*text, *waits(rows), *faults(rows)])


def waits(rows: Sequence[Row]) -> list[str]:
    """A line for each step of a case during which the GPU was often without a kernel.

    Kernels are as long with the profiler as without it, pauses are not: they are what the step was
    timed to take more than its kernels.

    Example:
        >>> parts = {"merge, forward": 25_800.0, "no kernel": 13_700.0}
        >>> what = ("3b/step/B2xS4096", "mhc_tile", "step", "training", 8192, 1280, 4, "bfloat16")
        >>> print(*waits([Row(*what, us=31_700.0, parts=parts)]))
        mhc_tile: the GPU waited for the host for 19% of the step; its kernels take 25.80 ms
    """
    lines = []
    for row in rows:
        kernels = sum(us for part, us in row.parts.items() if part != GAPS)
        if row.us and row.parts and 1 - kernels / row.us > MOST_IDLE:
            lines.append(
                f"{row.contender}: the GPU waited for the host for {1 - kernels / row.us:.0%} of "
                f"the step; its kernels take {kernels / 1000:.2f} ms"
            )
    return lines


def with_error(percent: float | None, error: float | None) -> str:
    """An overhead in percent and its standard error; empty where there is none.

    Example:
        >>> with_error(5.43, 0.61), with_error(0.0, None)
        ('+5.4% ± 0.6', '+0.0%')
    """
    if percent is None:
        return ""
    return f"{percent:+.1f}%" + (f" ± {error:.1f}" if error else "")


def faults(rows: Sequence[Row], said: Mapping[str, str] | None = None) -> list[str]:
    """A line for each contender's fault, however many cases have it; `said` words a status."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            found.setdefault((row.contender, row.status, row.fault), []).append(row.case)
    return [
        (f"{name} {said[status]}" if said and status in said else f"{name}: {status}")
        + f" at {cases[0]}"
        + (f" and {len(cases) - 1} more" if len(cases) > 1 else "")
        + (f": {fault}" if fault else "")
        for (name, status, fault), cases in found.items()
    ]


def untimed(row: Row) -> str:
    """Why a row has no time."""
    return row.status if row.status != "ok" else "not timed"


def _ms(us: float | None) -> str:
    return shown(us, ".2f", 1e-3)


def shown(value: float | None, form: str, scale: float = 1.0) -> str:
    """A number times a scale as text; empty where there is none.

    Example:
        >>> shown(2_500_000, ".1f", 1e-6), shown(None, ".1f")
        ('2.5', '')
    """
    return "" if value is None else format(value * scale, form)

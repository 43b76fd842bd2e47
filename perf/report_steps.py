"""What the report says of the steps of `perf overhead`."""

from collections.abc import Mapping

from .markup import table, text
from .records import OURS, Record, Row, overhead
from .tables import with_error


def steps(record: Record) -> list[str]:
    """Tables of steps and of what they are made of; nothing of other results.

    Args:
        record: of `mhc-tile perf overhead`.
    """
    if record.kind != "overhead":
        return []
    of_what = record.environment.get("denominator")
    if not of_what:
        of_what = "the step of the same model with plain residual connections"
    words_of = of_what if isinstance(of_what, Mapping) else {"": of_what}
    said = ["<p>Overhead is what a step takes longer than with plain residuals. 100% is</p><ul>"]
    said += [
        f"<li>{text(f'{case}: {what}' if case else what)}</li>" for case, what in words_of.items()
    ]
    rows = []
    for case in record.cases:
        own = record.of(case)
        for index, row in enumerate(own):
            over = overhead(row, own)
            sublayer = row.details.get("sublayer_us")
            cells = (
                text(case if index == 0 else ""),
                text(row.contender),
                spread(row, 1e3),
                with_error(None if over is None else 100 * over, row.details.get("overhead_error")),
                "" if sublayer is None else f"{sublayer:.0f}",
                "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.1f}",
                "" if row.error is None else f"{row.error:.0e}",
                text("" if row.status == "ok" else row.status),
            )
            rows.append((cells, kind(row, index)))
    headers = ["case", "contender", "ms a step [p20 to p80]", "overhead", "us a sublayer"]
    headers += ["peak GB", "error", ""]
    return ["<h2>Steps</h2>", *said, "</ul>", table(headers, rows, left=2), *_parts(record)]


def _parts(record: Record) -> list[str]:
    """A table of what steps are made of."""
    spent = [row for row in record.rows if row.parts]
    names = list(dict.fromkeys(name for row in spent for name in row.parts))
    if not names:
        return []
    rows, seen = [], set[str]()
    for row in spent:
        shares = (row.details.get("profiled_us"), *(row.parts.get(name) for name in names))
        cells = (
            text("" if row.case in seen else row.case),
            text(row.contender),
            *("" if us is None else f"{us / 1e3:.2f}" for us in shares),
            "",
        )
        rows.append((cells, kind(row, int(row.case in seen))))
        seen.add(row.case)
    headers = ("case", "contender", "step", *names, "")
    return ["<h2>Where the time goes, ms under the profiler</h2>", table(headers, rows, left=2)]


def kind(row: Row, index: int) -> str:
    """The class of a row: whether it is ours, and the first of its case."""
    return " ".join(["ours"] * (row.contender == OURS) + ["first"] * (index == 0))


def spread(row: Row, unit: float) -> str:
    """A time, and the percentiles behind it, in a unit of so many microseconds."""
    if row.us is None:
        return "-"
    digits = 1 if row.us / unit < 1000 else 0
    shown = f"{row.us / unit:.{digits}f}"
    if row.p20 is None or row.p80 is None:
        return shown
    return f"{shown} [{row.p20 / unit:.{digits}f} to {row.p80 / unit:.{digits}f}]"

"""What the report says of the steps of `perf overhead`."""

import re
from collections.abc import Iterable, Mapping, Sequence

from .breakdown import ATTENTION, GAPS, LAYERS, PRODUCTS
from .markup import table, text
from .records import Record, Row, is_ours, overhead, plain_of
from .tables import waits, with_error

LEAST_US = 5.0  # of a difference that is shown
OPS = ("pre", "merge", "mapping", "pre_apply", "sinkhorn")
PARTS = (
    PRODUCTS, ATTENTION, LAYERS, GAPS, "merge and pre, forward",
    *(f"{op}, {way}" for op in OPS for way in ("forward", "backward")),
)  # fmt: skip
"""The parts of a step as they are shown: the layers', then those of connections."""


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
    rows, waiting = [], []
    for case in record.cases:
        own = record.of(case)
        waiting += [f"<li>{text(case)}: {text(line)}</li>" for line in waits(own)]
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
    shown = ["<h2>Steps</h2>", *said, "</ul>", table(headers, rows, left=2)]
    if waiting:
        shown += ["<p>Overheads that are not what kernels cost:</p><ul>", *waiting, "</ul>"]
    return [*shown, *_parts(record)]


def more_than_plain(rows: Sequence[Row]) -> list[tuple[Row, dict[str, float], float]]:
    """What steps have more than the one with plain residuals; nothing without that one.

    Args:
        rows: of one case.

    Returns:
        Of every other row with parts: the row, microseconds by part, and as timed.
    """
    spent = [row for row in rows if row.parts and row.us]
    plain = plain_of(rows)  # what 100% is, even where another one has parts
    if plain is None or plain not in spent:
        return []
    found = []
    for row in spent:
        if row is not plain:
            names = dict.fromkeys((*plain.parts, *row.parts))
            more = {n: row.parts.get(n, 0.0) - plain.parts.get(n, 0.0) for n in names}
            found.append((row, more, (overhead(row, spent) or 0.0) * (plain.us or 0.0)))
    return found


def in_order(names: Iterable[str]) -> list[str]:
    """Parts as they are shown, each once; those of other names last.

    Example:
        >>> in_order(["merge, backward", "copies", "merge, forward", "attention"])
        ['attention', 'merge, forward', 'merge, backward', 'copies']
    """
    return sorted(
        dict.fromkeys(names), key=lambda name: PARTS.index(name) if name in PARTS else len(PARTS)
    )


def in_words(case: str) -> str:
    """A case of an overhead in words; as it is where it is named otherwise.

    Example:
        >>> in_words("paper-27b/step/B2xS4096/L4")
        '4 layers of paper-27b, 2 x 4096 tokens,'
    """
    found = re.fullmatch(r"([^/]+)/([^/]+)/B(\d+)xS(\d+)(?:/L(\d+))?", case)
    if not found:
        return case
    model, step, batch, sequence, layers = found.groups()
    of = f"{layers} layer{'s' * (layers != '1')} of {model}" if layers else model
    return f"{of}, {batch} x {sequence} tokens," + " with AdamW," * step.endswith("adamw")


def _parts(record: Record) -> list[str]:
    """What steps are made of, and what that is more than with plain residuals."""
    added, whole = [], []
    for case in record.cases:
        own = record.of(case)
        spent = [row for row in own if row.parts]
        if not spent:
            continue
        names = in_order(name for row in spent for name in row.parts)
        title = f"<h3>{text(case)}</h3>"
        rows = []
        for row in spent:
            us = (row.details.get("profiled_us"), *(row.parts.get(name) for name in names))
            rows.append((row, ["" if v is None else f"{v / 1e3:.2f}" for v in us]))
        whole += [title, _table(("contender", "step", *names), rows)]
        rows = [(row, _more(more, timed, names)) for row, more, timed in more_than_plain(own)]
        if rows:
            added += [title, _table(("contender", "as timed", *names), rows)]
    if added:
        added.insert(0, "<h2>More than with plain residuals, ms by part</h2>")
    if whole:
        whole.insert(0, "<h2>Where the time goes, ms under the profiler</h2>")
    return [*added, *whole]


def _more(more: Mapping[str, float], timed: float, names: Sequence[str]) -> list[str]:
    """Cells of what a step has more; the part that costs most stands out."""
    most = max(more, key=lambda name: more[name])
    cells = [f"{timed / 1e3:+.2f}"]
    for name in names:
        said = f"{more[name] / 1e3:+.2f}" if abs(more.get(name, 0.0)) >= LEAST_US else ""
        cells.append(f"<b class='most'>{said}</b>" if name == most and more[most] > 0 else said)
    return cells


def _table(headers: Sequence[str], rows: Sequence[tuple[Row, list[str]]]) -> str:
    """A table of numbers, a contender a line."""
    lines = [
        ((text(row.contender), *cells, ""), kind(row, index))
        for index, (row, cells) in enumerate(rows)
    ]
    return table((*headers, ""), lines, left=1)


def kind(row: Row, index: int) -> str:
    """The class of a row: whether it is ours, and the first of its case."""
    return " ".join(["ours"] * is_ours(row.contender) + ["first"] * (index == 0))


def spread(row: Row, unit: float) -> str:
    """A time, and the percentiles behind it, in a unit of so many microseconds."""
    if row.us is None:
        return "-"
    digits = 1 if row.us / unit < 1000 else 0
    shown = f"{row.us / unit:.{digits}f}"
    if row.p20 is None or row.p80 is None:
        return shown
    return f"{shown} [{row.p20 / unit:.{digits}f} to {row.p80 / unit:.{digits}f}]"

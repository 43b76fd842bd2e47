"""A result as one HTML page that needs nothing else: what, where, how fast, and how to read it.

Pictures are within the page, there are no scripts, and it says in words what its numbers mean.
"""

import io
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import figures, output, summary
from .compare import Comparison
from .markup import document, picture, table, text, words
from .records import OURS, Record, Row, is_ours, overhead, percent_of_roofline
from .report_steps import in_words, kind, spread, steps
from .report_words import CAPTIONS, INTRODUCTION, READING, READING_STEPS, STATUSES, glossary
from .tables import faults, with_error

LARGE = 4096  # tokens from which on a kernel has enough to do to be judged by its bandwidth
TIE = 0.02  # times that differ by less are the same


def page(
    record: Record,
    comparison: Comparison | None = None,
    pictures: Mapping[str, figures.Figure] | None = None,
) -> str:
    """The report.

    Args:
        record: the result.
        comparison: with an older one, to show what changed.
        pictures: of `figures.draw`; drawn if None.

    Returns:
        HTML.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    where = record.environment
    what = "step overhead" if record.kind == "overhead" else "op times"
    title = f"mhc_tile: {what} on {where.get('gpu') or where.get('device') or 'unknown hardware'}"
    if pictures is None:
        pictures = figures.draw(record, comparison)
    reading = READING_STEPS if record.kind == "overhead" else READING
    shown = [picture(_svg(drawn), CAPTIONS[name]) for name, drawn in pictures.items()]
    under = f"commit {where.get('commit') or 'unknown'}, {where.get('date') or 'no date'}"
    if left := where.get("cases_left"):
        under += f"; the run did not end, {left} cases are not measured"
    parts = [
        f"<h1>{text(title)}</h1><p class='under'>{text(under)}</p>",
        f"<p>{text(INTRODUCTION[record.kind])}</p>",
        _cards(record, comparison),
        *_faults(record),
        *_glossary(record),
        *steps(record),
        *(["<h2>Pictures</h2>", *shown] if shown else []),
        *(_comparison(comparison) if comparison else []),
        "<h2>How to read it</h2>",
        words((text(key), value) for key, value in reading.items()),
        *(_ops(record) if record.kind == "run" else []),
        "<h2>Where it was measured</h2>",
        _environment(where),
    ]
    return document(title, parts)


def write(
    record: Record, path: Path, comparison: Comparison | None = None, folder: Path | None = None
) -> None:
    """Write the report.

    Args:
        record: the result.
        path: of the HTML file.
        comparison: as in `page`.
        folder: where pictures are saved as PNG, too.

    Raises:
        OSError: It cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    pictures = figures.draw(record, comparison)
    whole = page(record, comparison, pictures)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(whole, encoding="utf-8")
    if folder:
        output.save(pictures, folder)


def geometric_mean(values: Iterable[float]) -> float | None:
    """Of positive numbers; None if there are none.

    Example:
        >>> geometric_mean([1.0, 4.0])
        2.0
    """
    logs = [math.log(value) for value in values if value > 0]
    return math.exp(sum(logs) / len(logs)) if logs else None


def best_other(rows: Sequence[Row], *, reference: bool) -> Row | None:
    """The fastest correct row of a case that is not ours; None if there is none.

    Args:
        rows: of one case.
        reference: of the reference's, or of other packages'.
    """
    others = [
        row
        for row in rows
        if row.contender != OURS
        and row.contender.startswith("reference") == reference
        and row.status == "ok"
        and row.us
    ]
    return min(others, key=lambda row: row.us or math.inf, default=None)


def _ours(record: Record) -> list[Row]:
    return [row for row in record.rows if is_ours(row.contender)]


def _cards(record: Record, comparison: Comparison | None) -> str:
    """The numbers that matter most."""
    own = _ours(record)
    good = [row for row in own if row.status == "ok" and row.us is not None]
    cards = [
        (
            f"{len(good)} of {len(own)}",
            "cases of mhc_tile correct and measured",
            len(good) < len(own),
        )
    ]
    copy = record.environment.get("copy_bytes_per_s")
    if record.kind == "run":
        big = [percent_of_roofline(row, copy) or 0 for row in good if row.tokens >= LARGE]
        if mean := geometric_mean(big):
            cards.append(
                (f"{mean:.0f}%", f"of the roofline from {LARGE} tokens on (geometric mean)", False)
            )
    if record.kind == "run":
        cards += [card for who in (False, True) if (card := _against(record, good, who))]
    for row in good if record.kind == "overhead" else []:
        if (over := overhead(row, record.of(row.case))) is not None:
            said = f"what {row.contender} adds to a step; 100% is {in_words(row.case)} with plain "
            said += "residuals"
            cards.append((with_error(100 * over, row.details.get("overhead_error")), said, False))
    if copy:
        cards.append((f"{copy / 1e12:.2f} TB/s", "bandwidth of a copy in this run", False))
    if comparison:
        faults = comparison.faults()
        change = comparison.mean_change
        said = summary.headline(comparison)
        cards.append(("no change" if change is None else f"{change:+.1%}", said, bool(faults)))
    boxes = []
    for number, said, bad in cards:
        inner = f"<b>{text(number)}</b><span>{text(said)}</span>"
        boxes.append(f"<div class='card{' bad' * bad}'>{inner}</div>")
    return f"<div class='cards'>{''.join(boxes)}</div>"


def _against(record: Record, good: Sequence[Row], reference: bool) -> tuple[str, str, bool] | None:
    """A card: how fast ours is next to the best of others, and in how many cases slower."""
    ratios = []
    for row in good:
        other = best_other(record.of(row.case), reference=reference)
        if other and other.us and row.us:
            ratios.append(other.us / row.us)
    if not (mean := geometric_mean(ratios)):
        return None
    slower = sum(ratio * (1 + TIE) < 1 for ratio in ratios)
    who = "the reference in PyTorch" if reference else "the best other package"
    said = f"as fast as {who} (geometric mean of {len(ratios)} cases), "
    said += f"more than {TIE:.0%} slower in {slower or 'none'}"
    return f"{mean:.2f}x", said, False


def _glossary(record: Record) -> list[str]:
    """Who and what occurs on the page."""
    parts = []
    for heading, rows in glossary(record).items():
        parts += [f"<h3>{text(heading)}</h3>", words(rows)]
    return ["<h2>Who and what</h2>", *parts] if parts else []


def _faults(record: Record) -> list[str]:
    """What did not work, in words."""
    lines = faults(record.rows, STATUSES)
    if not lines:
        return []
    return [
        "<h2>What did not work</h2><ul>",
        *(f"<li>{text(line)}</li>" for line in lines),
        "</ul>",
    ]


def _ops(record: Record) -> list[str]:
    """A table an op, the contenders of a case one below the other."""
    copy = record.environment.get("copy_bytes_per_s")
    headers: tuple[str, ...] = (
        "case",
        "contender",
        "time, us [p20 to p80]",
        "GB/s",
        "% of roofline",
        "x ours",
    )
    headers += ("error", "launches", "host us", "peak MB", "kept MB", "")
    parts = ["<h2>All numbers</h2>"]
    for op in dict.fromkeys(row.op for row in record.rows):
        rows: list[Any] = []
        for case in record.cases:
            own = [row for row in record.of(case) if row.op == op]
            ours = next((row for row in own if row.contender == OURS), None)
            for index, row in enumerate(sorted(own, key=lambda row: row.contender != OURS)):
                rows.append((_cells(row, ours, copy, first=index == 0), kind(row, index)))
        if rows:
            parts += [f"<h3>{text(op)}</h3>", table(headers, rows, left=2)]
    return parts


def _cells(row: Row, ours: Row | None, copy: float | None, *, first: bool) -> tuple[str, ...]:
    percent = percent_of_roofline(row, copy)
    speed = row.bytes / row.us / 1e3 if row.bytes and row.us else None
    ratio = row.us / ours.us if ours and ours.us and row.us else None
    return (
        text(row.case.removeprefix(f"{row.op}/") if first else ""),
        text(row.contender),
        spread(row, 1.0) + ("†" if row.captured is False and row.us else ""),
        _number(speed, ".0f"),
        _number(percent, ".0f"),
        _number(ratio, ".2f"),
        _number(row.error, ".1e"),
        _number(row.launches, "d"),
        _number(row.host_us, ".1f"),
        _megabytes(row.peak_bytes),
        _megabytes(row.saved_bytes),
        text("" if row.status == "ok" else row.status),
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"


def _comparison(found: Comparison) -> list[str]:
    """What changed, in words; times are in the table of all numbers."""
    lines = [*summary.lines(found)]
    changed = [pair for pair in found.pairs if pair.ours and pair.verdict != "same"]
    headers = ("verdict", "case", "base us", "new us", "change", "allowed", "")
    rows = [
        (
            text(pair.verdict),
            text(pair.case),
            spread(pair.base, 1.0) if pair.base else "-",
            spread(pair.new, 1.0) if pair.new else "-",
            _number(pair.change, "+.1%"),
            _number(pair.allowed, "+.1%"),
            text("; ".join(pair.notes)),
        )
        for pair in changed
    ]
    parts = [f"<h2>Against the older result: {text(summary.headline(found))}</h2><ul>"]
    parts += [f"<li>{text(line)}</li>" for line in lines] + ["</ul>"]
    return parts + ([table(headers, rows, left=2)] if rows else [])


def _environment(where: Mapping[str, Any]) -> str:
    rows = []
    for key, value in where.items():
        if key == "denominator":
            continue  # said with the steps
        if key == "copy_bytes_per_s":
            key, value = "copy", f"{value / 1e12:.3f} TB/s" if value else None
        if key == "command" and isinstance(value, (list, tuple)):
            rows.append(("command", f"<code>{text(shlex.join(map(str, value)))}</code>"))
            continue
        rows.append((text(key), text(_said(value, "not installed" * (key == "packages")))))
    return words(rows)


def _said(value: Any, none: str = "") -> str:
    """A value of the environment in words; `none` is for those of a mapping that are None."""
    if isinstance(value, Mapping):
        value = [
            f"{name} {(none or 'not set') if v is None else _said(v)}" for name, v in value.items()
        ]
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_said, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _svg(drawn: figures.Figure) -> bytes:
    buffer = io.BytesIO()
    figures.save(drawn, buffer, "svg")
    return buffer.getvalue()

"""A result as one HTML page that needs nothing else: what, where, how fast, and how to read it.

Pictures are within the page, there are no scripts, and it says in words what its numbers mean.
"""

import io
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import figures, summary
from .compare import Comparison
from .markup import document, picture, table, text, words
from .records import OURS, Record, Row, percent_of_roofline
from .report_steps import kind, overhead, spread, steps

LARGE = 4096  # tokens from which on a kernel has enough to do to be judged by its bandwidth
READING = {
    "case": "op, mode, T tokens x C channels of each of n streams, dtype. A <i>training</i> call "
    "is forward and backward, an <i>inference</i> or <i>forward</i> call has no gradients.",
    "time": "microseconds of one call on the GPU, the median of several turns, and behind it the "
    "20th and 80th percentile. Contenders take turns, with inputs that are not in the cache. "
    "A time marked † includes the CPU's, because no CUDA graph could be captured.",
    "roofline": "The shortest time that this GPU allows: the bytes that the op must read and write "
    "at least once, at the bandwidth of a large copy, measured in the same run. 100% is a call "
    "that takes no longer. Few tokens do not fill a GPU, and stay far below. Other "
    "implementations are held against the same bytes, whatever they move themselves.",
    "x ours": "time over that of mhc_tile: 2.00 takes twice as long.",
    "error": "relative root mean square error against the definition in float64, the largest over "
    "all results and gradients. bfloat16 itself rounds by 2e-3.",
    "launches": "GPU kernels that one call starts.",
    "host": "microseconds of CPU time until the call returns.",
    "peak, kept": "device memory in MB that the call needs at most beyond its inputs, and that it "
    "keeps from forward to backward.",
}
READING_STEPS = {
    "case": "model, what a step is, batch x sequence length.",
    "time": "milliseconds of one step, the median of several turns, and behind it the 20th and "
    "80th percentile. Contenders take turns.",
    "us a sublayer": "what the step takes longer than the plain one, over its sublayers, of which "
    "a layer has two.",
    "peak": "device memory in GB that the step needs at most.",
    "error": "of output and gradient against the definition, relative; the layers are in bfloat16.",
    "where the time goes": "GPU time by kernel, of steps in a row under the profiler; <i>no "
    "kernel</i> is what none fills.",
}
CAPTIONS = {
    "roofline": "Share of the roofline by op: bars and their numbers are mhc_tile, marks are other "
    "implementations. The dashed line is 100%. Longer is better.",
    "tokens": "Time by number of tokens. The dashed line is the roofline; a flat line is the time "
    "that launches take, however little there is to do. Lower is better.",
    "hidden_size": "Time by width. The dashed line is the roofline. Lower is better.",
    "parts": "What a step's time is made of, under the profiler.",
    "added": "What a step has more than one with plain residuals, by part; to the left is what it "
    "has less, such as additions that the connection's own kernels do.",
    "changes": "The largest changes against the older result, at most 40; to the right is slower.",
}


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
    parts = [
        f"<h1>{text(title)}</h1><p class='under'>{text(under)}</p>",
        _cards(record, comparison),
        *_faults(record),
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
        folder.mkdir(parents=True, exist_ok=True)
        for name, drawn in pictures.items():
            figures.save(drawn, folder / f"{name}.png", "png")


def geometric_mean(values: Iterable[float]) -> float | None:
    """Of positive numbers; None if there are none.

    Example:
        >>> geometric_mean([1.0, 4.0])
        2.0
    """
    logs = [math.log(value) for value in values if value > 0]
    return math.exp(sum(logs) / len(logs)) if logs else None


def best_other(rows: Sequence[Row]) -> Row | None:
    """The fastest correct row of a case that is not ours; None if there is none.

    Args:
        rows: of one case.
    """
    others = [row for row in rows if row.contender != OURS and row.status == "ok" and row.us]
    return min(others, key=lambda row: row.us or math.inf, default=None)


def _ours(record: Record) -> list[Row]:
    return [row for row in record.rows if row.contender == OURS]


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
    ratios = []
    for row in good:
        other = best_other(record.of(row.case))
        if other and other.us and row.us:
            ratios.append(other.us / row.us)
    if record.kind == "run" and (mean := geometric_mean(ratios)):
        slower = sum(ratio < 1 for ratio in ratios)
        said = f"faster than the best other implementation of each of {len(ratios)} cases "
        said += f"(geometric mean), slower in {slower or 'none'}"
        cards.append((f"{mean:.2f}x", said, False))
    for row in good if record.kind == "overhead" else []:
        if (over := overhead(row, record.of(row.case))) is not None:
            cards.append((f"{over:+.1%}", f"overhead of mhc_tile, {row.case}", False))
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


def _faults(record: Record) -> list[str]:
    """What did not work, in words."""
    said = {
        "wrong": "gave wrong results",
        "failed": "failed",
        "out of memory": "ran out of memory",
        "absent": "is not installed",
    }
    lines: dict[str, None] = {}
    for row in record.rows:
        if row.status in ("ok", "absent"):
            continue
        why = f": {row.fault}" if row.fault else ""
        lines[f"{row.contender} {said.get(row.status, row.status)} at {row.case}{why}"] = None
    absent = dict.fromkeys(row.contender for row in record.rows if row.status == "absent")
    for name in absent:
        lines[f"{name} is not installed and was not measured"] = None
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
            own = [row for row in record.of(case) if row.op == op and row.status != "absent"]
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
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {v or 'not installed'}" for name, v in value.items())
        if key == "command" and isinstance(value, (list, tuple)):
            rows.append(("command", f"<code>{text(shlex.join(map(str, value)))}</code>"))
            continue
        rows.append((text(key), text("none" if value is None else value)))
    return words(rows)


def _svg(drawn: figures.Figure) -> bytes:
    buffer = io.BytesIO()
    figures.save(drawn, buffer, "svg")
    return buffer.getvalue()

"""A result as one HTML page that loads nothing from elsewhere; `templates/` has its words."""

import base64
import io
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from mhc_tile.autotune._extras import require
from mhc_tile.kernels.common import files

from . import figures, output, summary
from .compare import Comparison
from .records import OURS, Record, Row, is_ours, overhead, percent_of_roofline
from .steps import in_order, in_words, more_than_plain
from .tables import faults, shown, waits, with_error

LARGE = 4096  # tokens from which on a kernel has enough to do to be judged by its bandwidth
TIE = 0.02  # times that differ by less count as equal
LEAST_US = 5.0  # the smallest difference of a part that is shown


def page(
    record: Record,
    comparison: Comparison | None = None,
    pictures: Mapping[str, figures.Figure] | None = None,
) -> str:
    """The report as HTML.

    Args:
        record: the result.
        comparison: with an older result, to show what changed.
        pictures: of `figures.draw`; drawn if None.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    if pictures is None:
        pictures = figures.draw(record, comparison)
    return (
        _templates()
        .get_template("report.html.j2")
        .render(
            record=record,
            faults=faults(record.rows, words().STATUSES),
            glossary=glossary(record),
            pictures={name: _svg(drawn) for name, drawn in pictures.items()},
            change=_change(comparison) if comparison else None,
            environment=list(_environment(record.environment)),
            **_headline(record),
            **(_steps(record) if record.kind == "overhead" else {"ops": list(_ops(record))}),
        )
    )


def write(
    record: Record, path: Path, comparison: Comparison | None = None, folder: Path | None = None
) -> None:
    """Write the report.

    Args:
        record: the result.
        path: of the HTML file; its folder is made.
        comparison: as in `page`.
        folder: where pictures are saved as PNG, too.

    Raises:
        OSError: A file cannot be written.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    pictures = figures.draw(record, comparison)
    whole = page(record, comparison, pictures)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, whole)
    if folder:
        output.save(pictures, folder)


def _templates() -> Any:
    jinja2 = require("jinja2", "perf report", "perf")
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )


def words() -> Any:
    """The variables of `templates/words.j2`, as attributes.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    return _templates().get_template("words.j2").module


def glossary(record: Record) -> dict[str, list[tuple[str, str]]]:
    """The names that occur in a result with their meaning, by heading.

    Args:
        record: the result.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    said, steps = words(), record.kind == "overhead"
    names = {row.contender for row in record.rows}
    ops = [op for op in dict.fromkeys(row.op for row in record.rows) if op in said.OPS]
    versions = record.environment.get("packages") or {}
    forms = {**said.FORMS, **said.STEP_FORMS} if steps else said.FORMS
    contenders = []
    for key, what in said.CONTENDERS.items():
        if any(f"{name} ".startswith(f"{key} ") for name in names):
            what += f", {versions[key]}" if versions.get(key) else ""
            what += f"; {said.STEPS[key]}" if steps and key in said.STEPS else ""
            contenders.append((key, what))
    found = {
        "Contenders": contenders,
        "What is in brackets": [
            (key.strip("()"), what)
            for key, what in forms.items()
            if any(key in name for name in names)
        ],
        "Maps": list(said.MAPS.items()) if ops else [],
        "Ops": [(op, said.OPS[op]) for op in ops],
    }
    return {heading: rows for heading, rows in found.items() if rows}


def best_other(rows: Sequence[Row], *, reference: bool) -> Row | None:
    """The fastest correct row of a case that is not ours; None if there is none.

    Args:
        rows: of one case.
        reference: whether to look among the reference's rows or among other packages'.
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


def _headline(record: Record) -> dict[str, Any]:
    """The numbers that matter most."""
    own = [row for row in record.rows if is_ours(row.contender)]
    good = [row for row in own if row.status == "ok" and row.us is not None]
    found: dict[str, Any] = {
        "own": len(own), "good": len(good), "large": LARGE, "tie": TIE,
        "share": None, "against": [], "overheads": [],
    }  # fmt: skip
    if record.kind == "overhead":
        for row in good:
            if (over := overhead(row, record.of(row.case))) is not None:
                text = with_error(100 * over, row.details.get("overhead_error"))
                found["overheads"].append((text, row.contender, in_words(row.case)))
        return found
    copy = record.environment.get("copy_bytes_per_s")
    shares = [percent_of_roofline(row, copy) for row in good if row.tokens >= LARGE]
    if large := [share for share in shares if share]:
        found["share"] = geometric_mean(large)
    for who, reference in (
        ("the best other package", False),
        ("the reference in PyTorch", True),
    ):
        bests = [(row.us, best_other(record.of(row.case), reference=reference)) for row in good]
        ratios = [best.us / us for us, best in bests if best and best.us and us]
        if ratios:
            slower = sum(ratio * (1 + TIE) < 1 for ratio in ratios)
            values = {"mean": geometric_mean(ratios), "cases": len(ratios), "slower": slower}
            found["against"].append((who, values))
    return found


def _line(row: Row, cells: Sequence[str], *, first: bool, most: int = -1) -> dict[str, Any]:
    """A line of a table: its cells, the number of the one that stands out, its CSS classes."""
    kind = " ".join(["ours"] * is_ours(row.contender) + ["first"] * first)
    return {"cells": cells, "most": most, "kind": kind}


def _ops(record: Record) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each op and the lines of its table, the contenders of a case one below the other."""
    copy = record.environment.get("copy_bytes_per_s")
    for op in dict.fromkeys(row.op for row in record.rows):
        lines = []
        for case in record.cases:
            own = [row for row in record.of(case) if row.op == op]
            ours = next((row for row in own if row.contender == OURS), None)
            for index, row in enumerate(sorted(own, key=lambda row: row.contender != OURS)):
                cells = _cells(row, ours, copy, first=index == 0)
                lines.append(_line(row, cells, first=index == 0))
        yield op, lines


def _cells(row: Row, ours: Row | None, copy: float | None, *, first: bool) -> list[str]:
    return [
        row.case.removeprefix(f"{row.op}/") if first else "",
        row.contender,
        _spread(row) + ("†" if row.captured is False and row.us else ""),
        shown(row.bytes / row.us / 1e3 if row.bytes and row.us else None, ".0f"),
        shown(percent_of_roofline(row, copy), ".0f"),
        shown(row.us / ours.us if ours and ours.us and row.us else None, ".2f"),
        shown(row.error, ".1e"),
        shown(row.launches, ".0f"),
        shown(row.host_us, ".1f"),
        shown(row.peak_bytes, ".1f", 1e-6),
        shown(row.saved_bytes, ".1f", 1e-6),
        "" if row.status == "ok" else row.status,
    ]


def _spread(row: Row | None, unit: float = 1.0) -> str:
    """Median and percentiles of a time, in a unit of so many microseconds."""
    if row is None or row.us is None:
        return "-"
    form, scale = ".1f" if row.us / unit < 1000 else ".0f", 1 / unit
    text = shown(row.us, form, scale)
    if row.p20 is None or row.p80 is None:
        return text
    return f"{text} [{shown(row.p20, form, scale)} to {shown(row.p80, form, scale)}]"


def _steps(record: Record) -> dict[str, Any]:
    """The tables of steps and of what they are made of."""
    of_what = record.environment.get("denominator")
    of_what = of_what or "the step of the same model with plain residual connections"
    if isinstance(of_what, Mapping):
        of_what = [f"{case}: {what}" for case, what in of_what.items()]
    found: dict[str, Any] = {
        "denominators": [of_what] if isinstance(of_what, str) else of_what,
        "rows": [], "waiting": [], "added": [], "spent": [],
    }  # fmt: skip
    for case in record.cases:
        own = record.of(case)
        found["waiting"] += [f"{case}: {line}" for line in waits(own)]
        for index, row in enumerate(own):
            over = overhead(row, own)
            cells = [
                case if index == 0 else "",
                row.contender,
                _spread(row, 1e3),
                with_error(None if over is None else 100 * over, row.details.get("overhead_error")),
                shown(row.details.get("sublayer_us"), ".0f"),
                shown(row.peak_bytes, ".1f", 1e-9),
                shown(row.error, ".0e"),
                "" if row.status == "ok" else row.status,
            ]
            found["rows"].append(_line(row, cells, first=index == 0))
        spent = [row for row in own if row.parts]
        names = in_order(name for row in spent for name in row.parts)
        lines = []
        for index, row in enumerate(spent):
            times = [row.details.get("profiled_us"), *map(row.parts.get, names)]
            cells = [row.contender, *(shown(us, ".2f", 1e-3) for us in times), ""]
            lines.append(_line(row, cells, first=index == 0))
        if lines:
            found["spent"].append((case, names, lines))
        if more := _more(own, names):
            found["added"].append((case, names, more))
    return found


def _more(rows: Sequence[Row], names: Sequence[str]) -> list[dict[str, Any]]:
    """Lines of what steps have more than the plain one; the part that costs most stands out."""
    lines = []
    for index, (row, more, timed) in enumerate(more_than_plain(rows)):
        most = max(more, key=lambda name: more[name])
        parts = [more.get(name, 0.0) for name in names]
        cells = [shown(us, "+.2f", 1e-3) if abs(us) >= LEAST_US else "" for us in parts]
        cells = [row.contender, shown(timed, "+.2f", 1e-3), *cells, ""]
        place = names.index(most) + 2 if more[most] > 0 else -1
        lines.append(_line(row, cells, first=index == 0, most=place))
    return lines


def _change(found: Comparison) -> dict[str, Any]:
    """What changed; all times are in the tables of ops or steps."""
    changed = [pair for pair in found.pairs if pair.ours and pair.verdict != "same"]
    return {
        "headline": summary.headline(found),
        "mean": found.mean_change,
        "faults": bool(found.faults()),
        "lines": summary.lines(found),
        "rows": [
            {
                "kind": "",
                "most": -1,
                "cells": [
                    pair.verdict,
                    pair.case,
                    _spread(pair.base),
                    _spread(pair.new),
                    shown(pair.change, "+.1%"),
                    shown(pair.allowed, "+.1%"),
                    "; ".join(pair.notes),
                ],
            }
            for pair in changed
        ],
    }


def _environment(where: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in where.items():
        if key == "copy_bytes_per_s":
            key, value = "copy", f"{value / 1e12:.3f} TB/s" if value else None
        if key == "command" and isinstance(value, (list, tuple)):
            value = shlex.join(map(str, value))
        if key != "denominator":  # the tables of steps name it
            yield key, _said(value, "not installed" if key == "packages" else "not set")


def _said(value: Any, none: str = "not set") -> str:
    """A value of the environment in words; `none` replaces None among the values of a mapping."""
    if isinstance(value, Mapping):
        value = [f"{name} {none if v is None else _said(v)}" for name, v in value.items()]
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_said, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _svg(drawn: figures.Figure) -> str:
    buffer = io.BytesIO()
    figures.save(drawn, buffer, "svg")
    return base64.b64encode(buffer.getvalue()).decode()

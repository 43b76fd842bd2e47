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
    """The report as HTML, with what changed if there is a comparison with an older result.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    if pictures is None:
        pictures = figures.draw(record, comparison)
    pairs = comparison.pairs if comparison else ()
    parts = _steps(record) if record.kind == "overhead" else {"ops": _ops(record)}
    template = _templates().get_template("report.html.j2")
    return template.render(
        record=record,
        faults=faults(record.rows, words().STATUSES),
        glossary=glossary(record),
        pictures={name: _svg(drawn) for name, drawn in pictures.items()},
        change=comparison,
        changed=[pair for pair in pairs if pair.ours and pair.verdict != "same"],
        environment=list(_environment(record.environment)),
        **_headline(record),
        **parts,
    )


def write(
    record: Record, path: Path, comparison: Comparison | None = None, folder: Path | None = None
) -> None:
    """Write the report, and the pictures as PNG if there is a folder for them.

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
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    functions = (is_ours, overhead, percent_of_roofline, shown, with_error)
    environment.globals |= {function.__name__: function for function in functions}
    environment.globals |= {"headline": summary.headline, "lines": summary.lines}
    environment.globals |= {"spread": _spread, "least_us": LEAST_US}
    return environment


def words() -> Any:
    """The variables of `templates/words.j2`, as attributes."""
    return _templates().get_template("words.j2").module


def glossary(record: Record) -> dict[str, list[tuple[str, str]]]:
    """The names that occur in a result with their meaning, by heading."""
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
    """The fastest correct row of a case, of the reference or else of other packages, if any."""
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


def _ops(record: Record) -> dict[str, list[list[Row]]]:
    """The rows of each op by case, ours first."""
    found: dict[str, list[list[Row]]] = {}
    for op in dict.fromkeys(row.op for row in record.rows):
        cases = ([row for row in record.of(case) if row.op == op] for case in record.cases)
        found[op] = [sorted(own, key=lambda row: row.contender != OURS) for own in cases if own]
    return found


def _steps(record: Record) -> dict[str, Any]:
    """The rows of steps by case, and what they are made of."""
    of_what = record.environment.get("denominator")
    of_what = of_what or "the step of the same model with plain residual connections"
    if isinstance(of_what, Mapping):
        of_what = [f"{case}: {what}" for case, what in of_what.items()]
    cases = {case: record.of(case) for case in record.cases}
    spent, added = [], []
    for case, own in cases.items():
        rows = [row for row in own if row.parts]
        names = in_order(name for row in rows for name in row.parts)
        spent += [(case, names, rows)] if rows else []
        more = more_than_plain(own)
        added += [(case, names, more)] if more else []
    return {
        "cases": cases,
        "denominators": [of_what] if isinstance(of_what, str) else of_what,
        "waiting": [f"{case}: {line}" for case, own in cases.items() for line in waits(own)],
        "spent": spent,
        "added": added,
    }


def _spread(row: Row | None, unit: float = 1.0) -> str:
    """Median and percentiles of a time, in a unit of so many microseconds."""
    if row is None or row.us is None:
        return "-"
    form, scale = ".1f" if row.us / unit < 1000 else ".0f", 1 / unit
    text = shown(row.us, form, scale)
    if row.p20 is None or row.p80 is None:
        return text
    return f"{text} [{shown(row.p20, form, scale)} to {shown(row.p80, form, scale)}]"


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

"""A comparison as a table for a terminal, as Markdown for a pull request, and as JSON."""

import html
from collections.abc import Sequence
from typing import Any

import msgspec

from mhc_tile.autotune._extras import require

from .compare import ERRORS, OVERHEAD_DRIFT, VERDICTS, Comparison, Pair
from .records import Record, Row
from .tables import shown, untimed

HEADERS = ("", "case", "contender", "base us", "new us", "change", "allowed", "")
ALIGN = ("left", "left", "left", "right", "right", "right", "right", "left")


def headline(found: Comparison, *, complete: bool = False) -> str:
    """The outcome in one line: "2 regressions of 60 cases", "no regression in 60 cases".

    With `complete`, here and below, cases that were not measured count.
    """
    ours = [pair for pair in found.pairs if pair.ours]
    known = found.judged | {pair.case for pair in ours if complete and pair.verdict == "missing"}
    left = len({pair.case for pair in ours} - known)
    parts = []
    for verdict in ("regression", "failing", "missing"):
        number = len({pair.case for pair in found.of(verdict)})
        if number and (complete or verdict != "missing"):
            plural = "s" if verdict == "regression" and number > 1 else ""
            parts.append(f"{number} {verdict}{plural}")
    text = f"{', '.join(parts)} of" if parts else "no regression in"
    rest = f"; {left} in one of them only" if left else ""
    return f"{text} {_cases(len(known))}{rest}"


def lines(found: Comparison) -> list[str]:
    """What was compared, how, and what is different where it was measured."""
    base, new = (found.base.environment, found.new.environment)
    said = [
        f"base: {_origin(found.base)}",
        f"new:  {_origin(found.new)}",
        f"GPU {base.get('gpu') or 'none'}, copy {_copy(base)} -> {_copy(new)} TB/s",
        f"A case may be slower by {found.threshold:.0%}, or by noise where that is more"
        + (f"; {found.pace - 1:.1%} more, as the copy is slower." if found.pace > 1.0005 else "."),
    ]
    if found.new.kind == "overhead":
        said.append(
            f"An overhead may grow by {OVERHEAD_DRIFT:.0%} of the plain step, or by {ERRORS:g} "
            "standard errors where that is more."
        )
    if found.mean_change is not None:
        said.append(f"mhc_tile over all cases: {found.mean_change:+.1%} time (geometric mean).")
    return said + [f"differs: {difference}" for difference in found.differences]


def table(found: Comparison) -> str:
    """Every pair on a line, what is wrong first; MissingExtraError without tabulate."""
    tabulate = require("tabulate", "perf", "perf").tabulate
    rows = [_cells(pair) for pair in _sorted(found.pairs)]
    return tabulate(rows, HEADERS, disable_numparse=True, colalign=ALIGN if rows else None)


def markdown(found: Comparison, *, complete: bool = False) -> str:
    """A comment for a pull request: outcome, what changed, everything else folded away."""
    pairs = _sorted(found.pairs)
    changed = [pair for pair in pairs if pair.ours and pair.verdict != "same"]
    others = [pair for pair in pairs if pair not in changed]
    parts = [f"### Performance: {headline(found, complete=complete)}", ""]
    if found.faults(complete=complete):
        parts += ["**This change must not be merged as it is.**", ""]
    parts += [f"- {escape(line)}" for line in lines(found)] + [""]
    if changed:
        parts += [*_markdown_table(changed), ""]
    if others:
        count = f"{len(others)} unchanged" if changed else f"All {len(others)}"
        parts += [f"<details><summary>{count}, and other implementations</summary>", ""]
        parts += [*_markdown_table(others), "", "</details>", ""]
    return "\n".join(parts)


def as_json(found: Comparison, *, complete: bool = False) -> str:
    """The verdicts and where both results come from."""
    values: dict[str, Any] = {
        "passed": not found.faults(complete=complete),
        "headline": headline(found, complete=complete),
        "threshold": found.threshold,
        "pace": found.pace,
        "mean_change": found.mean_change,
        "differences": found.differences,
        "base": found.base.environment,
        "new": found.new.environment,
        "pairs": found.pairs,
    }
    return msgspec.json.format(msgspec.json.encode(values), indent=1).decode() + "\n"


def escape(text: str) -> str:
    r"""Text that Markdown shows as it is, also in a table.

    Example:
        >>> print(escape("a | b <c> `d`"))
        a \| b &lt;c&gt; \`d\`
    """
    plain = html.escape(" ".join(text.split()), quote=False)
    for mark in "\\`*_[]|#":
        plain = plain.replace(mark, f"\\{mark}")
    return plain


def _sorted(pairs: Sequence[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: (not pair.ours, VERDICTS.index(pair.verdict)))


def _cells(pair: Pair) -> tuple[str, ...]:
    times = (_time(pair.base), _time(pair.new))
    changes = (shown(value, "+.1%") for value in (pair.change, pair.allowed))
    return (pair.verdict, pair.case, pair.contender, *times, *changes, "; ".join(pair.notes))


def _markdown_table(pairs: Sequence[Pair]) -> list[str]:
    rules = ["---:" if align == "right" else "---" for align in ALIGN]
    rows = [[escape(cell) for cell in _cells(pair)] for pair in pairs]
    return [f"| {' | '.join(row)} |" for row in (HEADERS, rules, *rows)]


def _time(row: Row | None) -> str:
    """Median and spread, "91.2 (90.8 to 91.9)"."""
    if row is None:
        return ""
    if (sample := row.sample) is None:
        return untimed(row)
    return f"{sample.us:.1f} ({sample.low:.1f} to {sample.high:.1f})"


def _origin(record: Record) -> str:
    environment = record.environment
    commit = environment.get("commit") or "no commit"
    left = environment.get("cases_left")
    ended = f", did not end: {left} left" if left else ""
    date = environment.get("date") or "no date"
    return f"{commit}, {date}, {_cases(len(record.cases))}{ended}"


def _copy(environment: Any) -> str:
    copy = environment.get("copy_bytes_per_s")
    return f"{copy / 1e12:.2f}" if copy else "?"


def _cases(count: int) -> str:
    return f"{count} case{'s' * (count != 1)}"

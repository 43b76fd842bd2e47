"""What `mhc-tile perf run` and `overhead` share, from the checks to the exit code."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from mhc_tile.autotune._extras import require

from . import output
from .bench import Bench, bench_of
from .environment import environment
from .records import Kind, Record, Row, is_ours

_Item = TypeVar("_Item")


def begin(
    kind: str, args: SimpleNamespace, known: Sequence[str], here: Sequence[str]
) -> tuple[Bench, dict[str, Any], Path]:
    """Check what would fail after minutes of measuring.

    `known` are all contenders' names, `here` those that can be measured.

    Returns:
        The bench, the environment of the result, and its path.

    Raises:
        ValueError: An option is out of range.
        OSError: The result cannot be written.
        MissingExtraError: A package of the perf extra is missing.
    """
    command = f"perf {kind}"
    output.check_positive(command, turns=args.turns)
    output.check_names(command, args.contender, known, here)
    bench = bench_of(args.device)
    for package in ("tabulate", "tqdm"):
        require(package, f"mhc-tile {command}", "perf")
    where = environment(bench.bandwidth(), args.device)
    path = output.result_path("perf" if kind == "run" else kind, where, args.out)
    output.check_figures(command, args.figures)
    return bench, where, path


def measure_all(
    kind: Kind,
    items: Sequence[_Item],
    measure: Callable[[_Item, dict[str, Row], output.Progress], None],
    bench: Bench,
    where: dict[str, Any],
    path: Path | None,
    *,
    bar: bool = False,
) -> Record:
    """Measure cases or slices; whatever ends it, the file has what was measured.

    Args:
        kind: of the result.
        items: cases or slices.
        measure: puts the rows of an item by contender into its second argument, as they come.
        bench: measures the copy again at the end.
        where: the environment, with "cases_left" until all is measured.
        path: of the result; None writes nothing.
        bar: whether a terminal shows how many items are left.

    Returns:
        The result, with "cases_left" in its environment if the GPU answers no more.

    Raises:
        OSError: The result cannot be written.
    """
    progress, parts = output.Progress(), list[dict[str, Row]]()
    where["cases_left"] = len(items)
    try:
        for item in progress.over(items, f"mhc-tile perf {kind}") if bar else items:
            parts.append({})
            measure(item, parts[-1], progress)
            where["cases_left"] -= 1
            output.keep(kind, where, parts, path)  # a killed process loses the item in flight
        del where["cases_left"]
        where["copy_bytes_per_s"] = max(where["copy_bytes_per_s"], bench.bandwidth())
    except output.UnusableError as error:
        output.say(f"perf {kind}: {error}; what comes after it is not measured")
    finally:
        record = output.keep(kind, where, parts, path)
        output.say_unfinished(record, path)
    return record


def end(record: Record, path: Path, figures: Path | None) -> int:
    """Say where the result is, and draw it if `figures` is a folder.

    Returns:
        0, or 1 if this library is wrong or fails, or the GPU answers no more.
    """
    output.say(f"result: {output.kept_at(record, path)}")
    if figures:
        output.draw(record, figures)
    ours = (row for row in record.rows if is_ours(row.contender))
    return int("cases_left" in record.environment or any(row.status != "ok" for row in ours))

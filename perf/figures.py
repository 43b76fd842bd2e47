"""Pictures of a result: percent of the roofline, times by size, parts of a step, changes.

Colours are Okabe and Ito's, told apart without red or green. A contender keeps its colour and its
marker in all pictures of a result.
"""

import collections
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from mhc_tile.autotune._extras import require

from .compare import Comparison
from .records import OURS, Record, Row, percent_of_roofline
from .steps import PARTS, in_order, more_than_plain

Figure = Any  # matplotlib's, which is imported where it is needed
Label = tuple[str, str]  # colour and marker

BLUE, GREY, RED = "#0072B2", "#8C8C8C", "#D55E00"
PEERS = (("#E69F00", "s"), ("#009E73", "D"), ("#CC79A7", "^"), (RED, "v"), ("#56B4E9", "P"))
REFERENCES = ((GREY, "x"), ("#4D4D4D", "+"), ("#000000", "1"))
OTHERS = ("#000000", "#5E3C99", "#B2ABD2", "#1B7837")  # of parts that `PARTS` lacks, then hatched
HATCHES = ("", "////", "....", "xxxx")
BOUND = {"color": "#666666", "linestyle": (0, (4, 3)), "linewidth": 0.9}  # the roofline
MOST_SHARE = 112  # percent of the roofline up to which there are marks
LEGEND_INCHES = 1.9  # of an entry, the longest
MOST_PANELS = 6
MOST_CHANGES = 40
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "svg.hashsalt": "mhc_tile",
}


def draw(record: Record, comparison: Comparison | None = None) -> dict[str, Figure]:
    """Every picture that a result has numbers for, by name; "changes" is that of a comparison."""
    with _style():
        found = {
            "roofline": roofline(record),
            "tokens": scaling(record, "tokens"),
            "hidden_size": scaling(record, "hidden_size"),
            "added": added(record),
            "parts": parts(record),
            "changes": changes(comparison) if comparison else None,
        }
    return {name: figure for name, figure in found.items() if figure is not None}


def save(figure: Figure, target: Any, kind: str) -> None:
    """Write a picture of `draw` to a path or an open file, as "svg" or "png"."""
    with _style():
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(target, format=kind, dpi=150, metadata=metadata)


def _style() -> Any:
    return require("matplotlib", "perf", "perf").rc_context(STYLE)


def roofline(record: Record) -> Figure | None:
    """Bars of the share of the roofline: a column a mode, a line a shape; None if empty.

    A mode with one op has no panels if another mode has more ops: the table has its number.
    """
    copy = record.environment.get("copy_bytes_per_s")
    rows = [row for row in record.rows if percent_of_roofline(row, copy) is not None]
    shapes = main_shapes(rows)
    if not shapes:
        return None
    measured = {mode: {r.op for r in rows if r.mode == mode} for mode in (r.mode for r in rows)}
    most = max(map(len, measured.values()))
    modes = [mode for mode, found in measured.items() if len(found) > 1 or most == 1]
    ops = {
        shape: list(dict.fromkeys(row.op for row in rows if _shape(row) == shape))[::-1]
        for shape in shapes
    }
    heights = [0.9 + len(found) for found in ops.values()]
    size = (1.4 + 2.9 * len(modes), 0.9 + 0.3 * sum(heights))
    figure, axes = _panels(
        len(shapes), len(modes), size, sharex=True, sharey="row", height_ratios=heights
    )
    styles = labels(record)
    for axis, (shape, mode) in zip(axes, itertools.product(shapes, modes), strict=True):
        own = [row for row in rows if (row.mode, _shape(row)) == (mode, shape)]
        _shares(axis, own, ops[shape], copy, styles)
        axis.set_title(f"{shape[0]} x {shape[1]}, {mode}")
    axes[0].set_xlim(0, 1.13 * max(MOST_SHARE, *(percent_of_roofline(r, copy) or 0 for r in rows)))
    figure.supxlabel("percent of the roofline")
    _legend(figure, styles)
    return figure


def _shares(
    axis: Any, rows: Sequence[Row], ops: list[str], copy: float | None, styles: dict[str, Label]
) -> None:
    """A panel of `roofline`: a bar and a number for ours, a mark for every other contender."""
    halo = require("matplotlib.patheffects", "perf", "perf").withStroke  # marks lie on bars
    for row in rows:
        percent, place = percent_of_roofline(row, copy), ops.index(row.op)
        colour, marker = styles[row.contender]
        if row.contender == OURS:
            axis.barh(place, percent, height=0.62, color=colour)
            axis.annotate(  # at the right edge: marks are anywhere else
                f"{percent:.0f}", (1, place), (-2, 0), textcoords="offset points", fontsize=7,
                xycoords=axis.get_yaxis_transform(), ha="right", va="center", color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
            )  # fmt: skip
        else:
            axis.plot(
                percent, place, marker, color=colour, markeredgewidth=1.4, zorder=3,
                path_effects=[halo(linewidth=3.4, foreground="white")],
            )  # fmt: skip
    axis.axvline(100, **BOUND)
    _rows(axis, ops)


def scaling(record: Record, along: str) -> Figure | None:
    """Times by "tokens" or by "hidden_size": a panel an op and mode with two sizes or more.

    None if there is no such panel, or nowhere three sizes with the same other dimensions.
    """
    rows = _most_sizes(record, along)
    points: dict[tuple[str, str], list[Row]] = collections.defaultdict(list)
    for row in rows:
        points[row.op, row.mode].append(row)
    size = operator.attrgetter(along)
    panels = {name: own for name, own in points.items() if len(set(map(size, own))) > 1}
    if not panels:
        return None
    rows = list(itertools.chain(*panels.values()))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    inches = (0.8 + max(2.6, min(5.0, 7.7 / columns)) * columns, 1.2 + 2.0 * lines)
    figure, axes = _panels(lines, columns, inches, sharex=True)
    styles = labels(record)
    copy = record.environment.get("copy_bytes_per_s")
    for axis, (name, own) in zip(axes, panels.items(), strict=False):
        _times(axis, own, along, copy, styles)
        axis.set_title(", ".join(name))
        axis.set_xticks(sorted(set(map(size, rows))))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:  # with no panel below
        axis.tick_params(axis="x", labelbottom=True)
    one = rows[0]
    by_tokens = ("tokens T", f"C = {one.hidden_size}")
    label, fixed = by_tokens if along == "tokens" else ("width C", f"T = {one.tokens}")
    figure.supxlabel(f"{label}   ({fixed}, n = {one.streams}, {one.dtype})")
    figure.supylabel("microseconds a call")
    present = {row.contender for row in rows}
    _legend(figure, {name: style for name, style in styles.items() if name in present}, copy)
    return figure


def _most_sizes(record: Record, along: str) -> list[Row]:
    """Timed rows that differ in one size alone, where ours has most sizes; empty below three."""
    other = "hidden_size" if along == "tokens" else "tokens"

    def fixed(row: Row) -> tuple[int, int, str]:
        return getattr(row, other), row.streams, row.dtype

    timed = [row for row in record.rows if row.sample]
    points: dict[tuple[int, int, str], set[int]] = collections.defaultdict(set)
    for row in timed:
        if row.contender == OURS:
            points[fixed(row)].add(getattr(row, along))
    if max(map(len, points.values()), default=0) < 3:
        return []
    best = max(points, key=lambda key: (len(points[key]), key[1] == 4, key[2] == "bfloat16"))
    return [row for row in timed if fixed(row) == best]


def _times(
    axis: Any, rows: Sequence[Row], along: str, copy: float | None, styles: dict[str, Label]
) -> None:
    """A panel of `scaling`, both axes logarithmic: a line a contender, and the roofline."""
    size = operator.attrgetter(along)
    for name in dict.fromkeys(row.contender for row in rows):
        own = sorted((row for row in rows if row.contender == name), key=size)
        colour, marker = styles[name]
        sizes, front = [size(row) for row in own], 4 if name == OURS else 3
        axis.plot(sizes, [row.us for row in own], f"{marker}-", color=colour, zorder=front)
        axis.vlines(
            sizes, [row.p20 for row in own], [row.p80 for row in own], color=colour, zorder=front
        )
    bounds = {size(row): row.bytes / copy * 1e6 for row in rows if copy and row.bytes}
    if bounds:
        axis.plot(*zip(*sorted(bounds.items()), strict=True), **BOUND)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    low, high = axis.get_ylim()
    subs = [1.0] if high > 1e4 * low else [1.0, 3.0] if high > 20 * low else [1.0, 2, 3, 5, 7]
    axis.yaxis.set_major_locator(require("matplotlib.ticker", "perf", "perf").LogLocator(subs=subs))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.tick_params(axis="x", labelrotation=45, labelsize=7)
    axis.minorticks_off()


def parts(record: Record) -> Figure | None:
    """What the time of a step is made of: a bar a contender and a case; None without parts."""
    rows = [row for row in record.rows if row.parts and row.us]
    if not rows:
        return None
    wholes = [row.us or 0.0 for row in rows]
    figure, axis = _stacked(rows, [row.parts for row in rows], wholes, ".1f")
    axis.set_xlabel("milliseconds of a step; the line is the whole step as measured")
    return figure


def added(record: Record) -> Figure | None:
    """What a step has more than with plain residuals, by part; None without any plain one."""
    found = [each for case in record.cases for each in more_than_plain(record.of(case))]
    if not found:
        return None
    rows, more, timed = zip(*found, strict=True)
    figure, axis = _stacked(rows, more, timed, "+.1f")
    axis.axvline(0.0, color="#666666", linewidth=0.8)
    axis.set_xlabel("milliseconds more than with plain residuals; the line is what was timed")
    return figure


def _stacked(
    rows: Sequence[Row],
    values: Sequence[Mapping[str, float]],
    wholes: Sequence[float],
    form: str,
) -> tuple[Figure, Any]:
    """A bar of parts for each row, negative ones left of 0, and a line at its whole, all in us."""
    names = in_order(name for own in values for name in own)
    others = itertools.cycle(itertools.product(HATCHES, OTHERS))
    looks = {name: ("", PARTS[name]) if name in PARTS else next(others) for name in names}
    figure, (axis,) = _panels(1, 1, (8.5, 1.3 + 0.42 * len(rows)))
    for place, (own, us) in enumerate(reversed(list(zip(values, wholes, strict=True)))):
        ends, whole = [0.0, 0.0], us / 1e3
        for name, (hatch, colour) in looks.items():
            width = own.get(name, 0.0) / 1e3
            axis.barh(
                place, width, left=ends[width < 0], height=0.62, color=colour, hatch=hatch,
                edgecolor="white", linewidth=0.6, label=name if place == 0 else None,
            )  # fmt: skip
            ends[width < 0] += width
        axis.plot(whole, place, "|", color="black", markersize=14, markeredgewidth=1.4)
        axis.annotate(f" {whole:{form}}", (max(ends[0], whole), place), va="center")
    several = len({row.case for row in rows}) > 1
    texts = [f"{r.case}\n{r.contender}" if several else r.contender for r in reversed(rows)]
    axis.set_yticks(range(len(rows)), texts)
    axis.margins(x=0.08)
    axis.grid(axis="y", visible=False)
    _legend_above(figure, len(names))
    return figure, axis


def changes(found: Comparison) -> Figure | None:
    """How much slower our cases are than in the base, the worst above; None if none is known."""
    pairs = [pair for pair in found.pairs if pair.ours and pair.change is not None]
    pairs.sort(key=lambda pair: abs(pair.change or 0) / (pair.allowed or 1), reverse=True)
    pairs = sorted(pairs[:MOST_CHANGES], key=lambda pair: pair.change or 0)
    if not pairs:
        return None
    figure, (axis,) = _panels(1, 1, (8.5, 1.1 + 0.2 * len(pairs)))
    colours = {"regression": RED, "improvement": BLUE, "failing": RED}
    for place, pair in enumerate(pairs):
        allowed, change = 100 * (pair.allowed or 0), 100 * (pair.change or 0)
        axis.barh(place, 2 * allowed, left=-allowed, height=0.8, color="#EEEEEE")
        axis.plot(change, place, "o", color=colours.get(pair.verdict, GREY), zorder=3)
    axis.axvline(0, color="#666666", linewidth=0.8)
    axis.set_xlabel("percent more time than the base; the grey bar is what passes")
    _rows(axis, [pair.case for pair in pairs], fontsize=7)
    return figure


def labels(record: Record) -> dict[str, Label]:
    """Colour and marker of every contender that was timed, ours first."""
    timed = dict.fromkeys(row.contender for row in record.rows if row.us)
    names = sorted(timed, key=lambda name: (name != OURS, "reference" in name))
    peers, references = itertools.cycle(PEERS), itertools.cycle(REFERENCES)
    return {
        name: (BLUE, "o") if name == OURS else next(references if "reference" in name else peers)
        for name in names
    }


def main_shapes(rows: Sequence[Row]) -> list[tuple[int, int, int, str]]:
    """The shapes (T, C, n, dtype) at which most timed rows are, sorted; `MOST_PANELS` at most."""
    counts = collections.Counter(map(_shape, rows))
    most = max(counts.values(), default=0)
    wide = [shape for shape, count in counts.items() if 2 * count > most]
    wide.sort(key=lambda s: (-counts[s], s[2] != 4, s[3] != "bfloat16", -s[0] * s[1]))
    return sorted(wide[:MOST_PANELS])


def _shape(row: Row) -> tuple[int, int, int, str]:
    return row.tokens, row.hidden_size, row.streams, row.dtype


def _panels(
    lines: int, columns: int, size: tuple[float, float], **shared: Any
) -> tuple[Figure, list[Any]]:
    figure = require("matplotlib.figure", "perf", "perf").Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(lines, columns, squeeze=False, **shared).flatten())


def _rows(axis: Any, names: Sequence[str], **font: Any) -> None:
    """Name the lines of a panel from below; no grid between them."""
    axis.set_yticks(range(len(names)), names, **font)
    axis.set_ylim(-0.7, len(names) - 0.3)
    axis.grid(axis="y", visible=False)


def _legend(figure: Figure, styles: dict[str, Label], bound: float | None = None) -> None:
    line_of = require("matplotlib.lines", "perf", "perf").Line2D
    handles = [
        line_of([], [], color=colour, marker=marker, markeredgewidth=1.4, lw=0, label=name)
        for name, (colour, marker) in styles.items()
    ]
    if bound:
        handles.append(line_of([], [], **BOUND, label="roofline"))
    _legend_above(figure, len(handles), handles=handles)


def _legend_above(figure: Figure, entries: int, **handles: Any) -> None:
    fitting = max(1, int(figure.get_figwidth() / LEGEND_INCHES))
    figure.legend(loc="outside upper center", ncols=min(fitting, entries), **handles)

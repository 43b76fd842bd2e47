"""Pictures of a result: percent of the roofline, times by size, parts of a step, changes.

Colours are Okabe and Ito's, told apart without red or green; contenders have markers of their own,
too, and keep colour and marker in all pictures of a result.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mhc_tile.autotune._extras import require

from .compare import Comparison
from .records import OURS, Record, Row, percent_of_roofline
from .steps import PARTS, in_order, more_than_plain

Figure = Any  # matplotlib's, which is imported where it is needed
Label = tuple[str, str]  # colour and marker

BLUE, GREY = "#0072B2", "#8C8C8C"
PEERS = (("#E69F00", "s"), ("#009E73", "D"), ("#CC79A7", "^"), ("#D55E00", "v"), ("#56B4E9", "P"))
REFERENCES = ((GREY, "x"), ("#4D4D4D", "+"), ("#000000", "1"))
OTHERS = ("#000000", "#5E3C99", "#B2ABD2", "#1B7837")  # of parts with other names, then hatched
HATCHES = ("", "////", "....", "xxxx")
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
    """Every picture that a result has numbers for, by name.

    Args:
        record: the result.
        comparison: with an older one, for a picture of changes.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
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
    """Write a picture.

    Args:
        figure: of `draw`.
        target: a path or a file.
        kind: "svg" or "png".
    """
    with _style():
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(target, format=kind, dpi=150, metadata=metadata)


def roofline(record: Record) -> Figure | None:
    """Bars of the share of the roofline: a panel a mode, a line of panels a shape; None if empty.

    A mode in which only one op was measured, beside others with more, has no panels: the table has
    it.
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
    for axis, (shape, mode) in zip(axes, ((s, m) for s in shapes for m in modes), strict=True):
        _shares(
            axis,
            [row for row in rows if (row.mode, _shape(row)) == (mode, shape)],
            ops[shape],
            copy,
            styles,
        )
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
    axis.axvline(100, color="#666666", linewidth=0.8, linestyle=(0, (4, 3)))
    axis.set_yticks(range(len(ops)), ops)
    axis.set_ylim(-0.6, len(ops) - 0.4)
    axis.grid(axis="y", visible=False)


def scaling(record: Record, along: str) -> Figure | None:
    """Times by the number of tokens or by the width; None if too few.

    A panel an op and a mode of which there are two sizes or more.

    Args:
        record: the result.
        along: "tokens" or "hidden_size".
    """
    other = "hidden_size" if along == "tokens" else "tokens"
    rows = [row for row in record.rows if row.sample]
    fixed = _most_points(rows, along, other)
    if fixed is None:
        return None
    rows = [row for row in rows if (getattr(row, other), row.streams, row.dtype) == fixed]
    sizes: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        sizes.setdefault((row.op, row.mode), set()).add(getattr(row, along))
    panels = [panel for panel, own in sizes.items() if len(own) > 1]
    if not panels:
        return None
    rows = [row for row in rows if (row.op, row.mode) in panels]
    ticks = sorted(set.union(*map(sizes.__getitem__, panels)))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    size = (0.8 + max(2.6, min(5.0, 7.7 / columns)) * columns, 1.2 + 2.0 * lines)
    figure, axes = _panels(lines, columns, size, sharex=True)
    styles = labels(record)
    copy = record.environment.get("copy_bytes_per_s")
    for axis, (op, mode) in zip(axes, panels, strict=False):
        own = [row for row in rows if (row.op, row.mode) == (op, mode)]
        _times(axis, own, along, copy, styles)
        axis.set_title(f"{op}, {mode}")
        axis.set_xticks(ticks)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:  # with no panel below
        axis.tick_params(axis="x", labelbottom=True)
    shape = f"{'C' if along == 'tokens' else 'T'} = {fixed[0]}, n = {fixed[1]}, {fixed[2]}"
    figure.supxlabel(f"{'tokens T' if along == 'tokens' else 'width C'}   ({shape})")
    figure.supylabel("microseconds a call")
    present = {row.contender for row in rows}
    _legend(figure, {name: style for name, style in styles.items() if name in present}, copy)
    return figure


def _times(
    axis: Any, rows: Sequence[Row], along: str, copy: float | None, styles: dict[str, Label]
) -> None:
    """Lines of a panel, both axes logarithmic: every contender, and the bound."""
    bounds: dict[int, float] = {}
    for name in dict.fromkeys(row.contender for row in rows):
        own = sorted(
            (row for row in rows if row.contender == name), key=lambda row: getattr(row, along)
        )
        colour, marker = styles[name]
        sizes = [getattr(row, along) for row in own]
        front = 4 if name == OURS else 3
        axis.plot(sizes, [row.us for row in own], f"{marker}-", color=colour, zorder=front)
        axis.vlines(
            sizes, [row.p20 for row in own], [row.p80 for row in own], color=colour, zorder=front
        )
        if copy:
            for row, size in zip(own, sizes, strict=True):
                if row.bytes:
                    bounds[size] = row.bytes / copy * 1e6
    if bounds:
        sizes = sorted(bounds)
        axis.plot(sizes, [bounds[s] for s in sizes], color="#666666", linestyle=(0, (4, 3)), lw=0.9)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    low, high = axis.get_ylim()
    subs = (
        [1.0] if high > 1e4 * low else [1.0, 3.0] if high > 20 * low else [1.0, 2.0, 3.0, 5.0, 7.0]
    )
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
    """A bar of parts for each row and a line at its whole, all in microseconds.

    What is negative goes to the left of 0.
    """
    names = in_order(name for own in values for name in own)
    looks = {name: (colour, "") for name, colour in PARTS.items()}
    for index, name in enumerate(name for name in names if name not in PARTS):
        hatch = HATCHES[index // len(OTHERS) % len(HATCHES)]
        looks[name] = (OTHERS[index % len(OTHERS)], hatch)
    figure, (axis,) = _panels(1, 1, (8.5, 1.3 + 0.42 * len(rows)))
    for place, (own, us) in enumerate(reversed(list(zip(values, wholes, strict=True)))):
        ends, whole = [0.0, 0.0], us / 1e3
        for name in names:
            width = own.get(name, 0.0) / 1e3
            axis.barh(
                place, width, left=ends[width < 0], height=0.62, color=looks[name][0],
                hatch=looks[name][1], edgecolor="white", linewidth=0.6,
                label=name if place == 0 else None,
            )  # fmt: skip
            ends[width < 0] += width
        axis.plot(whole, place, "|", color="black", markersize=14, markeredgewidth=1.4)
        axis.annotate(f" {whole:{form}}", (max(ends[0], whole), place), va="center")
    several = len({row.case for row in rows}) > 1
    texts = [f"{r.case}\n{r.contender}" if several else r.contender for r in reversed(rows)]
    axis.set_yticks(range(len(rows)), texts)
    axis.margins(x=0.08)
    axis.grid(axis="y", visible=False)
    fitting = int(figure.get_figwidth() / LEGEND_INCHES)
    figure.legend(loc="outside upper center", ncols=min(fitting, len(names)))
    return figure, axis


def changes(found: Comparison) -> Figure | None:
    """How much slower our cases are than in the base, the worst above; None if none is known."""
    pairs = [pair for pair in found.pairs if pair.ours and pair.change is not None]
    pairs.sort(key=lambda pair: abs(pair.change or 0) / (pair.allowed or 1), reverse=True)
    pairs = sorted(pairs[:MOST_CHANGES], key=lambda pair: pair.change or 0)
    if not pairs:
        return None
    figure, (axis,) = _panels(1, 1, (8.5, 1.1 + 0.2 * len(pairs)))
    colours = {"regression": "#D55E00", "improvement": BLUE, "failing": "#D55E00"}
    for place, pair in enumerate(pairs):
        allowed, change = 100 * (pair.allowed or 0), 100 * (pair.change or 0)
        axis.barh(place, 2 * allowed, left=-allowed, height=0.8, color="#EEEEEE")
        axis.plot(change, place, "o", color=colours.get(pair.verdict, GREY), zorder=3)
    axis.axvline(0, color="#666666", linewidth=0.8)
    axis.set_yticks(range(len(pairs)), [pair.case for pair in pairs], fontsize=7)
    axis.set_ylim(-0.7, len(pairs) - 0.3)
    axis.set_xlabel("percent more time than the base; the grey bar is what passes")
    axis.grid(axis="y", visible=False)
    return figure


def labels(record: Record) -> dict[str, Label]:
    """Colour and marker of every contender that was timed, ours first.

    Args:
        record: the result.
    """
    timed = dict.fromkeys(row.contender for row in record.rows if row.us)
    names = sorted(timed, key=lambda name: (name != OURS, "reference" in name))
    found, peers, references = {}, 0, 0
    for name in names:
        if name == OURS:
            found[name] = (BLUE, "o")
        elif "reference" in name:
            found[name] = REFERENCES[references % len(REFERENCES)]
            references += 1
        else:
            found[name] = PEERS[peers % len(PEERS)]
            peers += 1
    return found


def main_shapes(rows: Sequence[Row]) -> list[tuple[int, int, int, str]]:
    """The shapes (T, C, n, dtype) at which most was measured, sorted; a few at most.

    Args:
        rows: timed.
    """
    counts = collections.Counter(_shape(row) for row in rows)
    most = max(counts.values(), default=0)
    wide = [shape for shape, count in counts.items() if 2 * count > most]
    wide.sort(key=lambda s: (-counts[s], s[2] != 4, s[3] != "bfloat16", -s[0] * s[1]))
    return sorted(wide[:MOST_PANELS])


def _shape(row: Row) -> tuple[int, int, int, str]:
    return row.tokens, row.hidden_size, row.streams, row.dtype


def _most_points(rows: Sequence[Row], along: str, other: str) -> tuple[int, int, str] | None:
    """The other size, n and dtype at which ours has most sizes; None if nowhere three."""
    points: dict[tuple[int, int, str], set[int]] = {}
    for row in rows:
        if row.contender == OURS:
            key = (getattr(row, other), row.streams, row.dtype)
            points.setdefault(key, set()).add(getattr(row, along))
    if not points:
        return None
    best = max(points, key=lambda key: (len(points[key]), key[1] == 4, key[2] == "bfloat16"))
    return best if len(points[best]) >= 3 else None


def _panels(
    lines: int, columns: int, size: tuple[float, float], **shared: Any
) -> tuple[Figure, list[Any]]:
    figure_of = require("matplotlib.figure", "perf", "perf").Figure
    figure = figure_of(figsize=size, layout="constrained")
    return figure, list(figure.subplots(lines, columns, squeeze=False, **shared).flatten())


def _legend(figure: Figure, styles: dict[str, Label], bound: float | None = None) -> None:
    line_of = require("matplotlib.lines", "perf", "perf").Line2D
    handles = [
        line_of([], [], color=colour, marker=marker, markeredgewidth=1.4, lw=0, label=name)
        for name, (colour, marker) in styles.items()
    ]
    if bound:
        dashes = (0, (4, 3))
        handles.append(line_of([], [], color="#666666", linestyle=dashes, lw=0.9, label="roofline"))
    fitting = max(1, int(figure.get_figwidth() / LEGEND_INCHES))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(fitting, len(handles)))


@contextlib.contextmanager
def _style() -> Iterator[None]:
    rc_context: Callable[..., Any] = require("matplotlib", "perf", "perf").rc_context
    with rc_context(STYLE):
        yield

"""The figures of the demo."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .extras import require
from .metrics import Row
from .report import Leg

# Okabe-Ito: distinct with every common colour blindness; line styles repeat the distinction.
COLOURS = {"residual": "#555555", "hc": "#D55E00", "mhc": "#0072B2"}
STYLES = {"residual": ":", "hc": "--", "mhc": "-"}
_MAX_MAPS = 8


def draw_all(folder: Path, legs: Sequence[Leg]) -> list[str]:
    """Draw every figure of the runs in a folder; returns the file names, in order."""
    ordinary = [leg for leg in legs if not leg.stress]
    stress = [leg for leg in legs if leg.stress]
    figures = {
        "loss.png": _losses(ordinary),
        "grad_norm.png": _grad_norms(ordinary),
        "gains.png": _gains(ordinary),
        "h_res.png": _maps(ordinary, "Ordinary training: the learned h_res"),
        "stress.png": _stress(stress),
        "h_res_stress.png": _maps(stress, "Stress: the learned h_res"),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=130)
    return list(figures)


def _figure(width: float, height: float, title: str, rows: int, columns: int) -> tuple[Any, Any]:
    """A figure and its axes [rows, columns]; without pyplot, which has global state."""
    figure_class = require("matplotlib.figure", "figures").Figure
    figure = figure_class(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=13)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _finish(axes: Any, title: str, x: str, y: str, **legend: Any) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(**legend)


def _line(leg: Leg, **changes: Any) -> dict[str, Any]:
    return {"color": COLOURS[leg.kind], "linestyle": STYLES[leg.kind], "label": leg.label} | changes


def _smooth(values: list[float], average: Any = statistics.fmean) -> list[float]:
    """Running average over a twentieth of the run, centred."""
    reach = len(values) // 40
    return [average(values[max(0, at - reach) : at + reach + 1]) for at in range(len(values))]


def _column(leg: Leg, name: str) -> tuple[list[int], list[float]]:
    rows = leg.of_kind("step")
    values = [float("nan") if row[name] is None else row[name] for row in rows]
    return [row["step"] for row in rows], values


def _curve(axes: Any, leg: Leg, name: str, label: str) -> None:
    """Every step in a thin line, the running mean in a thick one."""
    steps, values = _column(leg, name)
    axes.plot(steps, values, color=COLOURS[leg.kind], alpha=0.18, linewidth=0.8)
    axes.plot(steps, _smooth(values), **_line(leg, linewidth=1.8, label=label))


def _losses(legs: Sequence[Leg]) -> Any:
    title = "Training loss: same seed, same data, same steps"
    figure, ((left, right),) = _figure(10.5, 4.4, title, 1, 2)
    _loss(left, legs, "each run")
    plain = _column(legs[0], "loss")[1]
    for leg in legs:
        steps, losses = _column(leg, "loss")
        # Step by step, because all runs see the same batches; the median, because one may spike.
        gaps = [loss - base for loss, base in zip(losses, plain, strict=False)]
        gaps = _smooth(gaps, statistics.median)
        right.plot(steps[: len(gaps)], gaps, **_line(leg, linewidth=1.8))
    title = "less the plain residual's loss on the same batch"
    _finish(right, title, "step", "loss difference (nats per byte)")
    return figure


def _loss(axes: Any, legs: Sequence[Leg], title: str) -> None:
    for leg in legs:
        end = "" if leg.validation_loss is None else f" (validation {leg.validation_loss:.3f})"
        _curve(axes, leg, "loss", leg.label + end)
        rows = leg.of_kind("validation")
        points = [row["step"] for row in rows], [row["loss"] for row in rows]
        axes.plot(*points, "o", color=COLOURS[leg.kind], markersize=4)
    _finish(axes, title, "step", "loss (nats per byte)")


def _grad_norms(legs: Sequence[Leg]) -> Any:
    figure, ((axes,),) = _figure(7.5, 4.4, "Gradient norm before clipping", 1, 1)
    for leg in legs:
        _curve(axes, leg, "grad_norm", leg.label)
    if legs[0].config.clip:
        axes.axhline(legs[0].config.clip, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
    axes.set_yscale("log")
    _plain_ticks(axes)
    _finish(axes, "", "step", "global gradient norm")
    return figure


def _plain_ticks(axes: Any) -> None:
    """Ticks of a log axis, written 1.2, 30, 4,000: decades, and more where it spans few."""
    ticker = require("matplotlib.ticker", "figures")
    low, high = axes.get_ylim()
    subs: tuple[float, ...] = (1.0,)
    if high / low < 100:
        subs = (1.0, 2.0, 5.0) if high / low > 4 else (1.0, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 5.0, 8.0)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=50))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _per_sublayer(axes: Any, legs: Sequence[Leg]) -> None:
    for leg, gains, direction in _gains_of(legs):
        values = gains[-1][direction]
        forward = direction == "forward"
        line = _line(leg, label=f"{leg.label} {direction}", marker="o" if forward else "s")
        line |= {"markersize": 5, "markerfacecolor": COLOURS[leg.kind] if forward else "white"}
        axes.plot(range(1, len(values) + 1), values, **line, linewidth=1.2)
    _gain_axis(axes, 1.05)
    axes.xaxis.get_major_locator().set_params(integer=True)
    x, y = "sublayer (1 reads the embedding)", "gain of h_res"
    _finish(axes, "each sublayer, last record", x, y, fontsize=8)


def _composite(axes: Any, legs: Sequence[Leg]) -> None:
    for leg, gains, direction in _gains_of(legs):
        values = [row[f"composite_{direction}"] or float("nan") for row in gains]
        line = _line(leg, label=f"{leg.label} {direction}")
        width = 2.0 if direction == "forward" else 1.0
        axes.plot([row["step"] for row in gains], values, **line, linewidth=width)
    _gain_axis(axes, 1.5)
    title = "product of all sublayers, over training"
    _finish(axes, title, "step", "composite gain", fontsize=8)


def _gains_of(legs: Sequence[Leg]) -> list[tuple[Leg, list[Row], str]]:
    """The runs with records of gains, each in both directions."""
    records = [(leg, leg.of_kind("gain")) for leg in legs]
    return [(leg, rows, way) for leg, rows in records if rows for way in ("forward", "backward")]


def _gain_axis(axes: Any, at_least: float) -> None:
    """A log axis around the neutral gain 1, never so narrow that rounding looks like growth."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 1 / at_least), max(high, at_least))
    axes.axhline(1.0, color="black", linewidth=0.8, alpha=0.6)
    _plain_ticks(axes)


def _gains(legs: Sequence[Leg]) -> Any:
    title = "Ordinary training: gain of the residual mixing h_res"
    figure, ((left, right),) = _figure(10.5, 4.4, title, 1, 2)
    _per_sublayer(left, legs)
    _composite(right, legs)
    return figure


def _stress(legs: Sequence[Leg]) -> Any:
    depth, rate = 2 * legs[0].config.model.num_layers, legs[0].config.learning_rate
    title = f"Stress: {depth} sublayers, learning rate {rate:g}"
    figure, ((left, middle, right),) = _figure(14.5, 4.4, title, 1, 3)
    _loss(left, legs, "training loss")
    _composite(middle, legs)
    _per_sublayer(right, legs)
    return figure


def _maps(legs: Sequence[Leg], title: str) -> Any:
    maps = [(leg, leg.mean_h_res) for leg in legs if leg.mean_h_res is not None]
    depth = len(maps[0][1])
    count = min(depth, _MAX_MAPS)
    spread = torch.linspace(0, depth - 1, count, dtype=torch.float64, device="cpu")
    width, height = 1.5 * count + 1.8, 1.6 * len(maps) + 0.9
    figure, grid = _figure(width, height, title, len(maps), count)
    limit = max(1.0, *(matrices.abs().max().item() for _, matrices in maps))
    for (leg, matrices), row in zip(maps, grid, strict=True):
        for sublayer, axes in zip(spread.round().int().tolist(), row, strict=True):
            matrix = matrices[sublayer].tolist()
            image = axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
            _write_values(axes, matrix, limit)
            if leg is maps[0][0]:
                axes.set_title(f"sublayer {sublayer + 1}", fontsize=9)
            if leg is maps[-1][0]:
                axes.set_xlabel("from stream", fontsize=8)
        row[0].set_ylabel(f"{leg.label}\nto stream", fontsize=10, color=COLOURS[leg.kind])
    figure.colorbar(image, ax=grid, shrink=0.9, label="weight")
    return figure


def _write_values(axes: Any, matrix: list[list[float]], limit: float) -> None:
    for out_index, row in enumerate(matrix):
        for in_index, value in enumerate(row):
            colour = "white" if abs(value) > 0.6 * limit else "black"
            text = f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no minus on a zero
            axes.text(in_index, out_index, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(matrix)))
    axes.set_yticks(range(len(matrix)))
    axes.tick_params(labelsize=7, length=0)

"""What the tuner prints and draws: the candidates before, the gains after."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import table
from ._extras import require
from .problems import Problem
from .registry import KERNELS
from .tuner import Option, Plan


def short(config: dict[str, Any]) -> str:
    """A configuration's values on one line, after its type if that is among them."""
    return " ".join(str(v) if k == "type" else f"{k}={v}" for k, v in config.items())


def listing(plans: Sequence[Plan], arch: str) -> str:
    """Every candidate with what it takes, and why it is pruned if it is."""
    tabulate = require("tabulate", "autotune").tabulate
    headers = ("configuration", "registers", "shared bytes", "occupancy", "")
    align = ("left", "right", "right", "right", "left")
    parts = []
    for plan in plans:
        parts.append(f"{plan.problem}: {plan.bytes / 1e6:.3f} MB must move")
        if plan.idle:
            parts[-1] += f"; nothing to tune: {plan.idle}"
            continue
        rows = [_row(plan, option, arch) for option in plan.options]
        parts.append(tabulate(rows, headers, disable_numparse=True, colalign=align))
        count = 0 if plan.failed else len(plan.candidates)
        parts.append(f"{count} of {len(plan.options)} to measure\n")
    return "\n".join(parts)


def _row(plan: Plan, option: Option, arch: str) -> tuple[str, ...]:
    verdict = "default" if option is plan.options[0] else ""
    if option.pruned:
        verdict = f"{verdict} pruned: {option.pruned}".strip()
    taken = "", "", ""
    if option.takes:
        registers = max(kernel.registers for kernel in option.takes)
        shared = max(kernel.dynamic_smem + kernel.static_smem for kernel in option.takes)
        occupancy = min(kernel.occupancy(arch) for kernel in option.takes)
        taken = str(registers), str(shared), f"{occupancy:.0%}"
    return short(vars(option.config)), *taken, verdict


@dataclass(frozen=True)
class Row:
    """One entry of a table, for the closing report."""

    problem: Problem
    entry: table.Entry
    floor_us: float  # the time that bandwidth allows; 0 where it is not known

    @property
    def gain(self) -> float:
        """The default's time over the entry's."""
        return self.entry.default_us / self.entry.us


def rows(families: Sequence[table.Family], bandwidth: float) -> list[Row]:
    """The entries of families, sorted."""
    found = []
    for family in families:
        for tokens, entry in family.entries.items():
            problem = family.key.problem(tokens)
            moved = KERNELS[problem.kernel].traffic(problem)
            found.append(Row(problem, entry, moved / bandwidth * 1e6 if bandwidth else 0.0))
    return sorted(found, key=lambda row: row.problem)


def closing(found: Sequence[Row]) -> str:
    """The table of times: default, tuned, gain, share of the floor that bandwidth sets."""
    tabulate = require("tabulate", "autotune").tabulate
    headers: tuple[str, ...] = ("kernel", "tokens x C", "n", "dtype", "default us", "tuned us")
    headers += ("gain", "% of floor", "configuration")
    lines = [
        (
            row.problem.kernel,
            f"{row.problem.tokens} x {row.problem.channels or '-'}",
            str(row.problem.n),
            row.problem.dtype,
            f"{row.entry.default_us:.1f}",
            f"{row.entry.us:.1f}",
            f"{row.gain - 1:+.1%}",
            f"{row.floor_us / row.entry.us:.0%}" if row.floor_us else "",
            "default" if row.entry.default else short(row.entry.config),
        )
        for row in found
    ]
    align = ("left", "left", "right", "left", "right", "right", "right", "right", "left")
    mean = math.exp(sum(math.log(row.gain) for row in found) / len(found))
    changed = sum(not row.entry.default for row in found)
    text = tabulate(lines, headers, disable_numparse=True, colalign=align)
    summary = f"{changed} of {len(found)} differ from the default; geometric mean {mean - 1:+.1%}"
    return f"{text}\n\n{summary}"


def draw(found: Sequence[Row], path: Path, title: str) -> None:
    """A PNG of the gains: an axis a kernel, a line a shape."""
    figure_of = require("matplotlib.figure", "autotune").Figure
    kernels = list(dict.fromkeys(row.problem.kernel for row in found))
    columns = min(4, len(kernels))
    lines = -(-len(kernels) // columns)
    figure = figure_of(figsize=(1.8 + 3.6 * columns, 0.8 + 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    for axis in axes[len(kernels) :]:
        axis.set_axis_off()
    shapes: dict[Problem, list[Row]] = {}
    for row in found:
        shapes.setdefault(row.problem.at(1), []).append(row)
    axis_of = dict(zip(kernels, axes, strict=False))
    drawn: dict[str, Any] = {}  # the first line of every label, for one legend
    for shape, members in shapes.items():
        size = f"C {shape.channels}, " if shape.channels else ""
        label = f"{size}n {shape.n}, {shape.dtype}"
        colour = drawn[label].get_color() if label in drawn else f"C{len(drawn)}"
        tokens, gains = [row.problem.tokens for row in members], [row.gain for row in members]
        (line,) = axis_of[shape.kernel].plot(tokens, gains, ".-", color=colour, linewidth=1)
        drawn.setdefault(label, line)
    for kernel, axis in axis_of.items():
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set_xscale("log", base=2)
        axis.set_title(kernel, fontsize=9)
    figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", fontsize=8)
    figure.supxlabel("tokens")
    figure.supylabel("default / tuned time")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)

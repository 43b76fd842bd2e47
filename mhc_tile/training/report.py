"""What the demo says about its runs: a table, one sentence and a Markdown report."""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import TrainConfig
from .extras import require
from .metrics import Row, write_whole

LABELS = {"residual": "residual", "hc": "HC", "mhc": "mHC"}
VISIBLE_GAIN = 2.0  # a composite gain below this counts as neutral
SAME_LOSS = 0.01  # nats per byte; validation losses nearer than this count as equal
_TEMPLATE = Path(__file__).parent / "templates" / "report.md.j2"


@dataclass(frozen=True)
class Leg:
    """One finished run of the demo; its status is that of `TrainResult`."""

    name: str  # "residual", "hc", "mhc", "stress-hc" or "stress-mhc"
    config: TrainConfig
    status: str
    parameters: int
    validation_loss: float | None  # nats per byte
    rows: list[Row]
    mean_h_res: Tensor | None  # [L, n, n], mean over validation tokens; None for "residual"

    @property
    def kind(self) -> str:
        """The residual: "residual", "hc" or "mhc"."""
        return self.config.residual

    @property
    def label(self) -> str:
        """The residual as texts and figures write it."""
        return LABELS[self.kind]

    @property
    def stress(self) -> bool:
        """Whether the run belongs to the stress recipe."""
        return self.name.startswith("stress-")

    def of_kind(self, kind: str) -> list[Row]:
        """The metrics rows of one kind, in order."""
        return [row for row in self.rows if row["kind"] == kind]

    def peak_gain(self) -> float:
        """The largest composite gain on record, infinity for an overflow; 1 without records."""
        names = ("composite_forward", "composite_backward")
        gains = [row[name] for row in self.of_kind("gain") for name in names]
        return max((float("inf") if gain is None else gain for gain in gains), default=1.0)

    def ms_per_step(self) -> float:
        """Wall time of a step, with the monitor, in the fastest stretch between two writes."""
        # The fastest, not the median: other work on the machine only adds time.
        return min(row["ms_per_step"] for row in self.of_kind("step"))


def summary(legs: list[Leg]) -> list[dict[str, Any]]:
    """One row per leg: sizes, losses, composite gains, times."""
    rows = []
    for leg in legs:
        gains = leg.of_kind("gain")
        last = gains[-1] if gains else {"composite_forward": 1.0, "composite_backward": 1.0}
        rows.append(
            {
                "run": leg.name,
                "parameters": f"{leg.parameters:,}",
                "steps": len(leg.of_kind("step")),
                "validation loss\n(nats/byte)": _number(leg.validation_loss, ".3f"),
                "composite gain\nforward": _number(last["composite_forward"]),
                "composite gain\nbackward": _number(last["composite_backward"]),
                "largest\ncomposite": _number(leg.peak_gain()),
                "gain\nwarnings": len(leg.of_kind("warning")),
                "ms/step": _number(leg.ms_per_step(), ".0f"),
                "status": leg.status,
            }
        )
    return rows


def _number(value: float | None, form: str = "") -> str:
    """A number as text; without a format, three digits, or all digits of a large one."""
    if value is None or value == float("inf"):
        return "not finite"
    return f"{value:{form or (',.0f' if value >= 100 else '.3g' if value >= 10 else '.2f')}}"


def table(rows: list[dict[str, Any]], style: str) -> str:
    """The rows of `summary` as text, numbers to the right, in a style of tabulate."""
    align = ["right" if name not in ("run", "status") else "left" for name in rows[0]]
    tabulate = require("tabulate", "report").tabulate
    return tabulate(rows, headers="keys", tablefmt=style, disable_numparse=True, colalign=align)


def sentence(legs: list[Leg]) -> str:
    """The result of the runs in one sentence, composed from their numbers."""
    by_name = {leg.name: leg for leg in legs}
    return f"{_ordinary(by_name)}; {_stress(by_name)}."


def _ordinary(by_name: dict[str, Leg]) -> str:
    legs = [by_name[kind] for kind in ("residual", "hc", "mhc")]
    losses = [leg.validation_loss for leg in legs if leg.validation_loss is not None]
    if len(losses) < len(legs):
        failed = ", ".join(leg.label for leg in legs if leg.validation_loss is None)
        return f"With the same seed, data and steps, {failed} did not reach a validation loss"
    numbers = ", ".join(_number(loss, ".3f") for loss in losses)
    gap = losses[2] - losses[0]
    verdict = f"{abs(gap):.3f} {'below' if gap < 0 else 'above'}"
    if abs(gap) < SAME_LOSS:
        verdict = f"within {SAME_LOSS} of"
    slower = legs[2].ms_per_step() / legs[0].ms_per_step()
    return (
        f"With the same seed, data and steps, residual, HC and mHC reach validation losses of "
        f"{numbers} nats per byte, mHC's {verdict} the plain residual's at {slower:.1f} times its "
        f"time per step in plain PyTorch on this CPU"
    )


def _stress(by_name: dict[str, Leg]) -> str:
    hc, mhc = by_name["stress-hc"], by_name["stress-mhc"]
    high, low = _number(hc.peak_gain()), _number(mhc.peak_gain())
    if hc.peak_gain() < VISIBLE_GAIN and mhc.peak_gain() < VISIBLE_GAIN:
        return (
            f"under stress neither mixing left 1 in these few steps (largest composite gains: "
            f"HC {high}, mHC {low})"
        )
    warnings = hc.of_kind("warning")
    loss = ""
    if hc.status == "diverged":
        loss = " and its loss diverged"
    elif warnings and all(row["loss_looks_normal"] for row in warnings):
        loss = " while its loss looked normal"
    kept = "stayed at" if mhc.peak_gain() < VISIBLE_GAIN else "reached"
    return (
        f"under stress the composite gain of HC's unconstrained mixing reached {high}{loss}, "
        f"and that of mHC's doubly stochastic mixing {kept} {low} (validation losses "
        f"{_number(hc.validation_loss, '.3f')} and {_number(mhc.validation_loss, '.3f')})"
    )


def write_report(folder: Path, legs: list[Leg], figures: list[str], corpus: str) -> Path:
    """Write report.md beside the figures that it shows; returns its path."""
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    rows = [{key.replace("\n", " "): value for key, value in row.items()} for row in summary(legs)]
    text = environment.from_string(_TEMPLATE.read_text()).render(
        sentence=sentence(legs),
        table=table(rows, "github"),
        recipes=[
            (name, next(leg.config for leg in legs if leg.stress is stress))
            for name, stress in (("Ordinary", False), ("Stress", True))
        ],
        corpus=corpus,
        machine=f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, Python {platform.python_version()}",
        figures=figures,
        warnings=[(leg.name, row["message"]) for leg in legs for row in leg.of_kind("warning")],
    )
    path = folder / "report.md"
    write_whole(path, text)
    return path

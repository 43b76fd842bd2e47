"""The demo: residual, HC and mHC on the same text, then HC and mHC under stress.

A folder `<out>/<leg>` per run, and beside them demo.json (the settings), metrics.jsonl (the rows
of all runs), the figures and report.md.
"""

import dataclasses
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import _checks
from ..models import model_config
from .checkpoint import list_checkpoints
from .config import TrainConfig
from .figures import draw_all
from .folder import full_path, owned
from .loop import OnRows, TrainResult, resume, train_again
from .metrics import Row, read_metrics, replace_metrics, write_whole
from .monitor import GainMonitor
from .report import Leg, write_report

# Over 24 sublayers, and with a high learning rate, HC's composite gain grows within few steps.
STRESS_MODEL = model_config(
    "1m", hidden_size=64, num_layers=12, num_heads=2, ffn_size=192, context_length=128
)


@dataclass(frozen=True)
class DemoSettings:
    """The choices of a user; the descriptions are also the help of `mhc-tile demo`.

    Args:
        seed: of every run.
        steps: of each ordinary run.
        stress_steps: of each stress run.
        corpus: text file or folder; the Python standard library's sources if left out.
    """

    seed: int = 0
    steps: int = 400
    stress_steps: int = 150
    corpus: str | None = None

    def __post_init__(self) -> None:
        """Refuse wrong types; store the corpus as an absolute path."""
        _checks.fields(self, at_least_0=("seed",), bits={"seed": 64})
        if self.corpus is not None:
            object.__setattr__(self, "corpus", str(full_path(self.corpus, "demo: corpus")))

    def legs(self) -> dict[str, TrainConfig]:
        """Name -> configuration of each run, in order."""
        ordinary = TrainConfig(
            model=model_config("1m", context_length=128),
            corpus=self.corpus, seed=self.seed, device="cpu", compile="off",
            steps=self.steps, batch_size=8, sequence_length=128,
            learning_rate=2e-3,  # the best of 1e-3, 2e-3 and 3e-3 for the plain residual
            warmup_steps=20,
            monitor_every=max(1, min(10, self.steps // 20)),
            eval_every=self.steps // 5, eval_batches=12,
            checkpoint_every=100,
        )  # fmt: skip
        stress = ordinary.replace(
            model=STRESS_MODEL, steps=self.stress_steps,
            batch_size=4, sequence_length=64,
            learning_rate=5e-3, warmup_steps=10,
            monitor_every=max(1, min(5, self.stress_steps // 20)),
            eval_every=self.stress_steps // 3,
        )  # fmt: skip
        legs = {kind: ordinary.replace(residual=kind) for kind in ("residual", "hc", "mhc")}
        return legs | {f"stress-{kind}": stress.replace(residual=kind) for kind in ("hc", "mhc")}


@dataclass(frozen=True)
class DemoResult:
    """The finished runs of a demo, in order."""

    legs: list[Leg]
    report: Path | None  # None if a signal ended the demo before
    stop_signal: int | None = None


def start_demo(out: Path, settings: DemoSettings) -> Path:
    """Make the demo's folder, which is new or empty, and store the settings in it."""
    with owned(out, "demo: out", new=True):
        _store(out, settings)
    return out


def _store(out: Path, settings: DemoSettings) -> None:
    write_whole(out / "demo.json", json.dumps(dataclasses.asdict(settings)))


def is_demo(out: Path) -> bool:
    """Whether a folder is a demo's."""
    return (out / "demo.json").is_file()


def stored_settings(out: Path) -> DemoSettings:
    """The settings that `start_demo` stored; a ValueError where they are missing or damaged."""
    path = out / "demo.json"
    if not is_demo(out):
        raise ValueError(f"demo: resume must be the folder of a demo, got {str(out)!r}")
    try:
        settings = DemoSettings(**json.loads(path.read_bytes()))
        settings.legs()  # refuses bad values
        return settings
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"demo: resume must be the folder of a demo with its settings, "
            f"got {str(path)!r} ({_checks.reason(error)})"
        ) from error


def run_legs(
    out: Path, listener: Callable[[str, TrainConfig], OnRows], *, corpus: str | Path | None = None
) -> DemoResult:
    """Run, or continue, every leg of a started demo in a folder; then draw and report.

    `listener` returns the `on_rows` of a leg; `corpus` is where the corpus is, if it has moved.
    """
    stored_settings(out)  # refuses a folder of somebody else before a lock is left there
    with owned(out, "demo: resume"):
        return _run_legs(out, listener, corpus)


def _run_legs(
    out: Path, listener: Callable[[str, TrainConfig], OnRows], corpus: str | Path | None
) -> DemoResult:
    legs: list[Leg] = []
    stored = settings = stored_settings(out)
    if corpus is not None:
        settings = dataclasses.replace(stored, corpus=str(corpus))
    for name, config in settings.legs().items():
        result = _run_leg(out / name, config, listener(name, config))
        if settings != stored:  # now that a leg has accepted it
            _store(out, settings)
            stored = settings
        metrics = result.run_dir / "metrics.jsonl"
        rows = read_metrics(metrics)
        if not any(row["kind"] == "step" for row in rows):
            raise ValueError(
                f"demo: metrics must hold the steps of {name}, got none in {str(metrics)!r}"
            )
        legs.append(_summarise(name, config, result, rows))
        combined = [{"run": leg.name, **row} for leg in legs for row in leg.rows]
        replace_metrics(out / "metrics.jsonl", combined)
        if result.stop_requested:
            return DemoResult(legs, None, result.stop_signal)
    try:
        figures = draw_all(out, legs)
    except Exception as error:  # the report's numbers do without its pictures
        warnings.warn(
            f"demo: the report has no figures ({_checks.reason(error)})",
            RuntimeWarning,
            stacklevel=3,
        )
        figures = []
    return DemoResult(legs, write_report(out, legs, figures, result.corpus.name))


def _run_leg(run_dir: Path, config: TrainConfig, on_rows: OnRows) -> TrainResult:
    if list_checkpoints(run_dir):
        return resume(run_dir, on_rows=on_rows, corpus=config.corpus)
    return train_again(config, run_dir, on_rows)  # it may have ended before its first


def _summarise(name: str, config: TrainConfig, result: TrainResult, rows: list[Row]) -> Leg:
    parameters = sum(parameter.numel() for parameter in result.model.parameters())
    monitor, mean_h_res = GainMonitor(result.model), None
    if monitor.num_sublayers:
        windows = result.corpus.validation_batches(config.batch_size, config.sequence_length, 1)
        with torch.no_grad(), monitor.listen():
            result.model(windows[0].long())
        mean_h_res = monitor.samples().mean(1)
    monitor.remove()
    loss = result.validation_loss
    return Leg(name, config, result.status, parameters, loss, rows, mean_h_res)

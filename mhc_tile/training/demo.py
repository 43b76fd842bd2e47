"""The demo: residual, HC and mHC on the same text, then HC and mHC under stress.

A folder `<out>/<leg>` per run, and beside them demo.json (the settings), metrics.jsonl (the rows
of all runs), the figures and report.md.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..models import ModelConfig, model_config
from .checkpoint import list_checkpoints
from .config import TrainConfig
from .figures import draw_all
from .loop import OnRows, TrainResult, resume, train
from .metrics import read_metrics, replace_metrics
from .monitor import GainMonitor
from .report import Leg, write_report

# Unconstrained mixing multiplies over 24 sublayers and learns fast: HC's composite gain passes 100
# within a few dozen steps on every seed tried.
STRESS_MODEL = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    num_layers=12,
    num_heads=2,
    head_size=32,
    ffn_size=192,
    context_length=128,
)


@dataclass(frozen=True)
class DemoSettings:
    """What a user may choose.

    Args:
        seed: of every run.
        steps: of each of the three ordinary runs.
        stress_steps: of each of the two stress runs.
        corpus: a file or folder; None for the Python standard library's sources.
    """

    seed: int = 0
    steps: int = 400
    stress_steps: int = 150
    corpus: str | None = None

    def legs(self) -> dict[str, TrainConfig]:
        """Name -> configuration of each run, in order."""
        ordinary = TrainConfig(
            model=model_config("1m", context_length=128),
            corpus=self.corpus,
            steps=self.steps,
            batch_size=8,
            sequence_length=128,
            learning_rate=2e-3,  # the best of 1e-3, 2e-3 and 3e-3 for the plain residual
            warmup_steps=20,
            seed=self.seed,
            device="cpu",
            monitor_every=max(1, min(10, self.steps // 20)),
            eval_every=self.steps // 5,
            eval_batches=12,
            checkpoint_every=100,
        )
        stress = ordinary.replace(
            model=STRESS_MODEL,
            steps=self.stress_steps,
            batch_size=4,
            sequence_length=64,
            learning_rate=5e-3,
            warmup_steps=10,
            monitor_every=max(1, min(5, self.stress_steps // 20)),
            eval_every=self.stress_steps // 3,
        )
        legs = {kind: ordinary.replace(residual=kind) for kind in ("residual", "hc", "mhc")}
        return legs | {f"stress-{kind}": stress.replace(residual=kind) for kind in ("hc", "mhc")}


@dataclass(frozen=True)
class DemoResult:
    """What the demo ended with.

    Args:
        legs: the finished runs, in order.
        report: path of report.md; None if Ctrl-C ended the demo before.
    """

    legs: list[Leg]
    report: Path | None


def start_demo(out: Path, settings: DemoSettings) -> None:
    """Make the demo's folder and store the settings in it.

    Raises:
        ValueError: The folder is in use.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"demo: out must not exist yet or be empty, got {str(out)!r}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps(dataclasses.asdict(settings)), encoding="utf-8")


def stored_settings(out: Path) -> DemoSettings:
    """The settings that `start_demo` stored.

    Raises:
        ValueError: The folder is not a demo's, or the settings are damaged.
    """
    path = out / "demo.json"
    if not path.is_file():
        raise ValueError(f"demo: resume must be the folder of a demo, got {str(out)!r}")
    try:
        return DemoSettings(**json.loads(path.read_bytes()))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"demo: resume must be the folder of a demo with its settings, "
            f"got {str(path)!r} ({type(error).__name__}: {error})"
        ) from error


def run_legs(out: Path, listener: Callable[[str, TrainConfig], OnRows]) -> DemoResult:
    """Run, or continue, every leg of a started demo; then draw and report.

    Args:
        out: the demo's folder.
        listener: called before each leg with its name and configuration; what it returns is given
            the metrics rows of the leg.

    Returns:
        The result.

    Raises:
        ValueError: The records of a leg are damaged.
    """
    legs: list[Leg] = []
    for name, config in stored_settings(out).legs().items():
        result = _run_leg(out / name, config, listener(name, config))
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
            return DemoResult(legs, None)
    figures = draw_all(out, legs)
    return DemoResult(legs, write_report(out, legs, figures, result.corpus.name))


def _run_leg(run_dir: Path, config: TrainConfig, on_rows: OnRows) -> TrainResult:
    if list_checkpoints(run_dir):
        return resume(run_dir, on_rows=on_rows)
    if run_dir.exists():  # stopped before its first checkpoint
        shutil.rmtree(run_dir)
    return train(config, run_dir, on_rows=on_rows)


def _summarise(name: str, config: TrainConfig, result: TrainResult, rows: list) -> Leg:
    parameters = sum(parameter.numel() for parameter in result.model.parameters())
    monitor = GainMonitor(result.model)
    mean_h_res = None
    if monitor.num_sublayers:
        windows = result.corpus.validation_batches(config.batch_size, config.sequence_length, 1)
        with torch.no_grad(), monitor.listen():
            result.model(windows[0].long())
        mean_h_res = monitor.samples().mean(1)
    monitor.remove()
    loss = result.validation_loss
    return Leg(name, config, result.status, parameters, loss, rows, mean_h_res)

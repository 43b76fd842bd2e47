"""The commands `mhc-tile train` and `mhc-tile demo`."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..config import MHCConfig
from ..models import CONFIGS, RESIDUALS, model_config
from .checkpoint import list_checkpoints
from .config import PRECISIONS, TrainConfig
from .demo import DemoSettings, run_legs, start_demo, stored_settings
from .extras import require
from .loop import TrainResult, resume, train
from .metrics import Row
from .report import sentence, summary, table

INTERRUPTED = 130  # the shell's code for a process that Ctrl-C ended
_FAILED = 1

_TRAIN_OPTIONS: dict[str, tuple[Any, str]] = {
    "corpus": (str, "text file or folder; the Python standard library's sources if left out"),
    "steps": (int, "optimizer steps"),
    "batch_size": (int, "sequences per step"),
    "sequence_length": (int, "bytes per sequence"),
    "learning_rate": (float, "peak learning rate"),
    "warmup_steps": (int, "steps of linear warm-up"),
    "weight_decay": (float, "weight decay of matrices"),
    "clip": (float, "global gradient norm to clip to; 0 clips nothing"),
    "seed": (int, "of the initialisation and of the order of the data"),
    "device": (str, "auto, cpu, cuda, cuda:1, ..."),
    "log_every": (int, "steps between writes of metrics"),
    "monitor_every": (int, "steps between records of the stability monitor; 0 for none"),
    "eval_every": (int, "steps between validations; 0 for one at the end"),
    "eval_batches": (int, "batches of one validation"),
    "checkpoint_every": (int, "steps between checkpoints; 0 for one at the end"),
}


def say(text: str = "") -> None:
    """Write a line to stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tile train`."""
    defaults = TrainConfig()
    add = parser.add_argument
    add("--resume", metavar="PATH", help="run directory or checkpoint to continue; no other option")
    add("--out", metavar="DIR", help="run directory, must not exist (default: runs/<time>)")
    add("--model", default="1m", help=f"one of {', '.join(CONFIGS)} (default: 1m)")
    add("--residual", default=defaults.residual, choices=RESIDUALS, help="kind of connection")
    add("--num-streams", type=int, default=4, metavar="N", help="streams (default: 4)")
    add("--iters", type=int, default=20, metavar="N", help="Sinkhorn iterations (default: 20)")
    add("--init", default="paper", choices=("paper", "residual"), help="of the mHC mapping")
    add("--precision", default=defaults.precision, choices=PRECISIONS, help="of the layers")
    for name, (kind, text) in _TRAIN_OPTIONS.items():
        default = getattr(defaults, name)
        shown = "" if default is None else f" (default: {default})"
        flag = "--" + name.replace("_", "-")
        add(flag, type=kind, default=default, metavar=kind.__name__.upper(), help=text + shown)
    add("--no-tensorboard", action="store_true", help="write no TensorBoard events")


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tile demo`."""
    defaults = DemoSettings()
    add = parser.add_argument
    add("--resume", metavar="DIR", help="folder of a demo to continue; no option but --threads")
    add("--out", metavar="DIR", help="folder, must not exist (default: runs/<time>)")
    add("--seed", type=int, default=defaults.seed, help=f"(default: {defaults.seed})")
    add(
        "--steps",
        type=int,
        default=defaults.steps,
        help=f"of each ordinary run (default: {defaults.steps})",
    )
    add(
        "--stress-steps",
        type=int,
        default=defaults.stress_steps,
        help=f"of each stress run (default: {defaults.stress_steps})",
    )
    add("--corpus", help=_TRAIN_OPTIONS["corpus"][1])
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")


def run_train(args: argparse.Namespace) -> int:
    """Run `mhc-tile train`.

    Args:
        args: of `add_train_arguments`.

    Returns:
        The exit code: 0, 1 (the loss is not finite) or 130 (Ctrl-C).

    Raises:
        ValueError: Bad input.
        RuntimeError: A package of the extra is missing.
    """
    _refuse_beside_resume("train", args, add_train_arguments)
    out = Path(args.resume or args.out or _new_folder())

    def start() -> int:
        if args.resume:
            result = resume(out, on_rows=_Progress("train", None))
        else:
            config = _train_config(args)
            result = train(config, out, on_rows=_Progress(config.residual, config.steps))
        return _finish_train(result)

    return _guarded(start, lambda: _resume_hint("train", out) if list_checkpoints(out) else "")


def run_demo(args: argparse.Namespace) -> int:
    """Run `mhc-tile demo`.

    Args:
        args: of `add_demo_arguments`.

    Returns:
        The exit code: 0 or 130 (Ctrl-C).

    Raises:
        ValueError: Bad input.
        RuntimeError: A package of the extra is missing.
    """
    _refuse_beside_resume("demo", args, add_demo_arguments, used=("threads",))
    out = Path(args.resume or args.out or _new_folder())
    hint = _resume_hint("demo", out)

    def start() -> int:
        for module in ("tqdm", "tabulate", "matplotlib.figure"):
            require(module, "demo")
        torch.set_num_threads(max(1, args.threads))
        if not args.resume:
            settings = DemoSettings(args.seed, args.steps, args.stress_steps, args.corpus)
            settings.legs()  # refuses bad values before the folder is made
            start_demo(out, settings)
        say(f"{_introduction(stored_settings(out))}; everything is written to {out}")
        result = run_legs(out, lambda name, config: _Progress(name, config.steps))
        if result.report is None:
            say(hint)
            return INTERRUPTED
        say("\n" + table(summary(result.legs), "simple"))
        say(f"\n{sentence(result.legs)}\n\nReport: {result.report}")
        return 0

    return _guarded(start, lambda: hint if (out / "demo.json").exists() else "")


def _refuse_beside_resume(
    command: str,
    args: argparse.Namespace,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    used: tuple[str, ...] = (),
) -> None:
    """Refuse what --resume would ignore: the run goes on with the options it was started with."""
    if not args.resume:
        return
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, default in vars(parser.parse_args([])).items():
        value = getattr(args, name)
        if name not in ("resume", *used) and value != default:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{command}: {flag} must be left out with --resume, got {value!r}")


def _guarded(start: Callable[[], int], hint: Callable[[], str]) -> int:
    """Turn a Ctrl-C outside the loop into the command that continues."""
    try:
        return start()
    except KeyboardInterrupt:
        say("\n" + (hint() or "interrupted; there is nothing to resume"))
        return INTERRUPTED


def _train_config(args: argparse.Namespace) -> TrainConfig:
    values = {name: getattr(args, name) for name in _TRAIN_OPTIONS}
    model = model_config(args.model)
    return TrainConfig(
        model=model,
        residual=args.residual,
        connection=MHCConfig.paper(num_streams=args.num_streams, iters=args.iters, init=args.init),
        precision=args.precision,
        tensorboard=not args.no_tensorboard,
        **values,
    )


def _finish_train(result: TrainResult) -> int:
    if result.status == "interrupted":
        say(f"\nstopped behind step {result.step}; {_resume_hint('train', result.run_dir)}")
        return INTERRUPTED
    if result.status == "diverged":
        say(f"step {result.step}: the loss is not finite; {_last_checkpoint(result.run_dir)}")
        return _FAILED
    loss = "-" if result.validation_loss is None else f"{result.validation_loss:.4f}"
    say(f"validation loss {loss} nats per byte; written to {result.run_dir}")
    return INTERRUPTED if result.stop_requested else 0


def _last_checkpoint(run_dir: Path) -> str:
    found = list_checkpoints(run_dir)
    return f"the last checkpoint is {found[-1]}" if found else "no checkpoint was written"


def _resume_hint(command: str, path: Path) -> str:
    return f"continue with: mhc-tile {command} --resume {path}"


def _new_folder() -> Path:
    """runs/<time>, with a number behind it where that second is taken."""
    base = Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def _introduction(settings: DemoSettings) -> str:
    legs = settings.legs()
    names = ", ".join(legs)
    total = sum(config.steps for config in legs.values())
    return f"{len(legs)} runs ({names}), {total} steps in all"


class _Progress:
    """A progress bar fed with metrics rows; without a terminal, one line at the end.

    Args:
        name: of the run.
        steps: its length; None to read it from the run's first row.
    """

    def __init__(self, name: str, steps: int | None):
        self.name = name
        self.shown: dict[str, str] = {}
        self.bar = require("tqdm", "progress bar").tqdm(
            total=steps, desc=f"{name:>10}", unit="step", disable=None
        )

    def __call__(self, rows: list[Row]) -> None:
        for row in rows:
            if row["kind"] == "run":
                self.bar.total = row["config"]["steps"]
            elif row["kind"] == "step":
                self.bar.update()
                self._show("loss", row["loss"], ".3f")
            elif row["kind"] == "validation":
                self._show("validation", row["loss"], ".3f")
            elif row["kind"] == "gain":
                self._show("composite gain", row["composite_forward"], ".3g")
            elif row["kind"] == "warning":
                self.bar.write(f"{self.name}: {row['message']}", file=sys.stdout)
        self.bar.set_postfix(self.shown)
        last = rows[-1] if rows else {"kind": ""}
        if last["kind"] == "validation" and last["step"] == self.bar.total:
            self._close()

    def _show(self, name: str, value: float | None, form: str) -> None:
        self.shown[name] = "not finite" if value is None else f"{value:{form}}"

    def _close(self) -> None:
        unseen = self.bar.disable  # closing sets it
        self.bar.close()
        if unseen:
            say(f"{self.name}: {', '.join(f'{key} {value}' for key, value in self.shown.items())}")

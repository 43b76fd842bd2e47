"""The commands `mhc-tile train` and `mhc-tile demo`."""

import argparse
import re
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..config import MHCConfig
from ..models import CONFIGS, RESIDUALS, model_config
from .checkpoint import list_checkpoints
from .config import PRECISIONS, TrainConfig
from .demo import DemoSettings, run_legs, start_demo, stored_settings
from .extras import require
from .folder import FolderInUseError, full_path
from .loop import TrainResult, resume, train
from .progress import Progress, say, settle
from .report import sentence, summary, table
from .signals import Ended, exit_code, raising

_FAILED = 1
_TOO_LARGE = re.compile(r"out of memory|allocate memory|enough memory|overflow", re.IGNORECASE)
_TOO_MANY = 2**31  # of anything but seeds: torch's own messages name no option
_MAX_THREADS = 1024  # OpenMP ends the process where it cannot make them
_Started = TypeVar("_Started")

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


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tile train`; the parsed arguments have those that were given."""
    defaults = TrainConfig()
    parser.argument_default = argparse.SUPPRESS
    add = parser.add_argument
    add(
        "--resume",
        metavar="PATH",
        help="run directory or checkpoint to continue; of the other options it takes --steps, "
        "more than before, and --corpus, if that has moved; an older checkpoint drops the newer "
        "ones",
    )
    add("--out", metavar="DIR", help="run directory, must not exist (default: runs/<time>)")
    add("--model", help=f"one of {', '.join(CONFIGS)} (default: 1m)")
    add("--residual", choices=RESIDUALS, help="kind of connection (default: mhc)")
    add("--num-streams", type=int, metavar="N", help="streams (default: 4)")
    add("--iters", type=int, metavar="N", help="Sinkhorn iterations (default: 20)")
    add("--init", choices=("paper", "residual"), help="of the mHC mapping (default: paper)")
    add("--precision", choices=PRECISIONS, help="of the layers (default: auto)")
    for name, (kind, text) in _TRAIN_OPTIONS.items():
        default = getattr(defaults, name)
        shown = "" if default is None else f" (default: {default})"
        flag = "--" + name.replace("_", "-")
        add(flag, type=kind, metavar=kind.__name__.upper(), help=text + shown)
    add("--no-tensorboard", action="store_true", help="write no TensorBoard events")


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tile demo`; the parsed arguments have those that were given."""
    defaults = DemoSettings()
    parser.argument_default = argparse.SUPPRESS
    add = parser.add_argument
    add(
        "--resume",
        metavar="DIR",
        help="folder of a demo to continue; of the other options it takes --threads and, if that "
        "has moved, --corpus",
    )
    add("--out", metavar="DIR", help="folder, must not exist (default: runs/<time>)")
    add("--seed", type=int, help=f"(default: {defaults.seed})")
    add("--steps", type=int, help=f"of each ordinary run (default: {defaults.steps})")
    add("--stress-steps", type=int, help=f"of each stress run (default: {defaults.stress_steps})")
    add("--corpus", help=_TRAIN_OPTIONS["corpus"][1])
    add("--threads", type=int, help="CPU threads (default: 2)")


def run_train(args: argparse.Namespace) -> int:
    """Run `mhc-tile train`.

    Args:
        args: of `add_train_arguments`.

    Returns:
        The exit code: 0, 1 (the loss is not finite) or 128 and the number of the signal that ended
        the run: 130 after Ctrl-C. What happens to stdout does not change it.

    Raises:
        ValueError: Bad input.
        OSError: The records or a checkpoint cannot be written.
        RuntimeError: A package of the extra is missing.
    """
    given = _given("train", args, beside_resume=("corpus", "steps"))
    out: Path | None = None

    def start() -> int:
        nonlocal out
        if "resume" in given:
            out = full_path(given["resume"], "train: --resume")
            changes = {name: given[name] for name in ("corpus", "steps") if name in given}
            return _finish_train(resume(out, on_rows=Progress("train", None), **changes))
        config = _train_config(given)

        def fresh(folder: Path) -> TrainResult:
            nonlocal out
            out = folder
            return train(config, folder, on_rows=Progress(config.residual, config.steps))

        return _finish_train(_in_new_folder("train", given, fresh))

    def hint() -> str:
        return _resume_hint("train", out) if out is not None and list_checkpoints(out) else ""

    return _guarded("train", start, hint)


def run_demo(args: argparse.Namespace) -> int:
    """Run `mhc-tile demo`.

    Args:
        args: of `add_demo_arguments`.

    Returns:
        The exit code: 0, or 128 and the number of the signal that ended the demo: 130 after
        Ctrl-C. What happens to stdout does not change it.

    Raises:
        ValueError: Bad input.
        OSError: The records or the report cannot be written.
        RuntimeError: A package of the extra is missing.
    """
    given = _given("demo", args, beside_resume=("corpus", "threads"))
    out: Path | None = None

    def start() -> int:
        nonlocal out
        for module in ("tqdm", "tabulate", "matplotlib.figure"):
            require(module, "demo")
        threads = given.get("threads", 2)
        if not 1 <= threads <= _MAX_THREADS:
            raise ValueError(f"demo: --threads must be from 1 to {_MAX_THREADS}, got {threads}")
        torch.set_num_threads(threads)
        if "resume" in given:
            out = full_path(given["resume"], "demo: --resume")
        else:
            names = ("seed", "steps", "stress_steps", "corpus")
            settings = DemoSettings(**{name: given[name] for name in names if name in given})
            settings.legs()  # refuses bad values before the folder is made
            out = _in_new_folder("demo", given, lambda folder: start_demo(folder, settings))
        say(f"{_introduction(stored_settings(out))}; everything is written to {out}")
        first = next(iter(stored_settings(out).legs()))
        result = run_legs(
            out,
            lambda name, config: Progress(name, config.steps, corpus=name == first),
            corpus=given.get("corpus") if "resume" in given else None,
        )
        if result.stop_signal is not None:
            say(_resume_hint("demo", out))
            return exit_code(result.stop_signal)
        say("\n" + table(summary(result.legs), "simple"))
        say(f"\n{sentence(result.legs)}\n\nReport: {result.report}")
        return 0

    def hint() -> str:
        if out is None or not (out / "demo.json").exists():
            return ""
        return _resume_hint("demo", out)

    return _guarded("demo", start, hint)


def _given(
    command: str, args: argparse.Namespace, beside_resume: tuple[str, ...]
) -> dict[str, Any]:
    """The options that were given: none empty or too large, none that --resume would ignore.

    A shell passes an empty one for a variable that is not set; taken for a path it would be the
    working directory.
    """
    given = {name: value for name, value in vars(args).items() if name != "run"}
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{command}: {flag} must not be empty, got {value!r}")
        if isinstance(value, int) and value >= _TOO_MANY and name != "seed":
            raise ValueError(f"{command}: {flag} must be below {_TOO_MANY}, got {value}")
    ignored = [name for name in given if name not in ("resume", *beside_resume)]
    if "resume" in given and ignored:
        flag, value = "--" + ignored[0].replace("_", "-"), given[ignored[0]]
        raise ValueError(f"{command}: {flag} must be left out with --resume, got {value!r}")
    return given


def _guarded(command: str, start: Callable[[], int], hint: Callable[[], str]) -> int:
    """Turn what a user can cause outside the loop into one line; stdout may be anything."""
    try:
        with raising():
            return start()
    except KeyboardInterrupt as ended:
        say("\n" + (hint() or "interrupted; there is nothing to resume"))
        return exit_code(ended.args[0] if isinstance(ended, Ended) else signal.SIGINT)
    except OSError:  # as when the disk is full: what has been saved can go on
        if text := hint():
            say(text)
        raise
    except (MemoryError, OverflowError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _TOO_LARGE.search(str(error)):
            raise
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
        raise ValueError(
            f"{command}: model, batch and validation must fit into the memory, got {reason}"
        ) from error
    finally:
        settle(sys.stdout)


def _train_config(given: dict[str, Any]) -> TrainConfig:
    """The configuration of the options; `TrainConfig` has the defaults of those not given."""
    taken = (*_TRAIN_OPTIONS, "residual", "precision")
    constants = {name: given[name] for name in ("num_streams", "iters", "init") if name in given}
    return TrainConfig(
        model=model_config(given.get("model", "1m")),
        connection=MHCConfig.paper(**constants),
        tensorboard=not given.get("no_tensorboard", False),
        **{name: given[name] for name in taken if name in given},
    )


def _finish_train(result: TrainResult) -> int:
    if result.status == "interrupted":
        say(f"\nstopped behind step {result.step}; {_resume_hint('train', result.run_dir)}")
    elif result.status == "diverged":
        say(f"step {result.step}: the loss is not finite; {_last_checkpoint(result.run_dir)}")
        return _FAILED
    else:
        loss = "-" if result.validation_loss is None else f"{result.validation_loss:.4f}"
        say(f"validation loss {loss} nats per byte; written to {result.run_dir}")
    return 0 if result.stop_signal is None else exit_code(result.stop_signal)


def _last_checkpoint(run_dir: Path) -> str:
    found = list_checkpoints(run_dir)
    return f"the last checkpoint is {found[-1]}" if found else "no checkpoint was written"


def _resume_hint(command: str, path: Path) -> str:
    return f"continue with: {shlex.join(['mhc-tile', command, '--resume', str(path)])}"


def _in_new_folder(
    command: str, given: dict[str, Any], start: Callable[[Path], _Started]
) -> _Started:
    """Start in --out, or else in the first runs/<time> that no other process takes."""
    if "out" in given:
        return start(full_path(given["out"], f"{command}: --out"))
    while True:
        with suppress(FolderInUseError):
            return start(_new_folder())


def _new_folder() -> Path:
    """runs/<time>, with a number behind it where that second is taken."""
    base = Path("runs").absolute() / time.strftime("%Y%m%d-%H%M%S")
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

"""The commands `mhc-tile train` and `mhc-tile demo`; their options are fields of configurations."""

import dataclasses
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin

import torch

from .. import _checks
from ..autotune._options import Options, flag, parse
from ..config import MHCConfig
from ..models import CONFIGS, model_config
from .checkpoint import list_checkpoints
from .config import TrainConfig
from .demo import DemoSettings, is_demo, run_legs, start_demo, stored_settings
from .extras import require
from .folder import FolderInUseError, full_path
from .loop import TrainResult, resume, train
from .progress import Progress, say, settle
from .report import sentence, summary, table
from .signals import Ended, exit_code, raising

_TOO_LARGE = re.compile(r"out of memory|allocate memory|enough memory|overflow", re.IGNORECASE)
_TOO_MANY = 2**31  # of anything but seeds: torch's own messages name no option
_MAX_THREADS = 1024  # OpenMP ends the process where it cannot make them
_Started = TypeVar("_Started")

_CONNECTION = ("num_streams", "iters", "init")
_TRAIN: Options = {
    "resume": (
        str,
        "run directory or checkpoint to continue; of the other options it takes --steps, more than "
        "before, and --corpus, if that has moved; an older checkpoint drops the newer ones",
    ),
    "out": (str, "run directory, must not exist (default: runs/<time>)"),
    "model": (str, f"one of {', '.join(CONFIGS)} (default: 1m)"),
    "tensorboard": (bool, "write event files for TensorBoard (default: True)"),
}
_DEMO: Options = {
    "resume": (
        str,
        "folder of a demo to continue; of the other options it takes --threads and, if that has "
        "moved, --corpus",
    ),
    "out": (str, "folder, must not exist (default: runs/<time>)"),
    "threads": (int, "CPU threads (default: 2)"),
}


def run_train(argv: Sequence[str]) -> int:
    """Run `mhc-tile train` with the words after the command.

    Returns:
        The exit code: 0, 1 (the loss is not finite) or 128 and the number of the signal that ended
        the run: 130 after Ctrl-C. A stdout that fails does not change it.
    """
    options = _TRAIN | _of(TrainConfig, "model", "connection", "tensorboard")
    constants = _of(MHCConfig)
    options |= {name: constants[name] for name in _CONNECTION}
    about = "Train one named model on your own text."
    given = parse("mhc-tile train", about, options, argv, "train")
    _check_given("train", given, beside_resume=("corpus", "steps"))

    def start(places: list[Path]) -> int:
        if "resume" in given:
            places.append(full_path(given.pop("resume"), "train: --resume"))
            return _finish_train(resume(places[-1], on_rows=Progress("train", None), **given))
        config = _train_config(given)

        def fresh(folder: Path) -> TrainResult:
            places.append(folder)
            return train(config, folder, on_rows=Progress(config.residual, config.steps))

        return _finish_train(_in_new_folder("train", given, fresh))

    return _guarded("train", start)


def run_demo(argv: Sequence[str]) -> int:
    """Run `mhc-tile demo`; arguments and exit codes as of `run_train`."""
    about = "Train residual, HC and mHC on real text and compare them."
    given = parse("mhc-tile demo", about, _DEMO | _of(DemoSettings), argv, "train")
    _check_given("demo", given, beside_resume=("corpus", "threads"))

    def start(places: list[Path]) -> int:
        for module in ("tqdm", "tabulate", "jinja2", "matplotlib.figure"):
            require(module, "demo")
        threads = given.pop("threads", 2)
        if not 1 <= threads <= _MAX_THREADS:
            raise ValueError(f"demo: --threads must be from 1 to {_MAX_THREADS}, got {threads}")
        torch.set_num_threads(threads)
        if "resume" in given:
            out = full_path(given["resume"], "demo: --resume")
        else:
            settings = DemoSettings(**{n: value for n, value in given.items() if n != "out"})
            settings.legs()  # refuses bad values before the folder is made
            out = _in_new_folder("demo", given, lambda folder: start_demo(folder, settings))
        places.append(out)
        legs = stored_settings(out).legs()
        runs = f"{len(legs)} runs ({', '.join(legs)})"
        steps = sum(config.steps for config in legs.values())
        say(f"{runs}, {steps} steps in all; everything is written to {out}")
        first = next(iter(legs))
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

    return _guarded("demo", start)


def _of(config: type, *left_out: str) -> Options:
    """An option per field of a configuration, described by its docstring."""
    parsed = require("docstring_parser", "command line").parse(config.__doc__ or "")
    texts = {p.arg_name: " ".join((p.description or "").split()) for p in parsed.params}
    options = {}
    for field in dataclasses.fields(config):
        typed = field.type in (int, float) or get_origin(field.type) is Literal
        text = texts[field.name].removesuffix(".")
        if field.default is not None:
            text += f" (default: {field.default})"
        if field.name not in left_out:
            options[field.name] = (field.type if typed else str, text)
    return options


def _check_given(command: str, given: dict[str, Any], beside_resume: tuple[str, ...]) -> None:
    """Refuse numbers that are too large, and what --resume would ignore."""
    for name, value in given.items():
        option = flag(f"no_{name}" if value is False else name)
        if isinstance(value, int) and value >= _TOO_MANY and name != "seed":
            raise ValueError(f"{command}: {option} must be below {_TOO_MANY}, got {value}")
        if "resume" in given and name not in ("resume", *beside_resume):
            raise ValueError(
                f"{command}: {option} must be left out with --resume, got {value!r}; --resume may "
                f"be given with {' and '.join(map(flag, beside_resume))}, and keeps the rest"
            )


def _guarded(command: str, start: Callable[[list[Path]], int]) -> int:
    """Turn what a user can cause outside the loop into one line; stdout may fail.

    `start` adds the folder of the run or demo to its argument as soon as it is known.
    """
    places: list[Path] = []

    def hints() -> list[str]:
        started = is_demo if command == "demo" else list_checkpoints
        return [_resume_hint(command, path) for path in places[-1:] if started(path)]

    try:
        with raising():
            return start(places)
    except KeyboardInterrupt as ended:
        say("\n" + "".join(hints() or ["interrupted; there is nothing to resume"]))
        return exit_code(ended.args[0] if isinstance(ended, Ended) else signal.SIGINT)
    except OSError:  # as of a full disk: what has been saved can be resumed
        for text in hints():
            say(text)
        raise
    except (MemoryError, OverflowError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _TOO_LARGE.search(str(error)):
            raise
        raise ValueError(
            f"{command}: model, batch and validation must fit into the memory, "
            f"got {_checks.reason(error)}"
        ) from error
    finally:
        settle(sys.stdout)


def _train_config(given: dict[str, Any]) -> TrainConfig:
    """The configuration of the options; `TrainConfig` has the defaults of the others."""
    values = {name: value for name, value in given.items() if name not in ("out", *_CONNECTION)}
    constants = {name: given[name] for name in _CONNECTION if name in given}
    values["model"] = model_config(given.get("model", "1m"))
    return TrainConfig(connection=MHCConfig(**constants), **{"tensorboard": True, **values})


def _finish_train(result: TrainResult) -> int:
    if result.status == "interrupted":
        say(f"\nstopped after step {result.step}; {_resume_hint('train', result.run_dir)}")
    elif result.status == "diverged":
        found = list_checkpoints(result.run_dir)
        last = f"the last checkpoint is {found[-1]}" if found else "no checkpoint was written"
        say(f"step {result.step}: the loss is not finite; {last}")
        return 1
    else:
        loss = "-" if result.validation_loss is None else f"{result.validation_loss:.4f}"
        say(f"validation loss {loss} nats per byte; written to {result.run_dir}")
    if result.advice is not None:
        say(result.advice)
    return 0 if result.stop_signal is None else exit_code(result.stop_signal)


def _resume_hint(command: str, path: Path) -> str:
    return f"continue with: {shlex.join(['mhc-tile', command, '--resume', str(path)])}"


def _in_new_folder(
    command: str, given: dict[str, Any], start: Callable[[Path], _Started]
) -> _Started:
    """Start in --out, or else in the first runs/<time> that no other process takes."""
    if "out" in given:
        return start(full_path(given["out"], f"{command}: --out"))
    base = folder = Path("runs").absolute() / time.strftime("%Y%m%d-%H%M%S")
    number = 1
    while True:
        with suppress(FolderInUseError):
            return start(folder)
        number += 1
        folder = base.with_name(f"{base.name}-{number}")

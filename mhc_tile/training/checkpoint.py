"""Checkpoints: written in one step, the previous one kept, foreign and truncated files refused."""

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from mhc_tile.kernels.common.files import replacing

from .. import _checks
from .config import TrainConfig
from .folder import full_path

FORMAT = "mhc_tile.training/1"
FOLDER = "checkpoints"


class State(msgspec.Struct):
    """What a checkpoint of a run holds, beside its "format"."""

    step: int
    config: dict[str, Any]
    corpus: str
    model: dict[str, Any]
    optimizer: dict[str, Any]
    rows: list[dict[str, Any]] = []  # checkpoints of older versions have none


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run_dir / FOLDER / f"step_{step:08d}.pt"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; files of other names are none."""
    names = (path.stem.removeprefix("step_") for path in (run_dir / FOLDER).glob("step_*.pt"))
    steps = sorted({int(name) for name in names if name.isdecimal()})
    return [path for step in steps if (path := checkpoint_path(run_dir, step)).is_file()]


class Checkpoints:
    """The checkpoints of one run: the newest and the one before.

    `resumed` is the checkpoint that the run continues from, if any.
    """

    def __init__(self, run_dir: Path, resumed: Path | None = None):
        self.run_dir, self.last = run_dir, resumed

    def drop_newer(self, step: int) -> None:
        """Delete the checkpoints of later steps than the one that the run continues from."""
        for path in list_checkpoints(self.run_dir):
            if int(path.stem.removeprefix("step_")) > step and path != self.last:
                path.unlink()

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint after a step, in one step; an OSError leaves the older ones."""
        path = checkpoint_path(self.run_dir, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(path, path.with_suffix(".partial")) as file:
                torch.save({"format": FORMAT, "step": step, **state}, file)
        except RuntimeError as error:  # torch.save's, where the file does not take it all
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(
                f"train: checkpoint must be written whole, got {_checks.reason(cause)}: {path}"
            ) from error
        for other in list_checkpoints(self.run_dir):
            if other not in (path, self.last):
                other.unlink()
        self.last = path
        return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `Checkpoints.save` was given, with "step"; tensors on the CPU.

    A truncated or foreign file is a ValueError that names the older checkpoint, if there is one.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen unrelated types on bad bytes
        reason = f"a file that cannot be read ({type(error).__name__})"
        raise ValueError(_refusal(path, reason)) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(_refusal(path, "a file of another kind"))
    return state


def stored_config(path: Path, state: dict[str, Any]) -> TrainConfig:
    """The configuration in a checkpoint; a ValueError if that or another part does not fit."""
    try:
        msgspec.convert(state, State)
    except msgspec.ValidationError as error:
        raise ValueError(_refusal(path, f"a file of other parts ({error})")) from error
    try:
        config = TrainConfig.from_dict(state["config"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"a file with another configuration ({_checks.reason(error)})"
        raise ValueError(_refusal(path, reason)) from error
    if not 0 <= state["step"] <= config.steps:
        raise ValueError(_refusal(path, f"a file of step {state['step']} of {config.steps}"))
    return config


def restore(
    path: Path, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Load parameters and moments from the state at a path; a ValueError if they do not fit."""
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for parameter, kept in optimizer.state.items():
            for name, value in kept.items():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    raise ValueError(f"{name} {list(value.shape)} of {list(parameter.shape)}")
    except Exception as error:  # torch raises half a dozen unrelated types on what does not fit
        reason = f"parameters that do not fit ({_checks.reason(error)})"
        raise ValueError(_refusal(path, reason)) from error


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at `path`, through links to the file, or the newest of a run directory."""
    if path.is_file():
        while path.is_symlink():  # not `resolve`: the run's folder may link to another disk
            path = full_path(path.parent / path.readlink(), "resume: path")
        if path.parent.name != FOLDER:
            raise ValueError(
                f"resume: checkpoint must be in the folder {FOLDER!r} of its run directory, "
                f"got {str(path)!r}"
            )
        return path
    found = list_checkpoints(path)
    if not found:
        raise ValueError(
            f"resume: path must be a checkpoint or a run directory with one, got {str(path)!r}"
        )
    return found[-1]


def _refusal(path: Path, reason: str) -> str:
    message = f"resume: checkpoint must be a complete one of {FORMAT}, got {reason}: {str(path)!r}"
    kept = list_checkpoints(path.parent.parent) if path.parent.name == FOLDER else []
    older = kept[: kept.index(path)] if path in kept else kept
    if older:
        message += f"; the older one is kept, resume from it: {str(older[-1])!r}"
    return message

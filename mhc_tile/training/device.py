"""The device of a run."""

import torch

from .. import _checks


def pick_device(name: str) -> torch.device:
    """The device that `TrainConfig.device` names, if this machine has it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train: device must be a torch device, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"train: device must be available, got {name!r} and torch finds no GPU")
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each backend raises another type where it is missing
        raise ValueError(
            f"train: device must be available, got {name!r} ({_checks.reason(error)})"
        ) from error
    return device

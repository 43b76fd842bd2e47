"""What one training run is made of: `TrainConfig`."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import _checks
from ..config import MHCConfig
from ..models import RESIDUALS, ModelConfig, model_config
from .folder import full_path

PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result of a run; it is stored in every checkpoint.

    Args:
        model: shape of the decoder; its vocabulary must hold the 256 bytes.
        residual: "residual", "hc" or "mhc".
        connection: constants of the connections.
        corpus: a file or folder, stored as an absolute path with `~` expanded; None for the Python
            standard library's sources.
        steps: optimizer steps.
        batch_size: sequences per step.
        sequence_length: predicted tokens per sequence, at most the model's context_length.
        learning_rate: the peak, see `mhc_tile.training.schedule.learning_rate`.
        warmup_steps: steps of linear warm-up.
        weight_decay: of matrices, see `mhc_tile.training.optimizer.build_optimizer`.
        clip: gradients are scaled down to this global norm; 0 clips nothing.
        seed: of the initialisation and of the order of the data; below 2**64.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
        precision: "auto" (bf16 autocast on CUDA, else fp32), "fp32" or "bf16".
        log_every: steps between writes of metrics, each of which waits for the device once.
        monitor_every: steps between records of the stability monitor; 0 for none.
        eval_every: steps between validations; 0 for one at the end only.
        eval_batches: batches of one validation.
        checkpoint_every: steps between checkpoints; 0 for one at the end only.
        tensorboard: also write event files for TensorBoard.

    Raises:
        ValueError: A value is of another type or out of range; the message names it.
    """

    model: ModelConfig = field(default_factory=lambda: model_config("1m"))
    residual: str = "mhc"
    connection: MHCConfig = field(default_factory=MHCConfig.paper)
    corpus: str | Path | None = None
    steps: int = 1000
    batch_size: int = 8
    sequence_length: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    log_every: int = 10
    monitor_every: int = 10
    eval_every: int = 200
    eval_batches: int = 8
    checkpoint_every: int = 100
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Reject what no run could use."""
        self._check_types()
        if self.corpus is not None:
            corpus = str(full_path(self.corpus, "TrainConfig: corpus"))
            object.__setattr__(self, "corpus", corpus)
        for name in ("steps", "batch_size", "sequence_length", "log_every", "eval_batches"):
            self._check(name, getattr(self, name) >= 1, "be at least 1")
        for name in ("warmup_steps", "monitor_every", "eval_every", "checkpoint_every", "seed"):
            self._check(name, getattr(self, name) >= 0, "be at least 0")
        self._check("seed", self.seed < 2**64, "be below 2**64")
        for name in ("weight_decay", "clip", "learning_rate"):
            value = getattr(self, name)
            self._check(name, math.isfinite(value) and value >= 0, "be finite and at least 0")
        self._check("residual", self.residual in RESIDUALS, f"be one of {list(RESIDUALS)}")
        self._check("precision", self.precision in PRECISIONS, f"be one of {list(PRECISIONS)}")
        context = self.model.context_length
        self._check(
            "sequence_length",
            self.sequence_length <= context,
            f"be at most the model's context_length {context}",
        )
        if self.model.vocab_size < 256:
            raise ValueError(
                f"TrainConfig: model.vocab_size must be at least 256 for bytes, "
                f"got {self.model.vocab_size}"
            )

    def _check_types(self) -> None:
        # Exact types: a checkpoint is refused when it is read where it holds NumPy's or an Enum's.
        for entry in dataclasses.fields(self):
            value = exact = getattr(self, entry.name)
            if entry.type is int:
                exact = _checks.as_int(value)
                self._check(entry.name, exact is not None, "be an integer")
            elif entry.type is float:
                exact = _checks.as_number(value)
                self._check(entry.name, exact is not None, "be a number")
            elif isinstance(value, str):
                exact = str.__str__(value)
            object.__setattr__(self, entry.name, exact)
        for name, kind in (("model", ModelConfig), ("connection", MHCConfig)):
            self._check(name, isinstance(getattr(self, name), kind), f"be of {kind.__name__}")
        self._check("corpus", isinstance(self.corpus, str | Path | None), "be a path or None")
        self._check("device", isinstance(self.device, str), "be the name of a device")
        self._check("tensorboard", isinstance(self.tensorboard, bool), "be True or False")

    def _check(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"TrainConfig: {name} must {rule}, got {getattr(self, name)!r}")

    def replace(self, **changes: Any) -> "TrainConfig":
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, for checkpoints and metrics."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The configuration that `to_dict` wrote."""
        model = ModelConfig.from_dict(values["model"])
        connection = MHCConfig(**values["connection"])
        return cls(**{**values, "model": model, "connection": connection})


def resumed_config(
    config: TrainConfig, corpus: str | Path | None, steps: int | None
) -> TrainConfig:
    """A stored configuration with what may change when a run is resumed.

    Args:
        config: the stored one.
        corpus: where the corpus is now; None for where it was.
        steps: the length; None for the stored one.

    Returns:
        The configuration of the resumed run.

    Raises:
        ValueError: The corpus is gone, or the steps are fewer than before.
    """
    if corpus is not None:
        config = config.replace(corpus=corpus)
    if config.corpus is not None and not Path(config.corpus).exists():
        raise ValueError(
            f"resume: corpus must exist, got {config.corpus!r}; "
            "if it has moved, name its new place (--corpus)"
        )
    if steps is None:
        return config
    changed = config.replace(steps=steps)  # refuses what is no integer
    if steps < config.steps:
        raise ValueError(f"resume: steps must be at least the run's {config.steps}, got {steps}")
    return changed

"""The configuration of one training run: `TrainConfig`."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import _checks
from ..config import MHCConfig
from ..models import ModelConfig, model_config
from ..models.decoder import ResidualKind
from .folder import full_path


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result of a run; every checkpoint stores it.

    The descriptions of the arguments are also the help of `mhc-tile train`.

    Args:
        model: shape of the decoder; its vocabulary holds at least the 256 bytes.
        residual: kind of connection.
        connection: constants of the connections.
        corpus: text file or folder; the Python standard library's sources if left out.
        steps: optimizer steps.
        batch_size: sequences per step.
        sequence_length: bytes per sequence, at most the model's context_length.
        learning_rate: peak learning rate.
        warmup_steps: steps of linear warm-up.
        weight_decay: weight decay of matrices.
        clip: global gradient norm to clip to; 0 clips nothing.
        seed: of the initialisation and of the order of the data; below 2**64.
        device: auto (CUDA where there is one), cpu, cuda, cuda:1 and so on.
        precision: of the layers; auto is bf16 autocast on CUDA, else fp32.
        compile: how a step runs: off is eager, default is torch.compile, graphs is torch.compile
            with CUDA graphs; auto is off on a CPU and graphs on CUDA, or default with experts.
        log_every: steps between writes of metrics, each of which waits for the device once.
        monitor_every: steps between records of the stability monitor; 0 for none.
        eval_every: steps between validations; 0 for one at the end.
        eval_batches: batches of one validation.
        checkpoint_every: steps between checkpoints; 0 for one at the end.
        tensorboard: also write event files for TensorBoard.

    Raises:
        ValueError: A value is of another type or out of range; the message names it.
    """

    model: ModelConfig = field(default_factory=lambda: model_config("1m"))
    residual: ResidualKind = "mhc"
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
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "off", "default", "graphs"] = "auto"
    log_every: int = 10
    monitor_every: int = 10
    eval_every: int = 200
    eval_batches: int = 8
    checkpoint_every: int = 100
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Reject what no run could use; store the corpus as an absolute path."""
        zero = ("warmup_steps", "monitor_every", "eval_every", "checkpoint_every", "seed")
        _checks.fields(self, at_least_0=zero, bits={"seed": 64})
        if self.corpus is not None:
            corpus = str(full_path(self.corpus, "TrainConfig: corpus"))
            object.__setattr__(self, "corpus", corpus)
        if self.sequence_length > self.model.context_length:
            raise ValueError(
                f"TrainConfig: sequence_length must be at most the model's context_length "
                f"{self.model.context_length}, got {self.sequence_length}"
            )
        if self.model.vocab_size < 256:
            raise ValueError(
                f"TrainConfig: model.vocab_size must be at least 256 for bytes, "
                f"got {self.model.vocab_size}"
            )

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
        values = {"compile": "off", **values}  # what wrote no such field was eager
        return cls(**{**values, "model": model, "connection": connection})

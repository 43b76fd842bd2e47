"""The training loop: `train` starts a run directory, `resume` continues one.

A run directory holds metrics.jsonl, checkpoints/ and, on request, tensorboard/. The loop waits for
the device where it writes metrics, validates or saves, and in no other step.
"""

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import Decoder
from .checkpoint import Checkpoints, find_checkpoint, load_checkpoint, stored_config
from .config import TrainConfig
from .corpus import Corpus, load_corpus
from .metrics import MetricsLog, Row
from .monitor import GainMonitor, GainRule, gain_row, measure_gains
from .optimizer import build_optimizer
from .schedule import learning_rate

OnRows = Callable[[list[Row]], None]


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with.

    Args:
        status: "done", "interrupted" (a checkpoint of this step was written) or "diverged" (a
            loss or gradient is not finite; the last checkpoint is from before).
        step: completed steps.
        run_dir: of the run.
        model: as it stands.
        corpus: it was trained on.
        validation_loss: the last one, nats per byte; None if there was none.
        stop_requested: whether Ctrl-C came; in the last step, validation or save of a run that is
            "done", it is for the caller to act on.
    """

    status: str
    step: int
    run_dir: Path
    model: Decoder
    corpus: Corpus
    validation_loss: float | None
    stop_requested: bool = False


def train(
    config: TrainConfig, run_dir: str | Path, *, on_rows: OnRows | None = None
) -> TrainResult:
    """Train from the first step.

    Args:
        config: of the run.
        run_dir: where it is recorded; must not exist, or be empty.
        on_rows: called with each batch of metrics rows when it is written.

    Returns:
        The result. Ctrl-C ends the run behind the current step, with a checkpoint; a second one
        ends it at once.

    Raises:
        ValueError: The run directory is in use, or the corpus cannot be read.
    """
    run_dir = Path(run_dir)
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ValueError(f"train: run_dir must not exist yet or be empty, got {str(run_dir)!r}")
    return _Run(config, run_dir, on_rows, None).train()


def resume(path: str | Path, *, on_rows: OnRows | None = None) -> TrainResult:
    """Continue a run from a checkpoint, exactly as if it had never stopped.

    Metrics of later steps than the checkpoint's are dropped. A finished run is returned as it is.

    Args:
        path: a run directory (its newest checkpoint) or one checkpoint file of it.
        on_rows: called with each batch of metrics rows when it is written; the first call has the
            rows that were kept.

    Returns:
        The result, as of `train`.

    Raises:
        ValueError: There is no checkpoint, it is truncated, foreign or incomplete, the metrics are
            damaged, or the corpus has changed.
    """
    checkpoint = find_checkpoint(Path(path)).resolve()
    state = load_checkpoint(checkpoint)
    config = stored_config(checkpoint, state)
    return _Run(config, checkpoint.parent.parent, on_rows, (checkpoint, state)).train()


def pick_device(name: str) -> torch.device:
    """The device that `TrainConfig.device` names; "auto" is CUDA where there is one.

    Raises:
        ValueError: It names no device, or one that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train: device must be a torch device, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"train: device must be available, got {name!r} and torch finds no GPU")
    return device


class _StopRequest:
    """Turns the first Ctrl-C into a request to stop behind the current step."""

    def __init__(self) -> None:
        self.pending = False
        self._previous = signal.getsignal(signal.SIGINT)
        main = threading.current_thread() is threading.main_thread()
        # Where Ctrl-C is ignored, as in a background job, or is not Python's, it stays so.
        self._handles = main and self._previous not in (signal.SIG_IGN, None)

    def __enter__(self) -> "_StopRequest":
        if self._handles:
            signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handles:
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, _signal: int, _frame: FrameType | None) -> None:
        self.pending = True
        signal.signal(signal.SIGINT, self._previous)  # a second one ends the process at once


class _Run:
    """One run: its model, optimizer, data and records."""

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        on_rows: OnRows | None,
        resumed: tuple[Path, dict[str, Any]] | None,
    ):
        self.config = config
        self.run_dir = run_dir
        self.on_rows = on_rows
        self.corpus = load_corpus(config.corpus)
        self.validation = self.corpus.validation_batches(
            config.batch_size, config.sequence_length + 1, config.eval_batches
        )
        self.device = pick_device(config.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = Decoder(config.model, config.residual, config.connection).to(self.device)
        self.optimizer = build_optimizer(
            self.model, learning_rate=config.learning_rate, weight_decay=config.weight_decay
        )
        self.monitor = GainMonitor(self.model)
        self.rule = GainRule()
        self.step = 0
        self.validation_loss: float | None = None
        self.pending: list[tuple[int, float, Tensor, Tensor, dict[str, Tensor] | None]] = []
        if resumed is not None:
            self._restore(*resumed)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(run_dir, resumed[0] if resumed else None)
        self.log = MetricsLog(run_dir, resumed_step=self.step, tensorboard=config.tensorboard)
        if resumed is None:
            self._write([{"kind": "run", "step": 0, "config": config.to_dict()}])
        else:
            self._replay(self.log.kept)

    # the loop

    def train(self) -> TrainResult:
        """Run the remaining steps."""
        config, stop = self.config, _StopRequest()
        try:
            with stop:
                self._start_clock()
                stopping = False
                while self.step < config.steps and not stopping:
                    self._train_step()
                    stopping = stop.pending
                    last = self.step == config.steps
                    saving = last or stopping or self._due(config.checkpoint_every)
                    evaluating = last or self._due(config.eval_every)
                    writing = saving or evaluating or self._due(config.log_every)
                    if writing and not self._flush():
                        return self._result("diverged", stop)
                    if evaluating:
                        self._evaluate()
                    if saving:
                        self._save()
        finally:
            self.log.close()
            self.monitor.remove()
        return self._result("done" if self.step == config.steps else "interrupted", stop)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _train_step(self) -> None:
        config = self.config
        self.step += 1
        rate = learning_rate(
            self.step,
            peak=config.learning_rate,
            warmup_steps=config.warmup_steps,
            steps=config.steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tokens = self.corpus.batch(
            config.batch_size, config.sequence_length + 1, seed=config.seed, step=self.step
        )
        due = self.monitor.num_sublayers > 0 and self._due(config.monitor_every)
        with self.monitor.listen(due):
            loss = self._loss(tokens)
        gains = measure_gains(self.monitor.samples()) if due else None
        loss.backward()
        limit = config.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.model.balance_experts()
        self.optimizer.zero_grad(set_to_none=True)
        self.pending.append((self.step, rate, loss.detach(), norm, gains))

    def _loss(self, tokens: Tensor) -> Tensor:
        """Cross entropy of the next byte, [] in nats, in fp32."""
        if self.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        tokens = tokens.long()
        automatic = self.config.precision == "auto" and self.device.type == "cuda"
        bf16 = self.config.precision == "bf16" or automatic
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            logits = self.model(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def _evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            losses = torch.stack([self._loss(tokens) for tokens in self.validation])
        self.model.train()
        self.validation_loss = losses.mean().item()
        self._write([{"kind": "validation", "step": self.step, "loss": self.validation_loss}])
        self._start_clock()

    # records

    def _start_clock(self) -> None:
        self.clock = time.perf_counter()

    def _flush(self) -> bool:
        """Write the rows of the steps since the last flush.

        Returns:
            Whether every loss and gradient is finite; if not, the parameters no longer are.
        """
        losses = torch.stack([loss for _, _, loss, _, _ in self.pending]).tolist()
        norms = torch.stack([norm for _, _, _, norm, _ in self.pending]).tolist()
        elapsed = (time.perf_counter() - self.clock) * 1000 / len(self.pending)
        rows: list[Row] = []
        for (step, rate, _, _, gains), loss, norm in zip(self.pending, losses, norms, strict=True):
            row = {"kind": "step", "step": step, "loss": loss, "grad_norm": norm}
            rows.append({**row, "learning_rate": rate, "ms_per_step": round(elapsed, 3)})
            if gains is not None:
                rows.append(gain_row(step, gains))
                rows += self._warnings(rows[-1], loss)
        self._write(rows)
        self.pending = []
        self._start_clock()
        return all(map(math.isfinite, losses + norms))

    def _warnings(self, gains: Row, loss: float | None) -> list[Row]:
        return [
            {
                "kind": "warning",
                "step": warning.step,
                "signal": warning.signal,
                "gain": warning.gain,
                "loss_looks_normal": warning.loss_looks_normal,
                "message": warning.message(),
            }
            for warning in self.rule.update(gains, loss)
        ]

    def _write(self, rows: list[Row]) -> None:
        self.log.write(rows)
        if self.on_rows is not None:
            self.on_rows(rows)

    def _replay(self, rows: list[Row]) -> None:
        """Bring the rule, the last validation and the listener to where the kept rows end."""
        losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}
        for row in rows:
            if row["kind"] == "gain":
                self.rule.update(row, losses.get(row["step"]))
            elif row["kind"] == "validation":
                self.validation_loss = row["loss"]
        if self.on_rows is not None:
            self.on_rows(rows)

    # checkpoints

    def _save(self) -> None:
        self.checkpoints.save(
            self.step,
            {
                "config": self.config.to_dict(),
                "corpus": self.corpus.fingerprint,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
        )
        self._start_clock()

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        if state["corpus"] != self.corpus.fingerprint:
            raise ValueError(
                f"resume: corpus must be the one that {str(path)!r} was trained on, "
                f"got other bytes in {self.corpus.name}"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def _result(self, status: str, stop: _StopRequest) -> TrainResult:
        return TrainResult(
            status,
            self.step,
            self.run_dir,
            self.model,
            self.corpus,
            self.validation_loss,
            stop.pending,
        )

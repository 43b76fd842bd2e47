"""The training loop: `train` starts a run directory, `resume` continues one.

A run directory holds metrics.jsonl, checkpoints/ and, on request, tensorboard/. The loop waits for
the device where it writes metrics, validates or saves, and in no other step.
"""

import json
import math
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..models import Decoder
from .checkpoint import Checkpoints, find_checkpoint, load_checkpoint, restore, stored_config
from .compilation import Loss, choose_mode, compile_loss, forward_loss, refusal
from .config import TrainConfig
from .corpus import Corpus, load_corpus
from .device import pick_device
from .folder import full_path, owned, require_unused
from .metrics import (
    MetricsLog,
    Row,
    check_rows,
    kept_rows,
    last_config,
    require_tensorboard,
    to_json_line,
)
from .monitor import GainMonitor, GainRule, gain_row, measure_gains, warning_row
from .optimizer import build_optimizer
from .schedule import learning_rate
from .signals import StopRequest
from .waiting import GpuWaits

OnRows = Callable[[list[Row]], None]


@dataclass(frozen=True)
class TrainResult:
    """The end of a run.

    Args:
        status: "done", "interrupted" (a checkpoint of this step was written) or "diverged" (a
            loss or gradient is not finite; the last checkpoint is from before).
        step: completed steps.
        run_dir: of the run.
        model: after this step.
        corpus: of the run.
        validation_loss: the last one, nats per byte; None if there was none.
        stop_signal: number of the signal that asked the run to end, if any. It may come in the last
            step, validation or save of a run that is "done"; then the caller acts on it.
        advice: what would make the run faster, in a sentence, if the GPU waited for the host.
    """

    status: str
    step: int
    run_dir: Path
    model: Decoder
    corpus: Corpus
    validation_loss: float | None
    stop_signal: int | None = None
    advice: str | None = None

    @property
    def stop_requested(self) -> bool:
        """Whether a signal asked the run to end."""
        return self.stop_signal is not None


def train(
    config: TrainConfig, run_dir: str | Path, *, on_rows: OnRows | None = None
) -> TrainResult:
    """Train from the first step. The process owns the run directory until the run has ended.

    Args:
        config: of the run.
        run_dir: where it is recorded; must not exist, or be empty. `~` is expanded.
        on_rows: called with each batch of metrics rows after they are written and, where a
            checkpoint is due, saved. Before the first of them, a run that compiles calls it with
            a row of kind "compile" without seconds, which is not written. Its exceptions become
            warnings. KeyboardInterrupt, SystemExit and a warning that is an error end the run,
            after a checkpoint of the current step.

    Returns:
        The result. Where the main thread trains, Ctrl-C, SIGTERM and SIGHUP end the run after the
        current step, with a checkpoint; a second Ctrl-C ends it at once.

    Raises:
        FolderInUseError: The run directory has files, or another process owns it; a ValueError.
        ValueError: The corpus cannot be read, there is no such device, or torch.compile fails in
            the mode that `config.compile` asks for. With "auto" a warning says so, and the run is
            eager.
        OSError: The records or a checkpoint cannot be written.
    """
    run_dir = full_path(run_dir, "train: run_dir")
    require_unused(run_dir, "train: run_dir")  # early; `owned` decides
    run = _Run(config, run_dir, on_rows, None)
    with owned(run_dir, "train: run_dir", new=True):
        return run.train()


def train_again(config: TrainConfig, run_dir: Path, on_rows: OnRows) -> TrainResult:
    """`train` in a run directory without a checkpoint; its metrics are deleted first."""
    run = _Run(config, run_dir, on_rows, None)
    with owned(run_dir, "train: run_dir"):
        (run_dir / "metrics.jsonl").unlink(missing_ok=True)
        return run.train()


def resume(
    path: str | Path,
    *,
    on_rows: OnRows | None = None,
    corpus: str | Path | None = None,
    steps: int | None = None,
) -> TrainResult:
    """Continue a run from a checkpoint, with the same bits as if it had never stopped.

    An older checkpoint first deletes the newer checkpoints, then the metrics of later steps. A
    finished run is returned as it is. With more steps than before, the learning rate continues as
    in a run of the new length (`schedule.learning_rate`): that of a finished run rises again.

    Args:
        path: a run directory (its newest checkpoint) or one checkpoint file of it.
        on_rows: as of `train`; the first call with written rows has those that were kept.
        corpus: where the corpus is now, if it has moved.
        steps: the new length; at least the old one.

    Returns:
        The result, as of `train`.

    Raises:
        FolderInUseError: Another process owns the run directory; a ValueError.
        ValueError: There is no checkpoint, it is truncated, foreign or incomplete, its parameters
            do not fit, the metrics are damaged, the corpus is gone or has changed, or the steps
            are fewer.
        OSError: As `train`.
    """
    path = full_path(path, "resume: path")
    found = find_checkpoint(path)  # refuses a folder of somebody else before a lock is left there
    run_dir = found.parent.parent if path.is_file() else path
    with owned(run_dir, "resume: path"):
        checkpoint = find_checkpoint(path)  # again: there may be a newer one by now
        state = load_checkpoint(checkpoint)
        stored = stored_config(checkpoint, state)
        rows = kept_rows(run_dir, state["step"])
        check_rows(rows, run_dir / "metrics.jsonl")
        # Until the next checkpoint, the last row of kind "run" has the length.
        length = max(stored.steps, last_config(rows).get("steps", 0))
        config = stored.replace(
            corpus=stored.corpus if corpus is None else corpus,
            steps=length if steps is None else steps,
        )
        if config.corpus is not None and not Path(config.corpus).exists():
            raise ValueError(
                f"resume: corpus must exist, got {config.corpus!r}; "
                "if it has moved, name its new place (--corpus)"
            )
        if config.steps < length:
            raise ValueError(f"resume: steps must be at least the run's {length}, got {steps}")
        return _Run(config, run_dir, on_rows, (checkpoint, state, rows)).train()


class _Run:
    """One run: its model, optimizer, data and records."""

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        on_rows: OnRows | None,
        resumed: tuple[Path, dict[str, Any], list[Row]] | None,
    ):
        self.config = config
        self.run_dir = run_dir
        self.on_rows = on_rows
        self.corpus = load_corpus(config.corpus)
        self.validation = self.corpus.validation_batches(
            config.batch_size, config.sequence_length + 1, config.eval_batches
        )
        self.device = pick_device(config.device)
        self.mode = choose_mode(config, self.device)
        if config.tensorboard:  # before anything is written
            require_tensorboard()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = Decoder(config.model, config.residual, config.connection).to(self.device)
        self.optimizer = build_optimizer(
            self.model, learning_rate=config.learning_rate, weight_decay=config.weight_decay
        )
        self.monitor = GainMonitor(self.model)
        self.rule = GainRule()
        self.loss: Loss = forward_loss
        self.compiled: Row | None = None
        self.waits = GpuWaits(self.device)
        self.step = 0
        self.validation_loss: float | None = None
        self.pending: list[tuple[int, float, Tensor, Tensor, dict[str, Tensor] | None]] = []
        self.unshown: list[list[Row]] = []
        self.unwritten: list[Row] = []  # what metrics.jsonl did not take
        if resumed is not None:
            self._restore(*resumed)
        self.saved = self.step
        self.checkpoints = Checkpoints(run_dir, resumed[0] if resumed else None)

    # the loop

    def train(self) -> TrainResult:
        """Run the remaining steps in a run directory that this process owns."""
        if self.mode != "off" and self.step < self.config.steps:
            self._compile()  # before any record: where it fails, the folder stays empty
        self._open()
        stop = StopRequest()
        finite, stopping = True, False
        try:
            self._show()
            with stop:
                self._start_clock()
                while self.step < self.config.steps and finite and not stopping:
                    self._train_step()
                    stopping = stop.number is not None
                    finite = self._after_step(stopping)
        finally:
            self.log.close()
            self.monitor.remove()
        status = "done" if self.step == self.config.steps else "interrupted"
        status = status if finite else "diverged"
        loss, number, advice = self.validation_loss, stop.number, self.waits.advice(self.mode)
        done = (status, self.step, self.run_dir, self.model, self.corpus)
        return TrainResult(*done, loss, number, advice)

    def _after_step(self, stopping: bool) -> bool:
        """Record, validate, save and show what is due after a step, in this order.

        Returns whether every loss and gradient is finite; if not, the parameters no longer are.
        """
        config, last = self.config, self.step == self.config.steps
        saving = last or stopping or self._due(config.checkpoint_every)
        evaluating = last or self._due(config.eval_every)
        if not (saving or evaluating or self._due(config.log_every)):
            return True
        rows, finite = self._collect()
        try:
            self._write(rows)
            if finite and evaluating:
                self._evaluate()
            if self.unwritten:
                raise self.refused
            if finite and saving:
                self._save()
        except (Exception, SystemExit):
            self._rescue(finite)
            raise
        try:
            self._show()
        except BaseException:  # a listener may end the program, but costs no step
            self._rescue(finite)
            raise
        return finite

    def _rescue(self, finite: bool) -> None:
        """Save the steps and the unwritten rows after a failure, if that is possible."""
        if finite and self.saved != self.step:
            with suppress(Exception):
                self._save()

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _compile(self) -> None:
        """Compile the loss; where "auto" chose a mode that fails, warn and run without it."""
        row: Row = {"kind": "compile", "step": self.step, "mode": self.mode, "seconds": None}
        self.unshown.append([row])
        self._show()
        start = time.perf_counter()
        tokens = self._on_device(self._batch(self.step + 1))
        try:
            self.loss = compile_loss(self.mode, self.model, self.monitor, tokens, self._bf16)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a compiler's can be of any class
            if self.config.compile != "auto":
                raise ValueError(refusal(self.mode, error)) from error
            warnings.warn(
                f"{refusal(self.mode, error)}; the run goes on without torch.compile",
                RuntimeWarning,
                stacklevel=2,
            )
            self.mode = "off"
        else:
            self.compiled = {**row, "seconds": round(time.perf_counter() - start, 3)}

    def _train_step(self) -> None:
        config = self.config
        self.step += 1
        schedule = {"warmup_steps": config.warmup_steps, "steps": config.steps}
        rate = learning_rate(self.step, peak=config.learning_rate, **schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tokens = self._on_device(self._batch(self.step))
        due = self.monitor.num_sublayers > 0 and self._due(config.monitor_every)
        if self.mode == "graphs":
            torch.compiler.cudagraph_mark_step_begin()  # nothing of the last step is read again
        # A compiled pass listens in every step, else it would be compiled twice: its samples are
        # views of tensors that the backward pass keeps anyway.
        with self.monitor.listen(due or self.mode != "off"):
            loss = self.loss(self.model, tokens, self._bf16)
        gains = measure_gains(self.monitor.samples()) if due else None
        self.monitor.clear()
        loss.backward()
        self.waits.mark()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
        self.optimizer.step()
        self.model.balance_experts()
        self.optimizer.zero_grad(set_to_none=True)
        # A copy: the next replay of a CUDA graph writes into the memory of its results.
        self.pending.append((self.step, rate, loss.detach().clone(), norm, gains))
        self.waits.read()

    def _batch(self, step: int) -> Tensor:
        config = self.config
        length = config.sequence_length + 1
        return self.corpus.batch(config.batch_size, length, seed=config.seed, step=step)

    def _on_device(self, tokens: Tensor) -> Tensor:
        if self.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        return tokens

    @property
    def _bf16(self) -> bool:
        bf16 = ("auto", "bf16") if self.device.type == "cuda" else ("bf16",)
        return self.config.precision in bf16

    def _evaluate(self) -> None:
        """The loss of the validation batches, eager: too few of them to compile a graph for."""
        self.model.eval()
        with torch.no_grad():
            batches = map(self._on_device, self.validation)
            losses = [forward_loss(self.model, tokens, self._bf16) for tokens in batches]
        self.model.train()
        self.validation_loss = torch.stack(losses).mean().item()
        self._write([{"kind": "validation", "step": self.step, "loss": self.validation_loss}])
        self._start_clock()

    # records

    def _start_clock(self) -> None:
        self.clock = time.perf_counter()

    def _open(self) -> None:
        """Open the records, and write a row of kind "run" if the last one differs."""
        self.checkpoints.drop_newer(self.step)  # before their rows, which are none without them
        tensorboard = self.config.tensorboard
        self.log = MetricsLog(self.run_dir, resumed_step=self.step, tensorboard=tensorboard)
        run: Row = {"kind": "run", "step": self.step, "config": self.config.to_dict()}
        run["corpus"] = self.corpus.describe()
        rows, self.unwritten = self.unwritten, []
        if last_config(self.log.kept + rows) != json.loads(to_json_line(run))["config"]:
            rows.append(run)
        if self.compiled is not None:
            rows.append(self.compiled)
        if rows:
            self.log.write(rows)
        self.unshown.append(self.log.kept + rows)

    def _collect(self) -> tuple[list[Row], bool]:
        """The rows of the steps since the last call, and whether they are all finite."""
        steps, rates, on_device, norms_on_device, records = zip(*self.pending, strict=True)
        losses = torch.stack(on_device).tolist()
        norms = torch.stack(norms_on_device).tolist()
        elapsed = round((time.perf_counter() - self.clock) * 1000 / len(steps), 3)
        rows: list[Row] = []
        for step, rate, loss, norm, gains in zip(steps, rates, losses, norms, records, strict=True):
            row = {"kind": "step", "step": step, "loss": loss, "grad_norm": norm}
            rows.append({**row, "learning_rate": rate, "ms_per_step": elapsed})
            if gains is not None:
                rows.append(gain_row(step, gains))
                rows += map(warning_row, self.rule.update(rows[-1], loss))
        self.pending = []
        self._start_clock()
        return rows, all(map(math.isfinite, losses + norms))

    def _write(self, rows: list[Row]) -> None:
        """Write rows, after those that an earlier write left; a failure is kept for later."""
        self.unwritten += rows
        self.unshown.append(rows)
        try:
            self.log.write(self.unwritten)
        except OSError as error:
            self.refused = error
        else:
            self.unwritten = []

    def _show(self) -> None:
        """Give the listener the rows since the last call; its exceptions become warnings."""
        batches, self.unshown = self.unshown, []
        for rows in batches:
            try:
                if self.on_rows is not None:
                    self.on_rows(rows)
            except Exception as error:
                warnings.warn(
                    f"train: on_rows must not raise, got {_checks.reason(error)}; the run goes on",
                    RuntimeWarning,
                    stacklevel=2,
                )

    # checkpoints

    def _save(self) -> None:
        state = {
            "config": self.config.to_dict(),
            "corpus": self.corpus.fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rows": [json.loads(to_json_line(row)) for row in self.unwritten],
        }
        self.checkpoints.save(self.step, state)
        self.saved = self.step
        self._start_clock()

    def _restore(self, path: Path, state: dict[str, Any], rows: list[Row]) -> None:
        if state["corpus"] != self.corpus.fingerprint:
            raise ValueError(
                f"resume: corpus must be the one that {str(path)!r} was trained on, "
                f"got other bytes in {self.corpus.name}"
            )
        restore(path, state, self.model, self.optimizer)
        self.step = state["step"]
        owed = state.get("rows", [])  # checkpoints of older versions have none
        check_rows(owed, path)
        late = [row for row in rows if owed and row["step"] >= owed[0]["step"]]
        self.unwritten = [row for row in owed if row not in late]  # a killed resume wrote them
        # The rule and the last validation continue from where the kept rows end.
        rows = rows + self.unwritten
        losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}
        for row in rows:
            if row["kind"] == "gain":
                self.rule.update(row, losses.get(row["step"]))
            elif row["kind"] == "validation":
                self.validation_loss = row["loss"]

"""The stability monitor: how much the residual mixing h_res amplifies the streams.

The forward gain of a matrix is its largest absolute row sum, the backward gain its largest absolute
column sum. The gain of a sublayer is the mean over tokens. The composite is the product of a
token's h_res over all sublayers, later ones on the left: what the residual path alone does to a
signal in the forward pass, and to a gradient in the backward pass (arXiv 2512.24880, section 3.1).
Doubly stochastic matrices keep every gain at 1. Unconstrained ones grow long before the loss shows
it, often in the first sublayer first: its gain is called the canary.

Only a recorded step costs time: the hooks then keep a view of the maps of at most MAX_TOKENS
tokens. A compiled pass that listens returns these views, with no kernel of its own.
`python -m mhc_tile.perf.monitor_cost` measures it.

Axes: L sublayers, T sampled tokens, [n, n] is [out, in].
"""

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, linear_regression
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..nn import HyperConnection, ManifoldHyperConnection

MAX_TOKENS = 512


def measure_gains(h_res: Tensor) -> dict[str, Tensor]:
    """Gains of a stack of residual mixings, without a host sync.

    `forward[l] = mean_t max_o sum_i |h_res[l, t, o, i]|`,
    `backward[l] = mean_t max_i sum_o |h_res[l, t, o, i]|`,
    `distance[l] = mean_t max(|row sum - 1|, |column sum - 1|, -entry)` over all of token t's rows,
    columns and entries; the composites are the gains of `h_res[L-1, t] @ ... @ h_res[0, t]`.

    Args:
        h_res: [L, T, n, n], in depth order.

    Returns:
        forward, backward, distance: [L]; composite_forward, composite_backward: [].

    Example:
        >>> gains = measure_gains(2 * torch.eye(4).expand(3, 5, 4, 4))
        >>> gains["forward"].tolist(), gains["composite_backward"].item()
        ([2.0, 2.0, 2.0], 8.0)
    """
    product = h_res[0]
    for later in h_res[1:]:
        product = later @ product
    off_rows = (h_res.sum(-1) - 1).abs().amax(-1)
    off_columns = (h_res.sum(-2) - 1).abs().amax(-1)
    negative = -h_res.amin((-1, -2))
    return {
        "forward": _row_gain(h_res),
        "backward": _row_gain(h_res.mT),
        "distance": torch.maximum(torch.maximum(off_rows, off_columns), negative).mean(-1),
        "composite_forward": _row_gain(product),
        "composite_backward": _row_gain(product.mT),
    }


def _row_gain(matrix: Tensor) -> Tensor:
    return matrix.abs().sum(-1).amax(-1).mean(-1)


class GainMonitor:
    """Records the h_res of every connection of a model, in the order in which they are called.

    A connection that a pass calls again is a further sublayer. The recompute of a backward pass is
    not recorded, nor is a pass without tokens. A call of the model starts a new record.

    Args:
        model: with `ManifoldHyperConnection` or `HyperConnection` modules; a model without any has
            nothing to record.
        max_tokens: tokens sampled, evenly spaced, the same ones in every sublayer; at least 1.
    """

    def __init__(self, model: nn.Module, max_tokens: int = MAX_TOKENS):
        kinds = (ManifoldHyperConnection, HyperConnection)
        connections = [module for module in model.modules() if isinstance(module, kinds)]
        self.num_sublayers = len(connections)
        self._max_tokens = _checks.whole("GainMonitor", "max_tokens", max_tokens)
        self._listening = self._starting = False
        self._samples: list[tuple[int, Tensor]] = []  # of which connection, in the order of calls
        self._hooks = [model.register_forward_pre_hook(self._start)]
        for index, connection in enumerate(connections):
            hook = functools.partial(self._keep, index)
            self._hooks.append(connection.tap.register_forward_hook(hook))

    def _start(self, _module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        if self._listening and not _in_backward():
            self._starting = True

    def _keep(self, index: int, _module: nn.Module, _inputs: Any, h_res: Tensor) -> None:
        if self._listening and h_res.numel() and not _in_backward():
            if self._starting:
                self._samples, self._starting = [], False
            self._samples.append((index, self._sample(h_res.detach())))

    def _sample(self, h_res: Tensor) -> Tensor:
        tokens = h_res.flatten(0, -3) if h_res.dim() > 2 else h_res.unsqueeze(0)
        # An odd stride visits every position of a sequence whose length is a power of two.
        stride = -(-len(tokens) // self._max_tokens) | 1
        return tokens[::stride] if len(tokens) > self._max_tokens else tokens

    @contextmanager
    def listen(self, on: bool = True) -> Iterator[None]:
        """Record the forward pass in this block, if `on`; of several, the last that has tokens.

        A backward pass that recomputes what torch.compile compiled must come after the block.
        """
        self._listening = on and self.num_sublayers > 0
        self._samples, self._starting = [], False
        try:
            yield
        finally:
            self._listening = False

    def samples(self) -> Tensor:
        """h_res of the recorded pass, [L, T, n, n]; a RuntimeError if a connection did not run."""
        ran = len({index for index, _ in self._samples})
        if ran != self.num_sublayers or not ran:
            raise RuntimeError(
                f"GainMonitor: the recorded pass must run all {self.num_sublayers} connections "
                f"on at least one token, got {ran}"
            )
        samples, self._samples = self._samples, []
        return torch.stack([sample for _, sample in samples])

    def clear(self) -> None:
        """Drop the record, and with it what keeps its tensors alive."""
        self._samples = []

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()


def _in_backward() -> bool:
    """Whether autograd is calling, to recompute; a compiled pass has no hooks in its backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def gain_row(step: int, gains: dict[str, Tensor]) -> dict[str, Any]:
    """The metrics row of `measure_gains`, to six digits; waits for the device."""
    row: dict[str, Any] = {"kind": "gain", "step": step}
    for name, value in gains.items():
        values = [float(f"{item:.6g}") for item in value.reshape(-1).tolist()]
        row[name] = values if value.dim() else values[0]
    # the larger gain of the first sublayer
    row["canary"] = max(row["forward"][0], row["backward"][0])
    return row


@dataclass(frozen=True)
class GainWarning:
    """A gain that crossed its threshold.

    Args:
        step: of the record.
        signal: "composite" or "canary".
        gain: value of the trend at this step.
        threshold: the one that the trend crossed.
        loss_looks_normal: whether the loss has not risen.
    """

    step: int
    signal: str
    gain: float
    threshold: float
    loss_looks_normal: bool

    def message(self) -> str:
        """One sentence for people."""
        what = {"composite": "composite gain", "canary": "first sublayer's gain"}[self.signal]
        gain = f"{self.gain:,.0f}" if 100 <= self.gain < 1e9 else f"{self.gain:.3g}"
        loss = "while the loss looks normal" if self.loss_looks_normal else "and the loss has risen"
        return (
            f"step {self.step}: the {what} of h_res reached {gain} "
            f"(threshold {self.threshold:g}) {loss}"
        )


def warning_row(warning: GainWarning) -> dict[str, Any]:
    """The metrics row of a warning."""
    return {"kind": "warning", **dataclasses.asdict(warning), "message": warning.message()}


class GainRule:
    """Warns when the trend of a gain crosses a threshold.

    The trend is the end of a straight line fitted to the logarithms of the last `window` records.
    It is at most 1.2 times the largest of them: a gain below 1.6, as of healthy mHC, reads below
    1.6^1.2 = 1.76 and does not warn. A spike in one record counts 0.6 of its logarithm. Each
    warning raises the threshold of its signal tenfold: one warning per decade.

    Args:
        composite: threshold of the larger composite gain.
        canary: threshold of the larger gain of the first sublayer.
        window: records in the trend; there is no warning before the third.
    """

    def __init__(self, composite: float = 3.0, canary: float = 2.0, window: int = 5):
        _checks.count("GainRule", window=window)
        self._thresholds = {"composite": composite, "canary": canary}
        for signal, threshold in self._thresholds.items():
            _checks.number("GainRule", signal, threshold, above=True)
        self._logs = {signal: deque[float](maxlen=window) for signal in self._thresholds}
        self._losses = deque[float](maxlen=2 * window)

    def update(self, row: dict[str, Any], loss: float | None) -> list[GainWarning]:
        """The warnings of a record, usually none.

        Args:
            row: from `gain_row`; None stands for a value that is not finite.
            loss: of the same step.
        """
        self._losses.append(math.inf if loss is None else loss)
        composite = (row["composite_forward"], row["composite_backward"])
        first = (row["forward"][0], row["backward"][0])
        warnings = []
        for signal, gains in (("composite", composite), ("canary", first)):
            logs = self._logs[signal]
            logs.append(max(map(_log_gain, gains)))
            if len(logs) < 3:
                continue
            slope, start = linear_regression(range(len(logs)), logs)
            trend, threshold = start + slope * (len(logs) - 1), self._thresholds[signal]
            if trend > math.log(threshold):
                gain, normal = math.exp(min(trend, 700.0)), self._loss_looks_normal()
                warnings.append(GainWarning(row["step"], signal, gain, threshold, normal))
            while trend > math.log(self._thresholds[signal]):
                self._thresholds[signal] *= 10.0
        return warnings

    def _loss_looks_normal(self) -> bool:
        """The last three losses are, in the mean, at most 10 % above those before."""
        losses = list(self._losses)
        recent, before = losses[-3:], losses[:-3]
        if not all(map(math.isfinite, recent)):
            return False
        return not before or fmean(recent) <= 1.1 * fmean(before)


def _log_gain(gain: float | None) -> float:
    """Logarithm from 0 (gain 1 and below) to 700 (not finite)."""
    if gain is None or not math.isfinite(gain):
        return 700.0
    return math.log(max(gain, 1.0))

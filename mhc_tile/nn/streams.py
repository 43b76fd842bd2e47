"""Modules that enter and leave the residual streams."""

import torch
from torch import Tensor, nn

from .. import _checks, ops
from ..config import MHCConfig
from ._parameters import StreamsModule, logit, parameter, start_projection, writable


class Expand(nn.Module):
    """Copy a hidden state into every stream: [..., C] to [..., n, C].

    Args:
        num_streams: n, at least 1.

    Example:
        >>> Expand(4)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 4, 64])
    """

    def __init__(self, num_streams: int) -> None:
        super().__init__()
        self.num_streams = _checks.whole("Expand", "num_streams", num_streams)

    def forward(self, hidden: Tensor) -> Tensor:
        """`mhc_tile.expand` of hidden [..., C]."""
        return ops.expand(hidden, self.num_streams)

    def extra_repr(self) -> str:
        """The size, for `print(model)`."""
        return f"num_streams={self.num_streams}"


class Collapse(nn.Module):
    """Mean or sum of the streams: [..., n, C] to [..., C].

    Args:
        mode: "mean", which undoes `Expand`, or "sum".

    Raises:
        ValueError: mode is neither.

    Example:
        >>> Collapse()(torch.randn(2, 10, 4, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, mode: str = "mean") -> None:
        super().__init__()
        self.mode = _checks.one_of("Collapse", "mode", mode, ops.streams.MODES)

    def forward(self, x: Tensor) -> Tensor:
        """`mhc_tile.collapse` of x [..., n, C]."""
        return ops.collapse(x, self.mode)

    def extra_repr(self) -> str:
        """The mode, for `print(model)`."""
        return f"mode={self.mode!r}"


class Head(StreamsModule):
    """The learned exit of DeepSeek-V4: [..., n, C] to [..., C], weights from the streams.

    phi is normal with variance 1 / (n*C). With `config.init` "paper" alpha is 0.01 and bias 0
    (every stream weighs 1/2); with "residual" the head starts as the mean of the streams.

    Args:
        hidden_size: C, the size of one stream; at least 1.
        config: num_streams, norm_eps, pre_eps and init are read; `MHCConfig.paper()` if None.
        device: where phi [n, n*C], alpha [1] and bias [n] are made, in fp32.

    Example:
        >>> Head(64)(torch.randn(2, 10, 4, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        config: MHCConfig | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(hidden_size, config)
        n = self.config.num_streams
        self.phi = parameter(n, n * self.hidden_size, device=device)
        self.alpha = parameter(1, device=device)
        self.bias = parameter(n, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start phi, alpha and bias again, as `config.init` says; in every process of FSDP2."""
        with writable(self, "phi", "alpha", "bias") as (phi, alpha, bias):
            start_projection(phi, alpha, bias, self.config)
            if self.config.init == "residual":
                nn.init.constant_(bias, logit(1 / self.config.num_streams - self.config.pre_eps))

    def forward(self, x: Tensor) -> Tensor:
        """`mhc_tile.head` of x [..., n, C]."""
        self.check_input(x)
        norm_eps, pre_eps = self.config.norm_eps, self.config.pre_eps
        parameters = self.read(x, self.phi, self.alpha, self.bias)
        return ops.head(x, *parameters, norm_eps=norm_eps, pre_eps=pre_eps)

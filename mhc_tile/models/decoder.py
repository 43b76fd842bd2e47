"""A decoder-only transformer whose sublayers are connected by residuals, HC or mHC.

Pre-norm RMSNorm, rotary attention through SDPA, SwiGLU or a mixture of experts, an output head tied
to the embedding. Attention and FFN are sublayers of their own, each with its connection. With n
streams the embedding is copied into the streams, and the streams are averaged at the end.

Axes: B batch, S sequence, C hidden size, n streams.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from .._autocast import autocast_dtype
from ..config import MHCConfig
from ..nn import (
    Collapse,
    Expand,
    HyperConnectedStack,
    HyperConnection,
    ManifoldHyperConnection,
    Residual,
)
from ..nn._arguments import check_config
from .configs import ModelConfig
from .layers import INPUT_STD, RMSNorm

ResidualKind = Literal["residual", "hc", "mhc"]
RESIDUALS: tuple[str, ...] = get_args(ResidualKind)


class Decoder(nn.Module):
    """Decoder-only transformer: token ids [B, S] -> logits [B, S, vocab_size].

    For one random seed the three kinds of residual start from the same embedding and sublayers.
    A decoder whose state is loaded can start without memory: make it on the meta device, call
    `to_empty` and then `reset_parameters` of every module that has it, which fills the buffers that
    no state dict holds and draws some of the parameters, and load the state.

    Args:
        config: the decoder's shape.
        residual: "residual" (one stream, plain addition), "hc" (unconstrained Hyper-Connections)
            or "mhc" (Manifold-Constrained Hyper-Connections).
        connection: constants of the connections, and n; `MHCConfig.paper()` if None. Without
            effect where residual is "residual".

    Raises:
        TypeError: config is not a ModelConfig, or connection not an MHCConfig.
        ValueError: residual is none of the three.

    Example:
        >>> import torch
        >>> from mhc_tile.models import Decoder, model_config
        >>> decoder = Decoder(model_config("1m"), residual="mhc")
        >>> decoder(torch.zeros(2, 16, dtype=torch.long)).shape
        torch.Size([2, 16, 256])
    """

    def __init__(
        self, config: ModelConfig, residual: str = "mhc", connection: MHCConfig | None = None
    ):
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise TypeError(f"Decoder: config must be a ModelConfig, got {type(config).__name__}")
        residual = _checks.one_of("Decoder", "residual", residual, RESIDUALS)
        connection = check_config("Decoder", connection, "connection")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        # Every sublayer before any connection: the random draws of the sublayers do not depend on
        # the kind of connection.
        layers: list[Any] = []
        for index in range(config.num_layers):
            layers += [config.attention(), config.feed_forward(index)]
        nn.init.normal_(self.embedding.weight, std=INPUT_STD)
        for layer in layers:
            layer.initialise(INPUT_STD / len(layers) ** 0.5)
        one_stream = residual == "residual"
        self.expand = nn.Identity() if one_stream else Expand(connection.num_streams)
        self.stack = HyperConnectedStack(
            _connect(index, layer, config.hidden_size, residual, connection)
            for index, layer in enumerate(layers)
        )
        self.collapse = nn.Identity() if one_stream else Collapse(mode="mean")
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, vocab_size] of the next token at every position.

        Under autocast the residual streams have the autocast dtype from the embedding on.

        Args:
            tokens: [B, S], int64 or int32, S at most context_length.

        Raises:
            ValueError: tokens is not [B, S], is not of integers, or is too long.
        """
        if tokens.dim() != 2 or tokens.shape[1] > self.config.context_length:
            raise ValueError(
                f"Decoder: tokens must have shape [B, S] with S at most "
                f"{self.config.context_length}, got {list(tokens.shape)}"
            )
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"Decoder: tokens must be int64 or int32, got {tokens.dtype}")
        hidden = self.embedding(tokens)
        if (dtype := autocast_dtype(hidden.device.type)) is not None:
            hidden = hidden.to(dtype)
        hidden = self.collapse(self.stack(self.expand(hidden)))
        return F.linear(self.norm(hidden), self.embedding.weight)

    def balance_experts(self) -> None:
        """Call every `update_bias` (`mhc_tile.models.moe.Router`), after each optimizer step."""
        for module in self.modules():
            if callable(update := getattr(module, "update_bias", None)):
                update()


def _connect(
    index: int, layer: nn.Module, hidden_size: int, residual: str, connection: MHCConfig
) -> nn.Module:
    if residual == "residual":
        return Residual(layer)
    if residual == "hc":
        return HyperConnection(layer, hidden_size, connection, layer_index=index)
    return ManifoldHyperConnection(layer, hidden_size, connection)


def count_parameters(
    config: ModelConfig, residual: str = "mhc", connection: MHCConfig | None = None
) -> int:
    """Number of parameters of a decoder, which is not allocated; arguments as for `Decoder`.

    The tied head counts once.

    Example:
        >>> from mhc_tile.models import model_config
        >>> count_parameters(model_config("1m"), "residual")
        885888
    """
    return _count(config, residual, connection)[0]


def count_active_parameters(
    config: ModelConfig, residual: str = "mhc", connection: MHCConfig | None = None
) -> int:
    """Number of parameters that a token uses: without those of the experts it is not routed to.

    Arguments as for `Decoder`.

    Example:
        >>> from mhc_tile.models import model_config
        >>> count_active_parameters(model_config("1m"), "residual")
        885888
    """
    return _count(config, residual, connection)[1]


def _count(config: ModelConfig, residual: str, connection: MHCConfig | None) -> tuple[int, int]:
    with torch.device("meta"):
        decoder = Decoder(config, residual, connection)
    count = sum(parameter.numel() for parameter in decoder.parameters())
    return count, count - sum(getattr(m, "idle_parameters", 0) for m in decoder.modules())

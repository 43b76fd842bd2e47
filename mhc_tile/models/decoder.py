"""A decoder-only transformer whose sublayers are joined by residuals, HC or mHC.

Pre-norm RMSNorm, rotary attention through SDPA, SwiGLU, an output head tied to the embedding.
Attention and FFN are separate sublayers and each is wrapped in its own connection. With n streams
the hidden state is copied into the streams behind the embedding and averaged behind the last
sublayer.

Axes: B batch, S sequence, C hidden size, H heads, D head size, n streams.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MHCConfig
from ..nn import (
    Collapse,
    Expand,
    HyperConnectedStack,
    HyperConnection,
    ManifoldHyperConnection,
    Residual,
)
from .configs import ModelConfig

RESIDUALS = ("residual", "hc", "mhc")


class RMSNorm(nn.RMSNorm):
    """RMSNorm in its input's dtype, so that under autocast the fused kernel serves it."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise over C."""
        weight = self.weight.to(hidden.dtype)
        return F.rms_norm(hidden, self.normalized_shape, weight, self.eps)


class Attention(nn.Module):
    """Norm and causal multi-head attention with rotary positions, [B, S, C] -> [B, S, C].

    Args:
        config: the decoder's shape.
    """

    cos_SD: Tensor
    sin_SD: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        inner = config.num_heads * config.head_size
        self.head_size = config.head_size
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.project_in = nn.Linear(config.hidden_size, 3 * inner, bias=False)
        self.project_out = nn.Linear(inner, config.hidden_size, bias=False)
        exponents = torch.arange(0, config.head_size, 2) / config.head_size
        positions = torch.arange(config.context_length)
        angles = torch.outer(positions, config.rope_theta**-exponents)
        self.register_buffer("cos_SD", angles.cos(), persistent=False)
        self.register_buffer("sin_SD", angles.sin(), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Attend to the same and earlier positions."""
        heads = self.project_in(self.norm(hidden)).unflatten(-1, (3, -1, self.head_size))
        query_BHSD, key_BHSD, value_BHSD = heads.transpose(1, 3).unbind(2)
        attended_BHSD = F.scaled_dot_product_attention(
            self._rotate(query_BHSD), self._rotate(key_BHSD), value_BHSD, is_causal=True
        )
        return self.project_out(attended_BHSD.transpose(1, 2).flatten(-2))

    def _rotate(self, heads_BHSD: Tensor) -> Tensor:
        length = heads_BHSD.shape[-2]
        cos, sin = self.cos_SD[:length], self.sin_SD[:length]
        first, second = heads_BHSD.chunk(2, dim=-1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return rotated.to(heads_BHSD.dtype)


class FeedForward(nn.Module):
    """Norm and SwiGLU, [..., C] -> [..., C].

    Args:
        config: the decoder's shape.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.project_in = nn.Linear(config.hidden_size, 2 * config.ffn_size, bias=False)
        self.project_out = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """`project_out(silu(gate) * up)`."""
        gate, up = self.project_in(self.norm(hidden)).chunk(2, dim=-1)
        return self.project_out(F.silu(gate) * up)


class Decoder(nn.Module):
    """Decoder-only transformer: token ids [B, S] -> logits [B, S, vocab_size].

    For one random seed the three kinds of residual start from the same embedding and sublayers.

    Args:
        config: the decoder's shape.
        residual: "residual" (one stream, plain addition), "hc" (unconstrained Hyper-Connections)
            or "mhc" (Manifold-Constrained Hyper-Connections).
        connection: constants of the connections, and n; `MHCConfig.paper()` if None. Without
            effect where residual is "residual".

    Raises:
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
        if residual not in RESIDUALS:
            raise ValueError(
                f"Decoder: residual must be one of {list(RESIDUALS)}, got {residual!r}"
            )
        connection = MHCConfig.paper() if connection is None else connection
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        # Every sublayer before any connection, so that connections take no part of its random draw.
        layers: list[Attention | FeedForward] = []
        for _ in range(config.num_layers):
            layers += [Attention(config), FeedForward(config)]
        self._initialise(layers)
        one_stream = residual == "residual"
        self.expand = nn.Identity() if one_stream else Expand(connection.num_streams)
        self.stack = HyperConnectedStack(_connect(layers, config.hidden_size, residual, connection))
        self.collapse = nn.Identity() if one_stream else Collapse(mode="mean")
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def _initialise(self, layers: list[Attention | FeedForward]) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)
        for layer in layers:
            nn.init.normal_(layer.project_in.weight, std=0.02)
            nn.init.normal_(layer.project_out.weight, std=0.02 / len(layers) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position.

        Under autocast the residual streams have the autocast dtype from the embedding on.

        Args:
            tokens: [B, S], int64 or int32, S at most context_length.

        Returns:
            [B, S, vocab_size].

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
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        hidden = self.collapse(self.stack(self.expand(hidden)))
        return F.linear(self.norm(hidden), self.embedding.weight)


def _connect(
    layers: Sequence[nn.Module], hidden_size: int, residual: str, connection: MHCConfig
) -> list[nn.Module]:
    if residual == "residual":
        return [Residual(layer) for layer in layers]
    if residual == "hc":
        return [
            HyperConnection(layer, hidden_size, connection, layer_index=index)
            for index, layer in enumerate(layers)
        ]
    return [ManifoldHyperConnection(layer, hidden_size, connection) for layer in layers]


def count_parameters(
    config: ModelConfig, residual: str = "mhc", connection: MHCConfig | None = None
) -> int:
    """Number of parameters of a decoder, without allocating it.

    Args:
        config: the decoder's shape.
        residual: as for `Decoder`.
        connection: as for `Decoder`.

    Returns:
        The count; the tied head counts once.

    Example:
        >>> from mhc_tile.models import model_config
        >>> count_parameters(model_config("1m"), "residual")
        885888
    """
    with torch.device("meta"):
        decoder = Decoder(config, residual, connection)
    return sum(parameter.numel() for parameter in decoder.parameters())

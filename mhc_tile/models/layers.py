"""Sublayers of the decoder and their parts: RMSNorm, rotary positions, attention, SwiGLU.

A sublayer of the decoder maps [B, S, C] to [B, S, C] and starts with its norm.

Axes: B batch, S sequence, C hidden size, H heads, D head size.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn._parameters import MappingModule, wide_dtype, writable

if TYPE_CHECKING:
    from .configs import ModelConfig

INPUT_STD = 0.02
"""Initial standard deviation of every matrix, except the last one of a sublayer."""


class Sublayer(nn.Module):
    """A module that ends with the matrix `project_out`."""

    project_out: nn.Module

    def initialise(self, output_std: float) -> None:
        """Draw the matrices again: `project_out` with output_std, the others with INPUT_STD."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = output_std if module is self.project_out else INPUT_STD
                nn.init.normal_(module.weight, std=std)


class RMSNorm(nn.RMSNorm):
    """RMSNorm in its input's dtype, which lets the fused kernel run under autocast."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise over C."""
        weight = self.weight.to(hidden.dtype)
        return F.rms_norm(hidden, self.normalized_shape, weight, self.eps)


class Rotary(MappingModule):
    """Rotary positions: rotates channels i and i + size / 2 by an angle of the position.

    The tables are computed in fp32 (fp64 where that is the default) and keep that dtype when a
    model is cast to bf16 or fp16: 16 bits do not resolve an angle of many turns.
    """

    cos_SD: Tensor
    sin_SD: Tensor

    def __init__(self, size: int, config: "ModelConfig"):
        super().__init__()
        self.size, self.rope_theta = size, config.rope_theta
        table = torch.empty(config.context_length, size // 2, dtype=wide_dtype())
        self.register_buffer("cos_SD", table, persistent=False)
        self.register_buffer("sin_SD", table.clone(), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the tables, which no state dict holds."""
        dtype, device = self.cos_SD.dtype, self.cos_SD.device
        exponents = torch.arange(0, self.size, 2, dtype=dtype, device=device) / self.size
        positions = torch.arange(self.cos_SD.shape[0], dtype=dtype, device=device)
        angles = torch.outer(positions, self.rope_theta**-exponents)
        with writable(self, "cos_SD", "sin_SD") as (cos_SD, sin_SD):
            cos_SD.copy_(angles.cos())
            sin_SD.copy_(angles.sin())

    def forward(self, heads_BSHD: Tensor) -> Tensor:
        """The heads with their positions, contiguous; computed in their own dtype."""
        length, dtype = heads_BSHD.shape[1], heads_BSHD.dtype
        cos, sin = (table[:length, None].to(dtype) for table in (self.cos_SD, self.sin_SD))
        first, second = heads_BSHD.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(Sublayer):
    """Norm and causal multi-head attention with rotary positions, [B, S, C] -> [B, S, C]."""

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        inner = config.num_heads * config.head_size
        self.head_size = config.head_size
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.project_in = nn.Linear(config.hidden_size, 3 * inner, bias=False)
        self.project_out = nn.Linear(inner, config.hidden_size, bias=False)
        self.rotary = Rotary(config.head_size, config)

    def forward(self, hidden: Tensor) -> Tensor:
        """Attend to the same and earlier positions."""
        heads = self.project_in(self.norm(hidden)).unflatten(-1, (3, -1, self.head_size))
        query_BSHD, key_BSHD, value_BSHD = heads.unbind(2)
        attended_BHSD = F.scaled_dot_product_attention(
            self.rotary(query_BSHD).transpose(1, 2),
            self.rotary(key_BSHD).transpose(1, 2),
            value_BSHD.transpose(1, 2),
            is_causal=True,
        )
        return self.project_out(attended_BHSD.transpose(1, 2).flatten(-2))


class SwiGLU(Sublayer):
    """`project_out(silu(gate) * up)`, [..., C] -> [..., C], inside of width ffn_size."""

    def __init__(self, hidden_size: int, ffn_size: int):
        super().__init__()
        self.project_in = nn.Linear(hidden_size, 2 * ffn_size, bias=False)
        self.project_out = nn.Linear(ffn_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply it."""
        gate, up = self.project_in(hidden).chunk(2, dim=-1)
        return self.project_out(F.silu(gate) * up)


class FeedForward(SwiGLU):
    """Norm and SwiGLU, [..., C] -> [..., C]."""

    def __init__(self, config: "ModelConfig"):
        super().__init__(config.hidden_size, config.ffn_size)
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """`project_out(silu(gate) * up)` of the normalised input."""
        return super().forward(self.norm(hidden))

"""Multi-head latent attention (MLA) for training: keys and values are materialised.

`latent, key_rope = W_down hidden`; head h has the key `[W_key[h] norm(latent) | rotary(key_rope)]`,
the query `[query | rotary(query_rope)]` and the value `W_value[h] norm(latent)`. All heads share
the rotated key. The rotation pairs channel i with channel i + size / 2; DeepSeek-V3 pairs
neighbours, so its weights have another order.

Axes: B batch, S sequence, C hidden size, H heads, D head size.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..nn._parameters import while_tracing
from .layers import RMSNorm, Rotary, Sublayer

if TYPE_CHECKING:
    from .configs import ModelConfig

# torch prefers cuDNN's attention to flash attention from this version on.
_CUDNN = 91501


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention in place of multi-head attention.

    The model's head_size is the width of values, and of the unrotated part of queries and keys.

    Args:
        kv_rank: width of the latent that keys and values are computed from; at least 1.
        rope_size: rotated channels of queries and of the one shared key; even.
        query_rank: width of a latent for the queries; None to project them in one step.

    Raises:
        TypeError: A count is not an int.
        ValueError: A value is out of range; the message names it.

    Example:
        >>> MLAConfig().kv_rank
        512
    """

    kv_rank: int = 512
    rope_size: int = 64
    query_rank: int | None = None

    def __post_init__(self) -> None:
        """Reject what no layer could have."""
        _checks.fields(self)
        if self.rope_size % 2:
            raise ValueError(f"MLAConfig: rope_size must be even, got {self.rope_size}")


class LatentAttention(Sublayer):
    """Norm and causal multi-head latent attention, [B, S, C] -> [B, S, C].

    Queries and keys have head_size + rope_size channels, values head_size. cuDNN's attention, which
    torch prefers on Hopper and on data centre Blackwell, accepts such heads. Flash attention does
    not: where torch would choose it (other GPUs, an older cuDNN), values are padded with zeros to
    the width of the keys. The results are the same. A configuration without `mla` is a ValueError.
    """

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        mla, heads, size = config.mla, config.num_heads, config.head_size
        if mla is None:
            raise ValueError("LatentAttention: config.mla must be an MLAConfig, got None")
        wide = heads * (size + mla.rope_size)
        self.head_size, self.rope_size = size, mla.rope_size
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        # One product for what reads the hidden state.
        self.widths = [mla.query_rank or wide, mla.kv_rank, mla.rope_size]
        self.project_in = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
        self.project_query: nn.Module = nn.Identity()
        if mla.query_rank is not None:
            norm = RMSNorm(mla.query_rank, eps=config.norm_eps)
            self.project_query = nn.Sequential(norm, nn.Linear(mla.query_rank, wide, bias=False))
        self.latent_norm = RMSNorm(mla.kv_rank, eps=config.norm_eps)
        self.project_latent = nn.Linear(mla.kv_rank, 2 * heads * size, bias=False)
        self.project_out = nn.Linear(heads * size, config.hidden_size, bias=False)
        self.rotary = Rotary(mla.rope_size, config)

    def forward(self, hidden: Tensor) -> Tensor:
        """Attend to the same and earlier positions."""
        size, rope_size = self.head_size, self.rope_size
        query, latent, key_rope = self.project_in(self.norm(hidden)).split(self.widths, dim=-1)
        query_BSHD = self.project_query(query).unflatten(-1, (-1, size + rope_size))
        heads_BSHD = self.project_latent(self.latent_norm(latent)).unflatten(-1, (-1, 2 * size))
        query_BSHD, query_rope = query_BSHD.split([size, rope_size], dim=-1)
        key_BSHD, value_BSHD = heads_BSHD.split([size, size], dim=-1)
        key_rope = self.rotary(key_rope.unsqueeze(2)).expand(-1, -1, key_BSHD.shape[2], -1)
        attended_BSHD = attend(
            torch.cat([query_BSHD, self.rotary(query_rope)], dim=-1),
            torch.cat([key_BSHD, key_rope], dim=-1),
            value_BSHD,
            pad=hidden.is_cuda and not _fuses_unequal_heads(hidden.device.index),
        )
        return self.project_out(attended_BSHD.flatten(-2))


def attend(query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor, *, pad: bool) -> Tensor:
    """Causal attention scaled by 1 / sqrt(D), [B, S, H, V] from values with V at most D channels.

    `pad` fills the values with zeros to D channels during the product.
    """
    width = value_BSHD.shape[-1]
    if pad:
        value_BSHD = F.pad(value_BSHD, (0, key_BSHD.shape[-1] - width))
    heads = (query_BSHD.transpose(1, 2), key_BSHD.transpose(1, 2), value_BSHD.transpose(1, 2))
    attended_BHSD = F.scaled_dot_product_attention(*heads, is_causal=True)
    return attended_BHSD.transpose(1, 2)[..., :width]


@while_tracing
def _fuses_unequal_heads(index: int | None) -> bool:
    """Whether torch's fastest attention on this CUDA device takes values narrower than keys."""
    major = torch.cuda.get_device_capability(index)[0]
    return major == 10 or (major == 9 and (torch.backends.cudnn.version() or 0) >= _CUDNN)

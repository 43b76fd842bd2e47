"""Named sizes of the decoder: `ModelConfig`, the registry `CONFIGS` and `model_config`."""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder; how its sublayers are connected is a separate choice.

    Args:
        vocab_size: number of tokens; at least 1.
        hidden_size: C, the width of one residual stream; at least 1.
        num_layers: transformer layers, each of two sublayers (attention, FFN); at least 1.
        num_heads: attention heads; at least 1. num_heads * head_size need not equal hidden_size.
        head_size: width of a head; even, for the rotary pairs.
        ffn_size: inner width of the SwiGLU; at least 1.
        context_length: the longest sequence, in tokens; at least 1.
        rope_theta: base of the rotary frequencies; above 0.
        norm_eps: added to the mean of squares in every RMSNorm of the sublayers; at least 0.

    Raises:
        TypeError: A count is not an int.
        ValueError: A value is out of range; the message names it.

    Example:
        >>> ModelConfig(vocab_size=256, hidden_size=64, num_layers=2, num_heads=2, head_size=32,
        ...             ffn_size=128, context_length=64).rope_theta
        10000.0
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_size: int
    ffn_size: int
    context_length: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        """Reject what no decoder could have."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is not int:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"ModelConfig: {field.name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"ModelConfig: {field.name} must be at least 1, got {value}")
        if self.head_size % 2:
            raise ValueError(f"ModelConfig: head_size must be even, got {self.head_size}")
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 0):
            raise ValueError(
                f"ModelConfig: rope_theta must be finite and above 0, got {self.rope_theta}"
            )
        if not (math.isfinite(self.norm_eps) and self.norm_eps >= 0):
            raise ValueError(
                f"ModelConfig: norm_eps must be finite and at least 0, got {self.norm_eps}"
            )

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)


def _bytes(layers: int, hidden: int, heads: int, head: int, ffn: int, context: int) -> ModelConfig:
    return ModelConfig(256, hidden, layers, heads, head, ffn, context)


def _paper(layers: int, hidden: int, heads: int, expert_size: int) -> ModelConfig:
    # Dense: one FFN as wide as the eight experts (6 routed, 2 shared) a token activates, and plain
    # attention of the same heads where the paper has MLA.
    return ModelConfig(129280, hidden, layers, heads, 128, 8 * expert_size, 4096)


CONFIGS: dict[str, ModelConfig] = {
    "1m": _bytes(4, 128, 4, 32, 384, 256),
    "10m": _bytes(8, 320, 5, 64, 896, 512),
    "100m": _bytes(14, 768, 12, 64, 2048, 1024),
    "paper-3b-dense": _paper(12, 1280, 16, 896),
    "paper-9b-dense": _paper(18, 1920, 24, 1280),
    "paper-27b-dense": _paper(30, 2560, 32, 1536),
}
"""Every named configuration.

"1m", "10m" and "100m" read bytes and are called after their parameter count. The three "paper-"
configurations have the hidden sizes, depths, heads and vocabulary of the 3B, 9B and 27B models of
arXiv 2512.24880 (Table 5) but are DENSE stand-ins for those mixtures of experts: their parameter
counts (0.62B, 1.7B, 4.4B) are near the paper's ACTIVE counts, not its totals.
"""


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The named configuration, with some fields replaced.

    Args:
        name: a key of `CONFIGS`.
        overrides: fields of `ModelConfig` to change.

    Returns:
        The configuration.

    Raises:
        ValueError: No configuration has this name (the message suggests the nearest), or an
            override is out of range.

    Example:
        >>> model_config("1m", context_length=64).hidden_size
        128
    """
    if name not in CONFIGS:
        near = difflib.get_close_matches(str(name).lower(), CONFIGS, n=1, cutoff=0.0)
        raise ValueError(
            f"model_config: name must be one of {list(CONFIGS)}, got {name!r}; "
            f"did you mean {near[0]!r}?"
        )
    return CONFIGS[name].replace(**overrides)

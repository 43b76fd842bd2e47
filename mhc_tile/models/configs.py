"""The shape of a decoder (`ModelConfig`), which parts it has, and its named configurations."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from .. import _checks
from .layers import Attention, FeedForward
from .mla import LatentAttention, MLAConfig
from .moe import MixtureOfExperts, MoEConfig


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder; how its sublayers are connected is a separate choice.

    Args:
        vocab_size: number of tokens; at least 1.
        hidden_size: C, the width of one residual stream; at least 1.
        num_layers: transformer layers, each of two sublayers (attention, FFN); at least 1.
        num_heads: attention heads; at least 1. num_heads * head_size need not equal hidden_size.
        head_size: width of a head; even, for the rotary pairs.
        ffn_size: inner width of the dense SwiGLU; at least 1.
        context_length: the longest sequence, in tokens; at least 1.
        rope_theta: base of the rotary frequencies; above 0.
        norm_eps: added to the mean of squares in every RMSNorm of the sublayers; at least 0.
        moe: mixture of experts in place of the dense FFN; None for none.
        mla: multi-head latent attention in place of multi-head attention; None for none.

    Raises:
        TypeError: A count is not an int, another constant not a number, or a part of another class.
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
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None

    def __post_init__(self) -> None:
        """Reject what no decoder could have."""
        _checks.fields(self, above_0=("rope_theta",))
        if self.head_size % 2:
            raise ValueError(f"ModelConfig: head_size must be even, got {self.head_size}")

    def attention(self) -> nn.Module:
        """A new attention sublayer."""
        return Attention(self) if self.mla is None else LatentAttention(self)

    def feed_forward(self, layer: int) -> nn.Module:
        """The new FFN sublayer of a layer, counted from 0."""
        if self.moe is None or layer < self.moe.leading_dense_layers:
            return FeedForward(self)
        return MixtureOfExperts(self)

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed, validated again.

        A dict for a part (`moe`, `mla`) changes some fields of that part, which must not be None.
        """
        for name, value in changes.items():
            if name in _parts() and isinstance(value, dict):
                if getattr(self, name) is None:
                    raise ValueError(
                        f"ModelConfig: {name} must be set to change fields of it, got None"
                    )
                changes[name] = dataclasses.replace(getattr(self, name), **value)
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The configuration that `dataclasses.asdict` wrote."""
        parts = {name: kind(**values[name]) for name, kind in _parts().items() if values.get(name)}
        return cls(**{**values, **parts})


def _parts() -> dict[str, Any]:
    """The class of each field that may be None."""
    fields = dataclasses.fields(ModelConfig)
    return {field.name: get_args(field.type)[0] for field in fields if get_args(field.type)}


def _bytes(layers: int, hidden: int, heads: int, head: int, ffn: int, context: int) -> ModelConfig:
    return ModelConfig(256, hidden, layers, heads, head, ffn, context)


def _dense(layers: int, hidden: int, heads: int, expert_size: int) -> ModelConfig:
    # One FFN as wide as the eight experts (6 routed, 2 shared) a token activates, and plain
    # attention of the same heads where the paper has MLA.
    return ModelConfig(129280, hidden, layers, heads, 128, 8 * expert_size, 4096)


def _paper(layers: int, hidden: int, heads: int, experts: int, expert_size: int) -> ModelConfig:
    return _dense(layers, hidden, heads, expert_size).replace(
        norm_eps=1e-20, moe=MoEConfig(experts, expert_size), mla=MLAConfig()
    )


CONFIGS: dict[str, ModelConfig] = {
    "1m": _bytes(4, 128, 4, 32, 384, 256),
    "10m": _bytes(8, 320, 5, 64, 896, 512),
    "100m": _bytes(14, 768, 12, 64, 2048, 1024),
    "300m": _bytes(24, 1024, 16, 64, 2688, 1024),
    "2m-moe": _bytes(4, 128, 4, 32, 384, 256).replace(
        moe=MoEConfig(8, 128, experts_per_token=2, shared_experts=1),
        mla=MLAConfig(kv_rank=64, rope_size=16),
    ),
    "paper-3b": _paper(12, 1280, 16, 64, 896),
    "paper-9b": _paper(18, 1920, 24, 64, 1280),
    "paper-27b": _paper(30, 2560, 32, 72, 1536),
    "paper-3b-dense": _dense(12, 1280, 16, 896),
    "paper-9b-dense": _dense(18, 1920, 24, 1280),
    "paper-27b-dense": _dense(30, 2560, 32, 1536),
}
"""Every named configuration.

"1m", "10m", "100m", "300m" and "2m-moe" read bytes; the names are their parameter counts. A token
activates 0.9M parameters of "2m-moe".

"paper-3b", "paper-9b" and "paper-27b" are the models of arXiv 2512.24880 (Table 5): latent
attention, a dense first layer, then mixtures of experts. Their output heads are tied to the
embedding; the paper's totals count a separate head.

The "-dense" ones have the same hidden sizes, depths, heads and vocabulary, plain attention, and one
dense FFN as wide as the experts that a token activates. Their parameter counts are near the active
counts of the paper's models.
"""


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The named configuration, with some fields replaced.

    Args:
        name: a key of `CONFIGS`.
        overrides: fields of `ModelConfig` to change, as for `ModelConfig.replace`.

    Raises:
        ValueError: No configuration has this name (the message suggests the nearest), or an
            override is out of range.

    Example:
        >>> model_config("1m", context_length=64).hidden_size
        128

        Two layers of the 27B, both with experts:

        >>> model_config("paper-27b", num_layers=2, moe={"leading_dense_layers": 0}).moe.num_experts
        72
    """
    if name not in CONFIGS:
        near = difflib.get_close_matches(str(name).lower(), CONFIGS, n=1, cutoff=0.0)
        raise ValueError(
            f"model_config: name must be one of {list(CONFIGS)}, got {name!r}; "
            f"did you mean {near[0]!r}?"
        )
    return CONFIGS[name].replace(**overrides)

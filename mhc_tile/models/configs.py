"""Named sizes of the decoder: `ModelConfig` and its parts, `CONFIGS` and `model_config`."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from ..config import check_count, check_number

# torch's grouped matmul takes fewer than 1024 groups.
_MOST_EXPERTS = 1023


@dataclass(frozen=True)
class MoEConfig:
    """Experts in place of the dense FFN (`mhc_tile.models.moe`).

    Args:
        num_experts: routed experts of a layer; 1 to 1023.
        experts_per_token: how many of them a token takes; 1 to num_experts.
        shared_experts: experts that every token takes, computed as one; at least 0.
        expert_ffn_size: inner width of one expert; at least 1.
        leading_dense_layers: layers before the first mixture, with the dense FFN of ffn_size; at
            least 0.
        balance_rate: step of the bias that balances the experts' load; at least 0.

    Raises:
        TypeError: A count is not an int, or balance_rate not a number.
        ValueError: A value is out of range; the message names it.

    Example:
        >>> MoEConfig(num_experts=64, expert_ffn_size=896).experts_per_token
        6
    """

    num_experts: int
    expert_ffn_size: int
    experts_per_token: int = 6
    shared_experts: int = 2
    leading_dense_layers: int = 1
    balance_rate: float = 1e-3

    def __post_init__(self) -> None:
        """Reject what no layer could have."""
        _check_counts(self, at_least_0=("shared_experts", "leading_dense_layers"))
        if self.num_experts > _MOST_EXPERTS:
            raise ValueError(
                f"MoEConfig: num_experts must be at most {_MOST_EXPERTS}, got {self.num_experts}"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"MoEConfig: experts_per_token must be at most num_experts {self.num_experts}, "
                f"got {self.experts_per_token}"
            )
        check_number(self, "balance_rate")


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention in place of multi-head attention (`mhc_tile.models.mla`).

    The heads' own channels of queries, keys and values are the model's head_size.

    Args:
        kv_rank: width of the latent that keys and values are made from; at least 1.
        rope_size: channels of queries and of the one shared key that carry the position; even.
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
        _check_counts(self)
        if self.query_rank is not None:
            check_count(self, "query_rank")
        if self.rope_size % 2:
            raise ValueError(f"MLAConfig: rope_size must be even, got {self.rope_size}")


def _check_counts(config: Any, at_least_0: tuple[str, ...] = ()) -> None:
    """Check every field that is declared as an int."""
    for field in dataclasses.fields(config):
        if field.type is int:
            check_count(config, field.name, 0 if field.name in at_least_0 else 1)


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
        _check_counts(self)
        if self.head_size % 2:
            raise ValueError(f"ModelConfig: head_size must be even, got {self.head_size}")
        check_number(self, "rope_theta", positive=True)
        check_number(self, "norm_eps")
        for name, kind in _PARTS.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise TypeError(
                    f"ModelConfig: {name} must be of {kind.__name__} or None, got {value!r}"
                )

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed, validated again.

        A dict as `moe` or `mla` changes some fields of that part.

        Raises:
            ValueError: The dict is for a part that is None.
        """
        for name in _PARTS:
            if isinstance(changes.get(name), dict):
                part = getattr(self, name)
                if part is None:
                    raise ValueError(
                        f"ModelConfig: {name} must be set to change fields of it, got None"
                    )
                changes[name] = dataclasses.replace(part, **changes[name])
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The configuration that `dataclasses.asdict` wrote."""
        parts = {name: kind(**values[name]) for name, kind in _PARTS.items() if values.get(name)}
        return cls(**{**values, **parts})


_PARTS: dict[str, Any] = {"moe": MoEConfig, "mla": MLAConfig}


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

"1m", "10m", "100m" and "2m-moe" read bytes and are called after their parameter count; of the last,
a token meets 0.9M.

"paper-3b", "paper-9b" and "paper-27b" are the models of arXiv 2512.24880 (Table 5): latent
attention, a dense first layer, then mixtures of experts. With mHC they have 2.81B, 8.93B and 26.7B
parameters, of which a token meets 612M, 1.66B and 4.14B. The paper's totals, 2.97B, 9.18B and
27.0B, are these with a head of its own instead of one that is tied to the embedding; its active
counts are ours.

The three "-dense" ones have the same hidden sizes, depths, heads and vocabulary, but plain
attention and one dense FFN as wide as the experts that a token takes: their parameter counts
(0.62B, 1.7B, 4.4B) are near the paper's ACTIVE counts, not its totals.
"""


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The named configuration, with some fields replaced.

    Args:
        name: a key of `CONFIGS`.
        overrides: fields of `ModelConfig` to change, as for `ModelConfig.replace`.

    Returns:
        The configuration.

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

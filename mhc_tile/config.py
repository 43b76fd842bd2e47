"""The constants of one mHC layer: `MHCConfig` and its presets."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from . import _checks


@dataclass(frozen=True)
class MHCConfig:
    """Constants of the mHC mapping (arXiv 2512.24880, eqs. 7-9 and 14-19).

    Args:
        num_streams: n, the number of residual streams; at least 1.
        norm_eps: added to the mean of squares before the root; at least 0.
        pre_eps: added to h_pre after the sigmoid; at least 0.
        post_scale: h_post = post_scale * sigmoid(logits); above 0.
        iters: Sinkhorn iterations, each of columns then rows; at least 1.
        sinkhorn_eps: added to the entries after the first exponential and to every denominator of
            the Sinkhorn iteration; at least 0.
        init: how `mhc_tile.nn.ManifoldHyperConnection` starts phi, alpha and bias: "paper" (gates
            of 0.01) or "residual" (the network starts as the plain residual network).

    Raises:
        TypeError: A count is not an int, or another constant not a number.
        ValueError: A value is out of range; the message names it.

    Example:
        >>> MHCConfig.paper().norm_eps
        1e-20
        >>> MHCConfig.deepseek_v4(num_streams=2).sinkhorn_eps
        1e-06
    """

    num_streams: int = 4
    norm_eps: float = 1e-20
    pre_eps: float = 0.0
    post_scale: float = 2.0
    iters: int = 20
    sinkhorn_eps: float = 0.0
    init: Literal["paper", "residual"] = "paper"

    def __post_init__(self) -> None:
        """Reject what no layer could compute."""
        _checks.fields(self, above_0=("post_scale",))

    @classmethod
    def paper(cls, **overrides: Any) -> "MHCConfig":
        """The paper's constants: norm_eps 1e-20, no other epsilon, 20 iterations."""
        return cls(**overrides)

    @classmethod
    def deepseek_v4(cls, *, norm_eps: float = 1e-6, **overrides: Any) -> "MHCConfig":
        """DeepSeek-V4's constants: pre_eps and sinkhorn_eps 1e-6; norm_eps is the model's own."""
        constants = {"norm_eps": norm_eps, "pre_eps": 1e-6, "sinkhorn_eps": 1e-6}
        return cls(**{**constants, **overrides})

    def replace(self, **changes: Any) -> "MHCConfig":
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)


CONSTANTS = tuple(
    each.name for each in dataclasses.fields(MHCConfig) if each.name not in ("num_streams", "init")
)
"""The fields that `pre`, `boundary` and `sublayer` take by the same names."""

"""The constants of one mHC layer: `MHCConfig` and its presets."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from . import _checks

INITS = ("paper", "residual")


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
    init: str = "paper"

    def __post_init__(self) -> None:
        """Reject what no layer could compute."""
        for name in ("num_streams", "iters"):
            check_count(self, name)
        for name in ("norm_eps", "pre_eps", "sinkhorn_eps"):
            check_number(self, name)
        check_number(self, "post_scale", positive=True)
        if self.init not in INITS:
            raise ValueError(f"MHCConfig: init must be one of {list(INITS)}, got {self.init!r}")
        object.__setattr__(self, "init", str.__str__(self.init))

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


def check_count(config: Any, name: str, minimum: int = 1) -> None:
    """Check a field of a frozen dataclass that counts; NumPy's integers become Python's.

    Raises:
        TypeError: It is not an int.
        ValueError: It is below the minimum.
    """
    kind, value = type(config).__name__, getattr(config, name)
    whole = _checks.as_int(value)
    if whole is None:
        raise TypeError(f"{kind}: {name} must be an int, got {value!r}")
    if whole < minimum:
        raise ValueError(f"{kind}: {name} must be at least {minimum}, got {value}")
    if whole >= 2**63:
        raise ValueError(f"{kind}: {name} must be below 2**63, got {value}")
    object.__setattr__(config, name, whole)


def check_number(config: Any, name: str, *, positive: bool = False) -> None:
    """Check a field of a frozen dataclass that is at least 0, or above it; NumPy's become floats.

    Raises:
        TypeError: It is not a number.
        ValueError: It is out of range or not finite.
    """
    kind, value = type(config).__name__, getattr(config, name)
    number = _checks.as_number(value)
    if number is None:
        rule = "a number above 0" if positive else "a number of at least 0"
        raise TypeError(f"{kind}: {name} must be {rule}, got {value!r}")
    if not (math.isfinite(number) and (number > 0 if positive else number >= 0)):
        rule = "above 0" if positive else "at least 0"
        raise ValueError(f"{kind}: {name} must be finite and {rule}, got {value}")
    object.__setattr__(config, name, number)

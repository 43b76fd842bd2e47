"""What modules with a mapping share: its parameters are made, started and kept in float32."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import MHCConfig

# sigmoid(40) is 1 to the last bit of float64.
_SATURATED = 40.0
# exp(4) : 1 puts 0.95 on the diagonal of a 4 x 4 h_res: streams stay apart and Sinkhorn's gradient
# is alive.
_DIAGONAL = 4.0


def parameter(*shape: int, device: torch.device | str | None) -> nn.Parameter:
    """An uninitialised parameter of a mapping: float32, or float64 where that is the default."""
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


def logit(probability: float) -> float:
    """Inverse of the sigmoid, saturated where the sigmoid of a float64 is 0 or 1."""
    if not 0 < probability < 1:
        return math.copysign(_SATURATED, probability - 0.5)
    return math.log(probability / (1 - probability))


def start_mapping(phi: Tensor, alpha: Tensor, bias: Tensor, config: MHCConfig) -> None:
    """Initialise a sublayer's mapping in place, as `ManifoldHyperConnection` documents.

    Raises:
        ValueError: init is "residual" and post_scale is too small for h_post = 1.
    """
    n = config.num_streams
    _start_projection(phi, alpha, config)
    nn.init.zeros_(bias)
    if config.init == "residual":
        if config.post_scale <= 1:
            raise ValueError(
                "MHCConfig: post_scale must be above 1 where init is 'residual', "
                f"got {config.post_scale}"
            )
        with torch.no_grad():
            bias[:n] = logit(1 / n - config.pre_eps)
            bias[n : 2 * n] = logit(1 / config.post_scale)
            bias[2 * n :] = _DIAGONAL * torch.eye(n).flatten()


def start_head(phi: Tensor, alpha: Tensor, bias: Tensor, config: MHCConfig) -> None:
    """Initialise a learned exit in place: the mean of the streams where init is "residual"."""
    _start_projection(phi, alpha, config)
    nn.init.zeros_(bias)
    if config.init == "residual":
        nn.init.constant_(bias, logit(1 / config.num_streams - config.pre_eps))


def _start_projection(phi: Tensor, alpha: Tensor, config: MHCConfig) -> None:
    nn.init.normal_(phi, std=phi.shape[-1] ** -0.5)
    nn.init.constant_(alpha, 0.01 if config.init == "paper" else 0.0)


class MappingModule(nn.Module):
    """A module whose own parameters stay float32 when a model is cast to bf16 or fp16.

    `model.to(torch.bfloat16)` and `model.half()` cast what the module wraps, and move its own
    parameters without rounding them: maps are computed in float32 whatever the model's dtype.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MappingModule":
        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype in (torch.bfloat16, torch.float16):
                return tensor.to(device=result.device, dtype=torch.float32)
            return result

        if recurse:
            for child in self.children():
                child._apply(fn)
        super()._apply(keep_precision, recurse=False)
        return self

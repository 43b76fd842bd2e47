"""Parameters of a mapping: made, initialised, kept and read in float32."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import _checks
from .._library import while_tracing
from ..config import MHCConfig
from ..reference import compute_dtype
from ._arguments import check_config

_HALVES = frozenset({torch.bfloat16, torch.float16})

# sigmoid(40) is 1 to the last bit of float64.
_SATURATED = 40.0
# exp(4) : 1 puts 0.95 on the diagonal of a 4 x 4 h_res: streams stay apart and Sinkhorn's gradient
# is alive.
_DIAGONAL = 4.0


def parameter(*shape: int, device: torch.device | str | None) -> nn.Parameter:
    """An uninitialised parameter of a mapping, of `wide_dtype`."""
    return nn.Parameter(torch.empty(shape, device=device, dtype=wide_dtype()))


def wide_dtype() -> torch.dtype:
    """The dtype of new parameters: float32, or float64 where that is torch's default."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def parameters_without_weight_decay(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that an optimizer should not decay: those of less than two dims.

    Among them are alpha and bias of every connection and head. The bias is the static mapping:
    its decay would pull h_res to the uniform matrix (to zero for `HyperConnection`) against the
    data. The weights of norms and the biases of layers belong to them too. phi and theta are
    matrices and decay.

    Args:
        module: a connection, a stack or a whole model.

    Returns:
        The parameters, each once, in the order of `module.parameters()`.

    Example:
        >>> from mhc_tile import ManifoldHyperConnection
        >>> block = ManifoldHyperConnection(torch.nn.Linear(8, 8, bias=False), 8)
        >>> spared = set(parameters_without_weight_decay(block))
        >>> [name for name, parameter in block.named_parameters() if parameter in spared]
        ['alpha', 'bias']
        >>> decayed = [parameter for parameter in block.parameters() if parameter not in spared]
        >>> groups = [{"params": decayed}, {"params": list(spared), "weight_decay": 0.0}]
        >>> optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    """
    return [parameter for parameter in module.parameters() if parameter.dim() < 2]


@contextmanager
def writable(module: nn.Module, *names: str) -> Iterator[tuple[Tensor, ...]]:
    """Plain tensors to write in place of a module's parameters or buffers.

    Where FSDP2 leaves a process its shards, every process has to enter, and rank 0's values are
    kept: they are those that one process without shards would have. A parametrized one is set
    through its parametrization. One that a hook computes in every call, as of
    `torch.nn.utils.prune`, is a ValueError.
    """
    with torch.no_grad():
        tensors = [getattr(module, name) for name in names]
        owned = [name in module._parameters or name in module._buffers for name in names]
        for name, own in zip(names, owned, strict=True):
            if not own and name not in getattr(module, "parametrizations", ()):
                raise ValueError(
                    f"{type(module).__name__}: {name} must be a parameter to be written, got a "
                    "tensor that a hook computes; remove torch.nn.utils' weight_norm or prune first"
                )
        plain = tuple(
            torch.empty(t.shape, dtype=t.dtype, device=t.device) if _is_sharded(t) or not own else t
            for t, own in zip(tensors, owned, strict=True)
        )
        yield plain
        for name, tensor, values in zip(names, tensors, plain, strict=True):
            if values is tensor or values.is_meta:
                continue
            if _is_sharded(tensor):
                from torch.distributed.tensor import distribute_tensor

                mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
                values = distribute_tensor(values, mesh, placements)
            if name in getattr(module, "parametrizations", ()):
                setattr(module, name, values)
            else:
                tensor.copy_(values)


def gathered(tensor: Tensor) -> Tensor:
    """A tensor as one plain tensor; where it is a DTensor, every process has to call."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose class is slow to import."""
    return hasattr(tensor, "placements") and hasattr(tensor, "full_tensor")


def logit(probability: float) -> float:
    """Inverse of the sigmoid, saturated where the sigmoid of a float64 is 0 or 1."""
    if not 0 < probability < 1:
        return math.copysign(_SATURATED, probability - 0.5)
    return math.log(probability / (1 - probability))


def identity(n: int, like: Tensor) -> Tensor:
    """The n x n identity, flat, in the dtype and on the device of another tensor."""
    return torch.eye(n, dtype=like.dtype, device=like.device).flatten()


def start_projection(phi: Tensor, alpha: Tensor, bias: Tensor, config: MHCConfig) -> None:
    """Initialise a projection and its gates in place, with a bias of zeros."""
    nn.init.normal_(phi, std=phi.shape[-1] ** -0.5)
    nn.init.constant_(alpha, 0.01 if config.init == "paper" else 0.0)
    nn.init.zeros_(bias)


def start_mapping(phi: Tensor, alpha: Tensor, bias: Tensor, config: MHCConfig) -> None:
    """Initialise a sublayer's mapping in place, as `ManifoldHyperConnection` documents."""
    n = config.num_streams
    start_projection(phi, alpha, bias, config)
    if config.init == "residual":
        if config.post_scale <= 1:
            raise ValueError(
                "MHCConfig: post_scale must be above 1 where init is 'residual', "
                f"got {config.post_scale}"
            )
        bias[:n] = logit(1 / n - config.pre_eps)
        bias[n : 2 * n] = logit(1 / config.post_scale)
        bias[2 * n :] = _DIAGONAL * identity(n, bias)


@while_tracing
def _warn_of_rounding(kind: str) -> None:
    warnings.warn(
        f"{kind}: its own parameters must be float32, got some rounded to 16 bits: maps are "
        "computed in float32 from the rounded values. Leave these parameters out of FSDP2's "
        "mp_policy, and load states that hold them in float32.",
        stacklevel=1,
    )


class MappingModule(nn.Module):
    """A module whose own parameters and buffers stay float32 when a model is cast to bf16 or fp16.

    `model.to(torch.bfloat16)` and `model.half()` cast what the module wraps, and move its own
    parameters without rounding them, parametrized ones too. Parameters that were rounded in another
    way are read in float32.
    """

    _warned = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MappingModule":
        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype in _HALVES:
                return tensor.to(device=result.device, dtype=torch.float32)
            return result

        if recurse:
            for name, child in self.named_children():
                child._apply(keep_precision if name == "parametrizations" else fn)
        super()._apply(keep_precision, recurse=False)
        return self

    def read(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Own parameters as maps need them: rounded ones in float32 (float64 where x is).

        FSDP2 in bf16, `load_state_dict(assign=True)` of a bf16 state and `parameter.data = ...`
        round them; the first time, a warning says so.
        """
        for parameter in parameters:
            if parameter.dtype in _HALVES:
                break
        else:
            return parameters
        if torch.compiler.is_compiling():  # an attribute that changes would compile again
            _warn_of_rounding(type(self).__name__)
        elif not self._warned:
            self._warned = True
            _warn_of_rounding(type(self).__name__)
        dtype = compute_dtype(x)
        return tuple(p.to(dtype) if p.dtype in _HALVES else p for p in parameters)


class StreamsModule(MappingModule):
    """A module whose mapping reads the residual streams [..., n, C]."""

    def __init__(self, hidden_size: int, config: MHCConfig | None) -> None:
        super().__init__()
        kind = type(self).__name__
        self.hidden_size = _checks.whole(kind, "hidden_size", hidden_size)
        self.config = check_config(kind, config)

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"hidden_size={self.hidden_size}, num_streams={self.config.num_streams}"

    def check_input(self, x: Tensor) -> None:
        """Check that x has as many streams, of the same size, as the parameters are for."""
        sizes = (self.config.num_streams, self.hidden_size)
        if isinstance(x, Tensor) and x.shape[-2:] != sizes:
            raise ValueError(
                f"{type(self).__name__}: x must have shape [..., {sizes[0]}, {sizes[1]}], "
                f"got {list(x.shape)}"
            )
        _checks.streams(type(self).__name__, x)

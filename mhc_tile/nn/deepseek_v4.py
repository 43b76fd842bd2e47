"""DeepSeek-V4's parameters, in and out.

V4 stores a mapping as fn [n*n + 2n, n*C], base [n*n + 2n] and scale [3]: the same numbers as phi,
bias and alpha, but that it packs the mixing [in, out] where h_res is [out, in]. So the last n*n
rows are permuted and nothing else. The exit (fn [n, n*C], base [n], scale [1]) is stored alike.
"""

import torch
from torch import Tensor

from .. import _checks
from ._parameters import gathered, writable
from .connections import ManifoldHyperConnection
from .streams import Head


def _swap_in_out(packed: Tensor, num_streams: int) -> Tensor:
    """Swap in and out of the last n*n rows; its own inverse."""
    rows = torch.arange(packed.shape[0], device=packed.device)
    mixing = rows[2 * num_streams :].reshape(num_streams, num_streams)
    return packed[torch.cat([rows[: 2 * num_streams], mixing.t().flatten()])]


def load_deepseek_v4(
    module: ManifoldHyperConnection | Head, fn: Tensor, base: Tensor, scale: Tensor
) -> None:
    """Copy one V4 mapping (`hc_attn_*`, `hc_ffn_*`) or exit (`hc_head_*`) into a module.

    Use it with `MHCConfig.deepseek_v4(norm_eps=...)`, the model's own rms_norm_eps. Where FSDP2
    has sharded the module, every process calls it, and the tensors of rank 0 are loaded.

    Args:
        module: the connection or head to fill.
        fn: shape of module.phi. The projection, mixing rows packed [in, out].
        base: shape of module.bias.
        scale: shape of module.alpha.

    Raises:
        TypeError: module is neither a ManifoldHyperConnection nor a Head, or another argument is
            not a tensor.
        ValueError: A shape differs from the module's; nothing was copied.

    Example:
        >>> head = Head(8)
        >>> load_deepseek_v4(head, torch.randn(4, 32), torch.zeros(4), torch.ones(1))
    """
    pairs = {"fn": (fn, "phi"), "base": (base, "bias"), "scale": (scale, "alpha")}
    _check_kind("load_deepseek_v4", module)
    for name, (value, parameter) in pairs.items():
        _checks.is_tensor("load_deepseek_v4", name, value)
        shape = getattr(module, parameter).shape
        if value.shape != shape:
            raise ValueError(
                f"load_deepseek_v4: {name} must have shape {list(shape)} to match "
                f"{parameter}, got {list(value.shape)}"
            )
    if any(getattr(module, parameter).is_meta for _, parameter in pairs.values()):
        raise ValueError(
            "load_deepseek_v4: module must have memory, got one on the meta device; call "
            "module.to_empty(device=...) first"
        )
    for value, parameter in pairs.values():
        with writable(module, parameter) as (own,):
            own.copy_(_permuted(module, parameter, gathered(value)))


def export_deepseek_v4(module: ManifoldHyperConnection | Head) -> dict[str, Tensor]:
    """The inverse of `load_deepseek_v4`: copies of the module's parameters as fn, base and scale.

    Where FSDP2 has sharded the module, every process calls it and gets the whole tensors.

    Returns:
        fn, base and scale by name, in the module's dtype, detached.

    Raises:
        TypeError: module is neither a ManifoldHyperConnection nor a Head.

    Example:
        >>> sorted(export_deepseek_v4(Head(8)))
        ['base', 'fn', 'scale']
    """
    _check_kind("export_deepseek_v4", module)
    names = {"fn": "phi", "base": "bias", "scale": "alpha"}
    return {
        name: _permuted(module, parameter, gathered(getattr(module, parameter).detach())).clone()
        for name, parameter in names.items()
    }


def _permuted(module: ManifoldHyperConnection | Head, parameter: str, value: Tensor) -> Tensor:
    if parameter == "alpha" or isinstance(module, Head):
        return value
    return _swap_in_out(value, module.config.num_streams)


def _check_kind(op: str, module: object) -> None:
    if not isinstance(module, ManifoldHyperConnection | Head):
        raise TypeError(
            f"{op}: module must be a ManifoldHyperConnection or a Head, got {type(module).__name__}"
        )

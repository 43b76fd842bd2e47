"""DeepSeek-V4's parameters, in and out.

V4 stores a mapping as fn [n*n + 2n, n*C], base [n*n + 2n] and scale [3]: the numbers of phi, bias
and alpha, but the mixing is packed [in, out] where h_res is [out, in]. So the last n*n rows are
permuted and nothing else. The exit (fn [n, n*C], base [n], scale [1]) is stored alike.
"""

import torch
from torch import Tensor

from .. import _checks
from ._parameters import gathered, writable
from .connections import ManifoldHyperConnection
from .streams import Head

_NAMES = {"fn": "phi", "base": "bias", "scale": "alpha"}


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
    given = {"fn": fn, "base": base, "scale": scale}
    own = _parameters("load_deepseek_v4", module)
    for name, value in given.items():
        _checks.is_tensor("load_deepseek_v4", name, value)
        if value.shape != own[name].shape:
            raise ValueError(
                f"load_deepseek_v4: {name} must have shape {list(own[name].shape)} to match "
                f"{_NAMES[name]}, got {list(value.shape)}"
            )
    if any(parameter.is_meta for parameter in own.values()):
        raise ValueError(
            "load_deepseek_v4: module must have memory, got one on the meta device; call "
            "module.to_empty(device=...) first"
        )
    for name, value in given.items():
        with writable(module, _NAMES[name]) as (plain,):
            plain.copy_(_permuted(module, name, gathered(value)))


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
    return {
        name: _permuted(module, name, gathered(parameter.detach())).clone()
        for name, parameter in _parameters("export_deepseek_v4", module).items()
    }


def _permuted(module: ManifoldHyperConnection | Head, name: str, value: Tensor) -> Tensor:
    """Swap in and out of the last n*n rows of a mapping; its own inverse."""
    if name == "scale" or isinstance(module, Head):
        return value
    n = module.config.num_streams
    rows = torch.arange(value.shape[0], device=value.device)
    return value[torch.cat([rows[: 2 * n], rows[2 * n :].reshape(n, n).t().flatten()])]


def _parameters(op: str, module: ManifoldHyperConnection | Head) -> dict[str, Tensor]:
    """The module's parameters by V4's names."""
    if not isinstance(module, ManifoldHyperConnection | Head):
        raise TypeError(
            f"{op}: module must be a ManifoldHyperConnection or a Head, got {type(module).__name__}"
        )
    return {name: getattr(module, own) for name, own in _NAMES.items()}

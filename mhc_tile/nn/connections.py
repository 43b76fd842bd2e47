"""The three ways to connect a layer: mHC, Hyper-Connections, plain residual."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks, ops, reference
from .._autocast import without_autocast
from ..config import CONSTANTS, MHCConfig
from ..ops import OpenSublayer
from ._arguments import check_module, check_output, join_extras, split_extras
from ._parameters import StreamsModule, identity, parameter, start_mapping, writable


class Connection(StreamsModule):
    """What `ManifoldHyperConnection` and `HyperConnection` share."""

    def __init__(self, layer: nn.Module, hidden_size: int, config: MHCConfig | None) -> None:
        check_module(type(self).__name__, "layer", layer)
        super().__init__(hidden_size, config)
        self.layer = layer
        self.tap = nn.Identity()

    def run_layer(self, layer_input: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped layer returns, its output in the dtype of the streams."""
        result = self.layer(layer_input, *args, **kwargs)
        return check_output(type(self).__name__, layer_input, result)


def close_by(h_res: Tensor, state: OpenSublayer, layer_output: Tensor) -> Tensor:
    """`mhc_tile.close_sublayer`, by another h_res if a hook on the tap has returned one."""
    if h_res is state.h_res:
        return ops.close_sublayer(state, layer_output)
    return ops.merge(state.x, layer_output, state.h_post, h_res)


class ManifoldHyperConnection(Connection):
    """mHC around a layer: `x_next = h_res x + h_post layer(h_pre x)` (eqs. 7-9 and 14-19).

    `layer_input[c] = sum_i h_pre[i] * x[i, c]`
    `x_next[o, c] = sum_i h_res[o, i] * x[i, c] + h_post[o] * layer(layer_input)[c]`

    Initialisations (`config.init`); phi is normal with variance 1 / (n*C) in both, so that
    projections have variance 1 for any C:

    - "paper": alpha = 0.01 as the paper says, bias = 0 (h_pre = 1/2, h_post = post_scale / 2,
      h_res = 1/n everywhere, up to what the gates let through).
    - "residual": alpha = 0, h_pre = 1/n, h_post = 1, h_res near the identity. From equal streams
      (`Expand`) to the mean (`Collapse`), the network computes what the plain residual network
      computes: exactly but for the rounding of the bias, and of 1e-6 a sublayer under the
      epsilons of DeepSeek-V4. The first step moves alpha; as phi's rows differ, the streams part.

    Args:
        layer: a module that maps [..., C] to [..., C], or to a tuple that starts with [..., C].
        hidden_size: C, the size of one stream.
        config: the constants; `MHCConfig.paper()` if None.
        device: where phi, alpha and bias are made.

    Attributes:
        phi: [n*n + 2n, n*C], fp32, as in `mhc_tile.mapping`; likewise `alpha` [3] and `bias`.
            They stay fp32 when the model is cast to bf16 or fp16, and are read in fp32, with a
            warning, where they were rounded in another way.
        tap: an identity through which h_res [..., n, n] passes in every forward: a forward hook on
            it observes h_res, or returns another one, which is used instead. It must not write
            into h_res.

    Example:
        >>> block = ManifoldHyperConnection(torch.nn.Linear(64, 64), hidden_size=64)
        >>> block(torch.randn(2, 10, 4, 64)).shape
        torch.Size([2, 10, 4, 64])
    """

    def __init__(
        self, layer: nn.Module, hidden_size: int, config: MHCConfig | None = None,
        *, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(layer, hidden_size, config)
        n = self.config.num_streams
        logits = n * (n + 2)
        self.phi = parameter(logits, n * self.hidden_size, device=device)
        self.alpha = parameter(3, device=device)
        self.bias = parameter(logits, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start phi, alpha and bias again, as `config.init` says; in every process of FSDP2."""
        with writable(self, "phi", "alpha", "bias") as (phi, alpha, bias):
            start_mapping(phi, alpha, bias, self.config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the sublayer: x [..., n, C] to x_next, in its dtype; the rest goes to the layer.

        Where the layer returns a tuple of its output and extras, the result is (x_next, *extras).
        """
        state = self.begin(x)
        h_res = self.tap(state.h_res)
        result = self.run_layer(state.layer_input, *args, **kwargs)
        layer_output, extras = split_extras(result)
        return join_extras(close_by(h_res, state, layer_output), extras)

    def begin(self, x: Tensor) -> OpenSublayer:
        """`mhc_tile.open_sublayer` with this sublayer's parameters; the caller calls the tap."""
        self.check_input(x)
        return ops.open_sublayer(x, *self._parameters_for(x), **self._constants())

    def cross(self, state: OpenSublayer, layer_output: Tensor) -> OpenSublayer:
        """`mhc_tile.next_sublayer` into this sublayer; the caller calls the tap."""
        parameters = self._parameters_for(state.layer_input)
        return ops.next_sublayer(state, layer_output, *parameters, **self._constants())

    def pre(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`mhc_tile.pre` of x [..., n, C], for callers who merge by themselves.

        Returns:
            layer_input, h_post, h_res, and x itself for `merge` to read.
        """
        self.check_input(x)
        maps = ops.pre(x, *self._parameters_for(x), **self._constants())
        return maps[0], maps[1], self.tap(maps[2]), x

    def _parameters_for(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.read(x, self.phi, self.alpha, self.bias)

    def _constants(self) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in CONSTANTS}


class HyperConnection(Connection):
    """Unconstrained Hyper-Connections around a layer (eq. 5): the maps are used as they come.

    The same sublayer as `ManifoldHyperConnection` with the maps of
    `mhc_tile.reference.hc_mapping`: no sigmoid, no Sinkhorn, so nothing bounds the gain of h_res.
    At the start theta is 0, alpha 0.01, and the static part makes h_res the identity, h_post 1 and
    h_pre one-hot on stream `layer_index` mod n: the plain residual network, exactly.

    Args:
        layer: a module that maps [..., C] to [..., C], or to a tuple that starts with [..., C].
        hidden_size: C, the size of one stream.
        config: num_streams and norm_eps are read; `MHCConfig.paper()` if None.
        layer_index: the depth of this sublayer, from 0; at least 0.
        device: where theta, alpha and bias are made.

    Attributes:
        theta: [2 + n, C], fp32; likewise `alpha` [3] and `bias` [n*n + 2n].
        tap: an identity through which h_res [..., n, n] passes in every forward.

    Example:
        >>> block = HyperConnection(torch.nn.Linear(64, 64), hidden_size=64)
        >>> block(torch.randn(2, 10, 4, 64)).shape
        torch.Size([2, 10, 4, 64])
    """

    def __init__(
        self, layer: nn.Module, hidden_size: int, config: MHCConfig | None = None,
        layer_index: int = 0,
        *, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(layer, hidden_size, config)
        n = self.config.num_streams
        self.layer_index = _checks.whole(type(self).__name__, "layer_index", layer_index, 0)
        self.theta = parameter(2 + n, self.hidden_size, device=device)
        self.alpha = parameter(3, device=device)
        self.bias = parameter(n * (n + 2), device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start theta, alpha and bias again; in every process of FSDP2."""
        n = self.config.num_streams
        with writable(self, "theta", "alpha", "bias") as (theta, alpha, bias):
            nn.init.zeros_(theta)
            nn.init.constant_(alpha, 0.01)
            bias.zero_()
            bias[self.layer_index % n] = 1.0
            bias[n : 2 * n] = 1.0
            bias[2 * n :] = identity(n, bias)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the sublayer: x [..., n, C] to x_next [..., n, C]; the rest goes to the layer.

        A layer that returns a tuple gives (x_next, *extras), as in `ManifoldHyperConnection`.
        """
        self.check_input(x)
        parameters = self.read(x, self.theta, self.alpha, self.bias)
        for name, value in zip(("theta", "alpha", "bias"), parameters, strict=True):
            _checks.map_of(type(self).__name__, name, value, tuple(value.shape), x)
        with without_autocast(x.device.type):
            h_pre, h_post, h_res = reference.hc_mapping(
                x, *parameters, norm_eps=self.config.norm_eps
            )
        result = self.run_layer(ops.pre_apply(x, h_pre), *args, **kwargs)
        layer_output, extras = split_extras(result)
        return join_extras(ops.merge(x, layer_output, h_post, self.tap(h_res)), extras)


class Residual(nn.Module):
    """The plain residual connection: `x_next = x + layer(x)`, on a hidden state [..., C].

    Args:
        layer: a module that maps [..., C] to [..., C], or to a tuple that starts with [..., C].

    Example:
        >>> Residual(torch.nn.Linear(64, 64))(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        check_module(type(self).__name__, "layer", layer)
        self.layer = layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add the layer's output to x [..., C], in x's dtype; the rest goes to the layer.

        A layer that returns a tuple gives (x_next, *extras), as in `ManifoldHyperConnection`.
        """
        result = check_output(type(self).__name__, x, self.layer(x, *args, **kwargs))
        layer_output, extras = split_extras(result)
        if layer_output.shape != x.shape:  # a sum would broadcast it
            raise ValueError(
                f"{type(self).__name__}: layer_output must have shape {list(x.shape)} to match x, "
                f"got {list(layer_output.shape)}"
            )
        return join_extras(x + layer_output, extras)

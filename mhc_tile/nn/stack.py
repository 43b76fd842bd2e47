"""A list of connected layers, with one op between neighbours."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .. import ops
from .connections import ManifoldHyperConnection


class HyperConnectedStack(nn.Module):
    """Thread the residual streams through a list of connected layers.

    Between two neighbouring `ManifoldHyperConnection`s the `merge` of the first and the `pre` of
    the second are one op, `mhc_tile.boundary`, which keeps the streams on chip in between. The
    result is that of calling the connections one after the other. Connections of other kinds are
    called as they are.

    Args:
        connections: `ManifoldHyperConnection`, `HyperConnection` or any module of streams to
            streams (`Residual` where the streams are a hidden state [..., C]).
        fused: use `boundary`. Without it every connection is called as a module, so that forward
            hooks on the connections themselves run; hooks on their layers and taps run either way.

    Example:
        >>> layers = [torch.nn.Linear(64, 64) for _ in range(3)]
        >>> stack = HyperConnectedStack(ManifoldHyperConnection(layer, 64) for layer in layers)
        >>> stack(torch.randn(2, 10, 4, 64)).shape
        torch.Size([2, 10, 4, 64])
    """

    def __init__(self, connections: Iterable[nn.Module], *, fused: bool = True) -> None:
        super().__init__()
        self.connections = nn.ModuleList(connections)
        self.fused = fused

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run every layer.

        Args:
            x: [..., n, C]. The residual streams.
            *args: passed to every layer after its input.
            **kwargs: passed to every layer.

        Returns:
            x_next: the shape and dtype of x.
        """
        pending: tuple[Tensor, Tensor, Tensor] | None = None  # layer_output, h_post, h_res
        for connection in self.connections:
            if not (self.fused and isinstance(connection, ManifoldHyperConnection)):
                x = x if pending is None else ops.merge(x, *pending)
                pending = None
                x = connection(x, *args, **kwargs)
                continue
            if pending is None:
                layer_input, h_post, h_res, x = connection.pre(x)
            else:
                x, layer_input, h_post, h_res = connection.boundary(x, *pending)
            pending = (connection.run_layer(layer_input, *args, **kwargs), h_post, h_res)
        return x if pending is None else ops.merge(x, *pending)

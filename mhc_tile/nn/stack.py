"""A list of connected layers, with one op between neighbours."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, TypeGuard

from torch import Tensor, nn

from ..ops.sublayer import Open, finish
from .connections import Connection, ManifoldHyperConnection


class HyperConnectedStack(nn.Module):
    """Thread the residual streams through a list of connected layers.

    Between two neighbouring `ManifoldHyperConnection`s the `merge` of the first and the `pre` of
    the second are one op, `mhc_tile.boundary`. The result is that of calling the connections one
    after the other. Connections of other kinds, those with a `forward` of their own and those with
    hooks (such as FSDP2's, which gather parameters) are called as they are.

    With FSDP2 in bf16, give `fully_shard` the layers with `MixedPrecisionPolicy(torch.bfloat16)`,
    and the stack or the model without one: phi, alpha and bias have to stay fp32, and connections
    without hooks stay fused.

    Args:
        connections: `ManifoldHyperConnection`, `HyperConnection` or any module of streams to
            streams (`Residual` where the streams are a hidden state [..., C]).
        fused: use `boundary`. Without it every connection is called as a module. Hooks on the
            connections, their layers and their taps run either way.

    Raises:
        ValueError: Two neighbours differ in num_streams or hidden_size.

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
        for index, (before, after) in enumerate(pairwise(self.connections), start=1):
            if not (isinstance(before, Connection) and isinstance(after, Connection)):
                continue
            expected, sizes = ((c.config.num_streams, c.hidden_size) for c in (before, after))
            if sizes != expected:
                raise ValueError(
                    f"HyperConnectedStack: connections[{index}] must have num_streams "
                    f"{expected[0]} and hidden_size {expected[1]} as connections[{index - 1}] has, "
                    f"got {sizes[0]} and {sizes[1]}"
                )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run every layer.

        Args:
            x: [..., n, C]. The residual streams.
            *args: passed to every layer after its input.
            **kwargs: passed to every layer.

        Returns:
            x_next: the shape and dtype of x.
        """
        pending: tuple[Open, Tensor] | None = None  # the sublayer before, and its layer's output
        for connection in self.connections:
            if not (self.fused and _may_fuse(connection)):
                x = x if pending is None else finish(*pending)
                pending = None
                x = connection(x, *args, **kwargs)
                continue
            opened = connection.begin(x) if pending is None else connection.cross(*pending)
            if (tapped := connection.tap(opened.h_res)) is not opened.h_res:
                if opened.x is opened.handed:  # compiled: there x_next has no gradient of its own
                    x = finish(*pending) if pending else x
                    opened = opened._replace(x=x)
                pending = None
                x = connection.merge_tapped(opened, tapped, *args, **kwargs)
                continue
            pending = opened, connection.run_layer(opened.layer_input, *args, **kwargs)
        return x if pending is None else finish(*pending)


def _may_fuse(connection: nn.Module) -> TypeGuard[ManifoldHyperConnection]:
    """Whether calling the module would run `ManifoldHyperConnection.forward` and nothing else."""
    return (
        type(connection).forward is ManifoldHyperConnection.forward
        and "forward" not in connection.__dict__
        and not connection._forward_pre_hooks
        and not connection._forward_hooks
        and not connection._backward_pre_hooks
        and not connection._backward_hooks
    )

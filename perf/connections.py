"""Sublayers joined by other implementations of mHC, with the parameters of ours.

For `mhc-tile perf overhead`: the reference in eager PyTorch or inside torch.compile, and packages
of others through the adapters of `peers`. Axes: B batch, S sequence, n streams, C hidden size.
"""

from torch import Tensor, nn

from mhc_tile import ManifoldHyperConnection, reference

from .peers import ADAPTERS


class ReferenceConnection(nn.Module):
    """A sublayer of ours by `mhc_tile.reference` in place of the ops, with its parameters."""

    def __init__(self, ours: ManifoldHyperConnection) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        """From x [B, S, n, C] to x_next."""
        own = self.ours
        layer_input, h_post, h_res = reference.pre(
            x, own.phi, own.alpha, own.bias, **own._constants()
        )
        return reference.merge(x, own.run_layer(layer_input), h_post, h_res)


class PeerConnection(nn.Module):
    """A sublayer of ours by another package's `pre` and `merge`, with a copy of its parameters.

    Raises:
        ImportError: The package is not installed.
        ValueError: It has no such ops.
    """

    def __init__(self, ours: ManifoldHyperConnection, package: str) -> None:
        super().__init__()
        adapter = ADAPTERS[package]
        pre, merge = adapter("pre"), adapter("merge")
        if pre is None or merge is None:
            raise ValueError(f"PeerConnection: {package} must have pre and merge, got neither")
        self._pre, self._merge = pre, merge
        self.layer = ours.layer
        width = ours.hidden_size
        streams = ours.phi.new_zeros(1, ours.config.num_streams, width)
        _, *own = pre.take(streams, ours.phi.detach(), ours.alpha.detach(), ours.bias.detach())
        self.own = nn.ParameterList(value.clone() for value in own)

    def forward(self, x: Tensor) -> Tensor:
        """From x [B, S, n, C] to x_next."""
        (streams,) = self._merge.cotangents(x.flatten(0, 1))
        layer_input, *maps = self._pre.results(streams, *self.own)
        output = self.layer(layer_input.view(*x.shape[:2], -1))
        merged = self._merge.call(streams, output.view_as(layer_input), *maps)
        (x_next,) = self._merge.give(merged)
        return x_next.view_as(x)

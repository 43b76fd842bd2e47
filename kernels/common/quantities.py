"""The tensors of mHC by name: their axes, and whether they have the streams' dtype or the maps'.

`<name>_next`, `<name>_part` and `grad_<name>` are shaped as `<name>`. The names are those of
`mhc_tile.reference`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Quantity(NamedTuple):
    """What every tensor of one name has in common."""

    axes: tuple[str, ...]  # after the tokens: "n" streams, "C" channels, "k" logits, "nC", "gates"
    per_token: bool = True  # whether the leading dims are the tokens
    of_streams: bool = False  # whether the dtype is that of the streams; else fp32, fp64 where x is


_STREAMS = Quantity(("n", "C"), of_streams=True)
_HIDDEN = Quantity(("C",), of_streams=True)
_VECTOR = Quantity(("n",))
_MATRIX = Quantity(("n", "n"))
QUANTITIES = {
    "x": _STREAMS,
    "hidden": _HIDDEN,
    "layer_input": _HIDDEN,
    "layer_output": _HIDDEN,
    "h_pre": _VECTOR,
    "h_post": _VECTOR,
    "h_res": _MATRIX,
    "h_res_logits": _MATRIX,
    "logits": _MATRIX,
    "projection": Quantity(("k",)),
    "inv_rms": Quantity(()),
    "phi": Quantity(("k", "nC"), per_token=False),
    "alpha": Quantity(("gates",), per_token=False),
    "bias": Quantity(("k",), per_token=False),
}


@functools.cache
def quantity(name: str) -> Quantity:
    """The quantity that a tensor of this name is."""
    return QUANTITIES[name.removeprefix("grad_").removesuffix("_next").removesuffix("_part")]


def sizes_of(names: Sequence[str], tensors: Sequence[Tensor | None]) -> dict[str, Any]:
    """Sizes by axis, and under "tokens" the leading dims, of tensors [..., axes]."""
    sizes: dict[str, Any] = {}
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is None:
            continue
        known = quantity(name)
        count = len(known.axes)
        if known.per_token:
            sizes.setdefault("tokens", tensor.shape[: tensor.dim() - count])
        for axis, size in zip(known.axes, tensor.shape[tensor.dim() - count :], strict=True):
            sizes.setdefault(axis, size)
    return sizes


def shape_of(name: str, sizes: dict[str, Any]) -> tuple[Any, ...]:
    """The shape that a tensor of this name has, from the result of `sizes_of`."""
    known = quantity(name)
    own = tuple(sizes[axis] for axis in known.axes)
    return (*sizes["tokens"], *own) if known.per_token else own


class Samples:
    """Random tensors by name for one size of everything, the same for the same seed.

    `dtype` is that of the streams. On the device "meta" tensors have no values.
    """

    def __init__(
        self, tokens: int, n: int, channels: int, dtype: torch.dtype, device: Any, seed: int = 0
    ) -> None:
        self.sizes = {"tokens": (tokens,), "n": n, "C": channels, "k": n * n + 2 * n}
        self.sizes |= {"nC": n * channels, "gates": 3}
        self._dtype, self._device = dtype, torch.device(device)
        known = self._device.type != "meta"
        self._generator = torch.Generator(device).manual_seed(seed) if known else None

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal values; none on the meta device."""
        if self._generator is None:
            return torch.empty(shape, dtype=dtype, device=self._device)
        options: dict[str, Any] = {"dtype": dtype, "device": self._device}
        return torch.randn(shape, generator=self._generator, **options)

    def get(self, name: str) -> Tensor:
        """A new tensor of a name: normal values, phi and inv_rms scaled as a model has them."""
        streams = quantity(name).of_streams
        values = self.normal(shape_of(name, self.sizes), self._dtype if streams else torch.float32)
        if name == "phi":
            return values * self.sizes["nC"] ** -0.5
        return values * 0.01 + 1 if name == "inv_rms" else values

"""Other packages that are not there: modules with their names and conventions, by our reference."""

import importlib.metadata
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhc_tile import reference

MAPPING = {"norm_eps": 1e-6}
VERSION = "1.2.3"
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def tile_kernels_pre(residual, fn, scale, base, *, post_mult_value, sinkhorn_repeat, **eps):
    """Rows of h_res are [in, out], maps are [batch, tokens, 4, 1] and [batch, tokens, in, out]."""
    assert eps == {"norm_eps": 1e-6, "mhc_mult": 4, "pre_eps": 0.0, "sinkhorn_eps": 1e-6}
    assert residual.dim() == 4
    rows = [*range(8), *(8 + 4 * i + o for o in range(4) for i in range(4))]
    layer_input, h_post, h_res = reference.pre(
        residual, fn[rows], scale, base[rows], **MAPPING,
        post_scale=post_mult_value, iters=sinkhorn_repeat, sinkhorn_eps=0.0,
    )  # fmt: skip
    return layer_input, (h_post[..., None], h_res.transpose(-1, -2))


def tile_kernels_post(layer_output, residual, h_post, h_res):
    """The other way of arguments, maps as above."""
    return reference.merge(residual, layer_output, h_post[..., 0], h_res.transpose(-1, -2))


def liger_coefficients(x, phi, bias, pre, post, res, fp32, iters, *_):
    """phi is [4C, 24], the gates are three scalars."""
    assert not fp32
    alpha = torch.stack([pre, post, res])
    h_pre, h_post, logits = reference.mapping(x, phi.t(), alpha, bias, **MAPPING)
    return h_pre, h_post, reference.sinkhorn(logits, iters=iters)


class OwnMapping(nn.Module):
    """A module with parameters of its own, from [batch * n, tokens, C]."""

    def __init__(self, streams: int, *, dim: int, branch: nn.Module, layer_index: int) -> None:
        super().__init__()
        self.streams, self.branch = streams, branch

    def forward(self, rows: Tensor) -> Tensor:
        """Each stream by itself."""
        return rows + self.branch(rows)


def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _members(package: str, merge: Wrap) -> tuple[str, dict[str, Any]]:
    """The module and what is in it."""
    if package == "tile-kernels":
        members = {"mhc_pre": tile_kernels_pre, "mhc_post": merge(tile_kernels_post)}
        return "tile_kernels.modeling.mhc.functional", members
    if package == "liger-kernel":
        functions = {
            "LigerMHCCoeffsFunction": liger_coefficients,
            "LigerMHCPreFunction": reference.pre_apply,
            "LigerMHCPostResFunction": merge(reference.merge),
        }
        members = {name: SimpleNamespace(apply=call) for name, call in functions.items()}
        return "liger_kernel.ops.mhc", members
    return "hyper_connections", {"mHC": OwnMapping}


def install(monkeypatch: pytest.MonkeyPatch, *packages: str, merge: Wrap = _kept) -> None:
    """Let packages be installed.

    Args:
        monkeypatch: takes them away again.
        packages: their names.
        merge: what becomes of the function that merges.
    """
    real = importlib.metadata.version

    def version(name: str) -> str:
        return VERSION if name in packages else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for package in packages:
        name, members = _members(package, merge)
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            module = ModuleType(parts[count - 1])
            monkeypatch.setitem(sys.modules, ".".join(parts[:count]), module)
        vars(sys.modules[name]).update(members)


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Let a package be installed and fail when it is imported."""
    install(monkeypatch, package)
    name, _ = _members(package, _kept)
    monkeypatch.setitem(sys.modules, name, None)


def scaled(factor: float) -> Wrap:
    """Results that are wrong by a factor."""
    return lambda function: lambda *tensors: function(*tensors) * factor


def slanted(factor: float) -> Wrap:
    """Right results whose gradients are wrong by a factor."""

    def wrap(function):
        def call(*tensors):
            result = function(*tensors)
            return result * factor + (result * (1 - factor)).detach()

        return call

    return wrap


def raising(error: BaseException, after: int = 0) -> Wrap:
    """Raises from some call on; a new error each time, as a kept one keeps its frames alive."""
    calls = 0

    def wrap(function):
        def call(*tensors, **others):
            nonlocal calls
            calls += 1
            if calls > after:
                raise type(error)(*error.args)
            return function(*tensors, **others)

        return call

    return wrap

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


def tile_kernels_stages(merge):
    """TileKernels 2: stages that write into what they get, in pairs without autograd.

    Their backward functions differentiate the reference, in the package's layout.
    """

    def backward(function, grad, *tensors):
        leaves = [value.detach().requires_grad_() for value in tensors]
        with torch.enable_grad():
            return torch.autograd.grad(function(*leaves), leaves, grad)

    def sinkhorn(logits, repeat, eps):  # [in, out]
        turned = logits.transpose(-1, -2)
        return reference.sinkhorn(turned, repeat, eps).transpose(-1, -2)

    def sinkhorn_bwd(grad, logits, grad_logits, repeat, eps):
        (found,) = backward(lambda value: sinkhorn(value, repeat, eps), grad, logits)
        grad_logits.copy_(found)

    def pre_apply_bwd(grad, x, h_pre, grad_x):
        added, grad_h_pre = backward(reference.pre_apply, grad, x, h_pre)
        grad_x += added
        return grad_h_pre

    def post_bwd(layer_output, x, h_post, h_res, grad):
        return backward(tile_kernels_post, grad, layer_output, x, h_post, h_res)

    checked = (  # outputs are given; what comes in must lie as the kernels read it
        ("mhc_sinkhorn_fwd", lambda logits, out, *more: out.copy_(sinkhorn(logits, *more))),
        ("mhc_sinkhorn_bwd", sinkhorn_bwd),
        ("mhc_pre_apply_mix_fwd", lambda x, mix, out: out.copy_(reference.pre_apply(x, mix))),
        ("mhc_pre_apply_mix_bwd", pre_apply_bwd),
        ("mhc_post_fwd", merge(tile_kernels_post)),
        ("mhc_post_bwd", post_bwd),
        ("expand_to_mhc_fwd", lambda hidden, out: out.copy_(reference.expand(hidden, 4))),
        ("expand_to_mhc_bwd", lambda x, out: out.copy_(reference.collapse(x))),
    )
    return {name: _contiguous(function) for name, function in checked}


def _contiguous(function):
    def call(*values):
        assert all(v.is_contiguous() for v in values if isinstance(v, Tensor))
        return function(*values)

    return call


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


def _members(package: str, merge: Wrap, version: str = VERSION) -> tuple[str, dict[str, Any]]:
    """The module and what is in it."""
    if package == "tile-kernels" and version.startswith("2."):
        return "tile_kernels.mhc", tile_kernels_stages(merge)
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


def install(
    monkeypatch: pytest.MonkeyPatch, *packages: str, merge: Wrap = _kept, version: str = VERSION
) -> None:
    """Let packages be installed.

    Args:
        monkeypatch: takes them away again.
        packages: their names.
        merge: what becomes of the function that merges.
        version: of all of them.
    """
    real = importlib.metadata.version

    def version_of(name: str) -> str:
        return version if name in packages else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version_of)
    for package in packages:
        name, members = _members(package, merge, version)
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

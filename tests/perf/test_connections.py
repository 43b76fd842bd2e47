"""Sublayers joined by the reference and by other packages: ours, with its parameters."""

import pytest
import torch

import stand_ins
from compare import relative_rms
from mhc_tile import ManifoldHyperConnection
from mhc_tile.perf.connections import PeerConnection, ReferenceConnection
from mhc_tile.perf.peers import ADAPTERS

WIDTH = 16


@pytest.fixture
def ours():
    torch.manual_seed(0)
    connection = ManifoldHyperConnection(torch.nn.Linear(WIDTH, WIDTH), WIDTH)
    with torch.no_grad():
        for parameter in (connection.alpha, connection.bias):
            parameter.copy_(torch.randn_like(parameter))
    return connection


def run(connection):
    """x_next, and the gradient of x."""
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(2, 3, 4, WIDTH, generator=generator) for _ in range(2))
    connection.zero_grad()
    x_next = connection(x.requires_grad_())
    x_next.backward(grad)
    return x_next.detach(), x.grad


def close(one, other):
    assert one.shape == other.shape
    assert other.abs().max() > 1e-3
    assert relative_rms(one.double(), other.double()) < 1e-5


def layer_grads(connection):
    return [parameter.grad.clone() for parameter in connection.parameters()]


def test_the_reference_computes_ours(ours):
    expected, wanted = run(ours), layer_grads(ours)
    found, got = run(ReferenceConnection(ours)), layer_grads(ours)
    for one, other in zip((*found, *got), (*expected, *wanted), strict=True):
        close(one, other)


@pytest.mark.parametrize("package", ["tile-kernels", "liger-kernel"])
def test_other_packages_compute_ours(ours, monkeypatch, package):
    stand_ins.install(monkeypatch, package)
    expected = run(ours)
    wanted = {name: parameter.grad.clone() for name, parameter in ours.named_parameters()}
    peer = PeerConnection(ours, package)
    found = run(peer)
    for one, other in zip(found, expected, strict=True):
        close(one, other)
    close(peer.layer.weight.grad, wanted["layer.weight"])
    # Its own parameters are copies in its layout; their gradients, in ours:
    pre = ADAPTERS[package]("pre")
    first = pre.take(torch.zeros(1, 4, WIDTH), ours.phi, ours.alpha, ours.bias)[0]
    _, *own = pre.gradients(first, *(parameter.grad for parameter in peer.own))
    for name, grad in zip(("phi", "alpha", "bias"), own, strict=True):
        close(grad, wanted[name])


def test_a_package_without_these_ops_is_refused(ours, monkeypatch):
    stand_ins.install(monkeypatch, "hyper-connections")
    with pytest.raises(ValueError, match="hyper-connections must have pre and merge, got neither"):
        PeerConnection(ours, "hyper-connections")

"""What decides between a kernel and the reference, without a GPU."""

import contextlib

import pytest
import torch

from mhc_tile.ops import _dispatch


@pytest.fixture
def implementation(monkeypatch):
    """A dispatcher on CPU tensors: what ran, and with what."""
    monkeypatch.setattr(_dispatch, "_unfit", lambda *_: None)
    monkeypatch.setattr(_dispatch, "_current", lambda _device: contextlib.nullcontext())
    return _dispatch.on_cuda(
        "op",
        lambda *args: ("kernel", *args),
        lambda *args: ("reference", *args),
        streams=lambda x, *_: (x, x.shape[-2]),
    )


def test_a_kernel_runs_where_one_fits(implementation):
    x = torch.randn(3, 4, 8)
    assert implementation(x, 2)[0] == "kernel"
    assert implementation(x, 2)[1] is x


def test_the_reference_serves_float64_and_comparisons(implementation, monkeypatch):
    assert implementation(torch.randn(3, 4, 8, dtype=torch.float64))[0] == "reference"
    monkeypatch.setattr(_dispatch, "REFERENCE_ONLY", True)
    assert implementation(torch.randn(3, 4, 8))[0] == "reference"


def test_what_no_kernel_takes_warns_once(implementation, monkeypatch):
    monkeypatch.setattr(_dispatch, "_unfit", lambda *_: "it is too odd")
    _dispatch._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="op: the PyTorch reference runs .* it is too odd"):
        assert implementation(torch.randn(3, 4, 8))[0] == "reference"


def test_a_tensor_that_starts_off_16_bytes_reaches_the_kernel_as_a_copy(implementation):
    buffer = torch.randn(97)
    views = [buffer[start : start + 96].view(3, 4, 8) for start in (0, 1)]
    misaligned = next(view for view in views if view.data_ptr() % 16)
    _, given = implementation(misaligned)
    assert given.data_ptr() % 16 == 0
    assert torch.equal(given, misaligned)

"""Parameters are written where they are kept, or not at all, and say so."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from compare import compare
from mhc_tile import Head, HyperConnection, ManifoldHyperConnection
from mhc_tile.nn import load_deepseek_v4


def values(module):
    generator = torch.Generator().manual_seed(0)
    names = {"fn": module.phi, "base": module.bias, "scale": module.alpha}
    return {k: torch.randn(v.shape, generator=generator) for k, v in names.items()}


@pytest.mark.parametrize("kind", ["head", "connection"])
def test_a_parametrized_projection_is_loaded_and_started(kind):
    module = Head(8) if kind == "head" else ManifoldHyperConnection(nn.Identity(), 8)
    parametrizations.weight_norm(module, "phi")
    given = values(module)
    load_deepseek_v4(module, **given)
    rows = slice(4) if kind == "head" else slice(8)  # h_res' rows are permuted
    compare(module.phi[rows], given["fn"][rows].double(), k=4)
    before = module.phi.detach().clone()
    module.reset_parameters()
    assert not torch.equal(module.phi, before)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda head: prune.random_unstructured(head, "phi", 0.0),
        lambda head: nn.utils.weight_norm(head, "phi"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_what_a_hook_computes_is_refused(wrap):
    wrap(head := Head(8))
    for write in (lambda: load_deepseek_v4(head, **values(head)), head.reset_parameters):
        with pytest.raises(ValueError, match=r"Head: phi must be a parameter to be written"):
            write()


def test_a_module_without_memory_is_not_loaded():
    with pytest.raises(ValueError, match=r"load_deepseek_v4: module must have memory.*to_empty"):
        load_deepseek_v4(Head(8, device="meta"), **values(Head(8)))


def test_hyper_connections_name_a_parameter_of_another_dtype():
    connection = HyperConnection(nn.Identity(), 8)
    with pytest.raises(ValueError, match=r"HyperConnection: theta must be float64 where x is"):
        connection(torch.randn(2, 4, 8, dtype=torch.float64))

"""FSDP2: modules that two processes share are started, loaded and exported as whole ones are."""

import pytest
import torch
from torch import nn

from mhc_tile import HyperConnectedStack, HyperConnection, ManifoldHyperConnection, MHCConfig

if not torch.distributed.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)


def test_two_processes_have_the_values_of_one(tmp_path):
    import sharded

    torch.multiprocessing.spawn(sharded.run, (str(tmp_path / "rendezvous"),), nprocs=2)


def test_a_sharded_stack_starts_again(mesh):
    from torch.distributed.fsdp import fully_shard

    config = MHCConfig.paper(init="residual")
    stack = HyperConnectedStack(
        [
            ManifoldHyperConnection(nn.Linear(8, 8), 8, config),
            HyperConnection(nn.Linear(8, 8), 8, config),
        ]
    )
    wanted = {name: value.clone() for name, value in stack.state_dict().items() if "bias" in name}
    for connection in stack:
        fully_shard(connection, mesh=mesh)
    fully_shard(stack, mesh=mesh)
    for connection in stack:
        nn.init.zeros_(connection.bias)
        connection.reset_parameters()
        assert connection.bias.full_tensor().any()
    found = {n: v.full_tensor() for n, v in stack.state_dict().items() if n.count(".") == 2}
    assert all(torch.equal(found[name], wanted[name]) for name in found if "bias" in name)

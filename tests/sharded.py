"""What two processes of FSDP2 do in `nn/test_sharded.py`: shared modules agree with whole ones."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from mhc_tile import Head, HyperConnection, ManifoldHyperConnection, MHCConfig
from mhc_tile.nn import export_deepseek_v4, load_deepseek_v4

WIDTH = 6  # n * C is no multiple of what a process holds


def modules() -> dict[str, nn.Module]:
    residual, v4 = MHCConfig.paper(init="residual"), MHCConfig.deepseek_v4(num_streams=3)
    return {
        "residual": ManifoldHyperConnection(nn.Linear(WIDTH, WIDTH), WIDTH, residual),
        "paper": ManifoldHyperConnection(nn.Linear(WIDTH, WIDTH), WIDTH, v4),
        "hc": HyperConnection(nn.Linear(WIDTH, WIDTH), WIDTH, layer_index=1),
        "residual head": Head(WIDTH, residual),
        "head": Head(WIDTH, v4),
    }


def own(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in module.named_parameters() if "layer" not in n}


def same(name: str, sharded: nn.Module, truth: nn.Module) -> None:
    for parameter, value in own(sharded).items():
        assert value.to_local().numel() < value.numel() or value.numel() == 1, name
        assert torch.equal(value.full_tensor(), own(truth)[parameter]), (name, parameter)
    assert own(sharded)


def each(mesh: DeviceMesh, change: Callable[[nn.Module], None]) -> None:
    """Compare what a change does to every module, sharded and whole."""
    for name, module in modules().items():
        truth = modules()[name]
        fully_shard(module, mesh=mesh)
        for found in (module, truth):
            torch.manual_seed(3)
            with torch.no_grad():
                for value in own(found).values():
                    value.fill_(7.0)
            change(found)
        same(name, module, truth)


def exchange(module: nn.Module) -> None:
    """Load DeepSeek-V4's parameters and take them out again."""
    if isinstance(module, HyperConnection):
        return
    names = {"fn": "phi", "base": "bias", "scale": "alpha"}
    values = {name: torch.randn(getattr(module, own).shape) for name, own in names.items()}
    load_deepseek_v4(module, **values)
    exported = export_deepseek_v4(module)
    for name, value in values.items():
        assert type(exported[name]) is Tensor
        assert torch.equal(exported[name], value), name


def start(mesh: DeviceMesh) -> None:
    """From a model made on meta, and in a mesh where one dim replicates what the other shards."""
    for name in modules():
        with torch.device("meta"):
            module = modules()[name]
        fully_shard(module, mesh=mesh)
        module.to_empty(device="cpu")
        truth = modules()[name]
        for found in (module, truth):
            torch.manual_seed(3)
            found.reset_parameters()
        for parameter, value in own(module).items():
            assert torch.equal(value.full_tensor(), own(truth)[parameter]), (name, parameter)


def run(rank: int, path: str) -> None:
    """The work of one process of two."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        each(mesh, lambda module: module.reset_parameters())
        each(mesh, exchange)
        start(mesh)
        start(init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
        # Every process has a seed of its own: all keep what the first one drew.
        head = Head(WIDTH)
        fully_shard(head, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("r", "s")))
        torch.manual_seed(rank)
        head.reset_parameters()
        mine = head.phi.to_local().detach().clone()
        dist.broadcast(mine, src=0)
        assert torch.equal(mine, head.phi.to_local())
    finally:
        dist.destroy_process_group()

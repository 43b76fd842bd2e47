"""Devices, poisoned memory and quiet threads for every test."""

import pytest
import torch

import mhc_tile
from mhc_tile import _environment
from mhc_tile.autotune import worker
from mhc_tile.ops import _native


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; run `make test-gpu` where there is one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty is filled with NaN, so that an element nobody wrote cannot pass by luck."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _own_numbers():
    """A test's random numbers do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread_each():
    """Tests run in parallel processes: one thread each."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _workers_have_imported_tilelang():
    """Without a GPU, processes of the tuner may begin as copies of one that knows the kernels."""
    if not torch.cuda.is_available():
        worker.PRELOAD.append("mhc_tile.kernels.merge")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        devices = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
        metafunc.parametrize("device", devices)


@pytest.fixture
def batch_invariant():
    """`mhc_tile.set_batch_invariant`, for one test."""
    yield mhc_tile.set_batch_invariant
    mhc_tile.set_batch_invariant(False)


@pytest.fixture(autouse=True, scope="session")
def _ops_are_native():
    """On a GPU, without MHC_TILE_CPP=0, the ops' C++ library serves from the first test on."""
    if torch.cuda.is_available() and _environment.CPP:
        _native.load()


@pytest.fixture
def mesh():
    """A mesh of this process only."""
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch without distributed")
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.fixture
def files(tmp_path):
    """Writes results of `mhc-tile perf`; `files(a=Record(...))` gives their paths."""
    from mhc_tile.perf import records

    def write(**given):
        for name, result in given.items():
            records.write(result, tmp_path / f"{name}.json")
        return [str(tmp_path / f"{name}.json") for name in given]

    return write

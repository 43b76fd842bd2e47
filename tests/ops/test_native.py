"""The ops' C++ library without a GPU: it builds, differentiates as Python does, replays plans."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mhc_tile.kernels.common import toolchain
from mhc_tile.ops import _native, _plans
from mhc_tile.ops._definition import DEFINITIONS

tvm_ffi = pytest.importorskip("tvm_ffi")
pytestmark = pytest.mark.skipif(toolchain.host_compiler() is None, reason="needs a C++ compiler")
TESTS = Path(__file__).parents[1]


def python(code: str, **variables: str) -> str:
    environment = {**os.environ, **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_tests_of_gradients_pass_with_autograd_in_cpp():
    """Another process: the library stays loaded."""
    files = [str(TESTS / "ops" / f"test_{name}.py") for name in ("sublayer", "pre")]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "native_on_cpu", *files],
        env={**os.environ, "PYTHONPATH": str(TESTS)}, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-3000:]
    assert " passed" in found.stdout


REPLAY = """
import ctypes, math
import torch, tvm_ffi.libinfo
from mhc_tile import reference
from mhc_tile.kernels.common.programs import dry_run
from mhc_tile.ops import _native, _plans
from mhc_tile.ops._definition import DEFINITIONS

_native.load(on_cpu=True)
op, launches, runs = DEFINITIONS["merge"], [], []

class Any(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", ctypes.c_void_p)]

class View(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    ]

def seen(argument):
    view = ctypes.cast(argument.value, ctypes.POINTER(View)).contents
    assert (argument.kind, view.code, view.bits, view.offset) == (7, 2, 32, 0)
    shape = view.shape[: view.ndim]
    memory = (ctypes.c_float * math.prod(shape)).from_address(view.data)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)

@ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(Any), ctypes.c_int32, ctypes.c_void_p
)
def program(_, arguments, count, result):
    x, layer_output, h_post, h_res, x_next = map(seen, arguments[:count])
    launches.append(tuple(h_res.shape))
    x_next.copy_(reference.merge(x, layer_output, h_post, h_res.view(-1, 4, 4)))
    return 0

function = ctypes.c_void_p()
ffi = ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi())
assert not ffi.TVMFFIFunctionCreate(None, program, None, ctypes.byref(function))

def implementation(*tensors):
    runs.append("python")
    if _plans.wanted():
        with dry_run("sm_90a", 132):
            handle = lambda *_: function.value
            words = _plans._words(op.by_kernel, tensors, {}, torch.device("cpu"), handle)
        _native.library.mhc_tile_add(_native.words(words))
    return op.on_cpu(*tensors)

library = torch.library.Library("mhc_tile", "IMPL")
library.impl("merge", implementation, "CPU", allow_override=True)
make = lambda *size: torch.randn(size)
def call(tokens):
    inputs = make(*tokens, 4, 8), make(*tokens, 8), make(*tokens, 4), make(*tokens, 4, 4)
    assert torch.equal(op.call(*inputs), op.on_cpu(*inputs))
with torch.no_grad():
    for tokens in ((3,), (3,), (3,), (2, 5), (2, 5)):
        call(tokens)
    print(len(runs), launches, _native.library.mhc_tile_count())
    x, *others = make(4, 3, 8), make(3, 8), make(3, 4), make(3, 4, 4)
    op.call(x.transpose(0, 1), *others)              # not contiguous
    odd = torch.randn(97)[1:].view(3, 4, 8)          # 4 bytes past a multiple of 16
    op.call(odd, *others)
    op.call(make(3, 4, 8).to("meta"), *others)       # not on one device: the fake runs
    with _plans.paused():
        call((3,))
    _plans.clear()
    print(len(runs), len(launches), _native.library.mhc_tile_count(), *_plans.calls())
"""


def test_a_plan_replays_what_the_first_call_did(monkeypatch):
    first, second = python(REPLAY).splitlines()
    assert first == "2 [(3, 16), (3, 16), (10, 16)] 2"
    assert second == "5 3 0 3 6"


def test_a_plan_of_every_kernel_has_allocations_and_launches_alone():
    from mhc_tile.kernels.common.programs import dry_run
    from mhc_tile.kernels.common.quantities import Samples

    others = {"num_streams": 4, "mode": "mean", "norm_eps": 0.0, "pre_eps": 0.0, "eps": 0.0}
    others |= {"post_scale": 2.0, "iters": 20, "sinkhorn_eps": 0.0}
    for name, op in DEFINITIONS.items():
        if op.kernel is None:
            continue
        for tokens in (3, 4096):
            with dry_run("sm_90a", 132):
                tensors = Samples(tokens, 4, 2560, torch.bfloat16, torch.device("meta"))
                given, constants = op.call_of(tensors.get, others)
                words = _plans._words(
                    op.by_kernel, given, constants, torch.device("cpu"), lambda *_: 7
                )
            assert words[2] == len(op.returned), name
            assert 7 in words


def test_without_a_compiler_the_ops_run_in_python_and_say_so_once(tmp_path):
    code = """
import warnings
from mhc_tile.ops import _native
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        _native.begin()
        if _native._builder is not None:
            _native._builder.join()
print(len(caught), _native.library, *[str(each.message) for each in caught])
"""
    empty = {"PATH": str(tmp_path), "CXX": "", "XDG_CACHE_HOME": str(tmp_path)}
    said = python(code, **empty)
    assert said.startswith("1 None mhc_tile: the ops run in Python, which costs host time: a C++ ")
    assert python(code, MHC_TILE_CPP="0", **empty) == "0 None\n"
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    said = python(code, PATH="/bin:/usr/bin", CXX=str(broken), XDG_CACHE_HOME=str(tmp_path))
    assert "got: x.cpp:1: error: no such thing" in said
    assert not [each for each in (tmp_path / "mhc_tile" / "native").iterdir() if each.is_dir()]


def test_the_library_is_another_file_for_another_torch(monkeypatch):
    before = _native.path()
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert _native.path() != before

"""What kernels take on each architecture, read from ptxas without a GPU."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mhc_tile.kernels.common import lowering as _lowering
from mhc_tile.kernels.common import static as _static
from mhc_tile.kernels.common import toolchain as _toolchain
from mhc_tile.kernels.common.architectures import CHECKED, architecture_of
from mhc_tile.kernels.common.static import Resources, parse, regressions, resources

if reason := _static.available():
    pytest.skip(reason, allow_module_level=True)

import emulator_programs as programs

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first_kernel' for 'sm_90a'
ptxas info    : Function properties for first_kernel
    48 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size, 512 bytes smem
ptxas info    : Compile time = 8.118 ms
ptxas info    : Compiling entry function 'second_kernel' for 'sm_90a'
ptxas info    : Function properties for second_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""


def function(name: str, threads: int = 128, shared: int = 0) -> _lowering.DeviceFunction:
    return _lowering.DeviceFunction(name, (), (1, 1, 1), (threads, 1, 1), shared, False)


def test_what_ptxas_prints_is_read():
    functions = (function("second_kernel", 64), function("first_kernel", 96, 9))
    lowered = _lowering.Lowered("", functions)
    second, first = parse(PTXAS, lowered, "sm_90a")
    assert first == Resources("first_kernel", 255, 16, 24, 48, 512, 9, 96)
    assert second == Resources("second_kernel", 32, 0, 0, 0, 0, 0, 64)
    with pytest.raises(RuntimeError, match="says nothing of third_kernel"):
        parse(PTXAS, _lowering.Lowered("", (function("third_kernel"),)), "sm_90a")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spill_stores": 8}, "spills 8 bytes"),
        ({"registers": 130, "threads": 512}, "needs 69632 registers a block, of 65536"),
        ({"dynamic_smem": 102_400}, "needs 102400 bytes of shared memory, of 101376 on sm_89"),
        ({"threads": 2048, "registers": 16}, "has 2048 threads a block"),
    ],
)
def test_what_must_not_ship_is_named(change, fault):
    sound = dict(kernel="k", registers=64, spill_stores=0, spill_loads=0, stack=0)
    sound |= dict(static_smem=0, dynamic_smem=0, threads=128)
    assert Resources(**sound).faults("sm_89") == []
    (found,) = Resources(**{**sound, **change}).faults("sm_89")
    assert fault in found


@pytest.mark.parametrize("arch", CHECKED)
def test_a_program_compiles_for_every_architecture(arch):
    (taken,) = resources(programs.pre_apply(256, "bfloat16"), arch)
    assert 16 <= taken.registers <= 64
    assert taken.threads == 64
    assert taken.faults(arch) == []


def test_shared_memory_and_several_kernels():
    (mirror,) = resources(programs.mirror(256), "sm_80")
    assert (mirror.dynamic_smem, mirror.static_smem, mirror.threads) == (1024, 0, 128)
    first, second = resources(programs.scale_then_sum(64), "sm_80")
    assert first.kernel == "program_kernel"
    assert second.kernel == "program_kernel_1"


def test_a_spill_is_found():
    (taken,) = resources(programs.spilling(), "sm_80")
    assert taken.registers == 255
    assert taken.spill_stores > 0
    assert any("spills" in fault for fault in taken.faults("sm_80"))


def test_growth_against_a_record_is_named():
    record = {"k": {"registers": 64, "stack": 0}}
    assert regressions(record, {"k": {"registers": 64, "stack": 0}}) == []
    assert regressions(record, {"k": {"registers": 60, "stack": 0}, "new": {"registers": 9}}) == []
    assert regressions(record, {"k": {"registers": 72, "stack": 8}}) == [
        "k: registers 64 -> 72",
        "k: stack 0 -> 8",
    ]


def test_reports_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MHC_TILE_STATIC_CACHE", str(tmp_path))
    taken = resources(programs.mirror(256), "sm_80")
    (kept,) = tmp_path.iterdir()
    assert "Used" in json.loads(kept.read_text())
    monkeypatch.setattr(_static, "_compile", None)
    assert resources(programs.mirror(256), "sm_80") == taken


def test_a_digest_is_that_of_a_program_its_target_and_its_configuration():
    def digest(name, width=256, arch="sm_80", configs=None):
        return _static.program_digest(getattr(programs, name)(width), arch, configs)

    assert digest("mirror") == digest("mirror")
    others = (
        digest("mirror", 128),
        digest("scale_then_sum"),
        digest("mirror", arch="sm_89"),
        digest("mirror", configs={"tl.disable_tma_lower": True}),
    )
    assert len({digest("mirror"), *others}) == 5


def test_digests_are_the_same_in_every_process_and_on_every_line(tmp_path):
    code = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import emulator_programs as programs\n"
        "from mhc_tile.kernels.common import lowering as _lowering, static as _static\n"
        "program = programs.mirror(256)\n"
        "print(_static.program_digest(program, 'sm_80'))\n"
        "print(_static.source_digest(_lowering.lower(program, 'sm_80'), 'sm_80'))\n"
    )
    moved = tmp_path / "emulator_programs.py"
    moved.write_text("\n\n" + Path(programs.__file__).read_text())
    printed = []
    for seed, folder in enumerate((Path(programs.__file__).parent, tmp_path)):
        command = [sys.executable, "-c", code, str(folder)]
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        printed.append(result.stdout.split()[-2:])
    lowered = _lowering.lower(programs.mirror(256), "sm_80")
    here = [_static.program_digest(programs.mirror(256), "sm_80")]
    here.append(_static.source_digest(lowered, "sm_80"))
    assert printed == [here, here]


def test_a_source_digest_counts_launches_and_options():
    lowered = _lowering.lower(programs.mirror(256), "sm_80")
    (only,) = lowered.functions
    wider = dataclasses.replace(only, block=(2 * only.threads, 1, 1))
    digests = {
        _static.source_digest(lowered, "sm_80"),
        _static.source_digest(lowered, "sm_89"),
        _static.source_digest(lowered, "sm_80", {_static.FLAGS: ["-G"]}),
        _static.source_digest(dataclasses.replace(lowered, functions=(wider,)), "sm_80"),
        _static.source_digest(dataclasses.replace(lowered, source="//"), "sm_80"),
    }
    assert len(digests) == 5


def test_what_is_missing_is_said_with_its_remedy(monkeypatch):
    monkeypatch.setattr(_toolchain, "nvcc", lambda: None)
    assert "mhc-tile[nvcc]" in _static.available()
    with pytest.raises(RuntimeError, match="nvcc is not installed"):
        resources(programs.mirror(256), "sm_80")
    with pytest.raises(ValueError, match="arch must be one of"):
        architecture_of("sm_75")

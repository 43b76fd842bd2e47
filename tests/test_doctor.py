"""`mhc-tile doctor`, the toolchain and the device it reports."""

import os
import re
import subprocess
import sys

import pytest
import torch

from mhc_tile import doctor
from mhc_tile.autotune import table
from mhc_tile.autotune.device import Device, describe
from mhc_tile.kernels.common import toolchain as _toolchain


def by_item() -> dict[str, doctor.Finding]:
    return {finding.item: finding for finding in doctor.examine()}


def test_the_command_prints_a_line_per_item():
    command = [sys.executable, "-m", "mhc_tile", "doctor"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stderr
    for item in ("mhc_tile", "python", "torch", "GPU", "TileLang", "nvcc", "kernel cache"):
        assert re.search(rf"(ok|note|missing)\s+{item}\b", result.stdout), item
    assert result.stdout.splitlines()[-1].startswith("doctor: ")


WITHOUT = """
import sys
for name in ("tilelang", "tvm", "platformdirs", "tqdm", "tabulate", "matplotlib"):
    sys.modules[name] = None  # importing it raises
import torch, mhc_tile
from mhc_tile.__main__ import main
assert mhc_tile.expand(torch.ones(2, 8), 4).shape == (2, 4, 8)
assert main(["doctor"]) in (0, 1)
for command in (["--version"], *([name, "--help"] for name in ("demo", "train", "autotune"))):
    try:
        main(command)
    except SystemExit as end:
        assert end.code == 0
main(["perf", "run", "--help"])
"""


def test_nothing_but_kernels_and_tuning_needs_tilelang_or_what_tuning_needs():
    result = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for said in ("doctor: ", "mhc-tile 0.", "--preset", "--stress-steps", "--figures PATH"):
        assert said in result.stdout


WITHOUT_TRAIN = """
import sys
for name in ("tyro", "docstring_parser", "jinja2", "tensorboard", "matplotlib"):
    sys.modules[name] = None  # importing it raises
from mhc_tile.__main__ import main
assert main(["doctor"]) in (0, 1)
assert main(["train", "--steps", "1"]) == main(["demo"]) == 1
main(["--version"])
"""


def test_without_the_train_extra_its_commands_name_it_in_one_line():
    result = subprocess.run([sys.executable, "-c", WITHOUT_TRAIN], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "mhc-tile 0." in result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert all("pip install 'mhc-tile[train]' brings it" in line for line in lines)


def test_a_kernel_cache_that_cannot_be_written_is_found(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "mhc_tile", "doctor"]
    environment = {**os.environ, "TILELANG_CACHE_DIR": str(tmp_path / "file" / "cache")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1, result.stderr
    assert re.search(r"missing +kernel cache +.* is not writable", result.stdout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_runs_instead():
    finding = by_item()["GPU"]
    assert finding.status == "note"
    assert "reference on the CPU" in finding.found
    assert "driver" in finding.remedy


@pytest.mark.parametrize("version", [None, "0.1.14"])
def test_a_missing_or_other_tilelang_is_named(monkeypatch, version):
    monkeypatch.setattr(_toolchain, "tilelang_version", lambda: version)
    finding = by_item()["TileLang"]
    assert (finding.status, finding.found) == ("missing", version or "not installed")
    assert "pip install tilelang==0.1.15" in finding.remedy
    assert doctor.render(doctor.examine()).endswith("missing")


def test_a_missing_compiler_is_a_note_with_a_remedy(monkeypatch):
    monkeypatch.setattr(_toolchain, "nvcc", lambda: None)
    monkeypatch.setattr(_toolchain, "host_compiler", lambda: None)
    findings = by_item()
    assert findings["nvcc"].status == findings["C++ compiler"].status == "note"
    assert "mhc-tile[nvcc]" in findings["nvcc"].remedy


def test_a_broken_nvcc_is_not_called_ok(monkeypatch, tmp_path):
    broken = tmp_path / "bin" / "nvcc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert _toolchain.nvcc() == broken
    finding = by_item()["nvcc"]
    assert finding.status == "note"
    assert "does not run" in finding.found


def test_kernels_in_the_cache_are_counted(monkeypatch, tmp_path):
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    assert by_item()["kernel cache"].found == f"0 kernels in {tmp_path}"
    for name in ("a", "b"):
        (tmp_path / "0.1.15" / "linux-x86_64" / "kernels" / name).mkdir(parents=True)
    assert by_item()["kernel cache"].found == f"2 kernels in {tmp_path}"


def test_a_cache_that_cannot_be_written_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    finding = by_item()["kernel cache"]
    assert finding.status == "missing"
    assert "TILELANG_CACHE_DIR" in finding.remedy


def test_missing_train_packages_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda name: name != "matplotlib")
    finding = by_item()["train extra"]
    assert finding.found == "without matplotlib"
    assert "mhc-tile[train]" in finding.remedy


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100a"),
        ((12, 0), "sm_120a"),
    ],
)
def test_targets_are_named_explicitly(capability, arch):
    assert _toolchain.target(capability) == {"kind": "cuda", "arch": arch}


def test_an_old_gpu_has_no_target():
    with pytest.raises(RuntimeError, match=re.escape("capability 8.0 or later, got 7.5")):
        _toolchain.target((7, 5))


def test_the_required_tilelang_is_the_declared_one():
    from test_layout import PROJECT

    pins = [line for line in PROJECT["project"]["dependencies"] if line.startswith("tilelang")]
    assert pins[0].startswith(f"tilelang=={_toolchain.REQUIRED_TILELANG};")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_describe_without_a_gpu():
    with pytest.raises(RuntimeError, match="torch must see a CUDA device, got none"):
        describe()


def test_the_table_in_use_is_named(monkeypatch, tmp_path):
    from tables import DEVICE, family

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("mhc_tile.autotune.device.describe", lambda index: DEVICE)
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "nothing")
    monkeypatch.setattr(table, "user_folder", lambda: tmp_path)
    monkeypatch.setattr(_toolchain, "tilelang_version", lambda: "0.1.15")
    monkeypatch.delenv(table.VARIABLE, raising=False)
    finding = by_item()["tuning 0"]
    assert (finding.status, finding.found) == ("note", "no table; default configurations")
    assert "mhc-tile autotune" in finding.remedy

    path = tmp_path / f"{DEVICE.slug}.json"
    table.update(path, DEVICE, [family(), family("pre", at=4096)])
    finding = by_item()["tuning 0"]
    assert (finding.status, finding.found) == ("ok", f"2 entries in {path}")

    monkeypatch.setattr(_toolchain, "tilelang_version", lambda: "0.1.16")
    finding = by_item()["tuning 0"]
    assert finding.status == "note"
    assert finding.found == f"2 entries in {path}, of TileLang 0.1.15"

    path.write_text("{")
    faults = [f for f in doctor.examine() if f.item == "tuning 0" and str(path) in f.found]
    assert "must be a table in JSON" in faults[0].found
    monkeypatch.setenv(table.VARIABLE, "off")
    assert by_item()["tuning 0"].found == "switched off by MHC_TILE_TABLES=off"


def test_a_gpu_that_does_not_answer_is_a_finding(monkeypatch):
    def lost(index):
        raise RuntimeError("CUDA error: unknown error\nCUDA kernel errors might be")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("mhc_tile.autotune.device.describe", lost)
    finding = by_item()["GPU 0"]
    assert finding.status == "missing"
    assert finding.found.startswith("does not answer: RuntimeError: CUDA error: unknown error CUDA")
    assert "nvidia-smi" in finding.remedy
    assert "tuning 0" not in by_item()


def test_the_cache_is_looked_at_without_raising(monkeypatch, tmp_path):
    def refused(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    for name in ("exists", "is_dir", "is_file", "stat"):
        monkeypatch.setattr(doctor.Path, name, refused)
    finding = doctor._cache(tmp_path / "x")
    assert (finding.item, finding.status) == ("kernel cache", "ok")


@pytest.mark.gpu
def test_describe_a_gpu():
    device = describe()
    assert device.capability == torch.cuda.get_device_capability()
    with pytest.raises(ValueError, match="index must be from 0 to"):
        describe(torch.cuda.device_count())
    assert by_item()["GPU 0"].found.startswith(device.name)


def test_a_device_reads_well():
    device = Device("NVIDIA H200", (9, 0), 132, 150 * 2**30, 60 * 10**6)
    assert device.slug == "nvidia_h200"
    expected = "NVIDIA H200, compute capability 9.0, 132 multiprocessors, 150 GiB, L2 60 MB"
    assert str(device) == expected

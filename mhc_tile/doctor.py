"""`mhc-tile doctor`: what is installed, what would be slow or missing, and the remedies."""

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from mhc_tile.kernels.common import toolchain as _toolchain

from . import _checks, _environment
from ._version import __version__

TRAIN_PACKAGES = ("jinja2", "matplotlib", "tabulate", "tensorboard", "tqdm", "tyro")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    item: str
    status: str  # "ok", "note" (something is slower or absent by choice) or "missing"
    found: str  # a version, place or state
    remedy: str = ""


def examine() -> list[Finding]:
    """Examine everything, in the order of the report. Nothing is compiled, changed or fetched."""
    return [f for check in (_software, _gpu, _tables, _compiler, _train) for f in check()]


def _software() -> Iterator[Finding]:
    yield Finding("mhc_tile", "ok", f"{__version__} in {Path(__file__).resolve().parent}")
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    found = f"{torch.__version__} ({build}), {torch.get_num_threads()} threads"
    yield Finding("torch", "ok", found)


def _gpu() -> Iterator[Finding]:
    from mhc_tile.autotune.device import describe

    if not torch.cuda.is_available():
        why = "this torch is a CPU build" if torch.version.cuda is None else "no device or driver"
        found = f"none ({why}); every op runs its PyTorch reference on the CPU"
        remedy = "for a GPU: an NVIDIA driver and a CUDA build of torch (https://pytorch.org)"
        yield Finding("GPU", "note", found, remedy)
        return
    for index in range(torch.cuda.device_count()):
        try:
            device = describe(index)
        except RuntimeError as error:  # of the driver
            remedy = "nvidia-smi says more; a process that hangs, or a restart of the driver"
            found = f"does not answer: {_checks.reason(error)}"
            yield Finding(f"GPU {index}", "missing", found, remedy)
            continue
        if device.capability >= _toolchain.MINIMUM_CAPABILITY:
            yield Finding(f"GPU {index}", "ok", str(device))
        else:
            remedy = "kernels need compute capability 8.0; ops use the reference here"
            yield Finding(f"GPU {index}", "note", str(device), remedy)


def _tables() -> Iterator[Finding]:
    """Which tuned configurations count; files are read, nothing is cached."""
    from mhc_tile.autotune import lookup, table
    from mhc_tile.autotune.device import describe

    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        item = f"tuning {index}"
        if table.is_off():
            yield Finding(item, "note", f"switched off by {table.VARIABLE}={table.OFF}")
            continue
        try:
            tables = lookup.load(describe(index))
        except RuntimeError:  # `_gpu` reports it
            continue
        entries = sum(len(family.entries) for family in tables.families.values())
        found = f"{entries} entries in {', '.join(map(str, tables.files))}"
        if not entries:
            remedy = "mhc-tile autotune --preset paper fits the kernels to this GPU"
            yield Finding(item, "note", "no table; default configurations", remedy)
        elif tables.other_tilelang:
            found += f", of TileLang {', '.join(tables.other_tilelang)}"
            remedy = "mhc-tile autotune measures again with the TileLang that is installed"
            yield Finding(item, "note", found, remedy)
        else:
            yield Finding(item, "ok", found)
        for fault in tables.faults:
            remedy = "repair or move it; mhc-tile autotune --preset paper makes a new one"
            yield Finding(item, "note", fault, remedy)


def _compiler() -> Iterator[Finding]:
    version, required = _toolchain.tilelang_version(), _toolchain.REQUIRED_TILELANG
    if version == required:
        yield Finding("TileLang", "ok", version)
    else:
        remedy = f"pip install tilelang=={required}  (Linux; generated code differs per release)"
        yield Finding("TileLang", "missing", version or "not installed", remedy)
    nvcc = _toolchain.nvcc()
    release = nvcc and _toolchain.nvcc_version(nvcc)
    if release:
        yield Finding("nvcc", "ok", f"{release} at {nvcc}")
    else:
        found = f"{nvcc} does not run" if nvcc else "not found"
        remedy = "pip install 'mhc-tile[nvcc]', or a CUDA toolkit on PATH; only GPU kernels need it"
        yield Finding("nvcc", "note", found, remedy)
    if compiler := _toolchain.host_compiler():
        yield Finding("C++ compiler", "ok", str(compiler))
    else:
        yield Finding("C++ compiler", "note", "not found", "install g++; only GPU kernels need it")
    yield _cache(_toolchain.kernel_cache())
    yield _native_ops()


def _native_ops() -> Finding:
    from .ops import _native

    if not _environment.CPP:
        return Finding("ops in C++", "ok", "switched off by MHC_TILE_CPP")
    try:
        path = _native.path()
    except ModuleNotFoundError as error:
        return Finding("ops in C++", "note", f"without {error.name}", "install TileLang")
    if path.is_file():
        return Finding("ops in C++", "ok", str(path))
    found = f"not built yet in {path.parent}"
    return Finding("ops in C++", "note", found, "the first call on a GPU builds them, or warmup")


def _cache(folder: Path) -> Finding:
    # os.path, not Path: Path raises for a folder that may not be read
    parent = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not (os.path.isdir(parent) and os.access(parent, os.W_OK | os.X_OK)):
        remedy = "set TILELANG_CACHE_DIR to a writable folder, else kernels compile in each process"
        return Finding("kernel cache", "missing", f"{folder} is not writable", remedy)
    kernels = sum(1 for _ in folder.glob("*/*/kernels/*")) if os.path.isdir(folder) else 0
    return Finding("kernel cache", "ok", f"{kernels} kernels in {folder}")


def _train() -> Iterator[Finding]:
    missing = [name for name in TRAIN_PACKAGES if not _installed(name)]
    if missing:
        remedy = "pip install 'mhc-tile[train]'; mhc-tile train and demo need them"
        yield Finding("train extra", "note", f"without {', '.join(missing)}", remedy)
    else:
        versions = (f"{name} {metadata.version(name)}" for name in TRAIN_PACKAGES)
        yield Finding("train extra", "ok", ", ".join(versions))


def _installed(name: str) -> bool:
    return any(metadata.distributions(name=name))


def render(findings: list[Finding]) -> str:
    """The report as text: a line each, remedies indented below."""
    width = max(len(finding.item) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:>7}  {finding.item:<{width}}  {finding.found}")
        if finding.remedy:
            lines.append(f"{'':>{width + 11}}-> {finding.remedy}")
    missing = sum(finding.status == "missing" for finding in findings)
    return "\n".join([*lines, "", f"doctor: {missing or 'nothing is'} missing"])


def run(args: argparse.Namespace) -> int:
    """Print the report; exit code 1 if something that the package declares is missing."""
    findings = examine()
    sys.stdout.write(render(findings) + "\n")
    return int(any(finding.status == "missing" for finding in findings))

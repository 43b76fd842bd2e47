"""The tree: packages on disk and in the wheel, who imports whom, three ways to be importable."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import msgspec
import pytest
import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
# What lies beside the packages' code for readers, and what a command reads: all of the latter.
DOCUMENTS = ("*.md", "*.png", "*.yml")
INSTALLED = Path(torch.__file__).resolve().parents[1]  # wherever these tests find their packages
MAPPED = PROJECT["tool"]["setuptools"]["package-dir"]

# Who may import whom: each layer sees itself and what stands before it.
LAYERS = [
    ("mhc_tile.kernels",),
    ("mhc_tile.autotune",),
    (
        "mhc_tile.reference",
        "mhc_tile.gradients",
        "mhc_tile.config",
        "mhc_tile._autocast",
        "mhc_tile._checks",
        "mhc_tile._library",
        "mhc_tile._version",
        "mhc_tile._checkout",
        "mhc_tile._environment",
    ),
    ("mhc_tile.ops",),
    ("mhc_tile.nn",),
    ("mhc_tile.models",),
    ("mhc_tile.training",),
    ("mhc_tile.doctor", "mhc_tile"),
    ("mhc_tile.perf",),
    ("mhc_tile.__main__",),  # the command line offers everything, and nothing imports it
]


def folder_of(package: str) -> Path:
    parts = package.split(".")
    beside = MAPPED.get(".".join(parts[:2]), "/".join(parts[:2]))
    return ROOT.joinpath(beside, *parts[2:])


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted(folder_of(package).glob("*.py")):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            found[name] = path
    return found


def layer_of(module: str) -> int:
    fits = [
        (len(prefix), index)
        for index, layer in enumerate(LAYERS)
        for prefix in layer
        if module == prefix or (prefix != "mhc_tile" and module.startswith(f"{prefix}."))
    ]
    assert fits, f"{module} belongs to no layer: add it to LAYERS"
    return max(fits)[1]


def imports_of(name: str, path: Path) -> set[str]:
    """The mhc_tile modules that a file imports, anywhere in it, by absolute name."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            names = {f"{base}.{alias.name}" for alias in node.names}
            inner = {item for item in names if item in known or item in PACKAGES}
            found |= inner or {base}
    return {item for item in found if item.split(".")[0] == "mhc_tile" and item != name}


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_downwards(name):
    for imported in imports_of(name, modules()[name]):
        if name == "mhc_tile" or imported == "mhc_tile":
            continue  # the package gathers its public names
        assert layer_of(imported) <= layer_of(name), f"{name} must not import {imported}"


def test_models_know_nothing_of_training_and_tests_nothing_of_perf():
    for name, path in modules().items():
        if name.startswith("mhc_tile.models"):
            assert not any("training" in item for item in imports_of(name, path))
    for path in Path(__file__).parent.rglob("test_*.py"):
        if path.parent.name == "perf":
            continue  # its own tests
        assert "mhc_tile.perf" not in {
            node.module for node in ast.walk(ast.parse(path.read_text())) if hasattr(node, "module")
        }


def test_the_listed_packages_are_those_on_disk():
    inside = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "mhc_tile").rglob("*.py")
    }
    beside = {
        ".".join((name, *path.parent.relative_to(folder_of(name)).parts))
        for name in MAPPED.keys() - {"mhc_tile"}
        for path in folder_of(name).rglob("*.py")
    }
    assert set(PACKAGES) == inside | beside
    for name in ("kernels", "autotune", "perf"):
        assert not (ROOT / name / "__init__.py").exists(), "it would shadow unrelated packages"


@pytest.mark.parametrize("path", [p for p in modules().values() if p.suffix == ".py"], ids=str)
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 600


def is_program(function: ast.FunctionDef) -> bool:
    """Whether it is a TileLang program, or makes one, or makes macros."""
    inner = [node for node in ast.walk(function) if isinstance(node, ast.FunctionDef)]
    decorators = [ast.unparse(each) for node in inner for each in node.decorator_list]
    return any(each.startswith(("T.prim_func", "T.macro", "program(")) for each in decorators)


@pytest.mark.parametrize("path", [p for p in modules().values() if p.suffix == ".py"], ids=str)
def test_functions_stay_readable(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            most = 120 if isinstance(node, ast.FunctionDef) and is_program(node) else 80
            assert lines <= most, f"{node.name} has {lines} lines, of {most}"


def python_in(venv: Path, code: str, *paths: Path, cwd: Path) -> str:
    """Run code in a bare environment, which finds torch where the tests run."""
    result = subprocess.run(
        [venv / "bin" / "python", "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def pip(venv: Path, *arguments: str | Path, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(INSTALLED)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what the package is built from."""
    copy = tmp_path_factory.mktemp("checkout") / "mhc_tile"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("mhc_tile", "kernels", "autotune", "perf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    """Built from the copy, in which there is data of another GPU and another architecture."""
    for new in ("autotune/tables/a_gpu", "perf/baselines/a_gpu", "perf/static/sm_1"):
        (checkout / f"{new}.json").write_text("{}")
    place = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    result = subprocess.run([*command, "-w", place, checkout], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = place.glob("*.whl")
    return found


@pytest.fixture
def venv(tmp_path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    # Behind the environment's own packages, and without the editable installs among these.
    places = {INSTALLED, Path(msgspec.__file__).resolve().parents[1]}  # one, as a rule
    (packages / "outer.pth").write_text("".join(f"{place}\n" for place in places))
    return tmp_path / "venv"


WHERE = """
import mhc_tile, mhc_tile.kernels.common.toolchain as k, mhc_tile.autotune.device as a
print(*(m.__file__ for m in (mhc_tile, k, a)), sep="\\n")
"""


def test_from_an_uninstalled_checkout(checkout, venv, tmp_path):
    files = python_in(venv, WHERE, checkout, cwd=tmp_path).split()
    expected = ("mhc_tile/__init__.py", "kernels/common/toolchain.py", "autotune/device.py")
    assert files == [str(checkout / name) for name in expected]


def test_from_an_editable_install(checkout, venv, tmp_path):
    pip(venv, "install", "--no-deps", "--no-build-isolation", "-e", checkout, cwd=tmp_path)
    for cwd in (tmp_path, checkout):
        files = python_in(venv, WHERE, cwd=cwd).split()
        assert files[1:] == [
            str(checkout / n) for n in ("kernels/common/toolchain.py", "autotune/device.py")
        ]


def data_of(root: Path) -> dict[str, Path]:
    """Files of the packages, by their place in a wheel, that are neither code nor documents."""
    found = {}
    for package in PACKAGES:
        folder = root / MAPPED.get(package, package.replace(".", "/"))
        for path in folder.rglob("*"):
            inner = path.relative_to(folder)
            if path.suffix in (".py", ".pyc") or any(path.match(kind) for kind in DOCUMENTS):
                continue
            if path.is_file() and not path.name.startswith("."):
                found[f"{package.replace('.', '/')}/{inner}"] = path
    return found


RECORDS = """
from pathlib import Path
from mhc_tile.__main__ import main
from mhc_tile.autotune import table
from mhc_tile.perf import program_gate as _gate
from mhc_tile.kernels.common.architectures import CHECKED
from mhc_tile.perf import cli, records, resources
read = [_gate.Record.read(_gate.RECORDS / f"{arch}.json") for arch in CHECKED]
assert all(record.kernels for record in read)
assert (_gate.RECORDS / "ops.json").is_file()
for gpu in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"):
    assert records.read(cli.baseline_path(gpu)).environment["gpu"] == gpu
    assert (table.SHIPPED / cli.baseline_path(gpu).name).is_file()
base = str(cli.baseline_path("NVIDIA H200"))
cli._gpu_here = lambda: "Another GPU"
print("gate", main(["perf", "gate"]))
print("written", main(["perf", "gate", "--static", "--write"]))
print("module", resources.main(["--write"]))
"""


def test_a_wheel_has_what_commands_read_and_keeps_it(wheel, venv, tmp_path):
    pip(venv, "install", "--no-deps", wheel, cwd=tmp_path)
    command = [venv / "bin" / "python", "-c", RECORDS]
    environment = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.stdout.split() == ["gate", "1", "written", "1", "module", "1"], result.stderr
    gate, written, *_ = result.stderr.splitlines()
    assert "`mhc-tile perf run --contender mhc_tile --out baseline.json` makes it" in gate
    assert "`--baseline baseline.json` has it read" in gate
    for line in (written, result.stderr.splitlines()[-1]):
        assert "--write must run in a checkout, got the installed package " in line
        assert "`pip install -e .`" in line
    assert list(tmp_path.glob("**/static/.*")) == []  # no draft of a record


def test_from_a_wheel(checkout, wheel, venv, tmp_path):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"{name.replace('.', '/')}.py" for name in modules() if name not in PACKAGES}
    expected |= {f"{n.replace('.', '/')}/__init__.py" for n in modules() if n in PACKAGES}
    data = data_of(checkout).keys()
    for new in ("autotune/tables/a_gpu.json", "perf/baselines/a_gpu.json", "perf/static/sm_1.json"):
        assert f"mhc_tile/{new}" in data
    assert packed == expected | data
    pip(venv, "install", "--no-deps", wheel, cwd=tmp_path)
    # Also while standing in the checkout, whose kernels/ must not win over the wheel's.
    for cwd in (tmp_path, checkout.parent):
        files = python_in(venv, WHERE, cwd=cwd).split()
        assert all(file.startswith(str(venv)) for file in files)


def test_importing_the_package_loads_neither_tilelang_nor_plots():
    code = "import sys, mhc_tile; print([m for m in sys.modules if m.split('.')[0] in %r])"
    heavy = ("tilelang", "tvm", "matplotlib", "tensorboard", "tabulate")
    result = subprocess.run(
        [sys.executable, "-c", code % (heavy,)], capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]", result.stdout + result.stderr

"""Adapters of other implementations, against stand-ins with those packages' conventions."""

import dataclasses
import sys
from types import ModuleType

import pytest

pytest.importorskip("tabulate")

import stand_ins
from mhc_tile.perf import peers, records, slices, suite, tables
from mhc_tile.perf.__main__ import main
from mhc_tile.perf.bench import CpuBench
from mhc_tile.perf.environment import environment
from mhc_tile.perf.operations import MODES, OPERATIONS, Case, Inputs
from mhc_tile.perf.records import OURS

COMPARED = ("tile-kernels", "liger-kernel")


def drawn(case):
    """Tensors of a case, and cotangents of its results."""
    make, operation = Inputs(case, "cpu", 0), OPERATIONS[case.op]
    tensors = [make.get(name) for name in operation.names]
    results = operation.reference(*tensors)
    return tensors, make.like([results] if hasattr(results, "shape") else results)


def error_of(package, op, mode="training"):
    case = Case(op, mode, 6, 16, dtype="float32")
    return suite.check(case, peers.ADAPTERS[package](op), *drawn(case))


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("op", ["sublayer", "pre", "merge"])
@pytest.mark.parametrize("package", COMPARED)
def test_results_and_gradients_come_back_in_our_layout(monkeypatch, package, op, mode):
    stand_ins.install(monkeypatch, package)
    assert error_of(package, op, mode) < 1e-5


@pytest.mark.parametrize("op", ["sublayer", "pre", "merge"])
@pytest.mark.parametrize("package", COMPARED)
def test_there_is_a_gradient_of_every_tensor(monkeypatch, package, op):
    stand_ins.install(monkeypatch, package)
    contender = peers.ADAPTERS[package](op)
    tensors, _ = drawn(Case(op, "training", 6, 16, dtype="float32"))
    own = contender.take(*tensors)
    back = contender.gradients(*own)
    assert len(back) == len(tensors)
    for value, tensor in zip(back, tensors, strict=True):
        assert value.shape == tensor.shape
        assert value.equal(tensor)  # there and back again
    assert contender.name == f"{package} {stand_ins.VERSION}"


@pytest.mark.parametrize("op", ["sublayer", "merge"])
@pytest.mark.parametrize("package", COMPARED)
@pytest.mark.parametrize("wrong", [stand_ins.scaled, stand_ins.slanted])
def test_one_that_computes_something_else_is_noticed(monkeypatch, package, op, wrong):
    stand_ins.install(monkeypatch, package, merge=wrong(1.05))
    assert error_of(package, op) > suite.TOLERANCE


@pytest.mark.parametrize("package", peers.ADAPTERS)
def test_ops_that_others_do_not_have(monkeypatch, package):
    stand_ins.install(monkeypatch, package)
    for op in set(OPERATIONS) - {"sublayer", "pre", "merge"}:
        assert peers.ADAPTERS[package](op) is None


@pytest.mark.parametrize("package", peers.ADAPTERS)
def test_what_cannot_be_imported_says_so(monkeypatch, package):
    stand_ins.without(monkeypatch, package)
    with pytest.raises(ImportError):
        peers.ADAPTERS[package]("sublayer")


def test_hyper_connections_has_a_mapping_of_its_own(monkeypatch):
    stand_ins.install(monkeypatch, "hyper-connections")
    contender = peers.ADAPTERS["hyper-connections"]("sublayer")
    tensors, _ = drawn(Case("sublayer", "training", 6, 16, dtype="float32"))
    assert "from that stream alone" in contender.note
    (result,) = contender.results(*contender.take(*tensors))
    assert result.shape == tensors[0].shape
    assert peers.ADAPTERS["hyper-connections"]("pre") is None


@pytest.fixture
def old_tile_kernels(monkeypatch, tmp_path):
    """A package that imports what TileLang has renamed, and modules for both names' parents."""
    before = set(sys.modules)
    for name in ("tilelang", "tilelang.utils", "tilelang.backend", "tilelang.backend.target"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["tilelang.backend.target"].determine_target = "the new place"
    folder = tmp_path / "tile_kernels" / "modeling" / "mhc"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder / "functional.py"
    for name in set(sys.modules) - before:
        if name.startswith(("tile_kernels", "tilelang.utils.target")):
            del sys.modules[name]


def test_tile_kernels_finds_what_tilelang_renamed(old_tile_kernels):
    old_tile_kernels.write_text("from tilelang.utils.target import determine_target as found\n")
    assert peers._tile_kernels_module().found == "the new place"


def test_other_missing_modules_of_tile_kernels_are_named(old_tile_kernels):
    old_tile_kernels.write_text("import a_module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        peers._tile_kernels_module()
    assert "tilelang.utils.target" not in sys.modules


# TileKernels 2: stages.

STAGES = ("sinkhorn", "pre_apply", "merge", "expand", "collapse")
SECOND = "2.1.0"


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("op", STAGES)
def test_stages_of_tile_kernels_2_compute_what_our_ops_do(monkeypatch, op, mode):
    stand_ins.install(monkeypatch, "tile-kernels", version=SECOND)
    assert error_of("tile-kernels", op, mode) < 1e-5
    contender = peers.ADAPTERS["tile-kernels"](op)
    assert contender.name == f"tile-kernels {SECOND}"
    tensors, _ = drawn(Case(op, "training", 6, 16, dtype="float32"))
    back = contender.gradients(*contender.take(*tensors))
    assert all(value.equal(tensor) for value, tensor in zip(back, tensors, strict=True))


def test_a_wrong_stage_of_tile_kernels_2_is_noticed(monkeypatch):
    stand_ins.install(monkeypatch, "tile-kernels", version=SECOND, merge=stand_ins.scaled(1.05))
    assert error_of("tile-kernels", "merge") > suite.TOLERANCE


def test_what_tile_kernels_2_leaves_to_others_has_a_reason(monkeypatch):
    stand_ins.install(monkeypatch, "tile-kernels", version=SECOND)
    assert peers.lacks("tile-kernels").keys() == {"mapping", "pre", "boundary", "sublayer"}
    assert not peers.lacks("tile-kernels").keys() & set(STAGES)
    for op in peers.lacks("tile-kernels"):
        assert peers.ADAPTERS["tile-kernels"](op) is None
    (line,) = peers.left_out(OPERATIONS, lambda name: True)
    assert line.startswith(f"tile-kernels {SECOND} has no mapping, pre, boundary, sublayer: ")
    assert "DeepGEMM" in line
    assert peers.left_out({"merge"}, lambda name: True) == []
    assert peers.left_out(OPERATIONS, lambda name: name == OURS) == []


def test_version_1_has_what_it_had(monkeypatch):
    stand_ins.install(monkeypatch, "tile-kernels", version="1.0.0")
    assert peers.lacks("tile-kernels") == {}
    assert peers.ADAPTERS["tile-kernels"]("pre").name == "tile-kernels 1.0.0"
    assert peers.ADAPTERS["tile-kernels"]("sinkhorn") is None


@pytest.mark.parametrize(("version", "joins"), [("1.0.0", True), (SECOND, False), ("3.0", False)])
def test_steps_are_joined_by_packages_with_pre_and_merge(monkeypatch, version, joins):
    stand_ins.install(monkeypatch, "tile-kernels", version=version)
    assert ("tile-kernels" in slices.names_here("cpu")) == joins
    assert bool(peers.left_out(("pre", "merge"), lambda name: True)) != joins


def test_a_run_says_what_is_left_out(monkeypatch, tmp_path, capsys):
    pytest.importorskip("tqdm")
    stand_ins.install(monkeypatch, "tile-kernels", version=SECOND)
    out = tmp_path / "run.json"
    few = ["run", "--device", "cpu", "--quick", "--mode", "inference", "--turns", "1"]
    case = ["--op", "pre", "--contender", "tile", "mhc_tile", "--out", str(out)]
    assert main([*few, *case]) == 0
    said = f"tile-kernels {SECOND} has no pre: TileKernels 2 leaves the projection to"
    assert said in capsys.readouterr().out
    assert records.read(out).environment["left_out"][0].startswith(said)
    assert main([*few, "--op", "pre", "--contender", "tile", "--out", str(out)]) == 1
    assert said in capsys.readouterr().err


# In a run.

CASE = Case("sublayer", "training", 8, 16)
PEER, TILE = f"liger-kernel {stand_ins.VERSION}", f"tile-kernels {stand_ins.VERSION}"


def measured(*names, case=CASE):
    return suite.measure(case, CpuBench(), lambda name: name.startswith(names), 2)


def test_peers_that_are_installed_take_part(monkeypatch):
    stand_ins.install(monkeypatch, "liger-kernel", "tile-kernels")
    rows = measured(OURS, "liger", "tile")
    assert list(rows) == [OURS, TILE, PEER]
    for row in rows.values():
        assert (row.status, row.turns) == ("ok", 2)
        assert 0 < row.error < suite.TOLERANCE
    text = tables.run(records.Record("run", environment(1e9, "cpu"), list(rows.values())))
    line = next(line for line in text.splitlines() if OURS in line)
    assert f"{min(rows[PEER].us, rows[TILE].us) / rows[OURS].us:.2f}x" in line


def test_peers_take_part_in_the_modes_that_they_have(monkeypatch):
    stand_ins.install(monkeypatch, "tile-kernels")
    found = {mode: list(measured("tile", case=Case("pre", mode, 8, 16))) for mode in MODES}
    assert found == {"inference": [TILE], "forward": [TILE], "training": []}


def test_peers_that_are_absent_are_left_out():
    assert list(measured(OURS, "liger", "tile", "hyper")) == [OURS]


def test_peers_have_cases_of_four_streams_in_bf16_only(monkeypatch):
    stand_ins.install(monkeypatch, "liger-kernel")
    for case in (dataclasses.replace(CASE, streams=2), dataclasses.replace(CASE, dtype="float32")):
        assert list(measured(OURS, "liger", case=case)) == [OURS]


@pytest.mark.parametrize("wrong", [stand_ins.scaled, stand_ins.slanted])
def test_one_that_is_wrong_is_not_timed(monkeypatch, wrong):
    stand_ins.install(monkeypatch, "liger-kernel", merge=wrong(1.1))
    rows = measured(OURS, "liger")
    assert rows[OURS].status == "ok"
    assert (rows[PEER].status, rows[PEER].us, rows[PEER].turns) == ("wrong", None, 0)
    assert rows[PEER].error > suite.TOLERANCE
    assert "against the reference in float64" in rows[PEER].fault


def test_one_with_a_mapping_of_its_own_is_said_to_compute_something_else(monkeypatch):
    stand_ins.install(monkeypatch, "hyper-connections")
    row = measured("hyper")[f"hyper-connections {stand_ins.VERSION}"]
    assert (row.status, row.us) == ("wrong", None)
    assert row.fault.startswith("computes something else: a stream's maps come from that stream")


def test_one_that_cannot_be_imported_is_a_row(monkeypatch):
    stand_ins.without(monkeypatch, "liger-kernel")
    rows = measured(OURS, "liger")
    assert rows[OURS].us > 0
    (other,) = (row for row in rows.values() if row.contender != OURS)
    assert (other.contender, other.status) == ("liger-kernel", "failed")
    assert other.fault.startswith("ModuleNotFoundError: ")
    assert "\n" not in other.fault

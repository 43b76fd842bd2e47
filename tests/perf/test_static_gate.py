"""Launches and bytes of every op, counted without a GPU: against the record, and planted growth."""

import collections
import copy
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tilelang")

import emulator_programs as programs
from mhc_tile import _library
from mhc_tile._library import OPS
from mhc_tile.kernels import merge as merge_kernel
from mhc_tile.kernels.common import static as _static
from mhc_tile.kernels.common import toolchain as _toolchain
from mhc_tile.kernels.common.programs import dry_run
from mhc_tile.ops import _dispatch
from mhc_tile.perf import cli, resources, static_gate
from mhc_tile.perf import program_gate as _gate
from mhc_tile.perf.__main__ import main


@pytest.fixture(scope="module")
def now():
    return static_gate.measure()


def test_no_op_launches_or_moves_more_than_recorded(now):
    more, other = static_gate.differences(static_gate.read(), now)
    assert more == []
    assert other == [], _gate.WRITE


def test_every_op_with_kernels_is_counted(now):
    names = static_gate.ops().keys()
    backward = {name for name in OPS if name.endswith("_backward")}
    without = {"head", "head_backward"}  # the reference serves them
    assert {name for name in names if name in OPS} == OPS.keys() - without
    assert backward - without < names
    for counted in now.values():
        assert len(counted) == len(names) * len(static_gate.TOKENS)


@pytest.mark.parametrize("arch", static_gate.ARCHITECTURES)
@pytest.mark.parametrize("tokens", static_gate.TOKENS)
def test_an_op_of_parts_launches_what_its_parts_do(now, arch, tokens):
    def of(name):
        return now[arch][f"{name} at {tokens}"]

    for op, *parts in (
        ("boundary_backward", "pre_backward with grad_x_part", "merge_backward"),
        ("expand_backward", "collapse"),
        ("collapse_backward", "expand"),
    ):
        for key in ("launches", "bytes", "passed"):
            assert of(op)[key] == sum(of(part)[key] for part in parts), (op, key)


def test_boundary_moves_x_next_once_and_launches_once_where_pre_does(now):
    for arch, counted in now.items():
        for tokens in static_gate.TOKENS:
            one, merge, pre = (counted[f"{op} at {tokens}"] for op in ("boundary", "merge", "pre"))
            x_next = tokens * 4 * 2560 * 2
            assert one["bytes"] == merge["bytes"] + pre["bytes"] - x_next
            fused = arch == "sm_90a" and tokens == 8192
            apart = merge["launches"] + pre["launches"]
            assert one["launches"] == (1 if fused else apart)
            assert one["passed"] == merge["passed"] + pre["passed"] - fused * x_next


def test_numbers_that_are_known(now):
    merge = now["sm_90a"]["merge at 8192"]
    moved = 8192 * (9 * 2560 * 2 + 4 * 20)
    assert merge == {"launches": 1, "torch": 0, "bytes": moved, "passed": moved}
    assert now["sm_90a"]["pre at 8192"]["launches"] == 1  # one cooperative launch
    assert now["sm_80"]["pre at 8192"]["launches"] == 2
    for counted in now.values():
        for name, counts in counted.items():
            assert counts["passed"] >= counts["bytes"], name


def planted(monkeypatch, change):
    """Counts of merge at 64 tokens with another launcher, which gets the real one."""
    real = merge_kernel.forward
    monkeypatch.setattr(merge_kernel, "forward", lambda *a, **k: change(real, *a, **k))
    return static_gate.count("merge", "sm_90a", 64)


def test_a_second_launch_is_found(monkeypatch, now):
    def twice(real, *arguments, **options):
        real(*arguments, **options)
        return real(*arguments, **options)

    counts = planted(monkeypatch, twice)
    before = now["sm_90a"]["merge at 64"]
    assert counts == {**before, "launches": 2, "passed": 2 * before["passed"]}


@pytest.mark.parametrize("change", ["copy", "fill", "sum"])
def test_a_kernel_of_torch_is_found(monkeypatch, now, change):
    def more(real, x, *arguments, **options):
        if change == "copy":
            x = x.clone()
        if change == "fill":
            torch.zeros_like(x)
        result = real(x, *arguments, **options)
        return result + x if change == "sum" else result

    counts = planted(monkeypatch, more)
    before = now["sm_90a"]["merge at 64"]
    assert (counts["launches"], counts["torch"]) == (2, 1)
    assert counts["passed"] - before["passed"] in (2 * 64 * 4 * 2560 * size for size in (1, 2, 3))


def test_views_and_empties_launch_nothing(monkeypatch, now):
    def viewed(real, x, *arguments, **options):
        torch.empty_like(x)
        return real(x.view(-1, 2560).view(x.shape).detach(), *arguments, **options)

    assert planted(monkeypatch, viewed) == now["sm_90a"]["merge at 64"]


def test_kernels_of_a_program_are_counted():
    assert static_gate._kernels(programs.scale_then_sum, (64,)) == 2
    assert static_gate._kernels(programs.mirror, (256,)) == 1


def test_the_switch_for_batch_invariance_is_left_as_it_was(monkeypatch, now):
    monkeypatch.setattr(_dispatch, "BATCH_INVARIANT", True)
    assert static_gate.count("pre", "sm_90a", 64) == now["sm_90a"]["pre at 64"]
    assert _dispatch.BATCH_INVARIANT


def test_growth_is_wrong_and_less_is_to_be_recorded(now):
    record = copy.deepcopy(now)
    record["sm_80"]["merge at 64"]["launches"] = 0
    record["sm_80"]["pre at 64"]["passed"] += 1
    del record["sm_90a"]["pre at 64"]
    record["sm_90a"]["gone at 64"] = {"launches": 1}
    more, other = static_gate.differences(record, now)
    assert more == ["sm_80: merge at 64: launches 0 -> 1"]
    assert [line.partition(" at 64: ")[0] for line in other] == [
        "sm_90a: pre",
        "sm_90a: gone",
        "sm_80: pre",
    ]
    assert static_gate.differences({}, now)[0] == []


@pytest.fixture
def place(tmp_path, monkeypatch, now):
    """A record of its own, no compiler, and kernels that take what is recorded."""
    monkeypatch.setattr(_static, "available", lambda: None)
    monkeypatch.setattr(_toolchain, "nvcc", lambda: None)
    monkeypatch.setattr(_gate, "RECORDS", tmp_path)
    monkeypatch.setattr(static_gate, "measure", lambda archs: {a: now[a] for a in archs})
    taken = {"registers": 64, "spill_stores": 0, "spill_loads": 0, "stack": 0, "static_smem": 0}
    taken |= {"dynamic_smem": 0, "threads": 128, "program": "p", "source": "s"}
    kernels = {"merge_forward_kernel": taken}

    def measure(architectures, *, fresh):
        return {arch: _gate.Record("13.0", copy.deepcopy(kernels)) for arch in architectures}

    monkeypatch.setattr(_gate, "measure", measure)
    return taken, tmp_path / "ops.json"


def test_the_command(place, capsys):
    taken, path = place
    assert main(["gate", "--static"]) == 1
    assert f"{path} must hold counts of ops, got" in capsys.readouterr().err
    assert main(["gate", "--static", "--write"]) == 0
    assert main(["gate", "--static"]) == 0
    assert "sm_90a: 1 kernels, 36 calls of ops" in capsys.readouterr().out
    record = json.loads(path.read_text())
    record["sm_90a"]["pre at 64"]["launches"] -= 1
    record["sm_90a"]["merge at 64"]["launches"] += 1
    path.write_text(json.dumps(record))
    taken["registers"] = 72
    assert main(["gate", "--static"]) == cli.REGRESSION
    out, err = capsys.readouterr()
    assert "sm_90a: merge at 64: launches 2 -> 1; record it with `mhc-tile perf gate" in out
    assert "sm_90a: pre at 64: launches 1 -> 2" in err
    assert "sm_89: merge_forward_kernel: registers 64 -> 72" in err
    assert main(["gate", "--static", "--arch", "sm_80", "--write"]) == 0
    assert main(["gate", "--static", "--arch", "sm_80"]) == 0
    assert json.loads(path.read_text())["sm_90a"] == record["sm_90a"]


def test_arguments_that_do_not_fit(capsys, monkeypatch):
    for arguments, why in (
        (["--write"], "--write must come with --static"),
        (["--static", "--json", "-"], "--static must come without --json, got -"),
        (["--static", "--arch", "sm_70"], "--arch must be one of sm_80, "),
    ):
        assert main(["gate", *arguments]) == 1
        assert why in capsys.readouterr().err
    monkeypatch.setattr(_static, "available", lambda: "no nvcc: install it")
    assert main(["gate", "--static"]) == 1
    assert "a compiler must be here, got none: no nvcc" in capsys.readouterr().err


def test_the_old_name_of_the_command_warns(capsys):
    with pytest.warns(DeprecationWarning, match="use `mhc-tile perf gate --static`"):
        assert resources.main(["--arch", "sm_70"]) == 1
    assert "--arch must be one of sm_80, " in capsys.readouterr().err


def test_an_nvcc_that_does_not_run_is_named(capsys, monkeypatch):
    monkeypatch.setattr(_static, "available", lambda: None)
    monkeypatch.setattr(_toolchain, "nvcc", lambda: Path("/broken/nvcc"))
    assert main(["gate", "--static"]) == 1
    assert "nvcc must run, got /broken/nvcc, which does not" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_named(place, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "file" / "x"))
    assert main(["gate", "--static"]) == 1
    assert "the variable TILELANG_CACHE_DIR names another place" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{", '{"sm_80": {"merge": {"launches": "1"}}}', "1"])
def test_a_record_that_is_none(tmp_path, monkeypatch, text):
    monkeypatch.setattr(_gate, "RECORDS", tmp_path)
    (tmp_path / "ops.json").write_text(text)
    with pytest.raises(ValueError, match="must hold counts of ops, got"):
        static_gate.read()


@pytest.mark.parametrize("tokens", static_gate.TOKENS)
@pytest.mark.parametrize("op", static_gate.ops())
def test_a_call_decides_little_anew(op, tokens):
    """Python calls of our own files, and from them, in a call like the one before."""
    known, optional = static_gate.ops()[op]
    launch = _gate.call(known, tokens, optional)
    own = tuple(str(Path(module.__file__).parent) for module in (merge_kernel, _library))
    seen = collections.Counter()

    def note(frame, event, argument):
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(own):
            seen[f"{frame.f_code.co_name} {event}"] += 1

    with dry_run("sm_90a", 132):
        for _ in range(2):
            launch()
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            launch()
        finally:
            sys.setprofile(before)
    assert 5 < seen.total() < 200, seen.most_common(5)

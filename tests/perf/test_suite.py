"""`mhc-tile perf run`: contenders are checked, then timed; what fails is a row, and it goes on."""

import dataclasses
import os
import shutil
import signal
import warnings

import pytest
import torch

pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

import stand_ins
from mhc_tile import __main__, reference
from mhc_tile.perf import output, records, suite
from mhc_tile.perf.__main__ import main
from mhc_tile.perf.bench import CpuBench
from mhc_tile.perf.operations import OPERATIONS, Case
from mhc_tile.perf.records import OURS
from mhc_tile.perf.suite import COMPILED, COMPILED_TF32, EAGER

CASE = Case("sublayer", "training", 8, 16)
PEER, TILE = f"liger-kernel {stand_ins.VERSION}", f"tile-kernels {stand_ins.VERSION}"
QUICK = ["run", "--device", "cpu", "--quick", "--turns", "2"]
FAST = ["--contender", OURS, EAGER]  # nothing is compiled


def measured(*names, case=CASE, turns=2, bench=None):
    def wanted(name):
        return name.startswith(names)

    return suite.measure(case, bench or CpuBench(), wanted, turns)


def replaced(monkeypatch, op, **changes):
    changed = dataclasses.replace(OPERATIONS[op], **changes)
    monkeypatch.setitem(OPERATIONS, op, changed)


def test_a_quick_run_end_to_end(tmp_path, capsys):
    path = tmp_path / "new" / "run.json"
    assert __main__.main(["perf", *QUICK, *FAST, "--out", str(path)]) == 0
    said = capsys.readouterr()
    result = records.read(path)
    assert result.kind == "run"
    assert {row.op for row in result.rows} == set(OPERATIONS)
    assert {row.mode for row in result.rows} == {"inference", "forward", "training"}
    for case in result.cases:
        assert [row.contender for row in result.of(case)] == [OURS, EAGER]
    for row in result.rows:
        assert (row.status, row.fault, row.turns) == ("ok", "", 2)
        assert 0 < row.p20 <= row.us <= row.p80
        assert row.error < 1e-5
    where = result.environment
    assert where["copy_bytes_per_s"] > 0
    assert {"device", "torch", "commit", "date", "python", "packages", "command"} < {*where}
    assert "cases_left" not in where
    assert "not installed: tile-kernels, liger-kernel, hyper-connections" in said.out
    assert f"result: {path}" in said.out
    assert len(said.out.splitlines()) > len(result.rows)
    assert " s  merge/training/64x64/n4/float32\n" in said.err
    pytest.importorskip("matplotlib")
    assert main(["report", str(path)]) == 0
    page = path.with_suffix(".html").read_text()
    assert "27 of 27" in page
    assert EAGER in page


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_the_compiled_reference(tmp_path):
    rows = measured(COMPILED, case=Case("pre_apply", "inference", 8, 16, dtype="float32"))
    assert rows[COMPILED].status == "ok", rows[COMPILED].fault
    assert rows[COMPILED].us > 0


def test_the_reference_in_tf32_is_called_under_that_setting(monkeypatch):
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            seen.append(("forward", torch.get_float32_matmul_precision()))
            return x.clone()

        @staticmethod
        def backward(_, grad):
            seen.append(("backward", torch.get_float32_matmul_precision()))
            return grad

    def compiled(function, **_):
        return lambda x, *others: function(Look.apply(x), *others)

    monkeypatch.setattr(torch, "compile", compiled)
    before = torch.get_float32_matmul_precision()
    case = Case("mapping", "training", 8, 16, dtype="float32")
    assert COMPILED_TF32 not in {c.name for c in suite.contenders(case, device="cpu")}
    assert COMPILED_TF32 not in {c.name for c in suite.contenders(Case("merge", "forward", 8, 16))}
    (contender,) = suite.contenders(case, lambda name: name == COMPILED_TF32)
    monkeypatch.setattr(suite, "contenders", lambda *_: [contender])
    rows = measured(COMPILED_TF32, case=case, turns=3)
    assert rows[COMPILED_TF32].status == "ok"
    assert {precision for _, precision in seen} == {"high"}
    kinds = [kind for kind, _ in seen]
    assert kinds.count("forward") == kinds.count("backward") > 5
    assert torch.get_float32_matmul_precision() == before


def test_names_of_results_and_pictures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    few = ["--op", "merge", "--mode", "inference", "--tokens", "64", "--figures", "pictures"]
    assert main([*QUICK, *FAST, *few]) == 0
    assert len(records.read(tmp_path / "perf-cpu.json").rows) == 2
    assert "no pictures" in capsys.readouterr().out  # no bytes on a CPU, and one size
    monkeypatch.setattr(suite.Operation, "moved", lambda self, case: 1000)
    monkeypatch.setattr(CpuBench, "device", "cuda")
    monkeypatch.setattr(suite, "_input_sets", _on_the_cpu(suite._input_sets))
    assert main([*QUICK, *FAST, *few]) == 0
    assert (tmp_path / "pictures" / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert "picture: pictures/roofline.png" in capsys.readouterr().out
    assert records.read(tmp_path / "perf-cpu.json").rows[0].bytes == 1000


def _on_the_cpu(sets):
    plain = CpuBench()
    plain.device = "cpu"
    return lambda case, operation, _: sets(case, operation, plain)


@pytest.mark.parametrize("place", range(3))
def test_nothing_passes_that_is_not_a_number(monkeypatch, place):
    def ours(*tensors):
        results = list(reference.pre(*tensors, norm_eps=1e-6))
        results[place] = results[place] * float("nan")
        return results

    replaced(monkeypatch, "pre", ours=ours)
    row = measured(OURS, case=Case("pre", "inference", 8, 16))[OURS]
    assert (row.status, row.us, row.error) == ("wrong", None, None)
    assert row.fault.startswith("relative error inf ")


@pytest.mark.parametrize(
    ("error", "status", "fault"),
    [
        (RuntimeError("\n no  good\nin many lines"), "failed", "RuntimeError: no good"),
        (AssertionError(), "failed", "AssertionError"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            "out of memory",
            "OutOfMemoryError: CUDA out of memory. Tried",
        ),
    ],
)
@pytest.mark.parametrize("after", [0, 5])  # when it is checked, when it is timed
def test_one_that_fails_is_a_row_and_the_others_are_timed(monkeypatch, error, status, fault, after):
    stand_ins.install(monkeypatch, "liger-kernel", merge=stand_ins.raising(error, after))
    rows = measured(OURS, "liger", turns=3)
    assert (rows[OURS].status, rows[OURS].turns) == ("ok", 3)
    assert (rows[PEER].status, rows[PEER].fault, rows[PEER].us) == (status, fault, None)


def test_advice_of_the_compiler_is_not_repeated_for_every_graph(monkeypatch):
    def advised(x, *_):
        warnings.warn("\nOnline softmax is disabled on the fly since Inductor", stacklevel=1)
        warnings.warn("TensorFloat32 tensor cores for float32 are available", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return x.clone()

    replaced(monkeypatch, "sublayer", ours=advised, reference=advised)
    with pytest.warns() as said:
        rows = measured(OURS, case=dataclasses.replace(CASE, mode="inference"))
    assert {str(one.message) for one in said} == {"something else"}
    assert rows[OURS].status == "ok"


def test_inputs_that_do_not_fit_are_a_row(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(suite, "_input_sets", full)
    rows = measured(OURS, EAGER).values()
    assert [(row.contender, row.status) for row in rows] == [
        (OURS, "out of memory"),
        (EAGER, "out of memory"),
    ]
    fault = "inputs do not fit: OutOfMemoryError: CUDA out of memory"
    assert {row.fault for row in rows} == {fault}
    assert list(measured(EAGER)) == [EAGER]
    monkeypatch.setattr(CpuBench, "recover", lambda self: False)
    with pytest.raises(output.UnusableError):
        measured(OURS)


def test_a_package_may_be_asked_for_with_its_version(monkeypatch):
    stand_ins.install(monkeypatch, "liger-kernel")
    assert suite.names_here("cpu") == [OURS, EAGER, COMPILED, PEER]
    assert list(measured(PEER)) == [PEER]


def test_contenders_that_have_no_chosen_op_leave_no_result(monkeypatch, tmp_path, capsys):
    stand_ins.install(monkeypatch, "liger-kernel")
    monkeypatch.setattr(suite, "measure", lambda *_: pytest.fail("it measures"))
    few = [*QUICK, "--op", "expand", "--mode", "forward", "--out", str(tmp_path / "run.json")]
    assert main([*few, "--contender", PEER]) == 1
    said = "must leave one that has the chosen ops and modes, got liger-kernel"
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Errors of ours, interrupts, bad input.


def test_a_mistake_of_ours_ends_with_1(monkeypatch, tmp_path, capsys):
    replaced(monkeypatch, "merge", ours=lambda *tensors: reference.merge(*tensors) * 1.1)
    out = tmp_path / "run.json"
    few = ["--op", "merge", "pre_apply", "--mode", "inference", "--out", str(out)]
    assert main([*QUICK, *FAST, *few]) == 1
    rows = records.read(out).rows
    assert [row.status for row in rows] == ["wrong", "ok", "ok", "ok"]
    assert (
        "mhc_tile: wrong at merge/inference/64x64/n4/float32: relative" in capsys.readouterr().out
    )


@pytest.mark.parametrize("turn", [False, True])
def test_an_interrupt_keeps_what_was_measured(monkeypatch, tmp_path, capsys, turn):
    cases, real = 0, CpuBench.timed

    def timed(self, function, sets):
        nonlocal cases
        cases += 1
        found = real(self, function, sets)
        if cases <= 2:
            return found
        if not turn:
            raise KeyboardInterrupt
        times = iter([1.0, 2.0, 3.0])

        def timer():
            for time in times:
                return time
            raise KeyboardInterrupt

        return dataclasses.replace(found, timer=timer)

    monkeypatch.setattr(CpuBench, "timed", timed)
    out = tmp_path / "run.json"
    few = ["--op", "merge", "--contender", OURS, "--turns", "9", "--out", str(out)]
    assert main([*QUICK, *few]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert records.read(out).environment["cases_left"] == 1
    rows = records.read(out).rows
    assert [row.mode for row in rows if row.us] == ["inference", "forward"] + ["training"] * turn
    assert [row.turns for row in rows if row.us] == [9, 9] + [3] * turn


def test_what_ends_before_its_first_case_replaces_nothing(monkeypatch, tmp_path):
    out = tmp_path / "run.json"
    few = ["--op", "merge", "--mode", "forward", "--contender", OURS, "--out", str(out)]
    assert main([*QUICK, *few]) == 0
    whole = out.read_bytes()
    assert "cases_left" not in records.read(out).environment

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "measure", interrupted)
    assert main([*QUICK, *few]) == 130
    assert out.read_bytes() == whole


def test_what_is_killed_loses_the_case_in_flight_alone(monkeypatch, tmp_path):
    kept, real = [], CpuBench.timed

    def timed(self, function, sets):
        kept.append([row.mode for row in records.read(out).rows] if out.exists() else [])
        return real(self, function, sets)

    monkeypatch.setattr(CpuBench, "timed", timed)
    out = tmp_path / "run.json"
    assert main([*QUICK, *FAST, "--op", "merge", "--contender", OURS, "--out", str(out)]) == 0
    assert kept == [[], ["inference"], ["inference", "forward"]]


@pytest.fixture(params=[signal.SIGTERM, signal.SIGHUP])
def number(request):
    """A signal, not ignored as under nohup."""
    before = signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    assert signal.signal(request.param, before) == signal.SIG_DFL


def test_a_signal_that_ends_a_run_keeps_what_was_measured(monkeypatch, tmp_path, capsys, number):
    real = CpuBench.timed

    def timed(self, function, sets):
        if any(value.requires_grad for value in sets[0]):
            os.kill(os.getpid(), number)
        return real(self, function, sets)

    monkeypatch.setattr(CpuBench, "timed", timed)
    out = tmp_path / "run.json"
    few = ["--op", "merge", "--contender", OURS, "--out", str(out)]
    assert main([*QUICK, *few]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [row.mode for row in records.read(out).rows if row.us] == ["inference"]


def test_a_gpu_that_answers_no_more_ends_the_run(monkeypatch, tmp_path, capsys):
    def broken(*tensors):
        raise RuntimeError("an illegal memory access was encountered")

    replaced(monkeypatch, "pre_apply", ours=broken)
    monkeypatch.setattr(CpuBench, "recover", lambda self: False)
    out = tmp_path / "run.json"
    few = ["--op", "merge", "pre_apply", "expand", "--mode", "forward", "--out", str(out)]
    assert main([*QUICK, *few, "--contender", OURS]) == 1
    rows = records.read(out).rows
    assert [(row.op, row.status) for row in rows] == [("merge", "ok"), ("pre_apply", "failed")]
    assert "mhc_tile left the GPU unusable at pre_apply/forward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device must be cuda or cpu, got tpu"),
        (["--turns", "0"], "perf run: --turns must be at least 1, got 0"),
        (["--contender", OURS, "ligre"], "--contender must begin one of mhc_tile, reference (eag"),
        (["--contender", "mhc_tile (layers"], "must begin one of mhc_tile, reference (eager), "),
        (["--contender", "tile-kernels 0"], "must begin one of mhc_tile, reference (eager), "),
        (["--contender", "reference (compiled, t"], "one that can be measured here, of mhc_tile, "),
        (["--out", "."], "perf: --out must be a file, got the folder ."),
        (["--tokens", "3"], "perf run: --tokens must be among 64 here, got 3"),
        (["--hidden", "-1"], "perf run: --hidden must be among 64 here, got -1"),
    ],
)
def test_bad_input_is_named(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK, *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_named_before_anything_is_measured(monkeypatch, capsys):
    from mhc_tile.autotune import _extras

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(_extras.importlib, "import_module", missing)
    monkeypatch.setattr(CpuBench, "bandwidth", lambda self: pytest.fail("it measures"))
    assert main(QUICK) == 1
    assert "pip install 'mhc-tile[perf]' brings it" in capsys.readouterr().err


def test_who_takes_long_to_compile_is_said(monkeypatch, tmp_path, capsys):
    few = [*QUICK, "--op", "merge", "--mode", "forward", "--contender", OURS]
    assert main([*few, "--out", str(tmp_path / "run.json")]) == 0
    assert "to compile" not in capsys.readouterr().err
    monkeypatch.setattr(suite, "LONG_S", 0.0)
    assert main([*few, "--out", str(tmp_path / "run.json")]) == 0
    said = capsys.readouterr().err
    assert "merge/forward/64x64/n4/float32: mhc_tile took 0 s to compile and check\n" in said


def test_the_gate_measures_ours_on_the_cases_of_a_baseline(monkeypatch):
    case = dataclasses.replace(CASE, op="merge", dtype="float32")
    found = suite.measure(case, CpuBench(), lambda name: name in (OURS, EAGER), 2)
    base = records.Record("run", {}, list(found.values()))
    monkeypatch.setattr(suite, "bench_of", lambda device: CpuBench())
    monkeypatch.setattr(suite, "environment", lambda copy: {"copy_bytes_per_s": copy})
    again = suite.measure_for_gate(base)
    assert [(row.case, row.contender) for row in again.rows] == [(case.key, OURS)]
    assert again.rows[0].turns == suite.TURNS


@pytest.mark.parametrize("rates", [(2e12, 3e12), (3e12, 2e12)])
def test_the_copy_is_measured_again_at_the_end(monkeypatch, tmp_path, rates):
    left = iter(rates)
    monkeypatch.setattr(CpuBench, "bandwidth", lambda self: next(left))
    few = ["--op", "merge", "--mode", "forward", "--contender", OURS, "--turns", "2"]
    assert main([*QUICK, *few, "--out", str(tmp_path / "run.json")]) == 0
    result = records.read(tmp_path / "run.json")
    assert result.environment["copy_bytes_per_s"] == 3e12
    assert not list(left)


@pytest.mark.gpu
def test_a_quick_run_on_a_gpu(tmp_path):
    out = tmp_path / "run.json"
    few = ["--op", "merge", "sublayer", "--tokens", "64", "--out", str(out)]
    ours = ["--contender", OURS, "reference"]  # other packages compile for minutes
    main(["run", "--quick", *few, *ours])
    result = records.read(out)
    assert len(result.cases) == 5
    for row in result.rows:
        assert row.contender in (OURS, EAGER, COMPILED, COMPILED_TF32)
        assert (row.status, row.fault) == ("ok", "")
        assert row.bytes > 0
        assert row.peak_bytes > 0
        assert 0 < records.percent_of_roofline(row, result.environment["copy_bytes_per_s"]) < 150
        if row.contender == OURS:
            assert row.captured
            assert row.launches >= 1
            assert row.host_us > 0
            assert (row.saved_bytes is not None) == (row.mode == "training")

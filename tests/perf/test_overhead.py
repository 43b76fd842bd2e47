"""`mhc-tile perf overhead`: slices joined in every way, their steps, what 100% is."""

import dataclasses
import itertools
import random
import statistics

import pytest
import torch

pytest.importorskip("tabulate")

import stand_ins
from mhc_tile import __main__, reference
from mhc_tile.perf import output, overhead, records, slices, tables
from mhc_tile.perf.__main__ import main
from mhc_tile.perf.bench import CpuBench
from mhc_tile.perf.breakdown import Breakdown
from mhc_tile.perf.overhead import measure
from mhc_tile.perf.peers import ADAPTERS
from mhc_tile.perf.records import OURS
from mhc_tile.perf.slices import NAMES, PLAIN, TF32, Slice, Step

TINY = ["--device", "cpu", "--model", "1m", "--layers", "1", "--batch", "1", "--sequence", "16"]
REAL = reference.merge
COMMAND = ["overhead", *TINY, "--turns", "2"]
PIECE = Slice("1m", layers=1, batch=1, sequence=16, device="cpu")
KINDS = [name for name in NAMES if not name.endswith(TF32) and name not in ADAPTERS]


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(slices, "compiled", lambda module, mode=None: module)


def measured(*names, piece=PIECE, bench=None):
    return measure(piece, bench or CpuBench(), output.Progress(), names, 2)


def test_an_overhead_is_the_mean_over_rounds(monkeypatch):
    """A GPU in two states, 2% apart: the ratio is 10% in both, and a disturbed turn is left out."""
    state = itertools.cycle([1.0, 1.02])
    turns = [next(state) for _ in range(16)]
    name = "hc (layers compiled)"
    planted = {PLAIN: [100 * s for s in turns], name: [110 * s for s in turns]}
    planted[name][3] *= 2
    series = iter([iter([7.0, *times]) for times in planted.values()])  # 7 warms up

    class Clock(overhead._Clock):
        def __init__(self, *args):
            super().__init__(*args)
            self._times = next(series)

        def __call__(self):
            self.taken.append(next(self._times))
            return self.taken[-1]

    monkeypatch.setattr(overhead, "_Clock", Clock)
    piece = dataclasses.replace(PIECE, layers=2)
    details = measure(piece, CpuBench(), output.Progress(), ("hc (l",), 16)[name].details
    assert details["overhead_percent"] == pytest.approx(10)
    assert details["overhead_error"] == pytest.approx(0, abs=1e-9)
    assert details["sublayer_us"] == pytest.approx(0.1 * 101 / 4)
    assert details["turns_us"] == planted[name]


def test_the_error_of_an_overhead_is_that_of_a_mean():
    rng = random.Random(0)
    plain = [100.0] * 16
    found = [
        overhead.longer([100 * rng.gauss(1.1, 0.01) for _ in plain], plain) for _ in range(2000)
    ]
    overs, errors = zip(*found, strict=True)
    assert statistics.fmean(overs) == pytest.approx(0.1, abs=1e-3)
    assert statistics.stdev(overs) == pytest.approx(statistics.fmean(errors), rel=0.05)
    assert overhead.longer([110.0], [100.0]) == (pytest.approx(0.1), 0.0)


def test_the_peak_holds_the_gradients(monkeypatch):
    steps, before = [], []
    monkeypatch.setattr(overhead, "Step", lambda *a, **k: steps.append(Step(*a, **k)) or steps[-1])

    class Bench(CpuBench):
        def memory(self, forward, backward):
            leaves = (steps[-1].x, *steps[-1].model.parameters())
            before.extend(leaf.grad for leaf in leaves)
            forward()
            assert all(leaf.grad is not None for leaf in leaves)
            return 1, None

    assert measured("residual (l", bench=Bench())[PLAIN].peak_bytes == 1
    assert len(before) > 2
    assert before == [None] * len(before)


def test_a_step_in_tf32_is_one(monkeypatch):
    seen, real = [], Step.__call__

    def step(self):
        with self._setting():
            seen.append(torch.get_float32_matmul_precision())
        real(self)

    monkeypatch.setattr(Step, "__call__", step)
    monkeypatch.setattr(overhead, "names_here", lambda device: slices.names_here("cuda"))
    monkeypatch.setattr(slices, "names_here", lambda device: [*KINDS, name])
    name = "hc (sublayers compiled, tf32)"
    rows = measured(name)
    assert [row.status for row in rows.values()] == ["ok", "ok"]
    assert seen.count("high") == seen.count("highest") > 2


def test_contenders_on_request_take_part_where_they_are_named():
    assert slices.ON_REQUEST[0] == "residual (eager)"
    assert list(measured("residual (e", "mhc_tile (e")) == [PLAIN, *slices.ON_REQUEST[::2]]
    assert not {*measured()} & {*slices.ON_REQUEST}


def test_a_run_end_to_end(tmp_path, capsys):
    path = tmp_path / "steps.json"
    assert __main__.main(["perf", *COMMAND, "--out", str(path)]) == 0
    said = capsys.readouterr()
    result = records.read(path)
    assert result.kind == "overhead"
    assert [row.contender for row in result.rows] == KINDS
    plain = result.rows[0]
    for row in result.rows:
        assert (row.status, row.fault, row.turns, row.tokens) == ("ok", "", 2, 16)
        over = row.details["overhead_percent"]
        pairs = zip(row.details["turns_us"], plain.details["turns_us"], strict=True)
        assert over == pytest.approx(sum(50 * (one / other - 1) for one, other in pairs), abs=0.1)
        assert row.details["sublayer_us"] == pytest.approx(over / 100 * plain.us / 2)
        assert (row.details["overhead_error"] == 0) == (row is plain)
        assert (row.error is None) == row.contender.startswith(("residual", "hc"))
        assert row.error is None or row.error < 0.02
    words = (
        "forward and backward of 1 layer of 1m without embedding and head, 1 x 16 tokens, bf16, "
        "plain residuals under torch.compile"
    )
    assert result.environment["denominator"] == {"1m/step/B1xS16/L1": words}
    assert "cases_left" not in result.environment
    assert f"100% is {words}\n" in said.out
    assert "us a sublayer" in said.out
    assert " s  1m/step/B1xS16/L1: 2 turns of 8\n" in said.err
    pytest.importorskip("matplotlib")
    assert main(["report", str(path)]) == 0
    assert words in path.with_suffix(".html").read_text()


def test_the_default_name_and_no_pictures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main([*COMMAND, "--contender", "hc", "--figures", "drawn"]) == 0
    rows = records.read(tmp_path / "overhead-cpu.json").rows
    assert [row.contender for row in rows] == [PLAIN, "hc (sublayers compiled)", KINDS[5]]
    assert "no pictures" in capsys.readouterr().out  # no breakdown on a CPU


def test_a_contender_that_there_is_not_is_named_before_anything_is_measured(tmp_path, capsys):
    out = tmp_path / "steps.json"
    assert main([*COMMAND, "--contender", "mhc", "ours", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "perf overhead: --contender must begin one of residual (compiled), " in said
    assert said.endswith("mhc_tile (graphs), got ours\n")
    for name in ("tile-kernels 1.2", "tile", "hc (compiled, tf32)"):  # not known, not here
        assert main([*COMMAND, "--contender", name, "--out", str(out)]) == 1
        assert f", got {name}\n" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("full", [PLAIN, "layers", "hc (layers compiled)"])
def test_as_many_layers_as_fit(monkeypatch, tmp_path, capsys, full):
    """The layers themselves, the plain ones or another contender's do not fit."""
    error = torch.OutOfMemoryError("CUDA out of memory")
    real, tried = overhead.Sublayers, []

    class Small(real):
        def __init__(self, piece):
            tried.append(piece.layers)
            super().__init__(piece)
            if piece.layers > 1 and full == "layers":
                raise error

        def contenders(self):
            found = super().contenders()
            if self.piece.layers > 1 and full in found:
                found[full] = stand_ins.raising(error)(None)
            return found

    monkeypatch.setattr(overhead, "Sublayers", Small)
    monkeypatch.setattr(slices, "LAYERS", 4)
    out = tmp_path / "steps.json"
    small = ["overhead", *TINY[:4], *TINY[6:], "--contender", "hc (l", "--turns", "1"]
    assert main([*small, "--out", str(out)]) == 0
    found = records.read(out)
    assert tried == [4, 2, 1]
    assert found.cases == list(found.environment["denominator"]) == [PIECE.key]
    assert {row.status for row in found.rows} == {"ok"}
    assert "memory is out: 1m/step/B1xS16/L2 instead" in capsys.readouterr().err
    main([*small, "--layers", "2", "--out", str(out)])
    assert records.read(out).cases == ["1m/step/B1xS16/L2"]
    assert "out of memory" in [row.status for row in records.read(out).rows]


def test_an_optimizer_is_part_of_every_contenders_step():
    rows = measured("hc (l", piece=Slice("1m", 1, 1, 16, optimizer=True, device="cpu"))
    assert [row.status for row in rows.values()] == ["ok", "ok"]
    assert rows[PLAIN].case == "1m/step+adamw/B1xS16/L1"


@pytest.mark.parametrize("package", ["tile-kernels", "liger-kernel"])
def test_peers_that_are_installed_take_part(monkeypatch, package):
    stand_ins.install(monkeypatch, package)
    rows = measured(package)
    assert list(rows) == [PLAIN, package]
    assert rows[package].status == "ok"
    assert rows[package].error < 0.02


def test_one_that_is_wrong_or_fails_is_a_row(monkeypatch):
    stand_ins.install(monkeypatch, "tile-kernels", merge=stand_ins.scaled(1.3))
    row = measured("tile")["tile-kernels"]
    assert (row.status, row.us) == ("wrong", None)
    assert "of output or gradient" in row.fault
    stand_ins.install(monkeypatch, "tile-kernels", merge=stand_ins.scaled(float("nan")))
    row = measured("tile")["tile-kernels"]
    assert (row.status, row.error) == ("wrong", None)
    stand_ins.without(monkeypatch, "tile-kernels")
    rows = measured("tile")
    assert rows["tile-kernels"].status == "failed"
    assert rows["tile-kernels"].fault.startswith("ModuleNotFoundError: ")
    assert rows[PLAIN].turns == 2


@pytest.mark.parametrize("after", [0, 8])  # when it is checked, when it is timed
def test_one_that_runs_out_of_memory_is_a_row(monkeypatch, after):
    full = stand_ins.raising(torch.OutOfMemoryError("CUDA out of memory\nTried"), after)
    stand_ins.install(monkeypatch, "tile-kernels", merge=full)
    rows = measured("tile", OURS)
    assert [row.status for row in rows.values()] == ["ok", "ok", "ok", "out of memory", "ok"]
    assert rows["tile-kernels"].fault == "OutOfMemoryError: CUDA out of memory"
    assert rows["tile-kernels"].us is None
    assert all(row.turns == 2 for row in rows.values() if row.status == "ok")


def test_layers_that_do_not_fit_are_a_row(monkeypatch):
    def full(piece):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(overhead, "Sublayers", full)
    rows = measured("hc (l")
    assert list(rows) == [PLAIN, "hc (layers compiled)"]
    assert {row.status for row in rows.values()} == {"out of memory"}
    assert rows[PLAIN].fault.startswith("the layers do not fit: OutOfMemoryError: ")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("no")])
def test_a_reference_that_fails_is_not_the_others_fault(monkeypatch, error):
    monkeypatch.setattr(slices.ReferenceConnection, "forward", stand_ins.raising(error)(None))
    rows = measured(OURS, "hc (l")
    assert rows["hc (layers compiled)"].turns == rows[PLAIN].turns == 2
    full = isinstance(error, torch.OutOfMemoryError)
    assert rows[OURS].status == ("out of memory" if full else "failed")
    said = "the reference, which results are checked against, fails: "
    assert rows[OURS].fault.startswith(said + type(error).__name__)


def test_what_is_right_keeps_what_sublayers_read_and_no_more():
    sublayers = slices.Sublayers(Slice("1m", layers=2, batch=1, sequence=16, device="cpu"))
    plain = torch.nn.Sequential(*map(slices.ReferenceConnection, sublayers.ours))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = sublayers.truth
    kept = [tensor for tensor in kept if tensor.numel()]  # torch 2.11 keeps an empty one, too
    assert len(kept) == len(sublayers.ours)
    expected = slices._differentiated(plain, *sublayers.inputs(OURS))
    assert all(map(torch.equal, found, expected))


def test_without_plain_residuals_there_are_times_but_no_overhead(monkeypatch):
    def broken(*layers):
        raise RuntimeError("no")

    monkeypatch.setattr(slices, "Residual", broken)
    rows = measured("hc (l")
    assert rows[PLAIN].status == "failed"
    assert rows["hc (layers compiled)"].us > 0
    assert "overhead_percent" not in rows["hc (layers compiled)"].details


@pytest.mark.parametrize("steps", [0, 1])  # while contenders are built, while they take turns
def test_an_interrupt_keeps_what_was_measured(monkeypatch, tmp_path, capsys, steps):
    calls, real = 0, overhead._Clock.__call__

    def clock(self):
        nonlocal calls
        calls += 1
        if calls > 5:  # a turn that warms up and one that counts, of two, then the plain one's
            raise KeyboardInterrupt
        return real(self)

    if steps:
        monkeypatch.setattr(overhead._Clock, "__call__", clock)
    else:
        monkeypatch.setattr(slices, "HyperConnection", stand_ins.raising(KeyboardInterrupt())(None))
    out = tmp_path / "steps.json"
    few = ["--contender", "hc (l", "--turns", "9", "--out", str(out)]
    assert main([*COMMAND, *few]) == 130
    rows = records.read(out).rows
    assert [row.turns for row in rows] == ([1, 1] if steps else [0])
    assert records.read(out).environment["cases_left"] == 1
    assert "interrupted" in capsys.readouterr().err


def test_what_is_killed_loses_the_slice_in_flight_alone(monkeypatch, tmp_path):
    kept, real = [], overhead.Sublayers

    def build(piece):
        kept.append(records.read(out).cases if out.exists() else [])
        return real(piece)

    monkeypatch.setattr(overhead, "Sublayers", build)
    out = tmp_path / "steps.json"
    few = ["--contender", "residual", "--turns", "1", "--out", str(out)]
    assert main([*COMMAND, *few, "--model", "1m", "2m-moe"]) == 0
    assert kept == [[], [PIECE.key]]


def test_a_gpu_that_answers_no_more_ends_the_run(monkeypatch, tmp_path, capsys):
    stand_ins.without(monkeypatch, "tile-kernels")
    monkeypatch.setattr(CpuBench, "recover", lambda self: False)
    out = tmp_path / "steps.json"
    assert main([*COMMAND, "--contender", "tile", "--out", str(out)]) == 1
    assert [row.status for row in records.read(out).rows] == ["ok", "failed"]
    assert "tile-kernels left the GPU unusable" in capsys.readouterr().out


def test_a_breakdown_that_fails_leaves_the_times(monkeypatch):
    def broken(step, us):
        raise RuntimeError("no profiler")

    monkeypatch.setattr(overhead, "breakdown", broken)
    monkeypatch.setattr(overhead._Clock, "__call__", lambda self: 7.0)
    bench = CpuBench()
    bench.device = "cuda"
    rows = measured("hc (l", bench=bench)
    assert [row.us for row in rows.values()] == [7.0, 7.0]
    assert rows[PLAIN].details["breakdown"] == "RuntimeError: no profiler"
    found = Breakdown(7.5, {"no kernel": 7.0}, {"gemm": 3.0})
    monkeypatch.setattr(overhead, "breakdown", lambda *_: found)
    rows = measured("hc (l", bench=bench)
    assert rows[PLAIN].parts == {"no kernel": 7.0}
    assert rows[PLAIN].details["kernels"] == {"gemm": 3.0}
    assert rows[PLAIN].details["profiled_us"] == 7.5
    text = tables.overhead("words", list(rows.values()))
    assert "ms under the profiler    step    no kernel" in text
    assert f"{PLAIN}      0.01    0.01" in text
    assert f"{PLAIN}: the GPU waited for the host for 100% of the step" in text


def test_a_turn_is_steps_in_a_row_under_their_own_load(monkeypatch):
    now, freed = 0, []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    class SixtyMilliseconds:
        def __call__(self):
            nonlocal now
            now += 60 if freed else 100  # the first turn is slow

        def free(self):
            freed.append(now)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = overhead._Clock(SixtyMilliseconds(), "cuda")
    assert [clock(), clock(), clock()] == [100_000, 60_000, 60_000]
    assert freed == [200, 200 + 2 * 3 * 60, 560 + 2 * 5 * 60]


@pytest.mark.parametrize("name", ["layers", "batch", "sequence", "turns"])
def test_numbers_below_1_are_refused(name, capsys):
    assert main([*COMMAND, f"--{name}", "0"]) == 1
    assert f"perf overhead: --{name} must be at least 1, got 0" in capsys.readouterr().err

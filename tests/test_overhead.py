"""`mhc-tile perf overhead`: slices joined in every way, their steps, what 100% is."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("tabulate")

import stand_ins
from mhc_tile import __main__, reference
from mhc_tile.autotune.timing import Sample
from mhc_tile.perf import connections, output, overhead, records, slices, tables
from mhc_tile.perf.__main__ import main
from mhc_tile.perf.bench import CpuBench
from mhc_tile.perf.breakdown import Breakdown
from mhc_tile.perf.environment import version
from mhc_tile.perf.overhead import measure
from mhc_tile.perf.records import OURS
from mhc_tile.perf.slices import NAMES, PEERS, PLAIN, TF32, Slice, Step, Sublayers

TINY = ["--device", "cpu", "--model", "1m", "--layers", "1", "--batch", "1", "--sequence", "16"]
REAL = reference.merge
COMMAND = ["overhead", *TINY, "--turns", "2"]
PIECE = Slice("1m", layers=1, batch=1, sequence=16, device="cpu")
KINDS = [name for name in NAMES if not name.endswith(TF32) and name not in PEERS]


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(slices, "compiled", lambda module: module)


def measured(*names, piece=PIECE, bench=None):
    return measure(piece, bench or CpuBench(), output.Progress(), names, 2)


def test_an_overhead_has_the_error_of_a_ratio(monkeypatch):
    name = "hc (layers compiled)"
    samples = {PLAIN: Sample(100, 99, 101, 16), name: Sample(200, 199, 201, 16)}
    monkeypatch.setattr(overhead, "rounds", lambda *_: iter([samples]))
    details = measured("hc (l")[name].details
    assert details["overhead_percent"] == 100
    # d(s / p) = ds / p and s / p^2 * dp, of 0.372 us each: 0.37% and 0.74%
    assert details["overhead_error"] == pytest.approx(100 * math.hypot(0.00372, 0.00744), rel=0.01)


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
        assert row.details["overhead_percent"] == pytest.approx(100 * (row.us / plain.us - 1))
        assert row.details["sublayer_us"] == pytest.approx((row.us - plain.us) / 2)
        assert (row.details["overhead_error"] == 0) == (row is plain)
        assert (row.error is None) == row.contender.startswith(("residual", "hc"))
        assert row.error is None or row.error < 0.02
    words = (
        "forward and backward of 1 layer of 1m without embedding and head, 1 x 16 tokens, bf16, "
        "plain residuals under torch.compile"
    )
    assert result.environment["denominator"] == {"1m/step/B1xS16/L1": words}
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


def test_names_and_words():
    assert Slice("paper-27b").key == "paper-27b/step/B2xS4096/L4"
    assert " of 4 layers of paper-27b without embedding" in Slice("paper-27b").denominator
    trained = Slice("1m", layers=2, optimizer=True)
    assert trained.key == "1m/step+adamw/B2xS4096/L2"
    assert trained.denominator.startswith("forward, backward and AdamW of 2 layers of 1m")


def test_a_contender_that_there_is_not_is_named_before_anything_is_measured(tmp_path, capsys):
    out = tmp_path / "steps.json"
    assert main([*COMMAND, "--contender", "mhc", "ours", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "perf overhead: --contender must begin one of residual (compiled), " in said
    assert said.endswith("liger-kernel, got ours\n")
    assert not out.exists()


def test_tf32_is_for_those_who_say_so_and_only_meanwhile():
    sublayers, seen = Sublayers(PIECE), []
    assert not any(name.endswith(TF32) for name in sublayers.contenders())
    sublayers.piece = dataclasses.replace(PIECE, device="cuda")
    assert [n for n in sublayers.contenders() if n not in PEERS] == [*NAMES[: -len(PEERS)]]
    sublayers.piece = PIECE
    sublayers.truth  # noqa: B018 - it is kept, and not looked at below

    def look(*_):
        seen.append(torch.get_float32_matmul_precision())

    for layer in sublayers.layers:
        layer.register_forward_pre_hook(look)
        layer.register_full_backward_pre_hook(look)
    before = torch.get_float32_matmul_precision()
    for name in ("reference (compiled, tf32)", "reference (layers compiled)"):
        model, (x, grad) = slices.ReferenceConnection(sublayers.ours[0]), sublayers.inputs(name)
        sublayers.error(name, model, x)
        Step(model, x, grad, [], tf32=name.endswith(TF32))()
        assert torch.get_float32_matmul_precision() == before
    assert seen == ["high"] * 4 + [before] * 4


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


def test_a_slice_of_a_mixture_has_experts_in_every_layer():
    config = Slice("paper-27b", layers=3).config
    assert (config.num_layers, config.moe.leading_dense_layers) == (3, 0)
    assert Slice("1m").config.moe is None
    assert Sublayers(Slice("2m-moe", layers=1, batch=1, sequence=8, device="cpu")).streams == 4


def test_all_ways_share_their_weights():
    sublayers = Sublayers(PIECE)
    own = {id(p) for layer in sublayers.layers for p in layer.parameters()}
    ours = {id(p) for c in sublayers.ours for p in (c.phi, c.alpha, c.bias)}
    assert list(sublayers.contenders()) == [n for n in NAMES if n in KINDS or version(n)]
    for name, build in sublayers.contenders().items():
        found = {id(parameter) for parameter in build().parameters()}
        assert own <= found, name
        assert (ours <= found) == name.startswith((OURS, "reference")), name
    assert all(p.dtype == torch.bfloat16 for layer in sublayers.layers for p in layer.parameters())
    assert all(c.phi.dtype == torch.float32 for c in sublayers.ours)


@pytest.mark.parametrize("optimizer", [False, True])
def test_a_step_leaves_the_weights_as_they_are(optimizer):
    sublayers = Sublayers(PIECE)
    model = sublayers.contenders()[OURS]()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    piece = Slice("1m", optimizer=optimizer)
    optimizers = overhead._optimizer(piece, model.parameters())
    assert len(optimizers) == optimizer
    step = Step(model, *sublayers.inputs(OURS), optimizers)
    step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    step()
    again = [parameter.grad for parameter in model.parameters()]
    assert all(one.equal(other) for one, other in zip(grads, again, strict=True))
    after = list(model.parameters())
    assert all(one.equal(other) for one, other in zip(before, after, strict=True))
    step.free()
    assert all(leaf.grad is None for leaf in (step.x, *model.parameters()))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("merge", lambda x, output, h_post, h_res: REAL(x, output, h_post, h_res.mT)),
        ("merge", lambda x, output, h_post, h_res: REAL(x, output, h_post, 0 * h_res + 0.25)),
        ("merge", lambda x, output, h_post, h_res: REAL(x, output, 0 * h_post + 1, h_res)),
        ("merge", lambda x, output, h_post, h_res: REAL(x, 0 * output, h_post, h_res)),
        ("merge", lambda x, *maps: REAL(x.detach(), *maps)),  # half a backward
    ],
)
@pytest.mark.parametrize("model", ["1m", "2m-moe"])
def test_the_check_bites(monkeypatch, name, wrong, model):
    sublayers = Sublayers(Slice(model, layers=2, batch=1, sequence=16, device="cpu"))
    right = sublayers.contenders()["reference (layers compiled)"]()
    x, _ = sublayers.inputs(OURS)
    assert sublayers.error("reference", right, x) < 0.02
    monkeypatch.setattr(connections.reference, name, wrong)
    assert sublayers.error("reference", right, x) > overhead.TOLERANCE


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
    assert [row.status for row in rows.values()] == ["ok", "ok", "ok", "out of memory"]
    assert rows["tile-kernels"].fault == "OutOfMemoryError: CUDA out of memory"
    assert rows["tile-kernels"].us is None
    assert all(row.turns == 2 for row in rows.values() if row.status == "ok")


def test_layers_that_do_not_fit_are_a_row(monkeypatch):
    def full(piece):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(overhead, "Sublayers", full)
    (row,) = measured().values()
    assert (row.contender, row.status) == (OURS, "out of memory")


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

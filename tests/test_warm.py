"""`mhc-tile perf run --warm`: several processes compile what the run then finds in its caches."""

import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys

import pytest

pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

from mhc_tile.autotune import worker
from mhc_tile.perf import output, records, suite, warm
from mhc_tile.perf.__main__ import main
from mhc_tile.perf.bench import CpuBench
from mhc_tile.perf.operations import Case, cases
from mhc_tile.perf.records import OURS
from mhc_tile.perf.suite import COMPILED, EAGER

SMALL = Case("merge", "inference", 8, 16, dtype="float32")
RUN = ["run", "--device", "cpu", "--op", "merge", "--mode", "inference", "--turns", "2"]
OURS_ALONE = functools.partial(str.startswith, OURS)  # of a name, whether ours begins with it


def test_every_case_is_in_one_shape_and_the_slowest_come_first():
    shapes = warm.by_shape(cases())
    assert sorted(case.key for of in shapes.values() for case in of) == sorted(
        case.key for case in cases()
    )
    assert all((case.tokens, case.hidden_size) == at for at, of in shapes.items() for case in of)
    widths = [width for _, width in shapes]
    assert widths == sorted(widths, reverse=True)
    assert next(at for at in shapes if at[1] == 2560) == (8192, 2560)  # every op is there


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_the_run_finds_what_was_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))

    def libraries():
        return {path.name for path in (tmp_path / "inductor").rglob("*.so")}

    quick = cases(quick=True, device="cpu", ops=["merge"])[:1]
    warm.compile_first(quick, functools.partial(suite._wanted, names=(COMPILED,)), "cpu")
    before, out = libraries(), tmp_path / "run.json"
    asked = [*RUN, "--quick", "--contender", COMPILED, "--out", str(out)]
    # another process: this one has other settings, for tests
    subprocess.run([sys.executable, "-m", "mhc_tile.perf", *asked], check=True)
    assert [row.status for row in records.read(out).rows] == ["ok"]
    assert before
    assert libraries() == before


def test_a_run_says_what_it_compiles_first(tmp_path, capsys):
    out = tmp_path / "run.json"
    assert main([*RUN, "--contender", OURS, "--warm", "--jobs", "2", "--out", str(out)]) == 0
    assert [row.turns for row in records.read(out).rows] == [2, 2]
    said = [line[7:] for line in capsys.readouterr().err.splitlines()]
    assert {" s  64x64: compiled", " s  256x128: compiled"} < {*said}
    assert said[2].startswith(" s  2 shapes compiled by 2 processes in ")
    assert said[3] == " s  merge/inference/64x64/n4/float32"


def test_a_process_that_dies_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(warm, "_HANDLER", f"{__name__}:dying")
    out = tmp_path / "run.json"
    assert main([*RUN, "--contender", EAGER, "--quick", "--warm", "--out", str(out)]) == 0
    assert "64x64: the process died of SIGKILL\n" in capsys.readouterr().err
    assert [row.status for row in records.read(out).rows] == ["ok"]


def dying(*_):
    return lambda task: os.kill(os.getpid(), signal.SIGKILL)


def test_an_interrupt_ends_the_processes(tmp_path, monkeypatch, capsys):
    started = []

    class Interrupted(worker.Worker):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self)

        def message(self, seconds):
            raise KeyboardInterrupt

    monkeypatch.setattr(worker, "Worker", Interrupted)
    out = tmp_path / "run.json"
    assert main([*RUN, "--contender", OURS, "--warm", "--jobs", "2", "--out", str(out)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(started) == 2
    for one in started:
        with pytest.raises(ProcessLookupError):
            os.kill(one.pid, 0)
    assert not out.exists()


def test_who_has_no_memory_beside_the_others_is_said_once(monkeypatch):
    row = suite._row(SMALL, OURS, None, status="out of memory", fault="CUDA out of memory")
    monkeypatch.setattr(suite, "measure", lambda *_, **__: {OURS: row})
    again = dataclasses.replace(SMALL, mode="training")
    (left,) = warm.handler("cpu", OURS_ALONE)(((8, 16), [SMALL, again]))
    assert left == [f"{OURS} had no memory beside the others"]


def test_a_gpu_that_answers_no_more_ends_a_shape(monkeypatch):
    def lost(*_, **__):
        raise output.UnusableError("mhc_tile left the GPU unusable")

    monkeypatch.setattr(suite, "measure", lost)
    (left,) = warm.handler("cpu", OURS_ALONE)(((8, 16), [SMALL]))
    assert left == ["mhc_tile left the GPU unusable"]


def test_one_turn_of_those_that_are_wanted(monkeypatch):
    turns, real = [], CpuBench.timed

    def timed(self, function, sets):
        found = real(self, function, sets)
        return dataclasses.replace(found, timer=lambda: turns.append(1) or 1.0)

    monkeypatch.setattr(CpuBench, "timed", timed)
    assert warm.handler("cpu", OURS_ALONE)(((8, 16), [SMALL])) == [[]]
    assert turns == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "3"], "perf run: --jobs must come with --warm, got --jobs 3 alone"),
        (["--warm", "--jobs", "0"], "perf run: --jobs must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

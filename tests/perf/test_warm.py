"""`mhc-tile perf run --warm`: several processes compile what the run then finds in its caches."""

import dataclasses
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch._inductor.config as inductor

pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

from mhc_tile.autotune import worker
from mhc_tile.perf import bench, output, records, suite, warm
from mhc_tile.perf.__main__ import main
from mhc_tile.perf.bench import CpuBench
from mhc_tile.perf.operations import Case, cases
from mhc_tile.perf.peers import is_asked
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
    warm.compile_first(quick, functools.partial(is_asked, names=(COMPILED,)), "cpu")
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
    assert said[0] == " s  shapes to compile: 2, processes: 2"
    assert {*said[1:3]} == {" s  64x64: compiled", " s  256x128: compiled"}
    assert re.fullmatch(r" s  compiled in \d+ s; now the run", said[3])
    assert said[4] == " s  merge/inference/64x64/n4/float32"


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
    assert started
    for one in started:
        with pytest.raises(ProcessLookupError):
            os.kill(one.pid, 0)
    assert not out.exists()


def left(monkeypatch, *measured):
    """What a process says of a shape whose cases end so: rows, or errors."""
    ends = iter(measured)

    def measure(*_, **__):
        end = next(ends)
        if isinstance(end, Exception):
            raise end
        return {row.contender: row for row in end}

    monkeypatch.setattr(suite, "measure", measure)
    (said,) = warm.handler("cpu", OURS_ALONE)(((8, 16), [SMALL] * len(measured)))
    return said


def test_what_is_not_compiled_is_said_once(monkeypatch):
    def row(name, status):
        return suite._row(SMALL, name, None, status=status, fault="" if status == "ok" else "why")

    full, failed = row(OURS, "out of memory"), row(COMPILED, "failed")
    said = left(monkeypatch, [full], [row(OURS, "ok"), failed], [full, row(EAGER, "wrong")])
    assert said == [
        f"{OURS} had no memory beside the others",
        f"{COMPILED} failed, which the run will show",
    ]


def test_a_case_that_breaks_costs_no_other(monkeypatch):
    said = left(monkeypatch, RuntimeError("no inputs\nfor it"), [])
    assert said == [f"{SMALL.key}: RuntimeError: no inputs"]


def test_a_gpu_that_answers_no_more_costs_one_shape(monkeypatch):
    monkeypatch.setattr(warm, "_HANDLER", f"{__name__}:losing")
    shapes = [dataclasses.replace(SMALL, hidden_size=width) for width in (64, 32, 16)]
    said = []
    monkeypatch.setattr(output.Progress, "note", lambda self, text: said.append(text))
    warm.compile_first(shapes, OURS_ALONE, "cpu", 1)
    assert said[1:4] == ["8x64: mhc_tile left the GPU unusable", "8x32: compiled", "8x16: compiled"]


def losing(device, wanted):
    """A process whose GPU is lost with C = 64, and stays so."""

    def measure(case, *_, **__):
        if case.hidden_size == 64:
            suite.measure = broken
            raise output.UnusableError("mhc_tile left the GPU unusable")
        return {}

    def broken(*_, **__):
        raise RuntimeError("an illegal memory access was encountered")

    suite.measure = measure
    return warm.handler(device, wanted)


def test_one_turn_of_those_that_are_wanted(monkeypatch):
    turns, real = [], CpuBench.timed

    def timed(self, function, sets):
        found = real(self, function, sets)
        return dataclasses.replace(found, timer=lambda: turns.append(1) or 1.0)

    def bench_of(device, fewest_sets):
        assert (device, fewest_sets) == ("cpu", 2)  # the others need memory, too
        return CpuBench()

    monkeypatch.setattr(CpuBench, "timed", timed)
    monkeypatch.setattr(bench, "bench_of", bench_of)
    with inductor.patch(compile_threads=7):  # monkeypatch would leave Inductor without it
        assert list(warm.handler("cpu", OURS_ALONE)(((8, 16), [SMALL]))) == [[]]
        assert inductor.compile_threads == 1
    assert turns == [1]


@pytest.mark.parametrize(("free", "expected"), [(140, 16), (80, 13), (1, 1)])
def test_processes_are_as_many_as_cores_and_memory_allow(monkeypatch, free, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 2**30, 140 * 2**30))
    assert warm._processes("cuda") == expected
    assert warm._processes("cpu") == 16


def test_a_terminal_s_ctrl_c_is_the_parent_s_alone(tmp_path):
    out = tmp_path / "run.json"
    asked = [*RUN, "--contender", OURS, "--warm", "--jobs", "2", "--out", str(out)]
    group = subprocess.Popen(
        [sys.executable, "-c", SIGINT_ANYWAY, "-m", *asked], start_new_session=True,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in group.stderr:
        if "to compile" in line:
            break
    time.sleep(0.5)  # its processes import
    os.killpg(group.pid, signal.SIGINT)
    said = group.stderr.read()
    assert group.wait() == 130
    assert said == "\nperf: interrupted\n"


SIGINT_ANYWAY = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs it behind &
from mhc_tile.perf.__main__ import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
"""


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

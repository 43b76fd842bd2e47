"""The tuner without a GPU: planted mistakes in real worker processes, resuming, choosing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("tilelang")

from fake_bench import name
from mhc_tile.autotune import compiling, registry, table, tuner
from mhc_tile.autotune.configs import encode
from mhc_tile.autotune.journal import Journal, name_of
from mhc_tile.autotune.measuring import Candidate, Measurer, Outcome
from mhc_tile.autotune.problems import Problem, Shape, problems
from mhc_tile.autotune.registry import Target
from mhc_tile.autotune.timing import Sample
from mhc_tile.kernels.common.static import Resources
from mhc_tile.kernels.merge import BackwardConfig, ForwardConfig

TARGET = Target("sm_90a", 132)
FAKE = "fake_bench:FakeBench"
PROBLEM = Problem("merge", 4, 2560, "bfloat16", 64)


def candidates(*threads: int, order: object = ()) -> tuple[Candidate, ...]:
    return tuple(Candidate(ForwardConfig(count), order) for count in threads)


def plant(monkeypatch, tmp_path: Path, **planted: object) -> Path:
    """Times or mistakes of configurations by their number of threads, t64=..; the log of runs."""
    values = {f"{key[1:]},1": what for key, what in planted.items()}
    log = tmp_path / "runs.log"
    monkeypatch.setenv("FAKE_BENCH", json.dumps(values))
    monkeypatch.setenv("FAKE_BENCH_LOG", str(log))
    return log


def measured(
    monkeypatch, tmp_path, options, seconds: float = 20.0, known=(), grads: int = 0, **planted
) -> tuple[dict[int, Outcome], list[int]]:
    """Outcomes, and the indices in the order in which they were kept."""
    plant(monkeypatch, tmp_path, **planted)
    kept: list[int] = []
    with Measurer(seconds=seconds, bench=FAKE, log=tmp_path / "worker.log") as measurer:
        outcomes = measurer.measure(
            PROBLEM, options, dict(known), lambda index, _: kept.append(index), grads
        )
    return outcomes, kept


def test_right_candidates_are_timed_and_hopeless_ones_dropped(monkeypatch, tmp_path):
    outcomes, _ = measured(
        monkeypatch, tmp_path, candidates(32, 64, 96, 128), t32=10.0, t64=9.0, t96=11.5, t128=10.7
    )
    assert [outcomes[i].status for i in range(4)] == ["measured", "measured", "slow", "measured"]
    assert outcomes[1].sample == Sample(9.0, 9.0, 9.0, 20)
    assert "1.15 times the default" in outcomes[2].why


def test_wrong_candidates_are_rejected_with_the_reason(monkeypatch, tmp_path):
    outcomes, _ = measured(
        monkeypatch, tmp_path, candidates(32, 64, 96, 128, 160),
        t64="is wrong", t96="leaves a hole", t128="races", t160="adds in another order",
    )  # fmt: skip
    assert outcomes[0].status == "measured"
    assert [outcomes[i].status for i in range(1, 5)] == ["rejected"] * 4
    assert outcomes[1].why == "wrong: result 0 must have the default's bits, got others"
    assert outcomes[2].why.startswith("wrong: result 1 must have the default's bits")


def test_another_order_of_sums_may_round_otherwise_but_not_be_wrong(monkeypatch, tmp_path):
    options = candidates(32) + candidates(64, 96, 128, order="other")
    outcomes, _ = measured(
        monkeypatch, tmp_path, options,
        t64="adds in another order", t96="is wrong", t128="leaves a hole",
    )  # fmt: skip
    assert [outcomes[i].status for i in range(4)] == ["measured"] * 2 + ["rejected"] * 2
    assert "result 0 must be within 3.1e-05 of the default's" in outcomes[2].why
    assert "got nan" in outcomes[3].why


def test_gradients_of_parameters_may_round_otherwise(monkeypatch, tmp_path):
    planted = {"t64": "rounds the sums"}
    for grads, status in ((0, "rejected"), (1, "measured")):
        outcomes, _ = measured(monkeypatch, tmp_path, candidates(32, 64), grads=grads, **planted)
        assert outcomes[1].status == status


def test_what_hangs_crashes_or_dies_ends_a_candidate_and_not_the_run(monkeypatch, tmp_path):
    begin = time.monotonic()
    outcomes, _ = measured(
        monkeypatch, tmp_path, candidates(32, 64, 96, 128, 160, 192, 224), seconds=3.0,
        t64="hangs", t96="dies", t128="crashes", t160="breaks the GPU", t192=9.0, t224="asserts",
    )  # fmt: skip
    assert outcomes[1].why == "hung: no answer for 3 s"
    assert outcomes[2].why == "crashed: the process died of SIGSEGV"
    for index in (3, 4):
        assert outcomes[index].why == "crashed: RuntimeError: an illegal memory access"
    assert outcomes[6].why == "crashed: AssertionError: "
    assert [outcomes[i].status for i in (0, 5)] == ["measured"] * 2
    assert outcomes[5].sample.us == 9.0
    assert time.monotonic() - begin < 120
    # a process that is broken is replaced, and nothing but the default is run again
    runs = (tmp_path / "runs.log").read_text().split()
    assert runs.count("32,1") == 4
    assert all(runs.count(f"{threads},1") == 1 for threads in (64, 96, 128, 160, 192, 224))


def test_however_many_break_the_gpu_the_others_are_measured(monkeypatch, tmp_path):
    broken = {f"t{threads}": "breaks the GPU" for threads in (64, 96, 128, 160)}
    options = candidates(32, 64, 96, 128, 160, 192)
    outcomes, _ = measured(monkeypatch, tmp_path, options, t192=8.0, **broken)
    assert [outcomes[i].status for i in range(1, 5)] == ["rejected"] * 4
    assert outcomes[5].sample.us == 8.0


def test_what_fails_among_the_finalists_is_rejected_and_the_others_are_timed(monkeypatch, tmp_path):
    outcomes, kept = measured(monkeypatch, tmp_path, candidates(32, 64, 96), t64="tires", t96=9.0)
    assert outcomes[1].why == "crashed: RuntimeError: unspecified launch failure"
    assert outcomes[2].sample.us == 9.0
    assert kept.count(1) == 2  # slow at first, then rejected


@pytest.mark.parametrize(
    ("does", "why"),
    [
        ("hangs", "got no answer for 3 s"),
        ("dies", "got the process died of SIGSEGV"),
        ("races", "got RuntimeError: measure: the default must be deterministic: result 0"),
        ("crashes", "got RuntimeError: an illegal memory access"),
    ],
)
def test_a_default_that_fails_is_an_error_that_names_the_problem(monkeypatch, tmp_path, does, why):
    said = f"merge 64 x 2560, n 4, bfloat16: the default must run, {why}"
    with pytest.raises(RuntimeError, match=said):
        measured(monkeypatch, tmp_path, candidates(32, 64), seconds=3.0, t32=does)


def test_known_outcomes_are_not_measured_again(monkeypatch, tmp_path):
    known = {1: Outcome("rejected", "wrong"), 2: Outcome("slow", ratio=0.9)}
    outcomes, kept = measured(
        monkeypatch, tmp_path, candidates(32, 64, 96, 128), known=known.items(), t96=9.0, t128=9.9
    )
    assert (tmp_path / "runs.log").read_text().split() == ["32,1", "128,1"]
    assert outcomes[1] == known[1]
    assert outcomes[2].sample == Sample(9.0, 9.0, 9.0, 20)
    assert 1 not in kept


# Plans and pruning


def compiled_as(monkeypatch, **results: object) -> tuner.Plan:
    """The plan of PROBLEM once its programs take what is given by threads and vectors."""
    taken = {"t160_1": (Resources("k", 64, 0, 0, 0, 0, 0, 160),)}

    def compile_all(jobs, **_):
        for job in jobs:
            threads, vectors = job.constants[-2:]
            yield job, results.get(f"t{threads}_{vectors}", taken["t160_1"])

    monkeypatch.setattr(compiling, "compile_all", compile_all)
    plan = tuner.plan(PROBLEM, TARGET)
    assert tuner.compile_plans([plan], processes=1) == len(plan.options) == 5
    return plan


def test_what_spills_cannot_launch_or_does_not_compile_is_pruned(monkeypatch):
    plan = compiled_as(
        monkeypatch,
        t320_1=(Resources("k", 64, 0, 0, 48, 0, 0, 128),),
        t96_1=(Resources("k", 64, 0, 0, 0, 0, 240_000, 128),),
        t160_1="RuntimeError: nvcc is unhappy",
        t96_2=(Resources("k", 255, 0, 0, 0, 0, 0, 1024),),
    )
    assert [name(option.config) for option in plan.candidates] == ["160,2"]
    assert {name(option.config): option.pruned for option in plan.options} == {
        "160,2": "",
        "320,1": "k keeps 48 bytes of a thread in local memory",
        "160,1": "does not compile: RuntimeError: nvcc is unhappy",
        "96,1": "k needs 240000 bytes of shared memory, of 232448 on sm_90a",
        "96,2": "k needs 262144 registers a block, of 65536",
    }


def test_the_default_is_measured_whatever_it_takes_but_must_compile(monkeypatch):
    plan = compiled_as(monkeypatch, t160_2=(Resources("k", 64, 0, 0, 48, 0, 0, 128),))
    assert plan.candidates[0] is plan.options[0]
    plan = compiled_as(monkeypatch, t160_2="no")
    assert plan.failed == "merge 64 x 2560, n 4, bfloat16: the default must compile, got no"


def test_what_a_launcher_refuses_is_pruned(monkeypatch):
    config = registry.KERNELS["pre"].load().persistent.Config(members=20, teams=13)
    real = registry.candidates
    monkeypatch.setattr(registry, "candidates", lambda *asked: [*real(*asked), config])
    plan = tuner.plan(Problem("pre", 4, 2560, "bfloat16", 8192), TARGET)
    assert plan.options[-1].pruned.startswith("refused: pre: config must launch")
    assert all(not option.pruned for option in plan.options[:-1])


def test_shapes_without_a_choice_are_not_measured():
    plan = tuner.plan(Problem("pre", 4, 2560, "float32", 64), TARGET)
    assert "one configuration" in plan.idle
    report = tuner.measure_plans([plan], None, None)  # touches neither journal nor worker
    assert not report.failed


# Journals and resuming


def test_a_journal_remembers_what_was_written_but_not_of_other_code(tmp_path):
    journal = Journal(tmp_path / "j.jsonl", "code")
    config = encode(ForwardConfig(96))
    outcome = Outcome("measured", ratio=0.9, sample=Sample(1.0, 0.9, 1.1, 20))
    journal.add(PROBLEM, config, Outcome("slow", "why", 1.5))
    journal.add(PROBLEM, config, outcome)
    journal.note_bandwidth(4e12)
    assert PROBLEM not in journal.complete
    journal.finish(PROBLEM)
    again = Journal(tmp_path / "j.jsonl", "code")
    assert again.outcomes[PROBLEM] == {name_of(config): outcome}
    assert list(again.complete) == [PROBLEM]
    assert again.bandwidth == 4e12
    assert not Journal(tmp_path / "j.jsonl", "other").outcomes[PROBLEM]
    again.forget(PROBLEM)
    assert not Journal(tmp_path / "j.jsonl", "code").outcomes[PROBLEM]


def test_a_journal_sees_what_another_tuner_appends(tmp_path):
    one, other = (Journal(tmp_path / "j.jsonl", "code") for _ in range(2))
    one.add(PROBLEM, encode(ForwardConfig(32)), Outcome("slow"))
    other.add(PROBLEM, encode(ForwardConfig(64)), Outcome("slow"))
    other.finish(PROBLEM, "580.1")
    one.refresh()
    assert len(one.outcomes[PROBLEM]) == len(other.outcomes[PROBLEM]) == 2
    date, driver = one.complete[PROBLEM]
    assert driver == "580.1"
    assert len(date) == len("YYYY-MM-DD")


def test_a_torn_line_costs_no_other(tmp_path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path, "code")
    for threads in (32, 64, 96):
        journal.add(PROBLEM, encode(ForwardConfig(threads)), Outcome("slow"))
    path.write_bytes(path.read_bytes()[:-20])
    again = Journal(path, "code")
    assert len(again.outcomes[PROBLEM]) == 2
    again.add(PROBLEM, encode(ForwardConfig(128)), Outcome("slow"))
    assert len(Journal(path, "code").outcomes[PROBLEM]) == 3


SHAPES = (Shape(2560, tokens=(16, 64, 4096)),)
TIMES = {"160,2": 10.0, "320,1": 9.0, "160,1": 9.05, "96,1": 9.9, "96,2": "is wrong"}


def run(journal_path: Path, table_path: Path, **options) -> tuner.Report:
    """Measure merge at three numbers of tokens on the fake GPU and write its table."""
    from tables import DEVICE

    plans = [tuner.plan(problem, TARGET) for problem in problems(SHAPES, ["merge"])]
    journal = Journal(journal_path, "code")
    with Measurer(seconds=30.0, bench=FAKE) as measurer:
        report = tuner.measure_plans(plans, journal, measurer, **options)
    wanted = [plan.problem for plan in plans]
    table.update(table_path, DEVICE, tuner.families(journal, wanted, TARGET))
    return report


@pytest.fixture
def fake(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("FAKE_BENCH", json.dumps(TIMES))
    monkeypatch.setenv("FAKE_BENCH_LOG", str(tmp_path / "runs.log"))
    return tmp_path


def runs(folder: Path) -> list[str]:
    path = folder / "runs.log"
    return path.read_text().split() if path.exists() else []


def test_a_table_is_what_was_measured(fake):
    run(fake / "j", fake / "t.json")
    (family,) = table.read(fake / "t.json").families.values()
    assert set(family.entries) == {16, 64, 4096}
    entry = family.entries[64]
    # 160 threads are no slower beyond the noise, but come later
    assert entry.config == {"type": "merge.ForwardConfig", "threads": 320, "vectors": 1}
    assert (entry.us, entry.default_us, entry.default) == (9.0, 10.0, False)


def test_a_second_run_measures_nothing_and_force_everything(fake):
    run(fake / "j", fake / "t.json")
    before, text = len(runs(fake)), (fake / "t.json").read_bytes()
    run(fake / "j", fake / "t.json")
    assert len(runs(fake)) == before
    run(fake / "j", fake / "t.json", force=True)
    assert len(runs(fake)) == 2 * before
    assert (fake / "t.json").read_bytes() == text


def test_a_candidate_that_did_not_compile_then_is_measured_now(fake, monkeypatch):
    real = tuner.plan

    def without_one(problem: Problem, target: Target) -> tuner.Plan:
        plan = real(problem, target)
        next(o for o in plan.options if name(o.config) == "320,1").pruned = "no time to compile"
        return plan

    monkeypatch.setattr(tuner, "plan", without_one)
    run(fake / "j", fake / "t.json")
    assert "320,1" not in runs(fake)
    monkeypatch.undo()
    monkeypatch.setenv("FAKE_BENCH", json.dumps(TIMES))
    run(fake / "j", fake / "t.json")
    (family,) = table.read(fake / "t.json").families.values()
    assert family.entries[64].config["threads"] == 320


def test_a_budget_begins_nothing_more_and_the_next_run_goes_on(fake):
    report = run(fake / "j", fake / "t.json", budget=0.0)
    assert len(report.left) == 3
    assert not runs(fake)
    assert not table.read(fake / "t.json").families
    assert not run(fake / "j", fake / "t.json").left
    assert len(table.read(fake / "t.json").families) == 1


def test_a_problem_that_fails_is_named_and_the_others_are_measured(fake, monkeypatch):
    monkeypatch.setenv("FAKE_BENCH", json.dumps({**TIMES, "160,2": "crashes"}))
    report = run(fake / "j", fake / "t.json")
    assert len(report.failed) == 3
    assert "merge 4096 x 2560" in report.failed[0]


def test_killed_at_three_points_and_resumed_it_is_the_same_table(fake):
    run(fake / "whole", fake / "whole.json")
    once, own = len(runs(fake)), Path(__file__).parent
    folders = [str(own.parent), str(own)]
    (fake / "runs.log").unlink()
    code = (
        f"import sys; sys.path[:0] = {folders!r}\nfrom pathlib import Path\n"
        f"from test_tuner import run\nif __name__ == '__main__':\n"
        f"    run(Path({str(fake / 'j')!r}), Path({str(fake / 't.json')!r}))\n"
    )
    script = fake / "script.py"
    script.write_text(code)
    journal = fake / "j"
    for lines in (2, 9, 17):  # outcomes after which it is killed
        process = subprocess.Popen([sys.executable, str(script)])
        while process.poll() is None:
            if journal.exists() and len(journal.read_text().splitlines()) >= lines:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        assert process.wait() == -signal.SIGKILL
    run(journal, fake / "t.json")
    assert (fake / "t.json").read_bytes() == (fake / "whole.json").read_bytes()
    # after each kill nothing is run again but the default and the candidate in flight
    assert len(runs(fake)) <= once + 3 * 2


def test_sums_over_tokens_have_bits_of_their_own():
    """Results that the bits are not asked of are the gradients of parameters, and the last ones."""
    for kernel, grads in (("pre_backward", 3), ("mapping_backward", 3), ("merge_backward", 0)):
        assert registry.KERNELS[kernel].parameter_grads == grads
    order = registry.KERNELS["merge_backward"].order
    assert order(BackwardConfig(32, 8, 16)) == order(BackwardConfig(32, 8, 20))
    assert order(BackwardConfig(32, 8)) != order(BackwardConfig(64, 8))


def test_a_journal_that_has_no_room_for_a_line_says_so_and_loses_no_other(tmp_path, monkeypatch):
    kept, real = Journal(tmp_path / "gpu.jsonl", "code"), os.write
    kept.note_bandwidth(3e12)
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:5]))
    with pytest.raises(OSError, match=r"the journal must take a whole line, got a part of it in "):
        kept.note_bandwidth(4e12)
    monkeypatch.undo()
    kept.note_bandwidth(5e12)
    assert Journal(tmp_path / "gpu.jsonl", "code").bandwidth == 5e12

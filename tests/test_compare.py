"""Two results side by side: verdicts on planted changes, noise, files that do not fit."""

import dataclasses
import json
import random
import re
import shlex
from pathlib import Path

import pytest

from mhc_tile import __main__
from mhc_tile.perf import cli, compare, records, suite, summary
from mhc_tile.perf.__main__ import main
from mhc_tile.perf.operations import cases
from results import ENVIRONMENT, process, record, row, true_times

OTHER = "merge/forward/64x7168/n4/bfloat16"


def verdict(base, new, **options) -> str:
    (pair,) = compare.compare(record(base), record(new), **options).pairs
    return pair.verdict


@pytest.mark.parametrize(
    ("base", "new", "expected"),
    [
        (90, 90, "same"),
        (90, 93, "same"),  # 3.3%, below the threshold
        (90, 99, "regression"),
        (90, 200, "regression"),
        (90, 80, "improvement"),
        (4, 4.38, "same"),  # 9.5%, but less than two processes may differ by
        (4, 5, "regression"),
        (4, 3.4, "improvement"),
    ],
)
def test_a_change_counts_beyond_threshold_and_noise(base, new, expected):
    assert verdict(row(base), row(new)) == expected


def test_times_that_scatter_make_noise():
    assert verdict(row(90, spread=0.2), row(99, spread=0.2)) == "same"
    assert verdict(row(90, spread=0.2, turns=400), row(99, spread=0.2, turns=400)) == "regression"
    assert verdict(row(90), row(99, spread=0.2)) == "same"  # either run's counts
    narrow = compare.noise_us(row(90), row(90))
    assert narrow > compare.noise_us(row(90, spread=0), row(90, spread=0)) == 90 * compare.DRIFT
    assert compare.noise_us(row(4, spread=0), row(4, spread=0)) == compare.DRIFT_US


def test_a_threshold_below_noise_does_not_fire_on_noise():
    assert verdict(row(90), row(91.3), threshold=0.0) == "same"
    assert verdict(row(90), row(93), threshold=0.0) == "regression"
    for wrong in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="threshold must be at least 0, got"):
            verdict(row(), row(), threshold=wrong)


@pytest.mark.parametrize("status", ["wrong", "failed", "out of memory"])
def test_what_worked_and_does_not_any_more_is_a_fault(status):
    broken = row(None, status=status, fault="merge: error 1e-1")
    assert verdict(row(), broken) == "failing"
    assert verdict(broken, broken) == "same"
    assert verdict(broken, row()) == "new"
    found = compare.compare(record(), record(broken))
    assert [pair.notes for pair in found.faults()] == [(f"{status}: merge: error 1e-1",)]


def test_a_case_that_no_cuda_graph_captures_any_more_is_a_fault():
    assert verdict(row(), row(captured=False)) == "failing"
    assert verdict(row(captured=False), row(captured=False)) == "same"


def test_what_was_not_measured_counts_for_a_gate_only():
    found = compare.compare(record(row(), row(case=OTHER)), record(row()))
    assert [pair.verdict for pair in found.pairs] == ["same", "missing"]
    assert found.faults() == []
    assert [pair.case for pair in found.faults(complete=True)] == [OTHER]
    assert verdict(row(), row(None)) == "missing"
    assert verdict(row(), row(float("nan"))) == "missing"
    assert verdict(row(None), row()) == "new"
    broken = row(None, status="failed")
    assert compare.compare(record(broken), record()).faults(complete=True) == []
    assert verdict(row(None), row(None)) == "same"


def test_peers_are_shown_and_do_not_decide():
    ours, peer = row(), row(100, contender="liger-kernel 0.6")
    slow = row(200, contender="liger-kernel 0.6")
    found = compare.compare(record(ours, peer), record(ours, slow))
    assert found.faults(complete=True) == []
    assert [pair.contender for pair in found.of("regression", ours=False)] == ["liger-kernel 0.6"]
    absent = row(None, contender="liger-kernel 0.6", status="absent")
    found = compare.compare(record(ours, peer), record(ours, absent))
    assert [pair.verdict for pair in found.pairs] == ["same", "missing"]
    assert "liger-kernel 0.6" in summary.table(found)


def test_a_gpu_that_copies_more_slowly_may_be_as_much_slower():
    base = record(row(90))
    slower = record(row(97), copy_bytes_per_s=4.2e12 / 1.03)
    assert compare.compare(base, record(row(97))).faults()
    found = compare.compare(base, slower)
    assert found.faults() == []
    assert round(found.pairs[0].allowed, 3) == 0.08
    faster = record(row(97), copy_bytes_per_s=4.2e12 * 1.03)
    assert compare.compare(base, faster).faults()
    unknown = record(row(97), copy_bytes_per_s=None)
    assert compare.compare(base, unknown).faults()
    with pytest.raises(ValueError, match=r"copy bandwidth: -9\.1%; --force"):
        compare.compare(base, record(row(), copy_bytes_per_s=4.2e12 / 1.1))


def test_other_gpus_and_kinds_are_refused_unless_forced():
    base, new = record(row()), record(row(), gpu="NVIDIA H100 80GB HBM3", copy_bytes_per_s=3e12)
    with pytest.raises(ValueError, match="gpu: NVIDIA H200 -> NVIDIA H100 80GB HBM3; --force"):
        compare.compare(base, new)
    assert compare.compare(base, new, force=True).differences[0].startswith("gpu: NVIDIA H200 ->")
    with pytest.raises(ValueError, match="kind: run -> overhead; gpu: NVIDIA H200 -> none"):
        compare.compare(base, record(row(), kind="overhead", gpu=None))


def test_what_else_differs_is_named():
    packages = {**ENVIRONMENT["packages"], "tilelang": "0.1.16"}
    new = record(row(), commit="fedcba", torch="2.12.0", packages=packages, date="later")
    assert compare.compare(record(row()), new).differences == (
        "commit: 0123456789ab -> fedcba",
        "torch: 2.11.0 -> 2.12.0",
        "tilelang: 0.1.15 -> 0.1.16",
    )
    assert compare.compare(record(row()), record(row())).differences == ()
    found = compare.compare(record(row(launches=2, peak_bytes=9)), record(row(launches=3)))
    assert found.pairs[0].notes == ("launches 2 -> 3",)


def test_the_mean_is_over_our_cases():
    base = record(row(10), row(10, case=OTHER), row(10, contender="peer"))
    new = record(row(20), row(5, case=OTHER), row(90, contender="peer"))
    assert compare.compare(base, new).mean_change == pytest.approx(0)
    assert compare.compare(record(), record()).mean_change is None


# The gate as it measures itself, on simulated processes.

GATES = 150  # of 60 cases, so 9,000 verdicts a rule


def gates(planted: float, slowed: str, count: int = GATES) -> int:
    """How many of so many simulated gates fail; planted is a slowdown of an op above 20 us."""
    times, failed = true_times(), 0
    assert len(times) == 60

    def slowdown(case: str) -> float:
        return 1 + planted if case.startswith(f"{slowed}/") and times[case] > 20 else 1.0

    for seed in range(count):
        rng = random.Random(f"{planted} {slowed} {seed}")
        base = process(times, rng)

        def measure(wanted, rng=rng):
            return process({case: times[case] for case in wanted.cases}, rng, slowdown)

        failed += bool(compare.gate(base, measure).faults(complete=True))
    return failed


def test_an_unchanged_tree_passes():
    assert gates(0.0, "merge") == 0


@pytest.mark.parametrize("op", ["merge", "sinkhorn"])
def test_a_planted_slowdown_is_caught(op):
    assert gates(0.10, op, 50) == 50
    assert gates(0.20, op, 20) == 20


def test_a_slowdown_below_the_threshold_is_not():
    assert gates(0.03, "merge") == 0


def test_a_suspected_case_alone_is_measured_again():
    base, asked = record(row(90), row(20, case=OTHER), row(50, contender="peer")), []
    answers = [record(row(99), row(20, case=OTHER)), record(row(98)), record(row(90))]

    def measure(wanted):
        asked.append(wanted.cases)
        return answers[len(asked) - 1]

    found = compare.gate(base, measure)
    assert asked == [[row().case, OTHER], [row().case], [row().case]]
    assert found.faults() == []
    assert found.of("same")[0].new.us == 90
    assert {pair.contender for pair in found.pairs} == {"mhc_tile"}
    asked.clear()
    answers[2] = record(row(97.5))
    assert [pair.new.us for pair in compare.gate(base, measure).faults()] == [97.5]


def test_what_breaks_when_it_is_measured_again_is_a_fault():
    broken = row(None, status="failed", fault="timed out")
    answers = iter([record(row(99)), record(broken)])
    (fault,) = compare.gate(record(row(90)), lambda base: next(answers)).faults()
    assert (fault.verdict, fault.notes) == ("failing", ("failed: timed out",))


# The commands.


@pytest.fixture
def files(tmp_path):
    """Writes results; `files(a=record(...))` gives their paths."""

    def write(**given):
        for name, result in given.items():
            records.write(result, tmp_path / f"{name}.json")
        return [str(tmp_path / f"{name}.json") for name in given]

    return write


def test_compare_prints_a_table_and_says_so_in_its_exit_code(files, capsys):
    base, same, slow = files(
        base=record(row()), same=record(row(91)), slow=record(row(99), commit="fedcba")
    )
    assert __main__.main(["perf", "compare", base, same]) == 0
    assert "no regression in 1 case\n" in capsys.readouterr().out
    assert main(["compare", base, slow]) == 3
    out = capsys.readouterr().out
    assert "90.0 (89.1 to 90.9)" in out
    assert "+10.0%" in out
    assert "differs: commit: 0123456789ab -> fedcba" in out
    assert "1 regression of 1 case\n" in out
    assert main(["compare", base, slow, "--threshold", "12"]) == 0


def test_markdown_and_json(files, capsys, tmp_path):
    peer = row(120, contender="a|<b>")
    base, slow = files(base=record(row(), peer), slow=record(row(99), peer, commit="fed"))
    target = tmp_path / "summary.md"
    assert main(["compare", base, slow, "--markdown", str(target), "--json", "-"]) == 3
    values = json.loads(capsys.readouterr().out)
    assert not values["passed"]
    assert [pair["verdict"] for pair in values["pairs"]] == ["regression", "same"]
    text = target.read_text()
    assert text.startswith("### Performance: 1 regression of 1 case\n")
    assert "| regression | merge/forward/8192x2560/n4/bfloat16 | mhc\\_tile | 90.0" in text
    assert "a\\|&lt;b&gt;" in text
    assert "must not be merged" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {9}
    assert main(["compare", base, base, "--markdown", "-"]) == 0
    assert capsys.readouterr().out.startswith("### Performance: no regression in 1 case\n")


def test_results_that_do_not_fit_are_errors(files, capsys, tmp_path):
    base, other = files(base=record(row()), other=record(row(), gpu="NVIDIA A100"))
    assert main(["compare", base, other]) == 1
    assert "gpu: NVIDIA H200 -> NVIDIA A100; --force" in capsys.readouterr().err
    assert main(["compare", base, other, "--force"]) == 0
    (tmp_path / "old.json").write_text('{"schema": 0}')
    assert main(["compare", base, str(tmp_path / "old.json")]) == 1
    assert "must have schema 1, got 0" in capsys.readouterr().err
    assert main(["compare", base, str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err.startswith("perf: ")
    for wrong in ("-3", "nan", "many"):
        with pytest.raises(SystemExit) as stop:
            main(["compare", base, other, f"--threshold={wrong}"])
        assert stop.value.code == 2


@pytest.fixture
def baselines(tmp_path, monkeypatch):
    """A folder of baselines, and a checkout at ENVIRONMENT's commit."""
    monkeypatch.setattr(cli, "HERE", tmp_path)
    monkeypatch.setattr(records, "_commit", lambda: ENVIRONMENT["commit"])
    return tmp_path / "baselines"


def test_gate_reads_the_baseline_of_the_model(files, baselines, capsys):
    good, slow = files(good=record(row(91)), slow=record(row(99)))
    assert main(["gate", good]) == 1
    error = capsys.readouterr().err
    path = baselines / "nvidia_h200.json"
    assert f"must be at {path}, got none" in error
    assert f"`mhc-tile perf run --out {path}`" in error
    records.write(record(row(90)), path)
    assert main(["gate", good]) == 0
    assert main(["gate", slow]) == 3
    records.write(record(row(90), row(case=OTHER)), path)
    capsys.readouterr()
    assert main(["gate", good]) == 3
    assert "1 missing of 2 cases\n" in capsys.readouterr().out
    assert main(["compare", str(path), good]) == 0
    assert "no regression in 1 case; 1 in one of them only\n" in capsys.readouterr().out
    records.write(record(row(90), cases_left=3), path)
    assert main(["gate", good]) == 1
    assert "must be of a run that ended, got one with 3 cases left" in capsys.readouterr().err
    records.write(record(row(90)), path)
    assert main(["gate", slow, "--baseline", slow]) == 0


def test_results_without_a_case_in_common_are_refused(files, baselines, capsys):
    one, other, none = files(one=record(row()), other=record(row(case=OTHER)), none=record())
    gate = ["gate", one, "--baseline", none]
    for command in (["compare", one, other], ["compare", one, none], ["compare", none, one], gate):
        assert main([*command, "--force"]) == 1
        assert "must have a case of mhc_tile in common, got none" in capsys.readouterr().err
    assert main(["gate", other, "--baseline", one, "--force"]) == 3
    assert "1 missing of 1 case; 1 in one of them only\n" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((Path(cli.__file__).parent / "baselines").glob("*.json")))
def test_a_baseline_that_is_included_is_one(path):
    base = records.read(path)
    assert base.kind == "run"
    assert cli.baseline_path(base.environment["gpu"]).name == path.name
    assert "cases_left" not in base.environment
    own = {one.case for one in base.rows if one.contender == records.OURS and one.us}
    assert own == {case.key for case in cases()}


def test_gate_refuses_a_result_of_another_commit(files, baselines, capsys):
    (stale,) = files(stale=record(row(), commit="fedcba"))
    records.write(record(row()), baselines / "nvidia_h200.json")
    assert main(["gate", stale]) == 1
    assert "must be of this checkout's commit 0123456789ab, got fedcba" in capsys.readouterr().err
    assert main(["gate", stale, "--force"]) == 0


def test_gate_measures_where_it_is_given_no_result(baselines, monkeypatch, capsys, tmp_path):
    assert main(["gate"]) == 1
    assert "a GPU or a result file must be given" in capsys.readouterr().err
    monkeypatch.setattr(cli, "_gpu_here", lambda: "NVIDIA H200")
    records.write(record(row(90)), baselines / "nvidia_h200.json")
    for us, code in ((91, 0), (99, 3)):
        monkeypatch.setattr(cli, "_measure", lambda base, us=us: record(row(us)))
        assert main(["gate", "--out", str(tmp_path / "new.json")]) == code
        assert records.read(tmp_path / "new.json").rows[0].us == us
    assert main(["gate", str(tmp_path / "new.json"), "--out", "x"]) == 1


def test_a_result_of_a_cpu_needs_a_baseline_by_name(files, baselines, capsys):
    (result,) = files(cpu=record(row(), gpu=None, copy_bytes_per_s=None))
    assert main(["gate", result]) == 1
    assert "--baseline must be given for a result of a CPU" in capsys.readouterr().err
    assert main(["gate", result, "--baseline", result]) == 0


def test_rows_are_not_changed():
    base = record(row())
    kept = dataclasses.replace(base)
    compare.gate(base, lambda wanted: record(row(99)))
    assert base == kept


def test_the_gate_measures_with_the_suite(monkeypatch):
    monkeypatch.setattr(suite, "measure_for_gate", lambda base: record(row(91)))
    assert cli._measure(record(row())).rows[0].us == 91


# The workflow to copy.

WORKFLOW = Path(__file__).parents[1] / "perf" / "workflow.yml"
COMMANDS = re.findall(r"(?<!`)\bmhc-tile [^\n`#]+", WORKFLOW.read_text())


@pytest.mark.parametrize("command", [c for c in COMMANDS if "<gpu>" not in c])
def test_the_workflows_commands_exist(command):
    words = shlex.split(command)[1:]
    assert callable(__main__.build_parser().parse_args(words).run)


def test_the_workflow_runs_tunes_gates_and_reports():
    names = [" ".join(shlex.split(command)[1:3]) for command in COMMANDS]
    for name in ("autotune --preset", "perf run", "perf gate", "perf report"):
        assert name in names
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    assert "self-hosted" in jobs["gate"]["runs-on"]
    steps = [step.get("run", step.get("uses")) for step in jobs["gate"]["steps"]]
    assert all(steps)
    assert steps[-1].startswith("actions/upload-artifact@")

"""Two results side by side: verdicts on planted changes, noise, files that do not fit."""

import json
import re
import shlex
from pathlib import Path

import pytest

from mhc_tile import __main__
from mhc_tile.autotune import cli as tuning
from mhc_tile.perf import cli, compare, environment, summary
from mhc_tile.perf.__main__ import main
from results import ENVIRONMENT, OTHER, record, row


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
    found = compare.compare(record(ours, peer), record(ours))
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


def step(percent, error=0.3, contender="mhc_tile", us=56e3):
    details = {"overhead_percent": percent, "overhead_error": error}
    case = "step/training/8192x2560/n4/bfloat16"
    return row(us, case=case, contender=contender, captured=False, details=details)


@pytest.mark.parametrize(
    ("base", "new", "expected"),
    [
        (step(6.2), step(6.7), "same"),
        (step(6.2), step(10.5), "regression"),  # 4% of the time of the whole step
        (step(6.2, 1.5), step(10.5, 1.5), "same"),  # three errors are 6.4
        (step(6.2), step(7.4), "same"),  # three errors are 1.3
        (step(6.2, 0.1), step(7.4, 0.1), "regression"),
        (step(6.2), step(4.0), "same"),
        (step(6.2), step(6.2, us=70e3), "regression"),  # of the time, whatever the plain step does
    ],
)
def test_of_a_step_the_overhead_is_judged_as_well(base, new, expected):
    found = compare.compare(*(record(one, kind="overhead") for one in (base, new)))
    (pair,) = found.pairs
    assert pair.verdict == expected
    assert pair.change == pytest.approx(new.us / base.us - 1)
    grown = [note for note in pair.notes if note.startswith("overhead +6.2% -> +")]
    assert bool(grown) == (expected == "regression" and new.us == base.us)


def test_all_ways_to_compile_ours_are_ours(files, capsys):
    layers = "mhc_tile (layers compiled)"
    base = record(step(6.2), step(6.2, contender=layers), step(9, contender="hc"), kind="overhead")
    new = record(step(20), step(50, contender=layers), step(70, contender="hc"), kind="overhead")
    assert main(["compare", *files(base=base, new=new)]) == 3
    out = capsys.readouterr().out
    assert out.endswith("1 regression of 1 case\n")
    assert "An overhead may grow by 1% of the plain step, or by 3 standard errors" in out


def test_a_run_that_did_not_end_is_said():
    found = compare.compare(record(row()), record(row(), cases_left=5))
    assert any("1 case, did not end: 5 left" in line for line in summary.lines(found))


# The commands.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "{base}", "{new}", "--json", "{new}"], "compare: --json must be another file"),
        (
            ["compare", "{base}", "{new}", "--markdown", "x", "--json", "./x"],
            "than --markdown, got",
        ),
        (["gate", "{new}", "--baseline", "{base}", "--markdown", "{base}"], "file than baseline"),
        (["report", "{new}", "--out", "{new}"], "perf report: --out must be another file than res"),
        (
            ["report", "{new}", "--figures", "{base}"],
            "--figures must be where files can be written",
        ),
        (["compare", "{base}", "{new}", "--json", "{base}/x"], "--json must be where files can be"),
        (["compare", "{base}", "none.json"], "perf: none.json must be a result file that can be"),
    ],
)
def test_nothing_is_written_over_what_is_read(arguments, message, files, capsys, monkeypatch):
    base, new = files(base=record(row(90)), new=record(row(99)))
    before = [Path(path).read_bytes() for path in (base, new)]
    monkeypatch.setattr(environment, "commit", lambda: ENVIRONMENT["commit"])
    monkeypatch.chdir(Path(base).parent)
    asked = [word.format(base=base, new=new) for word in arguments]
    assert main(asked) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("perf")
    assert "perf: perf" not in said
    assert [Path(path).read_bytes() for path in (base, new)] == before


def test_a_verdict_is_said_before_files_are_written(files, capsys, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    base, slow = files(base=record(row()), slow=record(row(99)))
    assert main(["compare", base, slow, "--markdown", str(tmp_path / "x.md")]) == 1
    said = capsys.readouterr()
    assert "1 regression of 1 case\n" in said.out
    assert "No space left on device" in said.err


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


# The workflow to copy.

WORKFLOW = Path(__file__).parents[2] / "perf" / "workflow.yml"
COMMANDS = re.findall(r"(?<!`)\bmhc-tile [^\n`#]+", WORKFLOW.read_text())


@pytest.mark.parametrize("command", [c for c in COMMANDS if "<gpu>" not in c])
def test_the_workflows_commands_exist(command):
    name, *options = shlex.split(command)[1:]
    if name == "autotune":
        assert tuning._options(options, "mhc-tile autotune")
    elif name == "perf":
        perform, args = cli.parsed(options, "mhc-tile perf")
        assert callable(perform)
        assert all(getattr(args, word[2:]) for word in options if word.startswith("--"))
    else:
        assert (name, options) == ("doctor", [])


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

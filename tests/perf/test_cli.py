"""The gate that measures, and what `mhc-tile perf` refuses before it measures."""

import dataclasses
import random
import re
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("tabulate")

from mhc_tile.perf import cli, compare, environment, records, suite
from mhc_tile.perf.__main__ import main
from mhc_tile.perf.bench import CpuBench
from mhc_tile.perf.operations import cases
from results import ENVIRONMENT, OTHER, process, record, row, true_times

# On simulated processes.

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


# Recorded on an H100: one code in two processes, and a merge that does a tenth more.

RECORDED = Path(__file__).parents[1] / "recorded"


@pytest.fixture(scope="module")
def h100():
    """One code in two processes."""
    return [records.read(RECORDED / f"h100_{name}.json") for name in ("base", "unchanged")]


def faults(base, new):
    return {pair.case for pair in compare.compare(base, new).faults(complete=True)}


def test_the_same_code_passes_either_way(h100):
    assert faults(*h100) == faults(*reversed(h100)) == set()
    large = [abs(pair.change) for pair in compare.compare(*h100).pairs if pair.base.us > 50]
    assert len(large) > 40
    assert max(large) < 0.03


def test_a_slower_merge_is_caught(h100):
    slower = records.read(RECORDED / "h100_merge_slower.json")
    for base in h100:
        found = faults(base, slower)
        assert {case.split("/")[0] for case in found} == {"merge", "boundary", "sublayer"}
        merges = {r.case for r in base.rows if (r.op, r.mode) == ("merge", "inference")}
        assert merges < found


@pytest.mark.parametrize("op", sorted(suite.OPERATIONS))
@pytest.mark.parametrize("factor", [1.02, 1.1, 1.2])
def test_a_slowdown_of_an_op_is_caught_in_what_was_measured(h100, op, factor):
    base, new = h100

    def slowed(r):
        return r.replace(us=r.us * factor, p20=r.p20 * factor, p80=r.p80 * factor)

    rows = [slowed(r) if r.op == op else r for r in new.rows]
    found = faults(base, msgspec.structs.replace(new, rows=rows))
    assert {case.split("/")[0] for case in found} <= {op}
    large = {r.case for r in base.rows if r.op == op and r.us > 20}
    assert found >= large if factor > 1.05 else not found & large


# The command.


@pytest.fixture
def baselines(tmp_path, monkeypatch):
    """A folder of baselines, and a checkout at ENVIRONMENT's commit."""
    monkeypatch.setattr(cli, "HERE", tmp_path)
    monkeypatch.setattr(environment, "commit", lambda: ENVIRONMENT["commit"])
    return tmp_path / "baselines"


def test_gate_reads_the_baseline_of_the_model(files, baselines, capsys):
    good, slow = files(good=record(row(91)), slow=record(row(99)))
    assert main(["gate", good]) == 1
    error = capsys.readouterr().err
    path = baselines / "nvidia_h200.json"
    assert f"must be at {path}, got none" in error
    assert f"`mhc-tile perf run --contender mhc_tile --out {path}`" in error
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
    assert re.fullmatch("[0-9a-f]{12}", base.environment["commit"])  # nothing uncommitted
    own = {one.case for one in base.rows if one.contender == records.OURS and one.us}
    assert own == {case.key for case in cases()}


def test_gate_refuses_a_result_of_another_commit(files, baselines, capsys):
    (stale,) = files(stale=record(row(), commit="fedcba"))
    records.write(record(row()), baselines / "nvidia_h200.json")
    assert main(["gate", stale]) == 1
    assert "must be of this checkout's commit 0123456789ab, got fedcba" in capsys.readouterr().err
    assert main(["gate", stale, "--force"]) == 0


@pytest.mark.parametrize("which", ["base", "result"])
def test_gate_refuses_what_was_measured_beside_others(files, baselines, capsys, which):
    alone, beside = record(row(90)), record(row(90), row(200, contender="tile-kernels 1.0"))
    (result,) = files(result=beside if which == "result" else alone)
    path = baselines / "nvidia_h200.json"
    records.write(beside if which == "base" else alone, path)
    assert main(["gate", result]) == 1
    where = path if which == "base" else result
    said = f"perf gate: {where} must be measured alone, by `mhc-tile perf run --contender mhc_tile`"
    assert f"{said}, got times of tile-kernels 1.0, too" in capsys.readouterr().err
    assert main(["gate", result, "--force"]) == 0
    assert "differs: contenders: mhc_tile" in capsys.readouterr().out


def test_gate_measures_where_it_is_given_no_result(baselines, monkeypatch, capsys, tmp_path):
    assert main(["gate"]) == 1
    assert "a GPU or a result file must be given" in capsys.readouterr().err
    monkeypatch.setattr(cli, "_gpu_here", lambda: "NVIDIA H200")
    records.write(record(row(90)), baselines / "nvidia_h200.json")
    for us, code in ((91, 0), (99, 3)):
        monkeypatch.setattr(suite, "measure_for_gate", lambda *_, us=us, **__: record(row(us)))
        assert main(["gate", "--out", str(tmp_path / "new.json")]) == code
        assert records.read(tmp_path / "new.json").rows[0].us == us
    assert main(["gate", str(tmp_path / "new.json"), "--out", "x"]) == 1
    capsys.readouterr()
    assert main(["gate", "--out", str(baselines / "nvidia_h200.json")]) == 1
    assert "perf gate: --out must not be the baseline, got " in capsys.readouterr().err


@pytest.fixture
def bench(baselines, monkeypatch):
    """A GPU that is the CPU, and a baseline of two small cases."""
    monkeypatch.setattr(cli, "_gpu_here", lambda: "NVIDIA H200")
    monkeypatch.setattr(suite, "bench_of", lambda device: CpuBench())
    copy = {"gpu": "NVIDIA H200", "copy_bytes_per_s": 4.2e12}
    monkeypatch.setattr(suite, "environment", lambda bandwidth: dict(copy))
    rows = [
        row(1e9, case=f"merge/{mode}/8x16/n4/float32", spread=0.0).replace(captured=None)
        for mode in ("inference", "forward")
    ]
    records.write(record(*rows), baselines / "nvidia_h200.json")
    return CpuBench


def test_gate_measures_with_the_suite_and_says_how_far_it_is(bench, capsys, tmp_path):
    pytest.importorskip("tqdm")
    assert main(["gate", "--out", str(tmp_path / "new" / "gate.json")]) == 0
    said = capsys.readouterr()
    assert " s  merge/forward/8x16/n4/float32\n" in said.err
    assert "no regression in 2 cases\n" in said.out
    found = records.read(tmp_path / "new" / "gate.json")
    assert [r.turns for r in found.rows] == [suite.TURNS] * 2
    assert "cases_left" not in found.environment


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{}"], "perf gate: --out must be a file, got the folder {}"),
        (["--markdown", "{}"], "perf gate: --markdown must be a file, got the folder {}"),
        (["--json", "{}/file/x"], "{}/file"),
        (["--baseline", "{}/h100.json"], "gpu: NVIDIA H100 -> NVIDIA H200"),
        (["--baseline", "{}/steps.json"], "kind: overhead -> run"),
    ],
)
def test_gate_refuses_before_it_measures(
    baselines, monkeypatch, tmp_path, capsys, files, arguments, message
):
    monkeypatch.setattr(cli, "_gpu_here", lambda: "NVIDIA H200")
    monkeypatch.setattr(suite, "measure_for_gate", lambda *_, **__: pytest.fail("it measures"))
    records.write(record(row(90)), baselines / "nvidia_h200.json")
    files(h100=record(row(), gpu="NVIDIA H100"), steps=record(row(), kind="overhead"))
    (tmp_path / "file").touch()
    assert main(["gate", *(word.format(tmp_path) for word in arguments)]) == 1
    assert message.format(tmp_path) in capsys.readouterr().err


def test_gate_names_a_missing_extra_before_it_measures(baselines, monkeypatch, capsys):
    from mhc_tile.autotune import _extras

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(cli, "_gpu_here", lambda: "NVIDIA H200")
    monkeypatch.setattr(suite, "measure_for_gate", lambda *_, **__: pytest.fail("it measures"))
    records.write(record(row(90)), baselines / "nvidia_h200.json")
    monkeypatch.setattr(_extras.importlib, "import_module", missing)
    assert main(["gate"]) == 1
    assert "pip install 'mhc-tile[perf]' brings it" in capsys.readouterr().err


@pytest.mark.parametrize("turn", [False, True])  # in a case that is new, in one that looked slower
def test_an_interrupted_gate_keeps_what_was_measured(bench, monkeypatch, tmp_path, capsys, turn):
    calls, real = 0, bench.timed

    def timed(self, function, sets):
        nonlocal calls
        calls += 1
        if calls > 1 + turn:
            raise KeyboardInterrupt
        found = real(self, function, sets)
        return dataclasses.replace(found, timer=lambda: 2e9) if turn else found

    monkeypatch.setattr(bench, "timed", timed)
    out = tmp_path / "gate.json"
    assert main(["gate", "--out", str(out)]) == 130
    assert "interrupted" in capsys.readouterr().err
    found = records.read(out)
    modes = [r.mode for r in found.rows if r.us]
    assert modes == (["inference", "forward"] if turn else ["inference"])
    assert ("cases_left" in found.environment) != turn


def test_a_gpu_that_answers_no_more_ends_the_gate(bench, monkeypatch, tmp_path, capsys):
    def broken(*_):
        raise RuntimeError("an illegal memory access was encountered")

    changed = dataclasses.replace(suite.OPERATIONS["merge"], ours=broken)
    monkeypatch.setitem(suite.OPERATIONS, "merge", changed)
    monkeypatch.setattr(bench, "recover", lambda self: False)
    out = tmp_path / "gate.json"
    assert main(["gate", "--out", str(out)]) == 3
    said = capsys.readouterr().out
    assert "mhc_tile left the GPU unusable at merge/inference" in said
    assert "1 failing, 1 missing of 2 cases" in said
    assert records.read(out).environment["cases_left"] == 2


def test_a_gpu_that_answers_no_more_when_it_measures_again_ends_the_gate(baselines):
    base = record(row(90), row(90, case=OTHER))
    lost = record(row(None, status="failed", fault="no"), cases_left=1)
    answers = iter([record(row(99), row(99, case=OTHER)), lost])
    found = compare.gate(base, lambda wanted: next(answers))
    assert {pair.verdict for pair in found.pairs} == {"failing", "regression"}


def test_a_gpu_that_copies_otherwise_is_refused_before_it_measures(bench, monkeypatch, capsys):
    slow = {"gpu": "NVIDIA H200", "copy_bytes_per_s": 3.9e12}
    monkeypatch.setattr(suite, "environment", lambda bandwidth: dict(slow))
    monkeypatch.setattr(suite, "measure", lambda *_: pytest.fail("it measures"))
    assert main(["gate"]) == 1
    assert "copy bandwidth: -7.1%" in capsys.readouterr().err
    slow["copy_bytes_per_s"] = 4.5e12
    assert main(["gate"]) == 1
    assert "copy bandwidth: +7.1%" in capsys.readouterr().err


def test_a_result_of_a_cpu_needs_a_baseline_by_name(files, baselines, capsys):
    (result,) = files(cpu=record(row(), gpu=None, copy_bytes_per_s=None))
    assert main(["gate", result]) == 1
    assert "--baseline must be given for a result of a CPU" in capsys.readouterr().err
    assert main(["gate", result, "--baseline", result]) == 0


def test_rows_are_not_changed():
    base = record(row())
    kept = msgspec.structs.replace(base)
    compare.gate(base, lambda wanted: record(row(99)))
    assert base == kept


# Options.

WORDS = {"run": [], "overhead": [], "compare": ["a", "b"], "gate": [], "report": ["a"]}
OPTIONS = {name: cli.command(name)[0] for name in WORDS}
VALUES = [
    (command, name)
    for command, options in OPTIONS.items()
    for name, (kind, _) in options.items()
    if kind is not bool and name not in cli._POSITIONAL
]


def test_every_command_is_here():
    assert WORDS.keys() == cli.COMMANDS.keys()


@pytest.mark.parametrize(("command", "option"), VALUES)
def test_no_option_takes_an_empty_text(command, option, capsys):
    kind = OPTIONS[command][option][0]
    for empty in ("", " "):
        with pytest.raises(SystemExit) as end:
            main([command, *WORDS[command], f"--{option}", empty])
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert f"--{option}" in said
        if kind in (str, Path, tuple[str, ...]):
            assert said == f"perf {command}: --{option} must not be empty, got {empty!r}\n"


@pytest.mark.parametrize(("command", "option"), [v for v in VALUES if v[1] in ("op", "contender")])
def test_a_list_has_a_value(command, option, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, f"--{option}"])
    assert end.value.code == 2
    assert f"--{option} must have a value, got none\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", [name for name, words in WORDS.items() if words])
def test_no_argument_is_missing_or_an_empty_text(command, capsys):
    count = len(WORDS[command])
    for at in range(count):
        given = ["x"] * count
        given[at] = ""
        with pytest.raises(SystemExit) as end:
            main([command, *given])
        assert end.value.code == 2
        assert "must not be empty, got ''" in capsys.readouterr().err
        with pytest.raises(SystemExit) as end:
            main([command, *["x"] * at])
        assert end.value.code == 2
        assert " must be given, got none\n" in capsys.readouterr().err


def test_every_file_and_folder_may_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = 0
    for command, options in OPTIONS.items():
        for name, (kind, _) in options.items():
            if kind is not Path:
                continue
            words = WORDS[command]
            if name in cli._POSITIONAL:
                words = [*["~/x"] * max(1, len(words))]
            else:
                words = [*words, f"--{name}=~/x"]
            _, args = cli.parsed([command, *words], "mhc-tile perf")
            assert getattr(args, name) == tmp_path / "x"
            found += 1
    assert found == 17


def test_a_home_of_nobody_is_named(capsys):
    with pytest.raises(SystemExit) as end:
        main(["report", "~no-such-user-here/x"])
    assert end.value.code == 2
    assert "must name a home folder, got '~no-such-user-here/x'" in capsys.readouterr().err


def test_a_dash_is_the_terminal():
    _, args = cli.parsed(["compare", "a", "b", "--json", "-"], "mhc-tile perf")
    assert args.json == cli.TERMINAL

"""The command: listing and compiling for real on one small kernel, and a run on a fake GPU."""

import functools
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

pytest.importorskip("tilelang")

from mhc_tile import __main__
from mhc_tile.autotune import __main__ as module
from mhc_tile.autotune import _extras, cli, compiling, cubin, journal, measuring, registry, table
from mhc_tile.autotune.problems import PRESETS, TOKENS, Problem, Shape, problems
from mhc_tile.autotune.registry import KERNELS, Target
from mhc_tile.kernels import sinkhorn, streams
from mhc_tile.kernels.common import static as _static
from mhc_tile.kernels.common import toolchain as _toolchain
from mhc_tile.kernels.common.static import Resources
from tables import DEVICE

needs_compiler = pytest.mark.skipif(
    _static.available() is not None, reason=str(_static.available() or "")
)
SMALL = ("--hidden", "64", "--kernel", "expand", "--tokens", "64", "--jobs", "2")


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch) -> Path:
    """Caches, journals and tables of this test alone."""
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(journal, "folder", lambda: tmp_path / "journal")
    monkeypatch.setattr(table, "user_folder", lambda: tmp_path / "tables")
    return tmp_path


def run(capsys, *arguments: str) -> str:
    assert __main__.main(["autotune", *arguments]) == 0
    return capsys.readouterr().out


def fails(capsys, *arguments: str) -> str:
    assert __main__.main(["autotune", *arguments]) == 1
    return capsys.readouterr().err


@needs_compiler
def test_compile_only_fills_a_cache_that_a_dry_run_lists(places, capsys):
    arch, cache = ("--arch", "sm_80"), places / "cache"
    said = run(capsys, *SMALL, *arch, "--compile-only")
    assert said.startswith(f"3 programs for sm_80 in {cache}; 0 candidates pruned")
    assert len(list(cache.rglob("executable.so"))) == 3
    assert len(list((cache / "mhc_tile").glob("*.json"))) == 3
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}

    lines = run(capsys, *SMALL, *arch, "--dry-run").splitlines()
    assert before == {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    moved = 64 * (4 + 1) * 64 * 2  # tokens, streams read or written, C, bytes
    assert lines[0] == f"expand 64 x 64, n 4, bfloat16: {moved / 1e6:.3f} MB must move"
    assert re.match(r"configuration +registers +shared bytes +occupancy", lines[1])
    rows = [line.split() for line in lines[3:6]]
    assert [row[0] for row in rows] == ["threads=256", "threads=128", "threads=512"]
    for row in rows:
        assert 8 < int(row[1]) < 64
        assert row[2] == "0"
        assert row[3] == "100%"
    assert [row[4:] for row in rows] == [["default"], [], []]
    assert lines[6] == "3 of 3 to measure"


@needs_compiler
def test_a_cubin_tells_what_the_assembler_printed(places):
    job = compiling.Job(streams.__name__, "expand_program", (4, 64, "bfloat16", 1.0, 128), "sm_80")
    program = streams.expand_program
    printed = _static.resources(program.factory(*job.constants), job.arch, program.pass_configs)
    assert compiling.known(job) is None
    assert compiling.build(job) == printed
    assert compiling.known(job) == printed
    for path in (places / "cache").rglob("executable.so"):
        path.unlink()  # of TileLang's cache; the record alone is not enough
    assert compiling.known(job) is None


@needs_compiler
def test_the_system_s_shared_memory_is_no_kernel_s(places):
    constants = (4, sinkhorn.Sinkhorn(3, 0.0), 32)
    job = compiling.Job(sinkhorn.__name__, "backward_program", constants, "sm_90a")
    program = sinkhorn.backward_program
    printed = _static.resources(program.factory(*constants), job.arch, program.pass_configs)
    assert compiling.build(job) == printed
    assert printed[0].static_smem == 0


@needs_compiler
def test_a_kernel_from_the_cache_tells_the_same_as_one_just_compiled(places):
    """In another process, where TileLang finds the kernel and keeps no module of it."""
    code = (
        "from mhc_tile.autotune.compiling import Job, build\n"
        "from mhc_tile.kernels.common.constants import Sinkhorn\n"
        "constants = (4, Sinkhorn(3, 0.0), 32)\n"
        "job = Job('mhc_tile.kernels.sinkhorn', 'backward_program', constants, 'sm_80')\n"
        "print(build(job)); job.path.unlink()"
    )
    environment = {**os.environ, "TILELANG_PRINT_ON_COMPILATION": "1"}
    run = functools.partial(subprocess.run, capture_output=True, text=True, env=environment)
    said = [run([sys.executable, "-c", code]).stdout for _ in range(2)]
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1]
    assert f"dynamic_smem={4 * 2 * 3 * 4 * 32}" in said[0]
    assert "begins to compile" in said[0]
    assert "begins to compile" not in said[1]


@needs_compiler
def test_a_cubin_tells_of_local_memory_and_such_a_kernel_is_at_fault(places):
    import tilelang

    import emulator_programs

    target = {"kind": "cuda", "arch": "sm_80"}
    kernel = tilelang.compile(emulator_programs.spilling(), target=target)
    library = Path(kernel._tilelang_cache_path) / "executable.so"
    ((name, usage),) = cubin.usage(library.read_bytes()).items()
    assert usage.stack > 0
    assert usage.threads == 256
    taken = Resources(name, usage.registers, 0, 0, usage.stack, 0, 0, usage.threads)
    (fault,) = compiling.faults([taken], "sm_80")
    assert fault == f"{name} keeps {usage.stack} bytes of a thread in local memory"


def test_a_file_without_a_cubin_has_no_kernels():
    assert cubin.usage(Path(sys.executable).read_bytes()) == {}
    assert cubin.usage(b"") == {}


def test_a_program_that_does_not_compile_is_an_answer(monkeypatch):
    job = compiling.Job(streams.__name__, "expand_program", (4, 64, "no dtype", 1.0, 128), "sm_80")
    ((same, why),) = compiling.compile_all([job], processes=1)
    assert same == job
    assert "RuntimeError" in why or "KeyError" in why
    assert compiling.known(job) is None
    ((_, why),) = compiling.compile_all([job], processes=1, build=False)
    assert why == "it is not compiled yet"


def test_occupancy_is_limited_by_threads_blocks_registers_or_shared_memory():
    def share(registers: int, shared: int, threads: int, arch: str = "sm_90a") -> float:
        return Resources("k", registers, 0, 0, 0, 0, shared, threads).occupancy(arch)

    assert share(32, 0, 1024) == 1.0
    assert share(32, 0, 32) == 32 * 32 / 2048  # 32 blocks
    assert share(255, 0, 256) == 256 / 2048
    assert share(32, 200_000, 256) == 256 / 2048
    assert share(32, 0, 1024, "sm_89") == 1024 / 1536
    with pytest.raises(ValueError, match=r"arch must be one of sm_80, .* got sm_999"):
        share(32, 0, 1024, "sm_999")


def test_the_presets():
    assert TOKENS == (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
    plain = {s.channels for s in PRESETS["all"] if (s.n, s.dtype) == (4, "bfloat16")}
    assert plain == {1280, 1920, 2560, 4096, 5120, 7168}
    assert {(s.n, s.dtype) for s in PRESETS["all"]} == {
        (4, "bfloat16"), (2, "bfloat16"), (8, "bfloat16"), (4, "float16"), (4, "float32"),
    }  # fmt: skip
    assert set(PRESETS["paper"]) | set(PRESETS["deepseek-v4"]) < set(PRESETS["all"])


def test_problems_are_listed_once_with_their_tokens_in_a_row():
    shapes = [Shape(64, tokens=(1, 16)), Shape(128, tokens=(1, 16))]
    found = problems(shapes, ["merge", "sinkhorn"])
    assert [(p.kernel, p.channels, p.tokens) for p in found] == [
        ("merge", 64, 16), ("merge", 64, 1), ("sinkhorn", 0, 16), ("sinkhorn", 0, 1),
        ("merge", 128, 16), ("merge", 128, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--dry-run",), "one of --preset ['all', 'deepseek-v4', 'paper'] and --hidden"),
        (("--preset", "paper", "--hidden", "64", "--dry-run"), "one of --preset"),
        (("--preset", "paper", "--streams", "2", "--dry-run"), "--streams must come with --hidden"),
        ((*SMALL, "--dry-run", "--compile-only"), "one phase must be given, got --dry-run and"),
        ((*SMALL, "--dry-run", "--resume", "--force"), "given, got --resume and --force"),
        ((*SMALL, "--dry-run", "--output", " "), "--output must not be empty, got ' '"),
        ((*SMALL, "--streams", "3", "--dry-run"), "--streams must be in (1, 2, 4, 8), got [3]"),
        (("--hidden", "0", "--dry-run"), "--hidden must be above 0 and at most 1048576, got 0"),
        (("--hidden", "64", "--tokens", "96", "--dry-run"), "--tokens must be powers of two"),
        (("--hidden", str(1 << 70), "--dry-run"), "--hidden must be above 0 and at most"),
        (("--hidden", "64", "--tokens", str(1 << 70), "--dry-run"), "--tokens must be above 0"),
        ((*SMALL, "--jobs", str(1 << 40), "--dry-run"), "--jobs must be above 0 and at most 4096"),
        ((*SMALL, "--budget", "0", "--dry-run"), "--budget must be above 0"),
        ((*SMALL, "--budget", "nan", "--dry-run"), "--budget must be above 0"),
        ((*SMALL, "--timeout", "nan", "--dry-run"), "--timeout must be above 0"),
        ((*SMALL, "--timeout", "inf", "--dry-run"), "--timeout must be above 0"),
        ((*SMALL, "--multiprocessors", "-4", "--dry-run"), "--multiprocessors must be above 0"),
        (SMALL, "--arch must come with --compile-only or --dry-run"),
    ],
)
def test_arguments_that_do_not_fit_are_explained(capsys, arguments, why):
    assert why in fails(capsys, *arguments, "--arch", "sm_90a")


def test_an_unknown_architecture_needs_its_multiprocessors(capsys):
    why = fails(capsys, *SMALL, "--compile-only", "--arch", "sm_86")
    assert "--multiprocessors must be given for this --arch, got sm_86" in why
    why = fails(capsys, *SMALL, "--compile-only", "--multiprocessors", "84")
    assert "--multiprocessors must come with --arch" in why


def test_an_architecture_that_is_none_is_refused(capsys):
    why = fails(capsys, *SMALL, "--dry-run", "--arch", "hopper", "--multiprocessors", "132")
    assert "--arch must be such as sm_90a, got hopper" in why
    why = fails(capsys, *SMALL, "--dry-run", "--arch", "sm_75", "--multiprocessors", "40")
    assert "autotune: --arch must be one of sm_80, sm_86" in why


def test_without_tilelang_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(_toolchain, "tilelang_version", lambda: None)
    why = fails(capsys, *SMALL, "--dry-run", "--arch", "sm_90a")
    assert "TileLang must be installed, got none; pip install tilelang==" in why


def test_without_a_gpu_it_says_what_works(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    why = fails(capsys, *SMALL)
    assert "must see a CUDA device, got none; --compile-only --arch sm_90a works" in why


def test_a_missing_package_is_named_with_its_extra(capsys, monkeypatch):
    def require(name: str) -> None:
        raise ImportError("no such package")

    monkeypatch.setattr(_extras.importlib, "import_module", require)
    why = fails(capsys, *SMALL)
    assert "autotune: the package 'tyro' must be installed" in why
    assert "pip install 'mhc-tile[tune]' brings it" in why


def test_both_commands_are_one(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["autotune", "--help"])
    one = capsys.readouterr().out
    with pytest.raises(SystemExit):
        module.main(["--help"])
    other = capsys.readouterr().out
    assert one[one.index("--preset") :] == other[other.index("--preset") :]
    assert module.main(["--tokens", "3"]) == 1
    assert capsys.readouterr().err.startswith("autotune: ")


@pytest.mark.parametrize("empty", ["", " "])
@pytest.mark.parametrize("option", [n for n, (kind, _) in cli._OPTIONS.items() if kind is not bool])
def test_no_option_takes_an_empty_text(capsys, option, empty):
    code = 1
    try:
        code = __main__.main(["autotune", *SMALL, cli.flag(option), empty])
    except SystemExit as end:
        code = end.code
    assert code == (1 if option in ("arch", "output") else 2)
    assert cli.flag(option) in capsys.readouterr().err


def test_the_table_may_begin_at_home_but_not_at_nobody_s(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli._options(["--output=~/x"], "autotune").output == tmp_path / "x"
    with pytest.raises(ValueError, match="--output must name a home folder, got '~no-such-user/x'"):
        cli._options(["--output", "~no-such-user/x"], "autotune")


# A GPU that is not there: everything but the CUDA calls is real.

TUNE = ("--hidden", "2560", "--kernel", "merge", "sinkhorn", "--tokens", "64", "4096")
PLANTED = {"160,2": 10.0, "96,2": 8.0, "320,1": "is wrong", "32": 2.0, "64": 2.0}


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_BENCH", json.dumps(PLANTED))
    monkeypatch.setenv("FAKE_BENCH_LOG", str(tmp_path / "runs.log"))
    monkeypatch.setattr(cli, "describe", lambda: DEVICE)
    monkeypatch.setattr(cli, "driver_version", lambda: "580.1")
    monkeypatch.setattr(cli, "identity", lambda: "")
    monkeypatch.setattr(cli, "_BANDWIDTH", "fake_bench:bandwidth")
    monkeypatch.setattr(
        cli, "Measurer", functools.partial(measuring.Measurer, bench="fake_bench:FakeBench")
    )
    none = (Resources("k", 32, 0, 0, 0, 0, 0, 128),)
    monkeypatch.setattr(compiling, "compile_all", lambda jobs, **_: [(job, none) for job in jobs])
    monkeypatch.setattr(_static, "available", lambda: None)


def test_the_command_from_candidates_to_table_and_picture(places, fake_gpu, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_BENCH", json.dumps({**PLANTED, "96,1": "hangs"}))
    said = run(capsys, *TUNE, "--timeout", "3")
    assert re.search(r"rejected: merge 64 x 2560, .*\"threads\": 320.*: wrong: result 0 must", said)
    assert re.search(r"rejected: merge 64 x 2560, .*\"threads\": 96.*: hung: no answer", said)
    row = next(line for line in said.splitlines() if re.match(r"merge +4096 x 2560", line))
    found = row.split()[-7:]
    assert found[:4] == ["10.0", "8.0", "+25.0%", "591%"]
    assert found[4:] == ["merge.ForwardConfig", "threads=96", "vectors=2"]
    assert "2 of 4 differ from the default; geometric mean +11.8%" in said  # 1.25 ** (2 / 4)
    path = places / "tables" / "nvidia_test_1.json"
    picture = places / "journal" / "nvidia_test_1_132.png"
    assert f"table: {path}\npicture: {picture}" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {key.kernel for key in table.read(path, DEVICE).families} == {"merge", "sinkhorn"}


def test_places_that_cannot_be_written_are_named_before_anything_is_measured(
    places, fake_gpu, monkeypatch, capsys
):
    monkeypatch.setattr(compiling, "compile_all", lambda *_, **__: pytest.fail("it compiles"))
    (places / "file").touch()
    said = fails(capsys, *TUNE, "--output", str(places))
    assert f"must be a file that can be written, got {places} (something else" in said
    assert "--output names another" in said
    said = fails(capsys, *TUNE, "--output", str(places / "file" / "x.json"))
    assert "--output names another" in said
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(places / "file" / "x"))
    assert "the variable TILELANG_CACHE_DIR names another place" in fails(capsys, *TUNE)
    monkeypatch.setattr(journal, "folder", lambda: places / "file" / "x")
    assert "the variable XDG_CACHE_HOME names another place" in fails(capsys, *TUNE)


def test_phases_can_be_run_apart(places, fake_gpu, capsys):
    path = places / "here.json"
    output = ("--output", str(path))
    assert "nothing is measured yet" in run(capsys, *TUNE, *output, "--write-only")
    assert not table.read(path, DEVICE).families
    said = run(capsys, *TUNE, *output, "--measure-only", "--timeout", "3")
    assert "measured; journal: " in said
    assert not table.read(path, DEVICE).families
    said = run(capsys, *TUNE, *output, "--write-only")
    assert len(table.read(path, DEVICE).families) == 2
    assert "differ from the default" in said
    apart, runs = path.read_bytes(), (places / "runs.log").read_text()
    for resume in ((), ("--resume",)):
        run(capsys, *TUNE, *output, *resume)
        assert path.read_bytes() == apart
        assert (places / "runs.log").read_text() == runs  # nothing ran again
    run(capsys, *TUNE, *output, "--force", "--timeout", "3")
    assert (places / "runs.log").read_text() == 2 * runs


def test_what_fails_is_the_exit_code(places, fake_gpu, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_BENCH", json.dumps({"160,2": "crashes"}))
    assert __main__.main(["autotune", *TUNE]) == 1
    said = capsys.readouterr().out
    assert "failed: merge 4096 x 2560, n 4, bfloat16: the default must run" in said
    assert "sinkhorn" in said


REAL_COMPILE_ALL = compiling.compile_all


def test_measure_only_compiles_nothing(places, fake_gpu, capsys, monkeypatch):
    monkeypatch.setattr(compiling, "compile_all", REAL_COMPILE_ALL)
    assert __main__.main(["autotune", *TUNE, "--measure-only"]) == 1
    said = capsys.readouterr().out
    why = "the default must compile, got it is not compiled yet"
    assert f"failed: merge 64 x 2560, n 4, bfloat16: {why}" in said
    assert not list((places / "cache").rglob("executable.so"))


def test_a_default_that_does_not_compile_costs_its_own_problems_alone(
    places, fake_gpu, capsys, monkeypatch
):
    fake = compiling.compile_all

    def compile_all(jobs, **_):
        for job, taken in fake(jobs):
            yield job, "RuntimeError: nvcc is unhappy" if "merge" in job.module else taken

    monkeypatch.setattr(compiling, "compile_all", compile_all)
    assert __main__.main(["autotune", *TUNE]) == 1
    said = capsys.readouterr().out
    assert "failed: merge 4096 x 2560, n 4, bfloat16: the default must compile, got Runtime" in said
    (key,) = table.read(places / "tables" / "nvidia_test_1.json", DEVICE).families
    assert key.kernel == "sinkhorn"
    assert __main__.main(["autotune", *TUNE[:4], "--arch", "sm_90a", "--compile-only"]) == 1
    assert "failed: merge" in capsys.readouterr().out
    assert __main__.main(["autotune", *TUNE[:4], "--arch", "sm_90a", "--dry-run"]) == 1
    said = capsys.readouterr().out
    assert "default pruned: does not compile: RuntimeError: nvcc is unhappy" in said
    assert "0 of 5 to measure" in said


def test_without_a_copy_bandwidth_there_are_no_percents(places, fake_gpu, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_BANDWIDTH", "fake_bench:no_bandwidth")
    said = run(capsys, *TUNE, "--timeout", "3")
    assert "a large copy could not be timed (the process ended with code 1; " in said
    assert "2 of 4 differ from the default" in said


def test_a_second_tuner_waits_for_the_first(places, fake_gpu, capsys):
    journal.folder().mkdir(parents=True)
    locked = threading.Event()

    def other_tuner() -> None:
        with FileLock(journal.folder() / "nvidia_test_1.lock"):
            locked.set()
            time.sleep(1.0)

    threading.Thread(target=other_tuner).start()
    locked.wait()
    said = run(capsys, *TUNE, "--timeout", "3")
    assert said.index("another tuner measures on this GPU: waiting") < said.index("rejected")


def test_a_table_that_cannot_be_written_ends_the_run_before_it_begins(places, fake_gpu, capsys):
    path = places / "newer.json"
    path.write_text('{"schema": 2}')
    assert "schema must be 1, got 2" in fails(capsys, *TUNE, "--output", str(path))
    assert not (places / "runs.log").exists()


def test_what_happens_to_the_table_is_said(places, fake_gpu, capsys):
    path = places / "here.json"
    path.write_text("{ broken")
    said = run(capsys, *TUNE, "--timeout", "3", "--output", str(path))
    assert f"{path} could not be read: it is kept as {path}.unreadable" in said
    assert f"ops do not read this table by themselves: set MHC_TILE_TABLES={path}" in said
    assert "set MHC_TILE_TABLES" not in run(capsys, *TUNE)


@pytest.mark.parametrize("kernel", KERNELS)
def test_inputs_fit_the_launcher_and_bytes_are_counted(kernel):
    sized = KERNELS[kernel].of_channels
    problem = Problem(kernel, 2, 64 if sized else 0, "float16" if sized else "float32", 3)
    config = registry.default(problem, Target("sm_80", 108))
    assert registry.programs(problem, config, Target("sm_80", 108))
    tensors, again = (KERNELS[kernel].samples(problem, "cpu") for _ in range(2))
    assert all(one.equal(other) for one, other in zip(tensors, again, strict=True))
    sizes = sum(value.nbytes for value in tensors)
    moved = KERNELS[kernel].traffic(problem)
    assert moved > 0.5 * sizes

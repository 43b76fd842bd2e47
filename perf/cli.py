"""The commands of `mhc-tile perf`: their options, and what they run.

TileLang and matplotlib are imported by who needs them alone.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_origin

from mhc_tile.autotune._arguments import check_folder
from mhc_tile.autotune._extras import require
from mhc_tile.autotune._options import Options, choose, parse
from mhc_tile.training.signals import raising

from . import compare, environment, output, records, summary
from .compare import Comparison
from .records import OURS, Record

REGRESSION = 3  # exit code: measured and compared, and something is slower or fails
HERE = Path(__file__).parent
TERMINAL = Path("-")

COMMANDS = {
    "run": "every op, case by case: ours, the reference, other implementations",
    "overhead": "what mHC adds to a training step of a model's layers",
    "compare": "two results, case by case; 3 if one is slower",
    "gate": "this checkout against the baseline of this GPU's model; 3 if it is slower",
    "report": "one HTML page of a result, with its pictures",
}
_POSITIONAL = ("base", "new", "result")
_EMPTY: dict[Any, Any] = {
    bool: False,
    tuple: (),
}  # if an option of this type is not given
_FORCE = {"force": (bool, "whatever differs between the results")}
_VERDICT: Options = {
    "threshold": (float, "percent (default: 5)"),
    **_FORCE,
    "markdown": (Path, "for a pull request; - for the terminal"),
    "json": (Path, "for programs; - for the terminal"),
}
_COMPARE: Options = {
    "base": (Path, "the older result, of `mhc-tile perf run`"),
    "new": (Path, "the newer result"),
    **_VERDICT,
}
_GATE: Options = {
    "result": (Path, "of `mhc-tile perf run` (default: measure now)"),
    "baseline": (Path, "file (default: perf/baselines/<gpu>.json)"),
    "out": (Path, "file that keeps what is measured now"),
    **_VERDICT,
    "static": (bool, "without a GPU: registers, spills, shared memory, launches; no times"),
    "arch": (str, "with --static: this one only, such as sm_90a"),
    "fresh": (bool, "with --static: compile what is recorded, too"),
    "write": (bool, "with --static: record in perf/static what is now"),
}
_REPORT: Options = {
    "result": (Path, "of `mhc-tile perf run` or `overhead`"),
    "baseline": (Path, "an older result, to compare"),
    "out": (Path, "file (default: beside the result)"),
    "figures": (Path, "folder for the pictures as PNG, too"),
    **_FORCE,
}


def main(argv: Sequence[str], prog: str = "mhc-tile perf") -> int:
    """Run a command.

    Returns:
        0, or 3 if something is slower than it was, or does not work any more; 1 if what
        `run` or `overhead` measures of this library is wrong or fails.

    Raises:
        SystemExit: There is no such command or option, or a value cannot be one; with code 2.
        ValueError: The arguments or the files do not fit; the message names them.
        OSError: A file cannot be read or written.
        MissingExtraError: A package of the perf extra is missing.
        KeyboardInterrupt: After Ctrl-C, or a SIGTERM such as `timeout` sends.
    """
    with raising():  # what was measured is kept
        perform, args = parsed(argv, prog)
        return perform(args)


def command(name: str) -> tuple[Options, dict[str, Any], Callable[[SimpleNamespace], int]]:
    """The options of a command, their defaults, and the function that runs it."""
    if name == "run":
        from . import suite

        return suite.OPTIONS, suite.DEFAULTS, suite.run
    if name == "overhead":
        from . import overhead

        return overhead.OPTIONS, overhead.DEFAULTS, overhead.run
    if name == "report":
        return _REPORT, {}, _report_page
    percent = {"threshold": 5.0}
    return (_GATE, percent, _gate) if name == "gate" else (_COMPARE, percent, _compare)


def parsed(
    argv: Sequence[str], prog: str
) -> tuple[Callable[[SimpleNamespace], int], SimpleNamespace]:
    """The function that runs a command, and what it gets: a value for every option.

    Raises:
        SystemExit: As of `main`.
        MissingExtraError: tyro is not installed.
    """
    name = choose(prog, "Measure, compare, judge and report.", COMMANDS, argv)
    options, defaults, perform = command(name)
    empty = {n: _EMPTY.get(get_origin(kind) or kind) for n, (kind, _) in options.items()}
    positional = [n for n in _POSITIONAL if n in options]
    try:
        given = parse(f"{prog} {name}", COMMANDS[name], options, argv[1:], "perf", positional)
        for missing in positional if name != "gate" else ():
            if missing not in given:
                raise ValueError(f"perf {name}: {missing} must be given, got none")
        if not 0 <= (percent := given.get("threshold", 0)) < 1000:  # nor is NaN
            rule = "must be from 0 to 1000 percent"
            raise ValueError(f"perf {name}: --threshold {rule}, got {percent}")
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from error
    return perform, SimpleNamespace(**empty | defaults | given)


def baseline_path(gpu: str) -> Path:
    """Where the baseline of a GPU's model is; `gpu` is the vendor's name of the model."""
    return HERE / "baselines" / f"{records.slug(gpu)}.json"


def _compare(args: SimpleNamespace) -> int:
    base, new = records.read(args.base), records.read(args.new)
    _check_output(args, "perf compare", base=args.base, new=args.new)
    found = compare.compare(base, new, threshold=args.threshold / 100, force=args.force)
    return _say(found, args, complete=False)


def _gate(args: SimpleNamespace) -> int:
    if args.static:
        return _gate_static(args)
    for name in ("arch", "fresh", "write"):
        if getattr(args, name):
            raise ValueError(f"perf gate: --{name} must come with --static, got no --static")
    options = {"threshold": args.threshold / 100, "force": args.force}
    if args.result:
        if args.out:
            raise ValueError("perf gate: --out must come without a result, got both")
        new = records.read(args.result)
        _check_commit(new, args)
        _check_alone(new, args.result, args)
        base = _baseline(args, new.environment.get("gpu"))
        _check_output(args, "perf gate", result=args.result, baseline=args.baseline)
        return _say(compare.compare(base, new, **options), args, complete=True)
    gpu = _gpu_here()
    base = _baseline(args, gpu)
    compare.check_comparable(base, Record("run", {"gpu": gpu}, []), force=args.force)
    _check_output(args, "perf gate", baseline=args.baseline or baseline_path(gpu))
    require("tqdm", "mhc-tile perf gate", "perf")
    from . import suite

    again = False

    def measure(wanted: Record) -> Record:
        nonlocal again
        first, again = not again, True
        # what looks slower is measured again; it does not replace the rest, and counts in any case
        path = args.out if first else None
        return suite.measure_for_gate(wanted, path, force=args.force or not first)

    found = compare.gate(base, measure, **options)
    if args.out:
        records.write(found.new, args.out)
    return _say(found, args, complete=True)


def _check_output(args: SimpleNamespace, command: str, **read: Path | None) -> None:
    """Fail for what would fail after minutes of measuring, or lose the verdict."""
    if TERMINAL not in (args.markdown, args.json):  # else there is no table
        require("tabulate", f"mhc-tile {command}", "perf")
    asked = {name: getattr(args, name, None) for name in ("out", "markdown", "json")}
    paths = {name: path for name, path in asked.items() if path and path != TERMINAL}
    output.check_apart(command, read, paths)
    for name, path in paths.items():
        output.check_file(command, name, path, replaced=name == "out")


def _gate_static(args: SimpleNamespace) -> int:
    for name in ("result", "baseline", "out", "markdown", "json"):
        if value := getattr(args, name):
            what = name if name == "result" else f"--{name}"
            raise ValueError(f"perf gate: --static must come without {what}, got {value}")
    from mhc_tile.kernels.common import static as _static
    from mhc_tile.kernels.common import toolchain as _toolchain
    from mhc_tile.kernels.common.architectures import CHECKED

    if args.arch and args.arch not in CHECKED:
        known = ", ".join(CHECKED)
        raise ValueError(f"perf gate: --arch must be one of {known}, got {args.arch}")
    if why := _static.available():
        raise ValueError(f"perf gate: a compiler must be here, got none: {why}")
    if (nvcc := _toolchain.nvcc()) and not _toolchain.nvcc_version(nvcc):
        raise ValueError(
            f"perf gate: nvcc must run, got {nvcc}, which does not; see mhc-tile doctor"
        )
    cache = _toolchain.kernel_cache()  # TileLang makes it as soon as it is imported
    check_folder("perf gate: TileLang's cache", cache, variable="TILELANG_CACHE_DIR")
    from . import static_gate

    chosen = [args.arch] if args.arch else CHECKED
    wrong = static_gate.run(chosen, fresh=args.fresh, write=args.write)
    sys.stderr.write("".join(f"{fault}\n" for fault in wrong))
    return REGRESSION if wrong else 0


def _check_commit(new: Record, args: SimpleNamespace) -> None:
    """A result of another commit says nothing of this checkout."""
    measured, here = new.environment.get("commit"), environment.commit()
    if here and measured != here and not args.force:
        raise ValueError(
            f"perf gate: {args.result} must be of this checkout's commit {here}, got {measured}; "
            "measure again, or judge it all the same with --force"
        )


def _check_alone(record: Record, path: Path, args: SimpleNamespace) -> None:
    """Beside other contenders this library's small cases take longer."""
    others = [name for name in compare.timed(record) if name != OURS]
    if others and not args.force:
        raise ValueError(
            f"perf gate: {path} must be measured alone, by `mhc-tile perf run --contender {OURS}`, "
            f"got times of {', '.join(others)}, too; judge it all the same with --force"
        )


def _baseline(args: SimpleNamespace, gpu: str | None) -> Record:
    if not (args.baseline or gpu):
        raise ValueError("perf gate: --baseline must be given for a result of a CPU, got none")
    path = args.baseline or baseline_path(str(gpu))
    try:
        base = records.read(path)
    except FileNotFoundError as error:
        place = path if args.baseline or environment.is_checkout() else Path("baseline.json")
        ending = "" if place == path else f", and `--baseline {place}` has it read"
        raise ValueError(
            f"perf gate: a baseline must be at {path}, got none; on a commit that is to be the "
            f"measure, `mhc-tile perf run --contender mhc_tile --out {place}` makes it{ending}"
        ) from error
    if left := base.environment.get("cases_left"):
        raise ValueError(
            f"perf gate: {path} must be of a run that ended, got one with {left} cases left; "
            "measure it again"
        )
    _check_alone(base, path, args)
    if args.out and args.out.resolve() == path.resolve():
        raise ValueError(
            f"perf gate: --out must not be the baseline, got {path}; "
            f"`mhc-tile perf run --contender mhc_tile --out {path}` makes a new one"
        )
    return base


def _gpu_here() -> str:
    from mhc_tile.autotune.device import describe

    try:
        return describe().name
    except RuntimeError as error:
        raise ValueError(
            f"perf gate: a GPU or a result file must be given, got neither ({error}); "
            "--static needs neither"
        ) from error


def _say(found: Comparison, args: SimpleNamespace, *, complete: bool) -> int:
    failed = bool(found.faults(complete=complete))
    if not (failed or found.judged):
        raise ValueError(
            "compare: results must have a case of mhc_tile in common, got none among "
            f"{len(found.base.rows)} and {len(found.new.rows)} rows"
        )
    asked = [(args.markdown, summary.markdown), (args.json, summary.as_json)]
    shown = [write(found, complete=complete) for target, write in asked if target == TERMINAL]
    if not shown:
        head = summary.headline(found, complete=complete)
        shown = ["\n".join([summary.table(found), "", *summary.lines(found), head]) + "\n"]
    sys.stdout.write("".join(shown))
    sys.stdout.flush()  # a disk that is full does not take the verdict with it
    for target, write in asked:
        if target and target != TERMINAL:
            target.write_text(write(found, complete=complete))
    return REGRESSION if failed else 0


def _report_page(args: SimpleNamespace) -> int:
    from . import report

    record, found = records.read(args.result), None
    path = args.out or args.result.with_suffix(".html")
    output.check_apart(
        "perf report", {"result": args.result, "baseline": args.baseline}, {"out": path}
    )
    output.check_file("perf report", "out", path)
    output.check_figures("perf report", args.figures)
    if args.baseline:
        found = compare.compare(records.read(args.baseline), record, force=args.force)
    report.write(record, path, found, args.figures)
    sys.stdout.write(f"{path}\n")
    return 0

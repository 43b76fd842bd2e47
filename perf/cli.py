"""The commands of `mhc-tile perf`: their arguments, and what they run.

Each command has a function in `COMMANDS` that declares it and sets `perform`, a function from the
parsed arguments to an exit code. TileLang and matplotlib are imported by who needs them alone.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhc_tile.autotune import _arguments as given

if TYPE_CHECKING:
    from .compare import Comparison
    from .records import Record

REGRESSION = 3  # exit code: measured and compared, and something is slower or fails
HERE = Path(__file__).parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)


def run(args: argparse.Namespace) -> int:
    """Run the chosen command.

    Returns:
        0, or 3 if something is slower than it was, or does not work any more.

    Raises:
        ValueError: The arguments or the files do not fit; the message names them.
        OSError: A file cannot be read or written.
        MissingExtraError: A package of the perf extra is missing.
        KeyboardInterrupt: After Ctrl-C, or a SIGTERM such as `timeout` sends.
    """
    with _ended_like_ctrl_c():
        return args.perform(args)


@contextlib.contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: what was measured is kept."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread, which gets no signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _add_run(commands: Any) -> None:
    from . import suite

    parser = commands.add_parser(
        "run", help="every op, case by case: ours, the reference, other implementations"
    )
    suite.add_arguments(parser)
    parser.set_defaults(perform=suite.run)


def _add_overhead(commands: Any) -> None:
    from . import overhead

    parser = commands.add_parser(
        "overhead", help="what mHC adds to a training step of a model's layers"
    )
    overhead.add_arguments(parser)
    parser.set_defaults(perform=overhead.run)


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser("compare", help="two results, case by case; 3 if one is slower")
    parser.add_argument("base", type=given.path, help="the older result, of `mhc-tile perf run`")
    parser.add_argument("new", type=given.path, help="the newer result")
    _add_output(parser)
    parser.set_defaults(perform=_compare)


def _add_gate(commands: Any) -> None:
    parser = commands.add_parser(
        "gate", help="this checkout against the baseline of this GPU's model; 3 if it is slower"
    )
    parser.add_argument(
        "result", type=given.path, nargs="?", help="of `mhc-tile perf run`; default: measure now"
    )
    parser.add_argument(
        "--baseline", type=given.path, metavar="FILE", help="default: perf/baselines/<gpu>.json"
    )
    parser.add_argument("--out", type=given.path, metavar="FILE", help="keep what is measured now")
    _add_output(parser)
    static = parser.add_argument_group(
        "without a GPU", "Registers, spills, shared memory, launches"
    )
    static.add_argument(
        "--static", action="store_true", help="registers, spills, launches; no times"
    )
    static.add_argument("--arch", type=given.text, help="this one only, such as sm_90a")
    static.add_argument("--fresh", action="store_true", help="compile what is recorded, too")
    static.add_argument("--write", action="store_true", help="record in perf/static what is now")
    parser.set_defaults(perform=_gate)


def _add_report(commands: Any) -> None:
    parser = commands.add_parser("report", help="one HTML page of a result, with its pictures")
    parser.add_argument("result", type=given.path, help="of `mhc-tile perf run` or `overhead`")
    parser.add_argument(
        "--baseline", type=given.path, metavar="FILE", help="an older result, to compare"
    )
    parser.add_argument("--out", type=given.path, metavar="FILE", help="default: beside the result")
    parser.add_argument(
        "--figures", type=given.path, metavar="DIR", help="the pictures as PNG, too"
    )
    parser.add_argument("--force", action="store_true", help="whatever differs between the results")
    parser.set_defaults(perform=_report_page)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threshold", type=_percent, default=5.0, metavar="PERCENT", help="default: 5"
    )
    parser.add_argument("--force", action="store_true", help="whatever differs between the results")
    file: dict[str, Any] = {"type": given.output, "metavar": "FILE"}
    parser.add_argument("--markdown", **file, help="for a pull request; - for the terminal")
    parser.add_argument("--json", **file, help="for programs; - for the terminal")


COMMANDS: list[Callable[[Any], None]] = [
    _add_run,
    _add_overhead,
    _add_compare,
    _add_gate,
    _add_report,
]


def baseline_path(gpu: str) -> Path:
    """Where the baseline of a GPU's model is.

    Args:
        gpu: the vendor's name of the model.

    Example:
        >>> baseline_path("NVIDIA H200").name
        'nvidia_h200.json'
    """
    from .records import slug

    return HERE / "baselines" / f"{slug(gpu)}.json"


def _compare(args: argparse.Namespace) -> int:
    from . import compare, records

    base, new = records.read(args.base), records.read(args.new)
    _check_output(args, "perf compare", base=args.base, new=args.new)
    found = compare.compare(base, new, threshold=args.threshold / 100, force=args.force)
    return _say(found, args, complete=False)


def _gate(args: argparse.Namespace) -> int:
    if args.static:
        return _gate_static(args)
    for name in ("arch", "fresh", "write"):
        if getattr(args, name):
            raise ValueError(f"perf gate: --{name} must come with --static, got no --static")
    from mhc_tile.autotune._extras import require

    from . import compare, records

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
    nothing = records.Record("run", {"gpu": gpu}, [])
    compare.check_comparable(base, nothing, force=args.force)
    _check_output(args, "perf gate", baseline=args.baseline or baseline_path(gpu))
    require("tqdm", "mhc-tile perf gate", "perf")
    again = False

    def measure(wanted: records.Record) -> records.Record:
        nonlocal again
        first, again = not again, True
        # what looks slower is measured again; it does not replace the rest, and counts in any case
        return _measure(wanted, args.out if first else None, args.force or not first)

    found = compare.gate(base, measure, **options)
    if args.out:
        records.write(found.new, args.out)
    return _say(found, args, complete=True)


def _check_output(args: argparse.Namespace, command: str, **read: Path | None) -> None:
    """Fail for what would fail after minutes of measuring, or lose the verdict."""
    from mhc_tile.autotune._extras import require

    from . import output

    asked = {name: getattr(args, name, None) for name in ("out", "markdown", "json")}
    if "-" not in asked.values():  # else there is no table
        require("tabulate", f"mhc-tile {command}", "perf")
    paths = {name: Path(path) for name, path in asked.items() if path and path != "-"}
    output.check_apart(command, read, paths)
    for name, path in paths.items():
        output.check_file(command, name, path, replaced=name == "out")


def _gate_static(args: argparse.Namespace) -> int:
    for name in ("result", "baseline", "out", "markdown", "json"):
        if getattr(args, name):
            what = name if name == "result" else f"--{name}"
            value = getattr(args, name)
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
    given.check_folder("perf gate", cache, "TileLang's cache", "TILELANG_CACHE_DIR")
    from . import static_gate

    chosen = [args.arch] if args.arch else CHECKED
    wrong = static_gate.run(chosen, fresh=args.fresh, write=args.write)
    for fault in wrong:
        sys.stderr.write(f"{fault}\n")
    return REGRESSION if wrong else 0


def _check_commit(new: "Record", args: argparse.Namespace) -> None:
    """A result of another commit says nothing of this checkout."""
    from .environment import commit

    measured, here = new.environment.get("commit"), commit()
    if here and measured != here and not args.force:
        raise ValueError(
            f"perf gate: {args.result} must be of this checkout's commit {here}, got {measured}; "
            "measure again, or judge it all the same with --force"
        )


def _check_alone(record: "Record", path: Path, args: argparse.Namespace) -> None:
    """Beside other contenders this library's small cases take longer."""
    from . import compare
    from .records import OURS

    others = [name for name in compare.timed(record) if name != OURS]
    if others and not args.force:
        raise ValueError(
            f"perf gate: {path} must be measured alone, by `mhc-tile perf run --contender {OURS}`, "
            f"got times of {', '.join(others)}, too; judge it all the same with --force"
        )


def _baseline(args: argparse.Namespace, gpu: str | None) -> "Record":
    from . import records
    from .environment import is_checkout

    if not (args.baseline or gpu):
        raise ValueError("perf gate: --baseline must be given for a result of a CPU, got none")
    path = args.baseline or baseline_path(str(gpu))
    try:
        base = records.read(path)
    except FileNotFoundError as error:
        place = path if args.baseline or is_checkout() else Path("baseline.json")
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


def _measure(base: "Record", path: Path | None, force: bool) -> "Record":
    """The cases of a baseline, now."""
    import importlib

    suite = importlib.import_module(".suite", __package__)
    return suite.measure_for_gate(base, path, force=force)


def _say(found: "Comparison", args: argparse.Namespace, *, complete: bool) -> int:
    from . import summary

    failed = bool(found.faults(complete=complete))
    if not (failed or found.judged):
        raise ValueError(
            "compare: results must have a case of mhc_tile in common, got none among "
            f"{len(found.base.rows)} and {len(found.new.rows)} rows"
        )
    asked = {"markdown": args.markdown, "json": args.json}
    write = {"markdown": summary.markdown, "json": summary.as_json}
    shown = [name for name, target in asked.items() if target == "-"]
    for name in shown:
        sys.stdout.write(write[name](found, complete=complete))
    if not shown:
        head = summary.headline(found, complete=complete)
        sys.stdout.write("\n".join([summary.table(found), "", *summary.lines(found), head]) + "\n")
    sys.stdout.flush()  # a disk that is full does not take the verdict with it
    for name, target in asked.items():
        if target and target != "-":
            Path(target).write_text(write[name](found, complete=complete))
    return REGRESSION if failed else 0


def _report_page(args: argparse.Namespace) -> int:
    from . import compare, output, records, report

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


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number of percent, got {text!r}") from error
    if not 0 <= value < 1000:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1000 percent, got {text}")
    return value

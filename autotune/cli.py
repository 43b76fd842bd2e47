"""The command `mhc-tile autotune`: its arguments, and the phases they ask for."""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..kernels.common import static as _static
from ..kernels.common import toolchain as _toolchain
from ..kernels.common.architectures import CHECKED, architecture_of
from . import _arguments as given
from . import compiling, journal, report, table, tuner
from ._extras import require
from .device import Device, describe, driver_version, identity
from .measuring import Measurer
from .problems import DTYPES, PRESETS, TOKENS, Problem, Shape, problems
from .registry import KERNELS, Target
from .worker import WorkerDied, WorkerHung

SECONDS = 60.0  # for one candidate: the inputs, its launches, its graph
# What no GPU, model or machine has yet; beyond it integers of programs and waits overflow.
MOST: dict[str, float] = {"hidden": 1 << 20, "tokens": _toolchain.MOST_TOKENS}
MOST |= {"multiprocessors": 1 << 16, "jobs": 1 << 12, "budget": 1e6, "timeout": 86400}
_BANDWIDTH = f"{__package__}.bench:copy_bandwidth"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    what = parser.add_argument_group("what to tune")
    what.add_argument("--preset", choices=sorted(PRESETS), help="shapes of models, or all of them")
    what.add_argument("--hidden", type=int, nargs="+", metavar="C", help="hidden sizes instead")
    what.add_argument("--streams", type=int, nargs="+", metavar="n", help="with C; default: 4")
    what.add_argument("--dtype", nargs="+", choices=DTYPES, help="with C; default: bfloat16")
    what.add_argument("--tokens", type=int, nargs="+", metavar="T", help="default: 1, 4, .. 65536")
    what.add_argument("--kernel", nargs="+", choices=list(KERNELS), help="only these")
    phase = parser.add_argument_group("phases").add_mutually_exclusive_group()
    phase.add_argument("--dry-run", action="store_true", help="compile and list the candidates")
    phase.add_argument("--compile-only", action="store_true", help="fill the cache; needs no GPU")
    phase.add_argument("--measure-only", action="store_true", help="what is compiled; no table")
    phase.add_argument("--write-only", action="store_true", help="a table of what is measured")
    how = parser.add_argument_group("how")
    how.add_argument("--arch", type=given.text, help="without a GPU: such as sm_90a")
    how.add_argument("--multiprocessors", type=int, help="with --arch, of a model that has fewer")
    how.add_argument("--budget", type=float, metavar="MINUTES", help="begin no measurement after")
    how.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiling processes")
    limit = "seconds for a candidate, at most a day"
    how.add_argument("--timeout", type=float, default=SECONDS, help=limit)
    again = how.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_false", dest="force", help="the default: go on")
    again.add_argument("--force", action="store_true", help="measure again what is known")
    parser.set_defaults(force=False)
    how.add_argument("--output", type=given.path, help="the table; default: the user's data folder")


def run(args: argparse.Namespace) -> int:
    """Run the phases that the arguments ask for.

    Returns:
        0, or 1 if something could not be measured.

    Raises:
        ValueError: The arguments do not fit together or this machine.
        MissingExtraError: A package of the tune extra is missing.
    """
    for module in ("tqdm", "tabulate", "matplotlib.figure"):
        require(module, "autotune")
    shapes = _shapes(args)
    if _toolchain.tilelang_version() is None:
        needed = f"pip install tilelang=={_toolchain.REQUIRED_TILELANG}"
        raise ValueError(f"autotune: TileLang must be installed, got none; {needed}")
    device, target = _target(args)
    if device is not None and not (args.dry_run or args.compile_only or args.measure_only):
        table.check(_path(args, device), device)
    wanted = problems(shapes, args.kernel or KERNELS)
    folder, cache = journal.folder(), _toolchain.kernel_cache()
    given.check_folder("autotune", folder, "the user's cache", "XDG_CACHE_HOME")
    given.check_folder("autotune", cache, "TileLang's cache", "TILELANG_CACHE_DIR")
    log = folder / "workers.log"
    if args.write_only:
        return _write(args, _device(device), target, wanted)
    plans = [tuner.plan(problem, target) for problem in _bar(wanted, len(wanted), "plan")]
    build = not args.measure_only
    if build and (why := _static.available()):
        raise ValueError(f"autotune: a compiler must be here, got none: {why}")
    count = tuner.compile_plans(plans, processes=args.jobs, progress=_bar, log=log, build=build)
    failed = [plan for plan in plans if plan.failed]
    if args.dry_run:
        _say(report.listing(plans, target.arch))
        return 1 if failed else 0
    options = [option for plan in plans for option in plan.options if option.pruned]
    _say(f"{count} programs for {target.arch} in {cache}; {len(options)} candidates pruned")
    if args.compile_only:
        for plan in failed:
            _say(f"failed: {plan.failed}")
        return 1 if failed else 0
    return _measure(args, _device(device), target, plans, log)


def _target(args: argparse.Namespace) -> tuple[Device | None, Target]:
    if args.arch:
        if not (args.compile_only or args.dry_run):
            raise ValueError("autotune: --arch must come with --compile-only or --dry-run")
        if not re.fullmatch(r"sm_\d+[a-z]?", args.arch):
            raise ValueError(f"autotune: --arch must be such as sm_90a, got {args.arch}")
        try:
            record = architecture_of(args.arch)
        except ValueError as error:  # before all is compiled
            said = str(error).partition(": ")[2]
            raise ValueError(f"autotune: --{said}") from error
        if not (number := args.multiprocessors or record.multiprocessors):
            raise ValueError(
                f"autotune: --multiprocessors must be given for this --arch, got {args.arch}; "
                f"known are {', '.join(CHECKED)}"
            )
        return None, Target(args.arch, number)
    if args.multiprocessors:
        raise ValueError("autotune: --multiprocessors must come with --arch, got no --arch")
    try:
        device = describe()
        arch = _toolchain.target(device.capability)["arch"]
    except RuntimeError as error:
        raise ValueError(
            f"autotune: {error}; --compile-only --arch sm_90a works without a GPU"
        ) from error
    return device, Target(arch, device.multiprocessors)


def _device(device: Device | None) -> Device:
    assert device is not None  # --arch goes with phases that need none
    return device


def _shapes(args: argparse.Namespace) -> Sequence[Shape]:
    if bool(args.preset) == bool(args.hidden):
        raise ValueError(f"autotune: one of --preset {sorted(PRESETS)} and --hidden must be given")
    for name in ("streams", "dtype"):
        if args.preset and getattr(args, name):
            raise ValueError(f"autotune: --{name} must come with --hidden, got --preset")
    for name, most in MOST.items():
        values = getattr(args, name)
        values = values if isinstance(values, list) else [values]
        for value in values:
            if value is not None and not 0 < value <= most:
                raise ValueError(
                    f"autotune: --{name} must be above 0 and at most {most}, got {value}"
                )
    if wrong := [n for n in args.streams or () if n not in _toolchain.STREAMS]:
        raise ValueError(f"autotune: --streams must be in {_toolchain.STREAMS}, got {wrong}")
    tokens = tuple(args.tokens or TOKENS)
    if wrong := [count for count in tokens if count & (count - 1)]:
        raise ValueError(f"autotune: --tokens must be powers of two, got {wrong}")
    if args.preset:
        return [Shape(s.channels, s.n, s.dtype, tokens) for s in PRESETS[args.preset]]
    return [
        Shape(channels, n, dtype, tokens)
        for channels in args.hidden
        for n in args.streams or (4,)
        for dtype in args.dtype or ("bfloat16",)
    ]


def _measure(
    args: argparse.Namespace,
    device: Device,
    target: Target,
    plans: list[tuner.Plan],
    log: Path,
) -> int:
    kept = journal.Journal(journal.path_of(device), compiling.fingerprint())

    def after(members: list[tuner.Plan]) -> None:
        if not args.measure_only:
            _update(args, device, target, [plan.problem for plan in members], kept)

    with _alone(device), Measurer(seconds=args.timeout, log=log) as measurer:
        kept.refresh()  # what another tuner has measured while this one waited
        try:
            kept.note_bandwidth(measurer.ask(_BANDWIDTH))
        except (WorkerDied, WorkerHung) as error:
            _say(f"a large copy could not be timed ({error}; {log}): no percent of the floor")
        outcome = tuner.measure_plans(
            plans,
            kept,
            measurer,
            driver=driver_version(),
            budget=args.budget and args.budget * 60,
            force=args.force,
            progress=_bar,
            after=after,
        )
    _rejected(plans, kept)
    for failure in outcome.failed:
        _say(f"failed: {failure}")
    if outcome.failed:
        _say(f"what the processes said is in {log}")
    if outcome.left:
        _say(f"{len(outcome.left)} problems are beyond the budget; the same command goes on there")
    if args.measure_only:
        _say(f"measured; journal: {kept.path}")
    else:
        _close(args, device, target, [plan.problem for plan in plans], kept)
    return 1 if outcome.failed else 0


def _write(args: argparse.Namespace, device: Device, target: Target, wanted: list[Problem]) -> int:
    kept = journal.Journal(journal.path_of(device), compiling.fingerprint())
    _update(args, device, target, wanted, kept)
    _close(args, device, target, wanted, kept)
    return 0


@contextlib.contextmanager
def _alone(device: Device) -> Iterator[None]:
    """Measure on this GPU while no other tuner does; a killed one lets go."""
    lock = FileLock(journal.folder() / f"{device.slug}{identity()}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say("another tuner measures on this GPU: waiting until it has ended")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _update(
    args: argparse.Namespace,
    device: Device,
    target: Target,
    wanted: Sequence[Problem],
    kept: journal.Journal,
) -> None:
    """Merge what is measured into the table, another tuner's outcomes of the same shapes too."""

    def families() -> Iterator[table.Family]:  # begins when the table is locked
        kept.refresh()
        yield from tuner.families(kept, wanted, target)

    path = _path(args, device)
    if aside := table.update(path, device, families()).aside:
        _say(f"{path} could not be read: it is kept as {aside}")


def _close(
    args: argparse.Namespace,
    device: Device,
    target: Target,
    wanted: list[Problem],
    kept: journal.Journal,
) -> None:
    """Print and draw the entries that were asked for, and say where everything is."""
    found = report.rows(tuner.families(kept, wanted, target), kept.bandwidth)
    path = _path(args, device)
    if not found:
        _say(f"nothing is measured yet; journal: {kept.path}")
        return
    _say(report.closing(found))
    picture = kept.path.with_suffix(".png")
    report.draw(found, picture, f"{device.name}: tuned configurations against the default")
    _say(f"\ntable: {path}\npicture: {picture}\njournal: {kept.path}")
    if path.resolve() not in [source.resolve() for source in table.sources(device)]:
        _say(f"ops do not read this table by themselves: {table.VARIABLE}={path} has them do so")


def _path(args: argparse.Namespace, device: Device) -> Path:
    return args.output or table.user_path(device)


def _rejected(plans: Iterable[tuner.Plan], kept: journal.Journal) -> None:
    for plan in plans:
        for name, outcome in kept.outcomes(plan.problem).items():
            if outcome.status == "rejected":
                _say(f"rejected: {plan.problem}: {name}: {outcome.why}")


def _bar(items: Iterable[Any], total: int, title: str) -> Iterable[Any]:
    tqdm = require("tqdm", "autotune").tqdm
    return tqdm(items, total=total, desc=title, mininterval=0.5, disable=None, dynamic_ncols=True)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()

"""The command `mhc-tile autotune`: its options, and the phases they ask for."""

import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from filelock import AcquireReturnProxy, FileLock, Timeout

from ..kernels.common import static as _static
from ..kernels.common import toolchain as _toolchain
from ..kernels.common.architectures import CHECKED, architecture_of
from . import compiling, journal, report, table, tuner
from ._arguments import check_folder
from ._extras import require
from ._options import Options, flag, parse
from .device import Device, describe, driver_version, identity
from .measuring import Measurer
from .problems import DTYPES, PRESETS, TOKENS, Problem, Shape, problems
from .registry import KERNELS, Target
from .worker import WorkerDied, WorkerHung

# What no GPU, model or machine has yet; beyond it integers of programs and waits overflow.
MOST: dict[str, float] = {"hidden": 1 << 20, "tokens": _toolchain.MOST_TOKENS}
MOST |= {"multiprocessors": 1 << 16, "jobs": 1 << 12, "budget": 1e6, "timeout": 86400}
_BANDWIDTH = f"{__package__}.bench:copy_bandwidth"
_KERNEL: Any = Literal.__getitem__(tuple(KERNELS))
_OPTIONS: Options = {
    "preset": (Literal["paper", "deepseek-v4", "all"], "shapes of models, or all of them"),
    "hidden": (tuple[int, ...], "hidden sizes, instead of a preset"),
    "streams": (tuple[int, ...], "with --hidden (default: 4)"),
    "dtype": (
        tuple[Literal["bfloat16", "float16", "float32"], ...],
        "with --hidden (default: bfloat16)",
    ),
    "tokens": (tuple[int, ...], "powers of two (default: 1, 4, .. 65536)"),
    "kernel": (tuple[_KERNEL, ...], "only these (default: all)"),
    "dry_run": (bool, "compile and list the candidates"),
    "compile_only": (bool, "fill the cache of kernels; needs no GPU"),
    "measure_only": (bool, "measure what is compiled; write no table"),
    "write_only": (bool, "write a table of what is measured"),
    "arch": (str, "without a GPU: such as sm_90a"),
    "multiprocessors": (int, "with --arch, of a GPU that has fewer than the largest"),
    "budget": (float, "minutes after which no measurement begins"),
    "jobs": (int, "processes that compile (default: one a core)"),
    "timeout": (float, "seconds for a candidate, at most a day (default: 60)"),
    "resume": (bool, "go on where an earlier run ended, the default"),
    "force": (bool, "measure again what is measured"),
    "output": (Path, "the table's file (default: in the user's data folder)"),
}
_DEFAULTS = {"jobs": os.cpu_count() or 1, "timeout": 60.0}
_PHASES = ("dry_run", "compile_only", "measure_only", "write_only")
_NEEDS = {"streams": "hidden", "dtype": "hidden", "multiprocessors": "arch"}


def main(argv: Sequence[str], prog: str = "mhc-tile autotune") -> int:
    """Run the command.

    Returns:
        0, or 1 if something could not be compiled or measured.

    Raises:
        SystemExit: An option is unknown or has no value of its type; with code 2.
        ValueError: The options do not fit together or this machine.
        OSError: Something cannot be written.
        MissingExtraError: A package of the tune extra is missing.
    """
    options = _options(argv, prog)
    for module in ("tqdm", "tabulate", "matplotlib.figure", "elftools"):
        require(module, "autotune")
    shapes = _shapes(options)
    if _toolchain.tilelang_version() is None:
        needed = f"pip install tilelang=={_toolchain.REQUIRED_TILELANG}"
        raise ValueError(f"autotune: TileLang must be installed, got none; {needed}")
    device, target = _target(options)
    if device and not (options.dry_run or options.compile_only or options.measure_only):
        table.check(options.output or table.user_path(device), device)
    wanted = problems(shapes, options.kernel or KERNELS)
    folder, cache = journal.folder(), _toolchain.kernel_cache()
    check_folder("autotune: the user's cache", folder, variable="XDG_CACHE_HOME")
    check_folder("autotune: TileLang's cache", cache, variable="TILELANG_CACHE_DIR")
    if options.write_only:
        assert device is not None  # --arch goes with phases that need none
        run = _Run(options, device, target)
        run.update(wanted)
        run.close(wanted)
        return 0
    log = folder / "workers.log"
    plans = [tuner.plan(problem, target) for problem in tuner.progress(wanted, len(wanted), "plan")]
    build = not options.measure_only
    if build and (why := _static.available()):
        raise ValueError(f"autotune: a compiler must be here, got none: {why}")
    count = tuner.compile_plans(plans, processes=options.jobs, log=log, build=build)
    failed = [plan for plan in plans if plan.failed]
    if options.dry_run:
        _say(report.listing(plans, target.arch))
        return 1 if failed else 0
    pruned = [option for plan in plans for option in plan.options if option.pruned]
    _say(f"{count} programs for {target.arch} in {cache}; {len(pruned)} candidates pruned")
    if options.compile_only:
        for plan in failed:
            _say(f"failed: {plan.failed}")
        return 1 if failed else 0
    assert device is not None
    return _Run(options, device, target).measure(plans, log)


def _options(argv: Sequence[str], prog: str) -> SimpleNamespace:
    """The options by name; None or False where one is not given and has no default."""
    given = parse(prog, "Fit the kernels to this GPU, once.", _OPTIONS, argv, "tune")
    return SimpleNamespace(**(dict.fromkeys(_OPTIONS) | _DEFAULTS | given))


def _shapes(options: SimpleNamespace) -> Sequence[Shape]:
    """What is tuned; ValueError if options do not fit together, or a number is out of range."""
    if bool(options.preset) == bool(options.hidden):
        raise ValueError(f"autotune: one of --preset {sorted(PRESETS)} and --hidden must be given")
    for names in (_PHASES, ("resume", "force")):
        if len(given := [flag(name) for name in names if getattr(options, name)]) > 1:
            raise ValueError(f"autotune: one phase must be given, got {' and '.join(given)}")
    for name, value in vars(options).items():
        option, partner = flag(name), _NEEDS.get(name)
        if partner and value and not getattr(options, partner):
            raise ValueError(f"autotune: {option} must come with {flag(partner)}, got none")
        for number in value if isinstance(value, tuple) else (value,):
            if name in MOST and number is not None and not 0 < number <= MOST[name]:
                rule = f"above 0 and at most {MOST[name]}"
                raise ValueError(f"autotune: {option} must be {rule}, got {number}")
    if wrong := [n for n in options.streams or () if n not in _toolchain.STREAMS]:
        raise ValueError(f"autotune: --streams must be in {_toolchain.STREAMS}, got {wrong}")
    tokens = options.tokens or TOKENS
    if wrong := [count for count in tokens if count & (count - 1)]:
        raise ValueError(f"autotune: --tokens must be powers of two, got {wrong}")
    if options.preset:
        return [Shape(s.channels, s.n, s.dtype, tokens) for s in PRESETS[options.preset]]
    sizes = itertools.product(options.hidden, options.streams or (4,), options.dtype or DTYPES[:1])
    return [Shape(*size, tokens) for size in sizes]


def _target(options: SimpleNamespace) -> tuple[Device | None, Target]:
    """The GPU that is here, or the architecture that is asked for."""
    if options.arch is None:
        try:
            device = describe()
            arch = _toolchain.target(device.capability)["arch"]
        except RuntimeError as error:
            raise ValueError(
                f"autotune: {error}; --compile-only --arch sm_90a works without a GPU"
            ) from error
        return device, Target(arch, device.multiprocessors)
    if not (options.compile_only or options.dry_run):
        raise ValueError("autotune: --arch must come with --compile-only or --dry-run")
    if not re.fullmatch(r"sm_\d+[a-z]?", options.arch):
        raise ValueError(f"autotune: --arch must be such as sm_90a, got {options.arch}")
    try:
        record = architecture_of(options.arch)
    except ValueError as error:  # before all is compiled
        raise ValueError(f"autotune: --{str(error).partition(': ')[2]}") from error
    if not (number := options.multiprocessors or record.multiprocessors):
        raise ValueError(
            f"autotune: --multiprocessors must be given for this --arch, got {options.arch}; "
            f"known are {', '.join(CHECKED)}"
        )
    return None, Target(options.arch, number)


class _Run:
    """Measuring and writing on the GPU that is here."""

    def __init__(self, options: SimpleNamespace, device: Device, target: Target) -> None:
        self._options, self._device, self._target = options, device, target
        self._path = options.output or table.user_path(device)
        self._journal = journal.Journal(journal.path_of(device), compiling.fingerprint())

    def measure(self, plans: list[tuner.Plan], log: Path) -> int:
        """Measure what is compiled, and write the table if that is wanted."""
        options, kept = self._options, self._journal

        with _locked(self._device), Measurer(seconds=options.timeout, log=log) as measurer:
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
                budget=options.budget and options.budget * 60,
                force=options.force,
                after=(lambda problems: None) if options.measure_only else self.update,
            )
        for plan in plans:
            for name, found in kept.outcomes[plan.problem].items():
                if found.status == "rejected":
                    _say(f"rejected: {plan.problem}: {name}: {found.why}")
        for failure in outcome.failed:
            _say(f"failed: {failure}")
        if outcome.failed:
            _say(f"what the processes said is in {log}")
        if outcome.left:
            _say(f"{len(outcome.left)} problems are left; the same command goes on there")
        if options.measure_only:
            _say(f"measured; journal: {kept.path}")
        else:
            self.close([plan.problem for plan in plans])
        return 1 if outcome.failed else 0

    def update(self, wanted: Sequence[Problem]) -> None:
        """Merge what is measured into the table, another tuner's outcomes of these shapes too."""

        def families() -> Iterator[table.Family]:  # begins when the table is locked
            self._journal.refresh()
            yield from tuner.families(self._journal, wanted, self._target)

        if aside := table.update(self._path, self._device, families()).aside:
            _say(f"{self._path} could not be read: it is kept as {aside}")

    def close(self, wanted: Sequence[Problem]) -> None:
        """Print and draw the entries that were asked for, and say where everything is."""
        kept, path = self._journal, self._path
        found = report.rows(tuner.families(kept, wanted, self._target), kept.bandwidth)
        if not found:
            _say(f"nothing is measured yet; journal: {kept.path}")
            return
        _say(report.closing(found))
        picture = kept.path.with_suffix(".png")
        title = f"{self._device.name}: tuned configurations against the default"
        report.draw(found, picture, title)
        _say(f"\ntable: {path}\npicture: {picture}\njournal: {kept.path}")
        if path.resolve() not in [source.resolve() for source in table.sources(self._device)]:
            _say(f"ops do not read this table by themselves: set {table.VARIABLE}={path}")


def _locked(device: Device) -> AcquireReturnProxy:
    """The lock of this GPU, which one tuner holds at a time; the end of a process releases it."""
    lock = FileLock(journal.folder() / f"{device.slug}{identity()}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        _say("another tuner measures on this GPU: waiting until it has ended")
        return lock.acquire()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()

"""The command `mhc-tile autotune`: its options, and the phases they ask for."""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from ..kernels.common import static as _static
from ..kernels.common import toolchain as _toolchain
from ..kernels.common.architectures import CHECKED, architecture_of
from . import _arguments, compiling, journal, report, table, tuner
from ._extras import require
from .device import Device, describe, driver_version, identity
from .measuring import Measurer
from .problems import PRESETS, TOKENS, Problem, Shape, problems
from .registry import KERNELS, Target
from .worker import WorkerDied, WorkerHung

# What no GPU, model or machine has yet; beyond it integers of programs and waits overflow.
MOST: dict[str, float] = {"hidden": 1 << 20, "tokens": _toolchain.MOST_TOKENS}
MOST |= {"multiprocessors": 1 << 16, "jobs": 1 << 12, "budget": 1e6, "timeout": 86400}
_BANDWIDTH = f"{__package__}.bench:copy_bandwidth"
_EXCLUSIVE = [("preset", "hidden"), ("dry_run", "compile_only", "measure_only", "write_only")]
_EXCLUSIVE += [("resume", "force")]
_NEEDED = ("preset", "hidden")
_PARTNERS = {"streams": "hidden", "dtype": "hidden", "multiprocessors": "arch"}


@dataclass(frozen=True)
class Options:
    """Fit the kernels to this GPU, once. Give --preset or --hidden.

    Attributes:
        preset: Shapes of models, or all of them.
        hidden: Hidden sizes instead.
        streams: With --hidden. By default 4.
        dtype: With --hidden. By default bfloat16.
        tokens: By default 1, 4, .. 65536.
        kernel: Only these kernels.
        dry_run: Compile and list the candidates.
        compile_only: Fill the cache of kernels. Needs no GPU.
        measure_only: Measure what is compiled, write no table.
        write_only: Write a table of what is measured.
        arch: Without a GPU, such as sm_90a.
        multiprocessors: With --arch, of a GPU that has fewer than the largest.
        budget: Minutes after which no measurement begins.
        jobs: Processes that compile.
        timeout: Seconds for a candidate: its inputs, its launches, its graph. At most a day.
        resume: Go on where an earlier run ended, the default.
        force: Measure again what is measured.
        output: The table. By default in the user's data folder.
    """

    preset: Literal["paper", "deepseek-v4", "all"] | None = None
    hidden: tuple[int, ...] = ()
    streams: tuple[int, ...] = ()
    dtype: tuple[Literal["bfloat16", "float16", "float32"], ...] = ()
    tokens: tuple[int, ...] = ()
    kernel: tuple[str, ...] = ()
    dry_run: bool = False
    compile_only: bool = False
    measure_only: bool = False
    write_only: bool = False
    arch: str | None = None
    multiprocessors: int | None = None
    budget: float | None = None
    jobs: int = os.cpu_count() or 1
    timeout: float = 60.0
    resume: bool = False
    force: bool = False
    output: str | None = None

    def check(self) -> None:
        """Refuse options that do not fit together, and values that nobody can mean.

        Raises:
            ValueError: The option, the rule and the value.
        """
        for names in _EXCLUSIVE:
            given = [name for name in names if getattr(self, name)]
            if len(given) > 1 or not (given or names != _NEEDED):
                flags = ", ".join(map(_flag, names))
                amount = "one" if names == _NEEDED else "at most one"
                raise ValueError(
                    f"autotune: {amount} of {flags} must be given, got {len(given) or 'none'}"
                )
        for name, partner in _PARTNERS.items():
            if getattr(self, name) and not getattr(self, partner):
                raise ValueError(
                    f"autotune: {_flag(name)} must come with {_flag(partner)}, got none"
                )
        for name in ("arch", "output"):
            if (text := getattr(self, name)) is not None and not text.strip():
                raise ValueError(f"autotune: {_flag(name)} must not be empty, got {text!r}")
        for name, most in MOST.items():
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if value is not None and not 0 < value <= most:
                    raise ValueError(
                        f"autotune: {_flag(name)} must be above 0 and at most {most}, got {value}"
                    )
        for name, rule, wrong in (
            ("kernel", f"in {', '.join(KERNELS)}", set(self.kernel) - KERNELS.keys()),
            ("streams", f"in {_toolchain.STREAMS}", set(self.streams) - {*_toolchain.STREAMS}),
            ("tokens", "powers of two", [count for count in self.tokens if count & (count - 1)]),
        ):
            if wrong:
                raise ValueError(f"autotune: {_flag(name)} must be {rule}, got {sorted(wrong)}")
        if self.arch and not (self.compile_only or self.dry_run):
            raise ValueError("autotune: --arch must come with --compile-only or --dry-run")

    def shapes(self) -> list[Shape]:
        """What is tuned."""
        tokens = self.tokens or TOKENS
        if self.preset:
            return [Shape(s.channels, s.n, s.dtype, tokens) for s in PRESETS[self.preset]]
        return [
            Shape(channels, n, dtype, tokens)
            for channels in self.hidden
            for n in self.streams or (4,)
            for dtype in self.dtype or ("bfloat16",)
        ]

    def path(self, device: Device) -> Path:
        """Where the table is.

        Raises:
            ValueError: --output names the home folder of nobody.
        """
        if self.output is None:
            return table.user_path(device)
        path = os.path.expanduser(self.output)
        if path.startswith("~"):
            raise ValueError(f"autotune: --output must name a home folder, got {self.output!r}")
        return Path(path)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def main(argv: Sequence[str], prog: str = "mhc-tile autotune") -> int:
    """Run the command.

    Args:
        argv: the words after the command's name.
        prog: the command's name, for the help.

    Returns:
        0, or 1 if something could not be compiled or measured.

    Raises:
        SystemExit: An option is unknown or has no value of its type; with code 2.
        ValueError: The options do not fit together or this machine.
        OSError: Something cannot be written.
        MissingExtraError: A package of the tune extra is missing.
    """
    tyro = require("tyro", "autotune")
    flags = (tyro.conf.FlagCreatePairsOff,)
    options = tyro.cli(Options, args=list(argv), prog=prog, config=flags)
    for module in ("tqdm", "tabulate", "matplotlib.figure", "elftools"):
        require(module, "autotune")
    options.check()
    if _toolchain.tilelang_version() is None:
        needed = f"pip install tilelang=={_toolchain.REQUIRED_TILELANG}"
        raise ValueError(f"autotune: TileLang must be installed, got none; {needed}")
    device, target = _target(options)
    wanted = problems(options.shapes(), options.kernel or KERNELS)
    folder, cache = journal.folder(), _toolchain.kernel_cache()
    measures = not (options.dry_run or options.compile_only)
    if device and measures and not options.measure_only:
        table.check(options.path(device), device)
    _arguments.check_folder("autotune", folder, "the user's cache", "XDG_CACHE_HOME")
    _arguments.check_folder("autotune", cache, "TileLang's cache", "TILELANG_CACHE_DIR")
    if options.write_only:
        assert device is not None  # --arch goes with phases that need none
        run = _Run(options, device, target)
        run.update(wanted)
        run.close(wanted)
        return 0
    log = folder / "workers.log"
    plans = [tuner.plan(problem, target) for problem in _bar(wanted, len(wanted), "plan")]
    build = not options.measure_only
    if build and (why := _static.available()):
        raise ValueError(f"autotune: a compiler must be here, got none: {why}")
    count = tuner.compile_plans(plans, processes=options.jobs, progress=_bar, log=log, build=build)
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


def _target(options: Options) -> tuple[Device | None, Target]:
    """The GPU that is here, or the architecture that is asked for."""
    if not options.arch:
        try:
            device = describe()
            arch = _toolchain.target(device.capability)["arch"]
        except RuntimeError as error:
            raise ValueError(
                f"autotune: {error}; --compile-only --arch sm_90a works without a GPU"
            ) from error
        return device, Target(arch, device.multiprocessors)
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

    def __init__(self, options: Options, device: Device, target: Target) -> None:
        self._options, self._device, self._target = options, device, target
        self._path = options.path(device)
        self._journal = journal.Journal(journal.path_of(device), compiling.fingerprint())

    def measure(self, plans: list[tuner.Plan], log: Path) -> int:
        """Measure what is compiled, and write the table if that is wanted."""
        options, kept = self._options, self._journal

        def after(members: list[tuner.Plan]) -> None:
            if not options.measure_only:
                self.update([plan.problem for plan in members])

        with _alone(self._device), Measurer(seconds=options.timeout, log=log) as measurer:
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
                progress=_bar,
                after=after,
            )
        for plan in plans:
            for name, found in kept.outcomes(plan.problem).items():
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
            _say(f"ops do not read this table by themselves: {table.VARIABLE}={path} has them do so")


@contextlib.contextmanager
def _alone(device: Device) -> Iterator[None]:
    """Measure on this GPU while no other tuner does; a killed one releases the lock."""
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


def _bar(items: Iterable[Any], total: int, title: str) -> Iterable[Any]:
    tqdm = require("tqdm", "autotune").tqdm
    return tqdm(items, total=total, desc=title, mininterval=0.5, disable=None, dynamic_ncols=True)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()

"""The three phases: compile the candidates, measure them, write the table.

Each can run alone and begins where an earlier run ended: compiled programs are in TileLang's cache,
outcomes in the journal, and a table is made from the journal. TileLang's own AutoTuner is not used:
where sizes are dynamic it tunes again in every process, and it does not check results that are
written in place.
"""

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..kernels.common import toolchain as _toolchain
from ..kernels.common.static import Resources
from . import compiling, registry, table
from ._extras import require
from .compiling import Job
from .configs import encode
from .journal import Journal, name_of
from .measuring import Candidate, Measurer, Outcome
from .problems import Problem
from .registry import KERNELS, Target
from .selection import Timed, select


def progress(items: Iterable[Any], total: int, title: str) -> Iterable[Any]:
    """The items, with a bar where standard error is a terminal."""
    tqdm = require("tqdm", "autotune").tqdm
    return tqdm(items, total=total, desc=title, mininterval=0.5, disable=None, dynamic_ncols=True)


@dataclass
class Option:
    """A candidate of a problem before it is measured."""

    config: Any
    order: Any  # its reduction order
    jobs: tuple[Job, ...] = ()  # its programs, in the order of their launches
    pruned: str = ""  # why it is not measured
    takes: tuple[Resources, ...] = ()  # what its kernels take, once they are compiled


@dataclass
class Plan:
    """A problem and its options, the default first."""

    problem: Problem
    options: list[Option]
    bytes: int  # that a call must move
    idle: str = ""  # why there is nothing to tune
    failed: str = ""  # why nothing can be measured

    @property
    def candidates(self) -> list[Option]:
        """Options that are not pruned; the default is the first, unless the plan has failed."""
        return [option for option in self.options if not option.pruned]


def plan(problem: Problem, target: Target) -> Plan:
    """List the candidates of a problem; those whose launcher refuses them are pruned."""
    kernel = KERNELS[problem.kernel]
    configs = registry.candidates(problem, target)
    idle = kernel.untunable(problem) or ""
    if not idle and len(configs) == 1:
        idle = "the kernel offers one configuration"
    options, failed = [], ""
    for config in configs:
        option = Option(config, kernel.order(config))
        try:
            jobs = [
                Job(factory.__module__, factory.__name__, constants, target.arch)
                for factory, constants in registry.programs(problem, config, target)
            ]
            option.jobs = tuple(dict.fromkeys(jobs))
        except (ValueError, RuntimeError) as error:
            option.pruned = f"refused: {error}"
            if config is configs[0]:
                failed = f"{problem}: the default must launch, got {error}"
        options.append(option)
    return Plan(problem, options, kernel.traffic(problem), idle, failed)


def compile_plans(
    plans: Sequence[Plan], *, processes: int, log: Path | None = None, build: bool = True
) -> int:
    """Compile every option's programs; prune what does not compile, spills or cannot launch.

    A plan whose default does not compile has failed; the others go on. Returns the number of
    programs.
    """
    active = [plan for plan in plans if not (plan.idle or plan.failed)]
    options = [option for plan in active for option in plan.candidates]
    jobs = list(dict.fromkeys(job for option in options for job in option.jobs))
    done = compiling.compile_all(jobs, processes=processes, log=log, build=build)
    results = dict(progress(done, len(jobs), "compile"))
    for plan in active:
        for option in plan.candidates:
            found = [results[job] for job in option.jobs]
            failed = [text for text in found if isinstance(text, str)]
            option.takes = tuple(t for takes in found if not isinstance(takes, str) for t in takes)
            wrong = failed or compiling.faults(option.takes, option.jobs[0].arch)
            if failed and option is plan.options[0]:
                plan.failed = f"{plan.problem}: the default must compile, got {failed[0]}"
            if failed or (wrong and option is not plan.options[0]):
                option.pruned = f"{'does not compile: ' if failed else ''}{wrong[0]}"
    return len(jobs)


@dataclass
class Report:
    """What measuring did."""

    failed: list[str] = field(default_factory=list)  # why problems could not be measured
    left: list[Problem] = field(default_factory=list)  # what the budget did not reach


def measure_plans(
    plans: Sequence[Plan],
    journal: Journal,
    measurer: Measurer,
    *,
    driver: str = "",
    budget: float | None = None,
    force: bool = False,
    after: Callable[[list[Problem]], None] = lambda problems: None,
) -> Report:
    """Measure what the journal does not know yet, for at most `budget` seconds.

    `after` is called with the problems of each shape when all its numbers of tokens are measured.
    """
    report, begin = Report(), time.monotonic()
    active = [plan for plan in plans if not plan.idle]
    steps = progress(active, len(active), "measure")
    for _, group in itertools.groupby(steps, key=lambda plan: plan.problem.at(1)):
        problems = []
        for plan in group:
            problem = plan.problem
            problems.append(problem)
            if plan.failed:
                report.failed.append(plan.failed)
                continue
            if not force and _known(plan, journal):
                continue
            if budget is not None and time.monotonic() - begin > budget:
                report.left.append(problem)
                continue
            if force:
                journal.forget(problem)
            try:
                _measure(plan, journal, measurer)
                journal.finish(problem, driver)
            except RuntimeError as error:
                report.failed.append(str(error))
        after(problems)
    return report


def _known(plan: Plan, journal: Journal) -> bool:
    """Whether a plan was measured to the end, with every candidate that it has now."""
    names = {name_of(encode(option.config)) for option in plan.candidates}
    return plan.problem in journal.complete and names <= journal.outcomes[plan.problem].keys()


def _measure(plan: Plan, journal: Journal, measurer: Measurer) -> None:
    encoded = [encode(option.config) for option in plan.candidates]
    earlier = journal.outcomes[plan.problem]
    names = enumerate(map(name_of, encoded))
    known = {index: earlier[name] for index, name in names if index and name in earlier}

    def keep(index: int, outcome: Outcome) -> None:
        journal.add(plan.problem, encoded[index], outcome)

    candidates = tuple(Candidate(option.config, option.order) for option in plan.candidates)
    grads = KERNELS[plan.problem.kernel].parameter_grads
    measurer.measure(plan.problem, candidates, known, keep, grads)


def families(journal: Journal, shapes: Iterable[Problem], target: Target) -> list[table.Family]:
    """The families of kernels and shapes, from everything that the journal knows of them."""
    wanted = {problem.at(1) for problem in shapes}
    timed: dict[table.Key, dict[int, list[Timed]]] = defaultdict(dict)
    for problem in sorted(journal.complete):
        if problem.at(1) not in wanted:
            continue
        outcomes = journal.outcomes[problem]
        samples = [
            Timed(config, KERNELS[problem.kernel].order(config), outcome.sample)
            for config in registry.candidates(problem, target)
            if (outcome := outcomes.get(name_of(encode(config)))) and outcome.sample
        ]
        if samples and samples[0].config == registry.default(problem, target):
            regime = registry.regime(problem, target)
            key = table.Key(problem.kernel, problem.n, problem.channels, problem.dtype, regime)
            timed[key][problem.tokens] = samples
    version = _toolchain.tilelang_version() or "unknown"
    found = []
    for key, by_tokens in timed.items():
        if choices := select(by_tokens):
            order = repr(next(iter(choices.values())).order)
            entries = {
                tokens: table.Entry(
                    encode(choice.config),
                    choice.default,
                    round(choice.us, 3),
                    round(choice.default_us, 3),
                )
                for tokens, choice in choices.items()
            }
            date, driver = max(journal.complete[key.problem(tokens)] for tokens in choices)
            found.append(table.Family(key, order, version, driver, date, entries))
    return found

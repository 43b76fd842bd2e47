"""Which configuration an op uses: the table's for this shape, its neighbour's, or the default.

A decision is remembered by kernel, shape and GPU: a later call costs one lookup in a dict.

All configurations of a family have one reduction order, so a token's bits depend on the number of
tokens no more than with the defaults. Few and many tokens have families of their own where their
defaults have different orders. With batch invariance the family of many tokens serves every number
of tokens. At a C that is in no table, all numbers of tokens take the order of the neighbour's entry
of most tokens, or the default's order where blocks share a token's C.
"""

import math
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..kernels.common import toolchain as _toolchain
from ..kernels.common.problem import Target
from . import registry, table
from .configs import decode
from .device import Device, describe
from .problems import Problem, bucket

MOST_REMEMBERED = 1 << 16  # shapes; a server of ragged batches sees each number of tokens
# Called when a decision may have changed.
LISTENERS: list[Callable[[], None]] = []
FARTHEST = 1.0  # a neighbour's C is at most this many powers of two away


@dataclass(frozen=True)
class Decision:
    """One kernel's configuration at one shape.

    Attributes:
        problem: the kernel and the shape.
        config: launch knobs; None where no kernel runs.
        why: "exact" (an entry of this shape), "nearest" (of a neighbour), "default", or "reference"
            where no kernel runs.
        detail: which entry, or why there is none.
        source: the table's file; empty for the default.
        family: the entry's family, if there is one.
    """

    problem: Problem
    config: Any
    why: str
    detail: str
    source: str = ""
    family: table.Key | None = None

    def __str__(self) -> str:
        """One line for a person."""
        source = f" in {self.source}" if self.source else ""
        return f"{self.problem}: {self.config or 'no kernel'} ({self.why}: {self.detail}{source})"


@dataclass
class Tables:
    """What all tables together say about one GPU."""

    device: Device
    # Each entry from the file that counts most.
    families: dict[table.Key, table.Family] = field(default_factory=dict)
    # Those that were read, the one that counts most first.
    files: list[Path] = field(default_factory=list)
    # Why files or families are not used, each beginning with the file's name.
    faults: list[str] = field(default_factory=list)
    # Decisions for a bucket of tokens and a regime; config None is the default's.
    plans: dict[tuple[Problem, str], Decision] = field(default_factory=dict)
    # Families, and the C at which they do not work.
    blocklist: set[tuple[table.Key, int]] = field(default_factory=set)

    def block(self, key: table.Key, channels: int, why: str) -> None:
        """Do not use a family at a C, for any number of tokens: all keep one reduction order."""
        self.blocklist.add((key, channels))
        self.plans.clear()
        self.faults.append(f"{self.families[key].source}: {key}: {why}; it is not used")

    @property
    def other_tilelang(self) -> list[str]:
        """Versions of TileLang, other than the installed one, that families were measured with."""
        versions = {
            entry.tilelang or family.tilelang
            for family in self.families.values()
            for entry in family.entries.values()
        }
        return sorted(versions - {_toolchain.tilelang_version()})


def load(device: Device) -> Tables:
    """Read every table of a GPU; what cannot be used is among the faults."""
    found = Tables(device)
    if why := table.misnamed():
        found.faults.append(f"{why}; it is not used")
    for path in table.sources(device):
        if not os.path.isfile(path):  # nor where a folder may not be looked into
            continue
        try:
            families = table.read(path, device).families
        except (table.TableError, OSError) as error:
            found.faults.append(f"{error}; it is not used")
            continue
        found.files.append(path)
        for key, family in families.items():
            known = found.families.get(key)
            found.families[key] = family.updated(known) if known else family
    return found


def decide(
    tables: Tables, problem: Problem, *, arch: str, batch_invariant: bool = False
) -> Decision:
    """The configuration of a kernel at a shape, and why; `arch` is such as "sm_90a".

    `batch_invariant` asks for the regime of many tokens, whatever their number.
    """
    target = Target(arch, tables.device.multiprocessors)
    own = registry.default(problem, target, batch_invariant=batch_invariant)
    if why := registry.KERNELS[problem.kernel].untunable(problem):
        return Decision(problem, own, "default", why)
    regime = registry.regime(problem, target, batch_invariant=batch_invariant)
    key = problem.at(bucket(problem.tokens)), regime
    if key not in tables.plans:
        tables.plans[key] = _plan(tables, *key, own, target)
    plan = tables.plans[key]
    return replace(plan, problem=problem, config=own if plan.config is None else plan.config)


def _plan(tables: Tables, problem: Problem, regime: str, own: Any, target: Any) -> Decision:
    """What is decided for all numbers of tokens of a bucket and a regime."""
    family = _closest(tables, problem, regime)
    if family is None:
        return Decision(problem, None, "default", "no table has this kernel near this shape")
    tokens = _nearest(family.entries, problem.tokens)
    try:
        config = _adapted(family, tokens, problem, own, target)
    except (ValueError, ArithmeticError, TypeError) as error:  # whatever is in a file
        tables.block(family.key, problem.channels, str(error))
        return _plan(tables, problem, regime, own, target)
    entry = family.entries[tokens]
    exact = family.key.channels == problem.channels and tokens == problem.tokens
    detail = f"{tokens} x {family.key.channels}" if family.key.channels else f"{tokens} tokens"
    if exact and config not in (None, decode(entry.config)):
        exact, detail = False, f"{detail}, adapted to what the kernel offers"
    source = entry.source or family.source
    return Decision(problem, config, "exact" if exact else "nearest", detail, source, family.key)


def _closest(tables: Tables, problem: Problem, regime: str) -> table.Family | None:
    """The family of the nearest C in log space, the smaller of two; None if all are far."""

    def distance(key: table.Key) -> float:
        if problem.channels == key.channels:
            return 0.0
        return abs(math.log2(key.channels / problem.channels)) if key.channels else math.inf

    same = problem.kernel, problem.n, problem.dtype, regime
    near = [
        key
        for key in tables.families
        if (key.kernel, key.n, key.dtype, key.regime) == same
        and distance(key) <= FARTHEST
        and (key, problem.channels) not in tables.blocklist
    ]
    best = min(near, key=lambda key: (distance(key), key.channels), default=None)
    return tables.families[best] if best else None


def _nearest(entries: dict[int, table.Entry], tokens: int) -> int:
    """The nearest bucket in log space, the larger of two."""
    at = math.log2(bucket(tokens))
    return min(entries, key=lambda known: (abs(math.log2(known) - at), -known))


def _adapted(family: table.Family, tokens: int, problem: Problem, own: Any, target: Any) -> Any:
    """The entry's configuration at a shape: itself where the kernel offers it, else the nearest.

    None where the entry says that the default is best. ValueError if it does not decode, or nothing
    that can launch keeps the family's order.
    """
    kernel = registry.KERNELS[problem.kernel]
    order = _order(family, problem, own, target)
    entry = family.entries[tokens]
    if entry.default and kernel.order(own) == order:
        return None
    offered = registry.candidates(problem, target)
    return _similar(decode(entry.config), [c for c in offered if kernel.order(c) == order])


def _order(family: table.Family, problem: Problem, own: Any, target: Any) -> Any:
    """The reduction order of a family at a shape's C, for all numbers of tokens.

    ValueError if the family's entries have several.
    """
    kernel, key = registry.KERNELS[problem.kernel], family.key
    orders = set()
    for tokens, entry in family.entries.items():
        config = decode(entry.config)
        if entry.default:
            many = key.regime == "many"
            config = registry.default(key.problem(tokens), target, batch_invariant=many)
        orders.add(kernel.order(config))
    if len(orders) > 1:
        raise ValueError("its entries must form sums in one order, got several")
    if key.channels == problem.channels:
        return orders.pop()
    most = max(family.entries)
    if family.entries[most].default or kernel.divides_channels:
        return kernel.order(own)
    offered = registry.candidates(problem.at(most), target)
    return kernel.order(_similar(decode(family.entries[most].config), offered))


def _similar(config: Any, offered: list[Any]) -> Any:
    """Of what a kernel offers, the configuration nearest to one, in log space; the first of equals.

    ValueError if it offers none of this type.
    """
    if config in offered:
        return config

    def distance(other: Any) -> float:
        pairs = ((value + 1, getattr(other, name) + 1) for name, value in vars(config).items())
        return sum(abs(math.log2(a / b)) for a, b in pairs)

    alike = [other for other in offered if type(other) is type(config)]
    if not alike:
        raise ValueError(f"the kernel must offer a configuration like {config} here, got none")
    return min(alike, key=distance)


# What ops ask: kernel (of `registry.KERNELS`), n, C (0 where a kernel sees none), dtype of x,
# tokens, index of the CUDA device, batch invariance.
Asked = tuple[str, int, int, torch.dtype, int, int, bool]

_known: dict[Asked, Any] = {}
_lock = threading.RLock()


def config(asked: Asked) -> Any:
    """The configuration that a launcher is to run with."""
    try:
        return _known[asked]
    except KeyError:
        decision = explain(asked)
    if len(_known) >= MOST_REMEMBERED:
        _known.clear()
    _known[asked] = decision.config
    return decision.config


def explain(asked: Asked) -> Decision:
    """What `config` returns, and why."""
    with _lock:
        tables = of_device(asked[5])
        before, arch = len(tables.faults), _target(asked).arch
        decision = decide(tables, _problem(asked), arch=arch, batch_invariant=asked[6])
        _report(tables.faults[before:])
    return decision


def default(asked: Asked, target: Target | None = None) -> Any:
    """The configuration where no table has one; a target counts in place of the GPU asked for."""
    return registry.default(_problem(asked), target or _target(asked), batch_invariant=asked[6])


def _target(asked: Asked) -> Target:
    device = of_device(asked[5]).device
    return Target(_toolchain.target(device.capability)["arch"], device.multiprocessors)


def _problem(asked: Asked) -> Problem:
    kernel, n, channels, dtype, tokens, *_ = asked
    return Problem(kernel, n, channels, str(dtype).removeprefix("torch."), tokens)


def reject(asked: Asked, error: Exception) -> None:
    """Block the family whose configuration failed where the default did not."""
    decision = explain(asked)
    with _lock:
        tables = of_device(asked[5])
        if decision.family:
            why = f"{decision.config} must launch, got {error}"
            tables.block(decision.family, decision.problem.channels, why)
            _report(tables.faults[-1:])
        _known.clear()
    _changed()


@cache
def of_device(index: int) -> Tables:
    """The tables of a CUDA device, read once; the first call warns of what is wrong with them."""
    tables = load(describe(index))
    _report(tables.faults)
    if not tables.families and not table.is_off():
        _report(
            [
                f"no tuned configurations for {tables.device.name}: defaults run. On this machine "
                "`mhc-tile autotune --preset paper` makes a table, or with --hidden, --streams and "
                f"--dtype that of a model; {table.VARIABLE}={table.OFF} silences this"
            ]
        )
    return tables


def forget() -> None:
    """Read tables anew at the next call: a table or MHC_TILE_TABLES has changed."""
    with _lock:
        _known.clear()
        of_device.cache_clear()
    _changed()


def _changed() -> None:
    for listener in LISTENERS:
        listener()


def _report(faults: list[str]) -> None:
    for fault in faults:
        warnings.warn(f"mhc_tile: {fault}", RuntimeWarning, stacklevel=4)

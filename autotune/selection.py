"""The third phase: from times to the entries of a table, the same from the same times.

A candidate replaces the default only where it is faster beyond the noise (`timing.faster`). All
numbers of tokens of a family keep one order of sums: that of the default, unless with another one
the whole family is faster and none of its entries slower.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .timing import MARGIN, Sample, faster


@dataclass(frozen=True)
class Timed:
    """A candidate that was measured to the end.

    Attributes:
        config: launch knobs.
        order: how it forms a token's sums.
        sample: its time.
    """

    config: Any
    order: Any
    sample: Sample


@dataclass(frozen=True)
class Choice:
    """The configuration for one number of tokens.

    Attributes:
        config: launch knobs.
        order: how it forms a token's sums.
        default: whether it is the default.
        us: its time.
        default_us: the default's time, measured beside it.
    """

    config: Any
    order: Any
    default: bool
    us: float
    default_us: float


def select(family: Mapping[int, Sequence[Timed]]) -> dict[int, Choice]:
    """Choose a configuration for each number of tokens of a family.

    Args:
        family: by number of tokens, what was measured in turns; the default first, then in the
            order in which the kernel offers candidates.

    Returns:
        A choice for each number of tokens, all of one order of sums; none if the defaults
        themselves have several.
    """
    own = {tokens: timed[0] for tokens, timed in family.items()}
    orders = {timed.order for timed in own.values()}
    if len(orders) > 1:
        return {}
    choices = {tokens: _pick(timed, own[tokens].order) for tokens, timed in family.items()}
    best, best_score = choices, _score(choices.values())
    others = dict.fromkeys(t.order for timed in family.values() for t in timed)
    for order in others:
        if order in orders or not all(_has(timed, order) for timed in family.values()):
            continue
        rival = {tokens: _pick(timed, order) for tokens, timed in family.items()}
        slower = any(choice.us > choice.default_us for choice in rival.values())
        score = _score(rival.values())
        if not slower and score < best_score + math.log(1 - MARGIN):
            best, best_score = rival, score
    return best


def _has(timed: Iterable[Timed], order: Any) -> bool:
    return any(one.order == order for one in timed)


def _pick(timed: Sequence[Timed], order: Any) -> Choice:
    """The first of an order that the best of it does not beat; the default comes first.

    In the default's order only what beats the default itself stands beside it: what scatters too
    much to be beaten is no gain.
    """
    same = [one for one in timed if one.order == order]
    if order == timed[0].order:
        same = [timed[0], *(one for one in same[1:] if faster(one.sample, timed[0].sample))]
    best = min(same, key=lambda one: one.sample.us)
    chosen = next(one for one in same if one is best or not faster(best.sample, one.sample))
    own = timed[0]
    return Choice(chosen.config, order, chosen is own, chosen.sample.us, own.sample.us)


def _score(choices: Iterable[Choice]) -> float:
    """The mean logarithm of time over the default's; below 0 is faster."""
    ratios = [math.log(choice.us / choice.default_us) for choice in choices]
    return sum(ratios) / len(ratios)

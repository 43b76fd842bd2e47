"""The third phase: from times to the entries of a table, the same from the same times.

A candidate replaces the default only where it is faster beyond the noise (`timing.faster`). All
numbers of tokens of a family keep one reduction order: that of the default, unless with another
order the whole family is faster and none of its entries slower.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .timing import MARGIN, Sample, faster


class Timed(NamedTuple):
    """A candidate that was measured to the end: launch knobs, reduction order, time."""

    config: Any
    order: Any
    sample: Sample


class Choice(NamedTuple):
    """The configuration for one number of tokens, its time, and the default's time beside it."""

    config: Any
    order: Any
    default: bool
    us: float
    default_us: float


def select(family: Mapping[int, Sequence[Timed]]) -> dict[int, Choice]:
    """Choose a configuration for each number of tokens of a family, all of one reduction order.

    There is no choice if the defaults, which come first, have several orders.
    """
    own, *others = {timed[0].order for timed in family.values()}
    if others:
        return {}
    best = {tokens: _pick(timed, own) for tokens, timed in family.items()}
    best_score = _score(best.values())
    first, *rest = [dict.fromkeys(one.order for one in timed) for timed in family.values()]
    for order in first:
        if order == own or not all(order in known for known in rest):
            continue
        rival = {tokens: _pick(timed, order) for tokens, timed in family.items()}
        slower = any(choice.us > choice.default_us for choice in rival.values())
        score = _score(rival.values())
        if not slower and score < best_score + math.log(1 - MARGIN):
            best, best_score = rival, score
    return best


def _pick(timed: Sequence[Timed], order: Any) -> Choice:
    """The first of an order that the best of it does not beat; the default comes first.

    In the default's order a candidate must beat the default itself: what scatters too much to be
    beaten is no gain.
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

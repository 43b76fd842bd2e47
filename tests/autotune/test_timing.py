"""Medians, spreads and turns, on a clock that is a list."""

import itertools

import pytest

from mhc_tile.autotune.timing import Sample, faster, impression, interleaved, summarise


def clock(*times: float):
    """A timer that returns these times, over and over."""
    turns = itertools.cycle(times)
    return lambda: next(turns)


def test_a_sample_is_a_median_and_the_spread_around_it():
    sample = summarise([float(value) for value in range(1, 12)])
    assert sample == Sample(us=6.0, low=3.0, high=9.0, turns=11)
    assert summarise([7.0]) == Sample(7.0, 7.0, 7.0, 1)


def test_one_slow_turn_moves_neither_median_nor_spread():
    assert summarise([10.0] * 9 + [900.0]) == Sample(10.0, 10.0, 10.0, 10)


@pytest.mark.parametrize(
    ("one", "other", "wins"),
    [
        (Sample(90, 89, 91, 20), Sample(100, 99, 101, 20), True),
        (Sample(98.6, 98.6, 98.6, 20), Sample(100, 100, 100, 20), False),  # inside the margin
        (Sample(98.4, 98.4, 98.4, 20), Sample(100, 100, 100, 20), True),
        (Sample(90, 80, 99.5, 20), Sample(100, 99, 101, 20), False),  # spreads overlap
        (Sample(100, 99, 101, 20), Sample(90, 89, 91, 20), False),
    ],
)
def test_faster_is_beyond_the_margin_and_beyond_both_spreads(one, other, wins):
    assert faster(one, other) is wins


def test_an_impression_leaves_out_the_first_turn():
    assert impression(clock(500.0, 3.0, 1.0, 2.0)) == 2.0


def test_timers_take_turns_and_none_is_always_first():
    order = []

    def timer(name: str, time: float):
        def turn() -> float:
            order.append(name)
            return time

        return turn

    samples = interleaved([timer("a", 1.0), timer("b", 2.0), timer("c", 3.0)], turns=3)
    assert "".join(order) == "abcbaccab"
    assert [sample.us for sample in samples] == [1.0, 2.0, 3.0]


def test_a_clock_that_drifts_drifts_for_all():
    """Of two equal kernels on a GPU that slows down by half, neither is found faster."""
    now = itertools.count()

    def timer() -> float:
        return 10.0 * (1 + 0.5 * next(now) / 40)

    one, other = interleaved([timer, timer], turns=20)
    assert not faster(one, other)
    assert not faster(other, one)
    assert one.us == pytest.approx(other.us, rel=0.03)

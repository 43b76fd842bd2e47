"""Which configuration becomes a table's entry, from recorded times."""

from mhc_tile.autotune.selection import Timed, select
from mhc_tile.autotune.timing import Sample


def timed(config: object, us: float, order: object = "own", spread: float = 0.1) -> Timed:
    return Timed(config, order, Sample(us, us - spread, us + spread, 20))


def test_the_default_stays_unless_beaten_beyond_the_noise():
    close = {64: [timed("default", 100), timed("a", 99), timed("b", 100.5)]}
    assert select(close)[64].config == "default"
    assert select(close)[64].default
    scattered = {64: [timed("default", 100), timed("a", 90, spread=20)]}
    assert select(scattered)[64].default
    beaten = select({64: [timed("default", 100), timed("a", 99), timed("b", 95)]})[64]
    assert (beaten.config, beaten.default, beaten.us, beaten.default_us) == ("b", False, 95, 100)


def test_what_scatters_too_much_to_be_beaten_is_not_chosen():
    slower = [timed("default", 100), timed("a", 105, spread=30), timed("b", 90)]
    alike = [timed("default", 100, spread=1), timed("a", 99.5, spread=7), timed("b", 95, spread=1)]
    for family in (slower, alike):
        assert select({64: family})[64].config == "b"


def test_of_candidates_that_are_alike_the_first_is_chosen_whatever_the_noise():
    for a, b in ((90.0, 90.4), (90.4, 90.0)):
        family = {64: [timed("default", 100), timed("a", a), timed("b", b), timed("c", 95)]}
        assert select(family)[64].config == "a"


def test_all_tokens_of_a_family_keep_one_order_of_sums():
    """The other order is faster at 64 tokens, slower at 4096, if by noise: neither uses it."""
    family = {
        64: [timed("default", 100), timed("a", 97), timed("b", 70, "other")],
        4096: [timed("default", 100), timed("a", 97), timed("b", 100.2, "other")],
    }
    choices = select(family)
    assert {t: c.config for t, c in choices.items()} == {64: "a", 4096: "a"}
    family[4096][2] = timed("b", 100, "other")
    choices = select(family)
    assert {t: c.config for t, c in choices.items()} == {64: "b", 4096: "b"}
    assert {c.order for c in choices.values()} == {"other"}
    del family[4096][2]  # nowhere measured at 4096
    assert {c.config for c in select(family).values()} == {"a"}


def test_another_order_of_sums_must_be_worth_more_than_noise():
    family = {64: [timed("default", 100), timed("a", 90), timed("b", 89.5, "other")]}
    assert select(family)[64].config == "a"
    family[64][2] = timed("b", 85, "other")
    assert select(family)[64].config == "b"


def test_defaults_of_several_orders_are_no_family():
    assert select({64: [timed("default", 1)], 4096: [timed("default", 1, "other")]}) == {}

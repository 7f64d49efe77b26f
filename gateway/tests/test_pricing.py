"""Prices: what the operator's figures come to."""

import pytest
from citadel_gateway.core.pricing import YEAR_SECONDS, Prices
from citadel_gateway.settings import Address, Hardware, Model, Price
from hypothesis import given
from hypothesis import strategies as st

HOST = Hardware(usd=20_000, lifetime_years=4, watts=800, usd_per_kwh=0.25, utilisation=0.5)
WHERE = (Address("127.0.0.1", 1),)
BIG = Model("big", WHERE, price=Price(share=0.5))
SOLD = Model("sold", WHERE, price=Price(input_mtoken=1, output_mtoken=4, cached_mtoken=0.25))
BOTH = Model("both", WHERE, price=Price(share=0.25, output_mtoken=2))
PRICES = Prices(HOST, (BIG, SOLD, BOTH))


def test_a_host_earns_its_price_back_in_the_time_in_which_it_works() -> None:
    working = 4 * YEAR_SECONDS * 0.5
    usd, parts = PRICES.cost("big", 0, 0, 0, working)
    assert parts["hardware"] == pytest.approx(10_000)  # the half of the host that is the model's
    assert parts["energy"] == pytest.approx(working / 3600 * 0.8 * 0.25 * 0.5)
    assert set(parts) == {"hardware", "energy"}
    assert usd == sum(parts.values())


def test_tokens_have_a_price_of_their_own() -> None:
    usd, parts = PRICES.cost("sold", 1000, 500, 400, 3.0)
    assert parts == {"tokens": pytest.approx((600 * 1 + 400 * 0.25 + 500 * 4) / 1e6)}
    assert usd == parts["tokens"]
    assert PRICES.cost("sold", 10, 0, 99, 0)[0] == pytest.approx(10 * 0.25 / 1e6)  # never more cached than there are


def test_what_has_no_price_costs_nothing() -> None:
    assert PRICES.cost("unknown", 10, 10, 0, 1.0) == (0, {})
    assert Prices(Hardware(), (BIG,)).cost("big", 10, 10, 0, 1.0) == (0, {})
    assert PRICES.idle_per_hour("unknown") == 0


def test_a_token_costs_less_when_the_engine_makes_more_of_them() -> None:
    rate = PRICES.rate("both")
    assert PRICES.per_token("both", 100) == pytest.approx(rate.second / 100 + 2e-6)
    assert PRICES.per_token("both", 0) == pytest.approx(2e-6)
    assert PRICES.estimate("both", 50, 100, 100) == pytest.approx(rate.second + 200e-6)


def test_idle_hours_bear_the_hardware_alone() -> None:
    assert PRICES.idle_per_hour("big") == pytest.approx(10_000 / (4 * YEAR_SECONDS) * 3600)


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 5000), st.floats(0, 60)), max_size=20)
)
def test_the_sum_of_requests_is_the_cost_of_their_sum(requests: list[tuple[int, int, int, float]]) -> None:
    requests = [(given, made, min(cached, given), seconds) for given, made, cached, seconds in requests]
    each = sum(PRICES.cost("both", *one)[0] for one in requests)
    given_, made, cached, seconds = (sum(column) for column in zip(*requests, strict=True)) if requests else (0,) * 4
    assert each == pytest.approx(PRICES.cost("both", int(given_), int(made), int(cached), seconds)[0])

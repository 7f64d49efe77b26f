"""The day on which something is used up: what growth, week, sway and ignorance each do to it."""

import numpy as np
import pytest
from citadel_predictor.forecast import Choice, FloatArray, exhaustion, reached
from citadel_predictor.forecast.choose import attempt
from citadel_predictor.forecast.exhaustion import day_of, reached_by, sway
from citadel_predictor.forecast.growth import COMPOUND, STRAIGHT, Growth

RANDOM = np.random.default_rng(3)
DAYS = np.arange(60)


def said(middle: FloatArray, reach: float = 0.0) -> Choice:
    """A forecast with an interval that reaches so far to each side."""
    return Choice("x", middle, {0.1: middle - reach, 0.5: middle, 0.9: middle + reach})


def test_the_day_on_which_a_disk_is_full() -> None:
    used = 500 + 5 * DAYS + RANDOM.normal(0, 3, DAYS.size) + 10 * (DAYS % 7 < 5)
    found = exhaustion(used, 900.0)
    assert found.eta_days[0.1] <= found.eta_days[0.5] <= found.eta_days[0.9]
    assert found.eta_days[0.5] == pytest.approx(20, abs=3)


def test_what_is_not_used_up_soon() -> None:
    found = exhaustion(100 + RANDOM.normal(0, 1, 40), 1e6)
    assert found.eta_days == {0.1: np.inf, 0.5: np.inf, 0.9: np.inf}


def test_too_few_days_for_a_date() -> None:
    with pytest.raises(ValueError, match="20 days of history"):
        exhaustion(np.ones(20), 5.0)


def test_a_day_without_doubt_is_that_day() -> None:
    steady = np.arange(30.0)
    found = reached(said(np.arange(30.0, 60.0)), steady, 39.5)
    assert found == {0.1: pytest.approx(10.6), 0.5: pytest.approx(11), 0.9: pytest.approx(11.4)}
    assert reached(said(np.arange(30.0, 60.0)), steady, 29.0) == {0.1: 0, 0.5: 0, 0.9: 0}
    assert reached(said(-np.arange(30.0, 60.0)), -steady, -39.5, below=True) == found


def test_a_day_of_high_values_comes_before_the_growth() -> None:
    """Against first days that were drawn."""
    middle, sd, limit = 90 + 0.5 * np.arange(1.0, 41.0), 3.0, 100.0
    drawn = middle + RANDOM.normal(0, sd, (20_000, middle.size)) >= limit
    first = drawn.argmax(axis=1) + 1
    probability = reached_by(middle, np.zeros(middle.size), sd, limit)
    for level in (0.1, 0.5, 0.9):
        assert day_of(probability, level) == pytest.approx(np.quantile(first, level), abs=0.6)
    assert day_of(probability, 0.5) < 15 < 20, "the growth itself is there on day 20"


def test_ignorance_widens_and_does_not_move() -> None:
    steady, middle = np.arange(30.0), np.arange(30.0, 60.0)
    sure, unsure = reached(said(middle), steady, 44.5), reached(said(middle, 5.0), steady, 44.5)
    assert unsure[0.5] == pytest.approx(sure[0.5], abs=0.6)
    assert unsure[0.1] == pytest.approx(sure[0.1] - 5, abs=0.7)
    assert unsure[0.9] == pytest.approx(sure[0.9] + 5, abs=0.7)


def test_the_sway_is_what_growth_and_week_leave() -> None:
    days = np.arange(200)
    values = 100 + 2 * days + 30 * (days % 7 < 5) + RANDOM.normal(0, 4, days.size)
    values[[20, 90, 150]] = np.nan
    values[170] = 1e6
    assert sway(values) == pytest.approx(4, rel=0.3)
    assert sway(np.full(40, np.nan)) == 0


@pytest.mark.parametrize(("method", "ahead"), [(STRAIGHT, 100 + 2 * 80), (COMPOUND, 100 * 1.01**80)])
def test_growth_goes_on_as_it_was(method: Growth, ahead: float) -> None:
    path = np.asarray(100 + 2.0 * DAYS if method is STRAIGHT else 100 * 1.01**DAYS, dtype=np.float64)
    assert method.fit(path, 7).predict(21)[-1] == pytest.approx(ahead)
    with pytest.raises(ValueError, match="20 values are fewer than 21"):
        method.fit(path[:20], 7)


def test_growth_that_no_number_holds_steps_aside() -> None:
    with pytest.raises(ValueError, match="not finite"):
        attempt(COMPOUND, np.exp(np.linspace(-300, 600, 60)), 7, 30)
    with pytest.raises(ValueError, match="a logarithm needs values above 0"):
        COMPOUND.fit(np.arange(30.0), 7)

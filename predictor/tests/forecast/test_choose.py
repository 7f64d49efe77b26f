"""The choice of a method, its interval, and what is said where there is little to go by."""

import json

import numpy as np
import pytest
from citadel_predictor.forecast import COMBINED, DEFAULT, METHODS, NAIVE, Choice, FloatArray, choose, filled
from hypothesis import given, settings
from hypothesis import strategies as st

DAY = 24
RANDOM = np.random.default_rng(20261124)


def traffic(days: int, noise: float = 0.05, growth: float = 0.0) -> FloatArray:
    """Requests of a service by the hour: days, weeks with two quiet days, growth, and noise that lasts some hours."""
    hours = np.arange(days * DAY)
    week = np.where(hours // DAY % 7 >= 5, 0.5, 1.0)
    shape = 100 * week * (1.2 + np.sin(2 * np.pi * hours / DAY)) * (1 + growth * hours / hours.size)
    jitter = np.zeros(hours.size)
    for at, shock in enumerate(RANDOM.normal(0, noise, hours.size)):
        jitter[at] = 0.7 * jitter[at - 1] + shock if at else shock
    return np.asarray(shape * (1 + jitter), dtype=np.float64)


def test_it_beats_the_seasonal_naive_on_what_has_a_pattern() -> None:
    series = traffic(29)
    choice = choose(series[:-DAY], DAY, DAY)
    ahead = series[-DAY:]
    naive = NAIVE.fit(series[:-DAY], DAY).predict(DAY)
    assert np.abs(choice.forecast - ahead).mean() < 0.6 * np.abs(naive - ahead).mean()
    assert choice.mase[choice.method] < choice.mase[NAIVE.name]
    assert choice.skill > 0.3
    assert set(METHODS) >= set(choice.mase) - {COMBINED}


def test_the_interval_holds_about_as_often_as_it_says() -> None:
    held = []
    for _ in range(12):
        series = traffic(25, noise=0.1)
        choice = choose(series[:-DAY], DAY, DAY)
        held.append(np.mean((series[-DAY:] >= choice.quantiles[0.1]) & (series[-DAY:] <= choice.quantiles[0.9])))
    assert 0.65 <= np.mean(held) <= 0.95


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.sampled_from([1, 7, 24]), st.integers(1, 200))
@settings(max_examples=25, deadline=None)
def test_whatever_comes_it_is_finite_and_in_order(seed: int, horizon: int, season: int, size: int) -> None:
    source = np.random.default_rng(seed)
    series = source.lognormal(0, 2, size) * source.integers(0, 2, size)
    series[source.random(size) < 0.2] = np.nan
    series[0] = 1.0
    choice = choose(series, season, horizon)
    low, middle, high = (choice.quantiles[level] for level in (0.1, 0.5, 0.9))
    assert choice.forecast.shape == low.shape == (horizon,)
    assert np.isfinite(np.stack([low, middle, high])).all()
    assert (low <= high).all()
    assert (low >= 0).all()
    if choice.mase:
        assert choice.mase[choice.method] <= choice.mase[NAIVE.name]


def test_noise_alone_is_left_to_the_naive_or_beaten() -> None:
    walk = np.cumsum(RANDOM.normal(size=600))
    choice = choose(walk, 1, 12)
    assert choice.mase[choice.method] <= choice.mase[NAIVE.name]


def test_who_loses_is_named() -> None:
    steps = np.resize([0.0, 0.0, 5.0, 1.0], 400)
    steps[-1] += 1e-9  # not quite what was before, so that there is something to lose
    choice = choose(steps, 4, 8, methods=[METHODS["linear"]])
    assert choice.method == NAIVE.name
    assert choice.skill == 0


def test_a_constant_series() -> None:
    choice = choose(np.full(500, 7.0), DAY, 48)
    assert choice.method == "constant"
    assert (choice.forecast == 7).all()
    assert "constant" in choice.reasons[-1]
    assert np.isnan(choice.skill)


def test_less_than_a_season() -> None:
    choice = choose(np.array([1.0, 2.0, 4.0]), DAY, 6)
    assert choice.method == "last"
    assert (choice.forecast == 4).all()
    assert "too few" in choice.reasons[-1]
    assert (np.diff(choice.quantiles[0.9]) >= 0).all()


def test_two_seasons_are_repeated() -> None:
    series = traffic(2)
    choice = choose(series, DAY, DAY)
    assert choice.method == NAIVE.name
    assert choice.forecast == pytest.approx(series[-DAY:])


def test_gaps_are_filled_from_the_season_and_said() -> None:
    series = traffic(20, noise=0.01)
    holes = series.copy()
    holes[100:110] = np.nan
    whole, said = filled(holes, DAY)
    assert np.abs(whole[100:110] / series[100:110] - 1).max() < 0.6
    assert said == ["10 of 480 values were missing and are filled in"]
    assert choose(holes, DAY, 6).reasons[0] == said[0]
    assert np.isfinite(filled(np.array([np.nan, 1, np.nan, 3, np.nan]), 1)[0]).all()


@pytest.mark.parametrize(
    ("values", "season", "horizon", "words"),
    [
        (np.ones((2, 2)), 1, 1, "one dimension"),
        (np.ones(5), 0, 1, "season is 0"),
        (np.full(5, np.nan), 1, 1, "no value"),
        (np.ones(5), 1, 0, "horizon is 0"),
    ],
)
def test_what_cannot_be_forecast(values: FloatArray, season: int, horizon: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        choose(values, season, horizon)


def test_a_choice_survives_the_disk() -> None:
    for series in (traffic(20), np.ones(9)):
        choice = choose(series, DAY, 12)
        again = Choice.from_dict(json.loads(json.dumps(choice.to_dict(), allow_nan=False)))
        assert again.to_dict() == choice.to_dict()
        assert again.forecast == pytest.approx(choice.forecast)


@pytest.mark.parametrize("name", [*(each.name for each in DEFAULT), "arima"])
def test_each_method(name: str) -> None:
    one = METHODS[name]
    series = traffic(28)
    ahead = one.fit(series[:-DAY], DAY).predict(DAY)
    assert np.abs(ahead - series[-DAY:]).mean() < 40
    with pytest.raises(ValueError, match="fewer than"):
        one.fit(series[: one.least(DAY) - 1], DAY)


def test_a_logarithm_says_what_it_needs() -> None:
    for name, words in (("ridge-log", "above 0"), ("ridge-root", "0 or more")):
        with pytest.raises(ValueError, match=words):
            METHODS[name].fit(np.arange(-5.0, 300.0), DAY)


def test_a_long_season_takes_no_more_lags_than_it_can_pay_for() -> None:
    series = traffic(8)
    choice = choose(np.repeat(series, 4), 96, 12)
    assert choice.fit_seconds < 10
    assert choice.mase[choice.method] <= choice.mase[NAIVE.name]

"""What was chosen, on a series that has grown; limits that are reached from either side; ARIMA and LSTM by name."""

import importlib
from typing import Any

import numpy as np
import pytest
from citadel_predictor.forecast import COMBINED, METHODS, NAIVE, FloatArray, choose, exhaustion, reached, refreshed
from citadel_predictor.forecast.lstm import Lstm, MissingTorchError

from .test_choose import DAY, traffic


def days(count: int) -> FloatArray:
    """Days that are alike, and noise that lasts some hours."""
    noise, source = np.zeros(count * DAY), np.random.default_rng(5)
    for at in range(1, noise.size):
        noise[at] = 0.5 * noise[at - 1] + source.normal(0, 3)
    return np.asarray(50 + 10 * np.sin(2 * np.pi * np.arange(noise.size) / DAY) + noise, dtype=np.float64)


def test_without_anything_new_it_is_the_same_forecast() -> None:
    series = traffic(21)
    choice = choose(series, DAY, DAY)
    again = refreshed(choice, series, DAY, DAY)
    assert again.method == choice.method
    assert again.mase == choice.mase
    np.testing.assert_allclose(again.forecast, choice.forecast)
    for level, path in choice.quantiles.items():
        np.testing.assert_allclose(again.quantiles[level], path)


def test_it_follows_the_series_and_reaches_further() -> None:
    series = traffic(22)
    choice = choose(series[:-6], DAY, 12)
    again = refreshed(choice, series, DAY, 15)
    assert again.forecast.shape == again.quantiles[0.1].shape == (15,)
    assert not np.allclose(again.forecast[:6], choice.forecast[6:])
    assert (again.quantiles[0.1] < again.quantiles[0.9]).all()


def test_a_method_that_cannot_be_had_any_more_is_said() -> None:
    series = days(21)
    choice = choose(series, DAY, DAY, methods=[METHODS["ridge-log"], METHODS["ridge"]])
    choice.method = COMBINED
    again = refreshed(choice, np.where(np.arange(series.size) == 100, 0, series), DAY, DAY)
    assert any("ridge-log: a logarithm needs" in reason for reason in again.reasons)
    choice.method = "ridge-log"
    with pytest.raises(ValueError, match="ridge-log cannot be fitted anew"):
        refreshed(choice, series * 0, DAY, DAY)


def test_what_was_never_judged_is_chosen_anew() -> None:
    with pytest.raises(ValueError, match="constant was not judged"):
        refreshed(choose(np.full(100, 1.0), DAY, DAY), traffic(10), DAY, DAY)


def test_a_limit_from_above() -> None:
    daily = 100 - np.arange(60.0)
    found = exhaustion(daily, 31, below=True)
    assert found.eta_days[0.5] == pytest.approx(10, abs=3)
    assert found.eta_days[0.1] <= found.eta_days[0.5] <= found.eta_days[0.9]
    assert reached(found.choice, daily, 50.0, below=True) == {0.1: 0, 0.5: 0, 0.9: 0}


def test_arima_when_it_is_asked_for() -> None:
    choice = choose(days(14), DAY, DAY, methods=[METHODS["arima"]])
    assert choice.mase["arima"] < choice.mase[NAIVE.name]


def test_without_torch_lstm_steps_aside_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingTorchError, match=r"citadel-predictor\[lstm\]"):
        Lstm().fit(traffic(14), DAY)
    choice = choose(traffic(14), DAY, DAY, methods=[METHODS["lstm"], METHODS["ridge"]])
    assert "lstm" not in choice.mase
    assert any("PyTorch is not installed" in reason for reason in choice.reasons)


def test_lstm_wants_enough_to_learn_from() -> None:
    with pytest.raises(ValueError, match="fewer than 144"):
        Lstm().fit(traffic(5), DAY)


def test_lstm_learns_what_repeats() -> None:
    pytest.importorskip("torch")
    series = traffic(21)
    network = Lstm(epochs=5)
    ahead = network.fit(series[:-DAY], DAY).predict(DAY)
    assert np.isfinite(ahead).all()
    np.testing.assert_array_equal(ahead, network.fit(series[:-DAY], DAY).predict(DAY))
    assert np.abs(ahead - series[-DAY:]).mean() < 0.5 * np.abs(series).mean()
    assert network.fit(series, DAY).predict(200).shape == (200,)
    with pytest.raises(ValueError, match="repeats itself"):
        network.fit(np.tile(np.arange(24.0), 10), DAY)
    choice = choose(series, DAY, DAY, methods=[network, METHODS["ridge"]])
    assert "lstm" in choice.mase
    assert choice.mase[choice.method] <= choice.mase[NAIVE.name]

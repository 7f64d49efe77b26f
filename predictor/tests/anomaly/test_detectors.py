"""Detectors: what they notice, what they leave alone, and that they survive the disk."""

import json

import numpy as np
import pytest
from citadel_predictor.anomaly import DETECTORS, AutoRegressive, Detector, Forest, Limits, Robust, build
from citadel_predictor.anomaly.shapes import HISTORY, Past, Shape, sums
from citadel_predictor.forecast import FloatArray

SIZE = 1500
AT = 1200


def quiet(seed: int = 1) -> FloatArray:
    """A load by the five minutes: waves of a day, and noise."""
    steps = np.arange(SIZE)
    noise = np.random.default_rng(seed).normal(0, 2, SIZE)
    return np.asarray(100 + 5 * np.sin(2 * np.pi * steps / 288) + noise, dtype=np.float64)


def scores(detector: Detector, values: FloatArray) -> FloatArray:
    return np.array([detector.update(float(value)) for value in values])


def fault(kind: str) -> FloatArray:
    values = quiet()
    if kind == "spike":
        values[AT : AT + 3] += 60
    elif kind == "drop":
        values[AT : AT + 20] = 0
    elif kind == "level":
        values[AT:] += 40
    elif kind == "noise":
        values[AT : AT + 60] += np.random.default_rng(2).normal(0, 30, 60)
    return values


@pytest.mark.parametrize("kind", ["spike", "drop", "level", "noise"])
def test_a_fault_is_noticed_once(kind: str) -> None:
    found = np.flatnonzero(scores(build("ensemble"), fault(kind)) >= 1)
    assert found.size >= 1
    assert AT <= found[0] <= AT + 30
    assert found.size <= 3


@pytest.mark.parametrize(("name", "most"), [("ensemble", 0), ("robust", 1), ("iforest", 10)])
def test_what_is_usual_is_left_alone(name: str, most: int) -> None:
    values = quiet()[:500] if name == "iforest" else quiet()  # milliseconds for each value
    assert (scores(build(name), values) >= 1).sum() <= most


@pytest.mark.parametrize("name", ["ar", "level", "robust", "iforest"])
def test_each_notices_a_drop(name: str) -> None:
    found = scores(build(name), fault("drop")[AT - 400 : AT + 20])
    assert found[-20:].max() >= 1


@pytest.mark.parametrize("name", [*DETECTORS])
def test_it_goes_on_after_a_restart_as_if_nothing_were(name: str) -> None:
    values = fault("level")[AT - 400 : AT + 40]
    if name == "iforest":  # it is fitted anew after a restart, on the same values
        values = values[:260]
    whole = scores(build(name), values)
    first, second = build(name), build(name)
    scores(first, values[:150])
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    again = scores(second, values[150:])
    if name == "iforest":
        assert again.shape == whole[150:].shape
    else:
        assert again == pytest.approx(whole[150:])


@pytest.mark.parametrize("name", [*DETECTORS])
def test_nothing_upsets_it(name: str) -> None:
    values = np.concatenate(
        [np.full(50, 7.0), [np.nan, np.inf, -np.inf], np.zeros(100), [1e300, -1e300], np.full(50, 3.0)]
    )
    if name == "iforest":
        values = values[np.abs(np.nan_to_num(values, posinf=0, neginf=0)) < 1e30]
    found = scores(build(name), values)
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    assert (found[50:53] == 0).all()


RANDOM = np.random.default_rng(8)
CONSTANTS = {
    "zero": np.zeros(320),
    "one value": np.full(320, 0.1),
    "large": np.full(320, 1e9),
    "below zero": np.full(320, -3e-3),
    "noise of the arithmetic": 5 + RANDOM.normal(0, 1e-13, 320),
    "last digits now and then": np.where(RANDOM.random(320) < 0.03, 0.1 + 0.2, 0.3),
    "all but zero now and then": np.where(RANDOM.random(320) < 0.03, 1e-16, 0.0),
}


@pytest.mark.parametrize("name", [*DETECTORS])
@pytest.mark.parametrize("kind", [*CONSTANTS])
def test_a_constant_is_no_anomaly_and_a_jump_out_of_it_is_one(name: str, kind: str) -> None:
    values = CONSTANTS[kind]
    jump = np.full(12, values[-1] + max(0.5, abs(values[-1]) / 5))
    found = scores(build(name), np.concatenate([values, jump]))
    assert found[:320].max() < 0.5
    assert found[320] >= 1


def test_a_forest_does_not_call_a_new_constant_odd_for_long() -> None:
    """Nor what varies after one: a forest that was grown from a constant would set everything apart equally well."""
    varied = quiet()[:300]
    found = scores(build("iforest"), np.concatenate([np.full(300, 7.0), np.full(300, 9.0), varied]))
    assert found[300] >= 1
    assert (found[312:600] < 1).all()
    assert (found[600:] >= 1).mean() < 0.1


def test_a_forest_calls_nothing_odd_that_has_been_there() -> None:
    """Two kinds of value, of which the rarer one is the oddest that it was grown from."""
    found = scores(build("iforest"), np.resize([3.0] * 19 + [4.0], 500))
    assert 0.9 < found.max() < 1


@pytest.mark.parametrize("name", ["ensemble", "ar", "iforest"])
def test_of_too_little_nothing_is_said(name: str) -> None:
    """Level and robust compare with a distribution; the others would compare with next to nothing."""
    most = {"ensemble": 100, "ar": 80, "iforest": 250}[name]
    values = quiet(3)[:most]
    values[-10:] *= 5
    assert scores(build(name), values).max() == 0
    assert scores(build(name), np.array([5.0, 6.0, 7.0, 800.0])).max() == 0


def test_limits() -> None:
    above, below = Limits(10.0), Limits(1.0, "below")
    assert scores(above, np.array([9.9, 10.0, np.nan])).tolist() == [0, 1, 0]
    assert scores(below, np.array([1.1, 1.0])).tolist() == [0, 1]
    above.restore(above.state())
    with pytest.raises(ValueError, match="limit is nan"):
        Limits(float("nan"))


def test_what_cannot_be_built_or_restored() -> None:
    with pytest.raises(ValueError, match="no detector lstm: take one of ensemble"):
        build("lstm")
    with pytest.raises(ValueError, match="history is 3"):
        Robust(3)
    with pytest.raises(ValueError, match="history is 100"):
        Forest(100)
    with pytest.raises(ValueError, match="not of an autoregression of order 5"):
        AutoRegressive(5).restore(AutoRegressive(3).state())
    with pytest.raises(KeyError):
        build("ensemble").restore({})
    with pytest.raises(ValueError, match="2 distances are not what 3 values leave"):
        Shape(4).restore({"seen": 3, "distances": [1.0, 2.0]})


def test_sums_lose_nothing_beside_a_wild_value() -> None:
    values = np.concatenate([[1e100], np.arange(1.0, 60.0)])
    for width in (1, 2, 3, 16, 48):
        plain = [values[at : at + width].sum() for at in range(values.size - width + 1)]
        assert sums(values, width) == pytest.approx(plain)


@pytest.mark.parametrize(("points", "step"), [(4, 1), (16, 1), (16, 3)])
def test_the_nearest_are_those_that_a_plain_search_finds(points: int, step: int) -> None:
    values = np.random.default_rng(4).normal(1e6, 1, 300)
    span = points * step
    pieces = np.lib.stride_tricks.sliding_window_view(values, span)
    means = pieces.reshape(len(pieces), points, step).mean(axis=2)
    apart = np.sort(((means[:-span] - means[-1]) ** 2).sum(axis=1))
    assert Shape(points, step).nearest(values) == pytest.approx(np.sqrt(apart[:20].mean()))
    assert Shape(points, step).nearest(values[: 2 * span + 18]) is None


def test_a_noon_like_midnight_is_odd_beside_its_day() -> None:
    steps = np.arange(288 * 9)
    values = np.round(50 - 40 * np.cos(2 * np.pi * steps / 288), 1) + np.random.default_rng(6).normal(0, 1, steps.size)
    quiet_day = values.copy()
    at = 288 * 8 + 72
    quiet_day[at : at + 144] = 10 + np.random.default_rng(7).normal(0, 1, 144)
    assert (scores(build("ensemble"), values)[1800:] >= 1).sum() <= 1
    assert (scores(build("ensemble"), quiet_day)[at : at + 144] >= 1).any()


def test_one_wild_value_does_not_blind_it() -> None:
    values = fault("level")
    values[600] = 1e300
    assert (scores(build("ensemble"), values)[AT : AT + 30] >= 1).any()


def test_memory_is_bounded() -> None:
    past, shape = Past(), Shape(4)
    for value in range(3 * HISTORY):
        past.append(float(value))
        assert past.last()[-1] == value
    assert past.last().size == HISTORY
    assert past.last()[0] == 2 * HISTORY
    for _ in range(30):
        shape.judge(past.last())
    assert len(shape.state()["distances"]) == 30
    detector = Robust(40)
    scores(detector, np.arange(500.0))
    assert len(detector.values) == 40
    forgetful = AutoRegressive(history=100)
    scores(forgetful, quiet())
    assert len(forgetful.misses) == 100

"""Detectors: what they notice, what they leave alone, and that they survive the disk."""

import json

import numpy as np
import pytest
from citadel_predictor.anomaly import DETECTORS, AutoRegressive, Detector, Limits, Robust, build
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
    assert (scores(build(name), quiet()) >= 1).sum() <= most


@pytest.mark.parametrize("name", ["ar", "level", "robust", "iforest"])
def test_each_notices_a_drop(name: str) -> None:
    found = scores(build(name), fault("drop"))
    assert found[AT : AT + 20].max() >= 1


@pytest.mark.parametrize("name", [*DETECTORS])
def test_it_goes_on_after_a_restart_as_if_nothing_were(name: str) -> None:
    values = fault("level")[AT - 400 : AT + 40]
    if name == "iforest":  # it is fitted anew after a restart, on the same values
        values = values[:200]
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


def test_a_constant_that_changes_is_an_anomaly() -> None:
    values = np.full(200, 5.0)
    values[150] = 6.0
    for name in ("level", "robust"):
        found = scores(build(name), values)
        assert found[:150].max() == 0
        assert found[150] >= 1


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
    with pytest.raises(ValueError, match="not of an autoregression of order 5"):
        AutoRegressive(5).restore(AutoRegressive(3).state())
    with pytest.raises(KeyError):
        build("ensemble").restore({})


def test_memory_is_bounded() -> None:
    detector = Robust(40)
    scores(detector, np.arange(500.0))
    assert len(detector.values) == 40
    forgetful = AutoRegressive(history=100)
    scores(forgetful, quiet())
    assert len(forgetful.misses) == 100

"""The past of a series: gaps, days, and a clock that was wrong."""

import json

import numpy as np
import pytest
from citadel_predictor.settings import DAY
from citadel_predictor.track import Track

HOUR = 3600
START = 20_000 * DAY


def hourly(hours: int, start: int = START) -> Track:
    track = Track(HOUR, 10_000)
    track.put((start + (at + 1) * HOUR, float(at)) for at in range(hours))
    return track


def test_what_is_missing_becomes_nan_and_what_comes_late_fills_it() -> None:
    track = hourly(3)
    track.put([(START + 6 * HOUR, 5.0), (START + 7 * HOUR, float("inf"))])
    assert np.isnan(track.values[[3, 4, 6]]).all()
    assert track.last() == (START + 6 * HOUR, 5.0)
    track.put([(START + 4 * HOUR, 3.0)])
    assert track.values[3] == 3
    track.put([])
    track.put([(START - 5 * HOUR, 1.0)])
    assert track.values.size == 7


def test_no_more_is_kept_than_was_said() -> None:
    track = Track(HOUR, 24)
    track.put((START + at * HOUR, float(at)) for at in range(100))
    assert track.values.tolist() == [float(at) for at in range(76, 100)]
    track.put([(START + 10_000 * HOUR, 1.0)])
    assert track.values.size == 24
    assert track.known_days() == pytest.approx(1 / 24)


def test_days_are_whole_and_need_half_of_their_steps() -> None:
    track = hourly(3 * 24 + 5)
    days = track.days("mean")
    assert days.end == START + 3 * DAY
    assert days.values.tolist() == [11.5, 35.5, 59.5]
    assert track.days("max").values.tolist() == [23, 47, 71]
    assert track.days("min").values.tolist() == [0, 24, 48]
    track.values[24:37] = np.nan
    assert np.isnan(track.days("mean").values[1])
    assert not hourly(5).days("mean").values.size
    assert not Track(HOUR, 10).days("mean").values.size


def test_a_first_day_that_is_not_whole_is_left_out() -> None:
    assert hourly(30, START + 20 * HOUR).days("mean").values.tolist() == [15.5]


def test_what_lies_ahead_of_the_clock_is_cut_off() -> None:
    track = hourly(10)
    assert not track.cut(START + 10 * HOUR)
    assert track.cut(START + 7.5 * HOUR)
    assert (track.values.size, track.end) == (7, START + 7 * HOUR)
    assert track.cut(0)
    assert not track.values.size
    assert track.last() is None
    assert not track.cut(0)


def test_it_survives_json() -> None:
    track = hourly(5)
    track.values[2] = np.nan
    other = Track(HOUR, 3)
    plain = json.loads(json.dumps(track.to_dict()).replace("NaN", "null"))
    other.restore(plain)
    assert np.isnan(other.values[0])
    assert other.values[1:].tolist() == [3, 4]
    assert other.end == track.end
    with pytest.raises(ValueError, match="no multiple of 3600"):
        other.restore({"end": 5, "values": []})

"""Cycles on a Prometheus that is well, that is not, and that shows too much."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from citadel_predictor.prometheus import QueryError
from citadel_predictor.settings import DAY, Target

from .fakes import HOUR, NOW, bench, requests, traffic


def test_a_cycle_forecasts_and_scores_every_series(tmp_path: Path) -> None:
    run = bench(tmp_path, requests(horizons=("1h", "6h", "1d", "7d", "30d"), detectors=("robust", "ar")))
    assert run.step()
    assert not run.reasons()
    assert len(run.values("llm_forecast_value", target="requests", model="small")) == 5 * 3
    truth = traffic(1)
    low, middle, high = (
        run.values("llm_forecast_value", model="small", horizon="6h", quantile=each)[0]
        for each in ("0.1", "0.5", "0.9")
    )
    assert low < middle < high
    assert middle == pytest.approx(truth(NOW // HOUR * HOUR + 5.5 * HOUR), rel=0.25)
    assert run.values("llm_forecast_mase", model="small", horizon="1d")[0] < 0.5
    assert max(run.values("llm_forecast_mase")) <= 1
    assert 0.5 < run.values("llm_forecast_coverage_ratio", model="small", level="0.8")[0] <= 1
    assert run.values("llm_forecast_history_days", model="small")[0] == pytest.approx(30, abs=0.1)
    assert len(run.values("llm_anomaly_score", model="small")) == 2
    assert run.values("llm_forecast_last_success_timestamp_seconds", target="requests") == [NOW + 300]
    cards = run.said("model_card")
    assert len(cards) == 2 * 4  # one hour and six share one forecast
    assert cards[0]["horizons"] == ["1h", "6h"]
    assert cards[0]["mase"] <= cards[0]["mase_naive"]
    assert run.values("llm_forecast_fit_seconds_count")


def test_between_trainings_only_what_is_new_is_asked_for(tmp_path: Path) -> None:
    run = bench(tmp_path)
    run.step()
    trained = len(run.said("model_card"))
    run.client.asked.clear()
    run.step()
    assert [(start, end) for _, start, end, _ in run.client.asked] == [(NOW // 300 * 300, NOW // 300 * 300 + 600)]
    before = run.values("llm_forecast_value", model="small")
    run.step(HOUR)
    assert run.values("llm_forecast_value", model="small") != before
    assert any("avg_over_time" in query and start == end for query, start, end, _ in run.client.asked)
    assert len(run.said("model_card")) == trained
    run.step(DAY)
    assert len(run.said("model_card")) == 2 * trained


def test_every_question_is_of_a_recording_rule_and_of_five_minutes_or_more(tmp_path: Path) -> None:
    run = bench(tmp_path, requests(history_days=90))
    for model in range(18):
        run.client.add("model:requests:rate5m", lambda at: 1.0, model=f"more-{model}")
    run.step()
    for query, start, end, step in run.client.asked:
        assert "model:requests:rate5m" in query
        assert step >= 300
        assert 20 * ((end - start) // step + 1) <= 50_000


def test_capacity_has_thirty_days_and_the_day_of_exhaustion(tmp_path: Path) -> None:
    disk = Target(
        "disk",
        "instance:disk:ratio",
        labels=("instance",),
        aggregate="max",
        horizons=("30d",),
        limit=0.9,
        capacity=True,
        detectors=("threshold",),
    )
    run = bench(tmp_path, disk)
    full = NOW + 14 * DAY
    run.client.add("instance:disk:ratio", lambda at: 0.9 - 0.01 * (full - at) / DAY, instance="sql-1")
    run.step()
    assert len(run.values("llm_forecast_value", target="disk", host="sql-1", quantile="0.5")) == 31
    assert run.values("llm_forecast_value", horizon_days="30", quantile="0.5") == run.values(
        "llm_forecast_value", horizon="30d", quantile="0.5"
    )
    early, middle, late = (
        run.values("llm_forecast_limit_eta_seconds", host="sql-1", quantile=each)[0] / DAY
        for each in ("0.1", "0.5", "0.9")
    )
    assert middle == pytest.approx(14, abs=3)
    assert early <= middle <= late
    assert run.values("llm_forecast_limit", host="sql-1") == [0.9]
    assert run.values("llm_anomaly_score", detector="threshold") == [0]
    assert "instance=" not in run.text()


def test_a_limit_below_and_a_limit_from_a_rule(tmp_path: Path) -> None:
    free = Target(
        "free",
        "instance:free:ratio",
        horizons=("30d",),
        limit="instance:free:least",
        direction="below",
        capacity=True,
        detectors=("threshold",),
    )
    run = bench(tmp_path, free)
    run.client.add("instance:free:ratio", lambda at: max(0.0, 0.3 - (at - NOW) / DAY * 0.01))
    run.step()
    assert run.reasons() == {"no_limit"}
    assert not run.values("llm_anomaly_score")
    run.client.add("instance:free:least", lambda at: 0.2)
    run.step()
    assert run.values("llm_forecast_limit_eta_seconds", quantile="0.5")[0] / DAY == pytest.approx(10, abs=3)
    run.client.add("instance:free:least", lambda at: 0.5)
    run.step()
    assert run.values("llm_anomaly_score", detector="threshold") == [1]
    assert run.values("llm_forecast_limit_eta_seconds") == [0, 0, 0]
    run.client.fails, run.client.fails_for = QueryError("refused", "no"), "least"
    assert run.step()
    assert run.reasons() == {"no_limit"}
    assert run.values("llm_predictor_errors_total", reason="refused") == [1]
    run.client.fails = QueryError("timeout", "late")
    assert not run.step()


def test_a_limit_that_is_never_reached_is_infinite(tmp_path: Path) -> None:
    run = bench(tmp_path, requests(horizons=("30d",), capacity=True, limit=1e9))
    run.step()
    assert set(run.values("llm_forecast_limit_eta_seconds")) == {math.inf}


def test_an_anomaly_is_seen_and_the_past_of_a_new_detector_is_not_reported(tmp_path: Path) -> None:
    run = bench(tmp_path, requests(detectors=("robust", "ensemble")))
    run.client.rules = {"model:requests:rate5m": {(("model", "small"),): lambda at: 10 + math.sin(at)}}
    run.step()
    assert max(run.values("llm_anomaly_score")) < 1
    run.client.rules = {"model:requests:rate5m": {(("model", "small"),): lambda at: 500.0}}
    run.step()
    assert run.values("llm_anomaly_score", detector="robust")[0] >= 1


def test_a_counter_reset_is_a_dip_and_no_more(tmp_path: Path) -> None:
    run = bench(tmp_path)
    whole = traffic(1)
    run.step(0)
    expected = run.values("llm_forecast_value", model="small", quantile="0.5")[0]
    other = bench(tmp_path / "other")
    reset = NOW - 9 * HOUR
    other.client.add("model:requests:rate5m", lambda at: 0.0 if abs(at - reset) < 1800 else whole(at), model="small")
    other.step(0)
    assert other.values("llm_forecast_value", model="small", quantile="0.5")[0] == pytest.approx(expected, rel=0.2)


def test_a_day_that_was_lost_is_said_and_filled(tmp_path: Path) -> None:
    run = bench(tmp_path)
    whole = traffic(1)
    run.client.add(
        "model:requests:rate5m", lambda at: math.nan if 2 * DAY < NOW - at < 3 * DAY else whole(at), model="small"
    )
    run.step()
    assert run.reasons() == {"gaps"}
    assert any("missing and are filled in" in line for line in run.said("target_state")[-1]["said"]["small"])
    assert len(run.values("llm_forecast_value", model="small")) == 3


def test_a_target_that_stops_for_hours_is_forecast_for_the_right_hour(tmp_path: Path) -> None:
    run = bench(tmp_path)
    run.step(0)
    shape = run.cycle.boards[0].series["small",].track
    truth = traffic(1)
    hours = 5
    shape.values[-hours:] = np.nan
    run.cycle.boards[0].answers.clear()
    run.step(300)
    middle = run.values("llm_forecast_value", model="small", quantile="0.5")[0]
    assert middle == pytest.approx(truth((NOW + 300) // HOUR * HOUR + 23.5 * HOUR), rel=0.25)
    shape.values[-30:] = np.nan
    run.cycle.boards[0].answers.clear()
    run.step(300)
    assert "stale" in run.reasons()
    assert not run.values("llm_forecast_value", model="small")


def test_a_constant_series_and_a_short_one(tmp_path: Path) -> None:
    run = bench(tmp_path, requests(horizons=("1d", "30d")))
    run.client.rules = {
        "model:requests:rate5m": {
            (("model", "constant"),): lambda at: 7.0,
            (("model", "new"),): lambda at: at % 7 if at > NOW - 8 * HOUR else math.nan,
        }
    }
    run.step()
    assert run.reasons() == {"constant", "short_history"}
    assert run.values("llm_forecast_value", model="constant", horizon="1d") == [7, 7, 7]
    assert len(run.values("llm_forecast_value", model="new", horizon="1d")) == 3
    assert not run.values("llm_forecast_value", model="new", horizon="30d")
    assert not run.values("llm_forecast_mase")
    assert not run.values("llm_forecast_coverage_ratio")


def test_days_ahead_need_three_weeks(tmp_path: Path) -> None:
    run = bench(tmp_path, requests(horizons=("1d", "30d"), history_days=10))
    run.step()
    assert run.reasons() == {"short_history"}
    assert run.values("llm_forecast_value", horizon="1d")
    assert not run.values("llm_forecast_value", horizon="30d")
    assert any("fewer than the 21" in line for line in run.said("target_state")[0]["said"]["small"])


def test_a_series_without_any_history(tmp_path: Path) -> None:
    run = bench(tmp_path)
    run.client.rules = {"model:requests:rate5m": {(): lambda at: at if at > NOW - 60 else math.nan}}
    run.step()
    assert run.reasons() == {"no_history"}


def test_prometheus_down_and_back(tmp_path: Path) -> None:
    other = Target("other", "a:b:c", detectors=())
    run = bench(tmp_path, requests(), other)
    run.step()
    before = run.values("llm_forecast_value")
    run.client.fails = QueryError("unreachable", "gone")
    run.client.asked.clear()
    assert not run.step()
    assert len(run.client.asked) == 1, "the second target is not asked of one that is down"
    assert run.reasons() == {"unreachable"}
    assert run.values("llm_forecast_value") == before
    assert run.values("llm_forecast_last_success_timestamp_seconds") == [NOW + 300]
    waits = []
    for _ in range(12):
        waits.append(run.cycle.wait(1))
        run.step()
    assert waits[0] < 100 < waits[2]
    assert max(waits) <= 900 * 1.25
    assert len(set(waits)) == len(waits)
    run.client.fails = None
    run.step()
    assert run.reasons() == {"no_series"}, "of the second target, which never had any"
    assert run.cycle.wait(1) == 299


def test_one_bad_question_does_not_stop_the_others(tmp_path: Path) -> None:
    run = bench(tmp_path, Target("other", "a:b:c"), requests())
    run.client.fails, run.client.fails_for = QueryError("refused", "bad"), "a:b:c"
    assert not run.step()
    assert run.values("llm_predictor_degraded", target="other", reason="refused") == [1]
    assert run.values("llm_forecast_value", target="requests")
    assert run.values("llm_predictor_cycles_total", outcome="incomplete") == [1]


def test_a_defect_in_one_target_is_logged_and_passed_over(tmp_path: Path) -> None:
    run = bench(tmp_path, Target("other", "a:b:c"), requests())
    run.client.add("a:b:c", lambda at: 1 / 0)
    assert not run.step()
    assert run.values("llm_predictor_degraded", target="other", reason="internal") == [1]
    assert "ZeroDivisionError" in run.said("target_failed")[0]["trace"]
    assert run.values("llm_forecast_value", target="requests")


def test_a_renamed_metric_vanishes_after_a_bounded_time_and_is_forgotten(tmp_path: Path) -> None:
    run = bench(tmp_path, forget_days=0.1)
    run.step()
    run.client.rules = {"model:requests_served:rate5m": run.client.rules["model:requests:rate5m"]}
    run.step()
    assert run.reasons() == {"no_series"}
    assert run.values("llm_forecast_value"), "half an hour's grace"
    run.step(1800)
    assert not run.values("llm_forecast_value")
    assert not run.values("llm_anomaly_score")
    assert run.values("llm_predictor_series") == [0]
    assert run.cycle.boards[0].series, "what was learnt stays for a while"
    run.step(3 * HOUR)
    assert not run.cycle.boards[0].series
    assert not run.values("llm_forecast_last_success_timestamp_seconds")
    assert len(run.said("series_forgotten")) == 2
    run.cycle.save()
    run.step(HOUR)
    run.start()
    assert not run.cycle.boards[0].series


def test_ten_times_as_many_series_as_planned(tmp_path: Path) -> None:
    run = bench(tmp_path, requests(), max_series_per_target=3)
    run.step()
    for model in range(30):
        run.client.add("model:requests:rate5m", traffic(model), model=f"a.{model}\\")
    run.step()
    assert run.reasons() == {"series_limited"}
    assert run.values("llm_predictor_series") == [3]
    assert run.values("llm_predictor_series_limited_total", target="requests") == [29]
    assert len(run.values("llm_forecast_value", quantile="0.5")) == 3
    assert run.values("llm_forecast_value", model="small"), "who was there first stays"
    run.step()
    assert run.values("llm_predictor_series_limited_total", target="requests") == [58]
    long = [query for query, start, end, _ in run.client.asked if "avg_over_time" in query and end - start > DAY]
    assert 'model=~"a\\\\.0\\\\\\\\"' in long[-1], "only the series that are kept are read"


def test_the_sum_over_all_targets_is_bounded_too(tmp_path: Path) -> None:
    run = bench(
        tmp_path, requests(), Target("again", "model:requests:rate5m", labels=("model",), detectors=()), max_series=3
    )
    run.step()
    assert run.values("llm_predictor_series", target="requests") == [2]
    assert run.values("llm_predictor_series", target="again") == [1]


def test_who_comes_takes_the_room_of_who_has_gone(tmp_path: Path) -> None:
    run = bench(tmp_path, requests(), max_series_per_target=2)
    run.step()
    run.client.rules = {}
    for model in ("x", "y"):
        run.client.add("model:requests:rate5m", traffic(3), model=model)
    run.step()
    assert {key[0] for key in run.cycle.boards[0].series} == {"x", "y"}


def test_series_that_look_the_same_are_said(tmp_path: Path) -> None:
    run = bench(tmp_path, requests(labels=()))
    run.step()
    assert run.reasons() == {"ambiguous"}
    assert run.values("llm_predictor_series") == [1]


@pytest.mark.parametrize("jump", [-3 * DAY, 400 * DAY])
def test_the_clock_jumps_and_comes_back(tmp_path: Path, jump: float) -> None:
    run = bench(tmp_path, forget_days=0.5)
    run.step()
    size = run.cycle.boards[0].series["small",].track.values.size
    run.step(300, jump)
    run.step(300)
    assert run.said("clock_jump")[0]["seconds"] == pytest.approx(jump)
    assert run.values("llm_predictor_errors_total", reason="clock_jump") == [1]
    run.step(300, -jump)
    run.step(300)
    track = run.cycle.boards[0].series["small",].track
    newest = track.last()
    assert newest is not None
    assert newest[0] == run.wall // HOUR * HOUR
    assert newest[1] == pytest.approx(traffic(1)(newest[0] - 1800))
    assert track.values.size >= size - 1 or jump > 0
    assert len(run.values("llm_forecast_value", model="small")) == 3
    assert run.cycle.boards[0].series["small",].trained <= run.wall


def test_a_restart_goes_on_from_the_state(tmp_path: Path) -> None:
    run = bench(tmp_path, requests(detectors=("robust", "ar", "iforest", "ensemble")))
    run.step()
    states = {key: each.to_dict() for key, each in run.cycle.boards[0].series.items()}
    before = run.values("llm_forecast_value")
    run.lines.clear()
    run.start()  # nothing was written at the end: as after kill -9
    assert {key: each.to_dict() for key, each in run.cycle.boards[0].series.items()} == states
    run.client.asked.clear()
    run.step()
    assert not run.said("model_card")
    assert run.values("llm_forecast_value") == pytest.approx(before)
    assert all(end - start <= 600 for _, start, end, _ in run.client.asked)


SHOWN = ("llm_forecast_value", "llm_forecast_limit", "llm_forecast_mase", "llm_forecast_coverage_ratio")


def growing(**more: Any) -> Target:
    """Requests, with a limit that a rule has."""
    return requests(horizons=("1h", "1d", "30d"), capacity=True, limit="model:requests:most", **more)


def test_a_restart_without_prometheus_shows_what_was_forecast_before(tmp_path: Path) -> None:
    run = bench(tmp_path, growing())
    run.client.add("model:requests:rate5m", lambda at: 100 + (at - NOW) / DAY, model="small")
    run.client.add("model:requests:most", lambda _: 110.0)
    run.step()
    before = {name: run.values(name) for name in SHOWN}
    eta = run.values("llm_forecast_limit_eta_seconds", model="small", quantile="0.5")[0]
    assert eta / DAY == pytest.approx(10, abs=3)
    assert min(len(values) for values in before.values()) >= 2
    run.client.fails = QueryError("unreachable", "no")
    run.wall += 1800
    run.start()
    assert {name: run.values(name) for name in SHOWN} == before
    assert run.values("llm_forecast_last_success_timestamp_seconds") == [NOW + 300]
    assert run.values("llm_forecast_limit_eta_seconds", model="small", quantile="0.5") == [pytest.approx(eta - 1800)]
    assert not run.values("llm_anomaly_score"), "of a value of half an hour ago"
    assert not run.step(0)
    assert {name: run.values(name) for name in SHOWN} == before
    assert run.reasons() == {"unreachable"}
    run.client.fails = None
    run.client.asked.clear()
    assert run.step(0)
    assert not run.said("state_damaged")
    assert {name: run.values(name) for name in SHOWN} == before, "and it goes on from there"
    assert run.values("llm_forecast_last_success_timestamp_seconds") == [NOW + 2100]


def test_a_score_is_of_a_recent_value_or_is_not_shown(tmp_path: Path) -> None:
    run = bench(tmp_path)
    run.step()
    scores = run.values("llm_anomaly_score")
    run.cycle.save()
    run.client.fails = QueryError("unreachable", "no")
    run.start()
    assert run.values("llm_anomaly_score") == scores
    run.step(900)
    assert run.values("llm_anomaly_score") == scores
    run.step(600)
    assert len(scores) == 2
    assert not run.values("llm_anomaly_score")


def test_a_forecast_is_shown_until_its_time_has_come(tmp_path: Path) -> None:
    run = bench(tmp_path, growing())
    run.client.add("model:requests:most", lambda _: 1000.0)
    run.step(0)
    run.client.fails = QueryError("unreachable", "no")
    for hours, horizons in ((1.9, {"1h", "1d", "30d"}), (2.1, {"1d", "30d"}), (26, {"30d"}), (24 * 31 + 1, set())):
        run.wall = NOW + hours * HOUR
        run.start()
        shown = {name for name in ("1h", "1d", "30d") if run.values("llm_forecast_value", horizon=name)}
        assert shown == horizons
        assert {name for name in shown if run.values("llm_forecast_mase", horizon=name)} == shown
        run.step(0)
        assert {name for name in ("1h", "1d", "30d") if run.values("llm_forecast_value", horizon=name)} == horizons
        assert bool(run.values("llm_forecast_limit_eta_seconds")) == bool(horizons)
    assert run.values("llm_forecast_last_success_timestamp_seconds") == [NOW]
    run.wall = NOW + 10 * DAY
    run.start()
    days = [day for day in range(1, 31) if run.values("llm_forecast_value", horizon_days=str(day))]
    assert days == [*range(9, 31)]


@pytest.mark.parametrize("jump", [-DAY, 0.0])
def test_what_does_not_belong_to_the_state_is_not_shown(tmp_path: Path, jump: float) -> None:
    """A clock that had run ahead; a state that was written between a reading and its forecast."""
    run = bench(tmp_path)
    run.step()
    for watched in run.cycle.boards[0].series.values() if not jump else ():
        watched.track.put([(watched.track.end + HOUR, 1.0)])
    run.cycle.save()
    run.client.fails = QueryError("unreachable", "no")
    run.wall += jump
    run.start()
    assert not run.values("llm_forecast_value")
    assert not run.values("llm_forecast_last_success_timestamp_seconds")


def test_a_state_from_before_this_was_kept_is_used_all_the_same(tmp_path: Path) -> None:
    run = bench(tmp_path, growing())
    run.step()
    path = tmp_path / "requests.json"
    plain = json.loads(path.read_text())
    del plain["succeeded"]
    for each in plain["series"]:
        del each["made"], each["limit"]
    path.write_text(json.dumps(plain))
    run.start()
    assert not run.values("llm_forecast_value")
    assert run.cycle.boards[0].series
    assert not run.said("state_damaged")
    run.lines.clear()
    run.step()
    assert run.values("llm_forecast_value")
    assert not run.said("model_card")


def test_a_limit_of_another_rule_is_not_taken_from_the_state(tmp_path: Path) -> None:
    run = bench(tmp_path, growing())
    run.client.add("model:requests:most", lambda _: 110.0)
    run.step(0)
    for limit, shown in (("model:requests:less", []), (90, [90, 90])):
        other = bench(tmp_path, msgspec.structs.replace(growing(), limit=limit))
        assert other.values("llm_forecast_limit") == shown
        assert other.values("llm_forecast_value")


def test_what_came_while_it_was_away_is_asked_for(tmp_path: Path) -> None:
    run = bench(tmp_path)
    run.step()
    run.start()
    run.step(6 * HOUR)
    track = run.cycle.boards[0].series["small",].track
    assert not np.isnan(track.values).any()
    assert track.end == run.wall // HOUR * HOUR
    assert run.cycle.boards[0].series["small",].seen == run.wall // 300 * 300


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"version":1}', b"\xff\xfe", None])
def test_a_damaged_state_is_said_put_aside_and_replaced(tmp_path: Path, damage: bytes | None) -> None:
    run = bench(tmp_path)
    run.step()
    path = tmp_path / "requests.json"
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    run.start()
    assert run.said("state_damaged")[0]["file"] == str(path)
    assert run.values("llm_predictor_errors_total", reason="state_damaged") == [1]
    assert run.step()
    assert run.values("llm_forecast_value")
    assert path.exists()
    assert (tmp_path / "requests.json.damaged").exists()


def test_another_query_begins_anew(tmp_path: Path) -> None:
    run = bench(tmp_path)
    run.step()
    other = bench(tmp_path, requests(aggregate="max"))
    assert not other.cycle.boards[0].series
    assert other.said("state_replaced")


def test_a_state_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = bench(tmp_path / "file")
    assert run.step()
    assert run.said("state_unwritable")
    assert run.values("llm_predictor_errors_total", reason="state_unwritable") == [1]
    assert run.values("llm_forecast_value")


def test_a_detector_of_another_version_is_warmed_anew(tmp_path: Path) -> None:
    run = bench(tmp_path, requests(detectors=("robust", "ar")))
    run.step()
    path = tmp_path / "requests.json"
    path.write_text(path.read_text().replace('"inverse"', '"converse"'))
    run.start()
    assert not run.said("state_damaged")
    run.step()
    assert len(run.values("llm_anomaly_score", model="small")) == 2
    assert run.cycle.boards[0].series["small",].detectors["ar"].state()["seen"] > 500


def test_files_of_targets_that_are_gone_are_removed_in_time(tmp_path: Path) -> None:
    run = bench(tmp_path)
    run.step()
    bench(tmp_path, requests(), forget_days=1e-9)
    other = bench(tmp_path, Target("other", "a:b:c"))
    assert (tmp_path / "requests.json").exists()
    other = bench(tmp_path, Target("other", "a:b:c"), forget_days=1e-9)
    assert not (tmp_path / "requests.json").exists()
    assert other.said("state_pruned")

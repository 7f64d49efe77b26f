"""Figures for people, made of what workers report."""

from typing import Any

import pytest
from citadel_gateway.control.figures import (
    POINTS,
    STOPPING,
    Maker,
    patch,
    quantile,
    rounded,
    states,
    stopping,
)
from citadel_gateway.metrics import BUCKETS, Counter, Distribution, Report
from citadel_gateway.settings import Address, Model
from citadel_gateway.snapshot import Snapshot
from hypothesis import given
from hypothesis import strategies as st

from gateway.tests.test_streams import merged

NOW = 1_900_000_000.0
FIRST = "llm_gateway_time_to_first_token_seconds"
SNAPSHOT = Snapshot(0, (Model("one", (Address("127.0.0.1", 1),)), Model("two", (Address("127.0.0.1", 2),))), ())


def report(
    wall: float, tokens: float = 0, codes: dict[str, float] | None = None, first: list[int] | None = None, **more: Any
) -> Report:
    counters = {
        "llm_gateway_tokens_total": [Counter(("one", "output"), tokens), Counter(("one", "input"), 2 * tokens)],
        "llm_gateway_requests_total": [
            *(Counter(("one", "chat", code), count) for code, count in (codes or {}).items()),
            Counter(("other", "models", "200"), 1e6),
        ],
    }
    gauges = {
        "llm_gateway_inflight_requests": [Counter(("one",), 3)],
        "llm_gateway_queue_length": [Counter(("one",), 2)],
        "llm_gateway_backend_up": [Counter(("one", "127.0.0.1:1"), 1), Counter(("two", "127.0.0.1:2"), 0)],
        "llm_gateway_connections": [Counter((), 7)],
        **more,
    }
    return Report(1, wall, counters, {FIRST: [Distribution(("one",), first, 0)]} if first else {}, gauges)


def test_a_moment() -> None:
    figures = Maker("here").make(SNAPSHOT, [report(NOW), report(NOW)], NOW, {"one": 1.25})
    assert (figures["host"], figures["workers"], figures["at"]) == ("here", 2, NOW)
    one, two = figures["models"]["one"], figures["models"]["two"]
    assert (one["state"], one["inflight"], one["queue"], one["cost_today_usd"]) == ("up", 6, 4, 1.25)
    assert (two["state"], two["backends"], two["cost_today_usd"]) == ("down", {"127.0.0.1:2": False}, 0)
    assert "first_token_seconds" not in one
    assert figures["total"]["inflight"] == 6
    assert figures["total"]["connections"] == 14
    assert figures["total"]["cost_today_usd"] == 1.25


def test_what_is_not_known_is_left_out() -> None:
    figures = Maker("here").make(SNAPSHOT, [], NOW)
    assert figures["models"]["one"]["state"] == "unknown"
    assert "cost_today_usd" not in figures["total"]
    assert Maker("here").make(None, [], NOW)["models"] == {}
    drained = Snapshot(0, SNAPSHOT.models, (), {"one": ["operator"]})
    one = Maker("here").make(drained, [report(NOW)], NOW)["models"]["one"]
    assert (one["state"], one["draining"]) == ("draining", ["operator"])


def test_rates_are_those_of_ten_seconds_and_counts_those_of_a_minute() -> None:
    maker = Maker("here")
    figures: dict[str, Any] = {}
    for second in range(100):
        codes = {"200": 5.0 * second, "429": float(second), "502": float(min(second, 50)), "timeout": 0.0}
        figures = maker.make(SNAPSHOT, [report(NOW + second, 40 * second, codes)], NOW + second)
    one = figures["models"]["one"]
    assert (one["output_tokens_per_second"], one["input_tokens_per_second"]) == (40, 80)
    assert one["requests_per_second"] == 6
    assert (one["limited_per_minute"], one["errors_per_minute"]) == (60, 11)
    assert len(maker.past.sums) <= 62
    back = maker.make(SNAPSHOT, [report(NOW + 100)], NOW + 100)["models"]["one"]
    assert (back["output_tokens_per_second"], back["requests_per_second"]) == (0, 0)


def test_times_are_those_of_the_last_minute() -> None:
    maker = Maker("here")
    size = len(BUCKETS[FIRST]) + 1
    old, new = [0] * size, [0] * size
    old[size - 1] = 1000  # all of them slow, before
    maker.make(SNAPSHOT, [report(NOW - 61, first=old)], NOW - 61)
    new[size - 1], new[1] = 1000, 100
    one = maker.make(SNAPSHOT, [report(NOW, first=new)], NOW)["models"]["one"]
    low, high = BUCKETS[FIRST][0], BUCKETS[FIRST][1]
    assert low < one["first_token_seconds"]["p50"] < one["first_token_seconds"]["p95"] <= high
    odd = Report(1, NOW, {}, {FIRST: [Distribution(("one",), [1, 2], 0)]})  # of another release
    assert "first_token_seconds" not in Maker("here").make(SNAPSHOT, [odd], NOW)["models"]["one"]


def test_curves() -> None:
    maker = Maker("here")
    for second in range(2 * POINTS + 20):
        maker.make(SNAPSHOT, [report(NOW + second)], NOW + second)
    history = maker.history()
    assert history["fields"][0] == "inflight"
    assert [len(points) for points in history["models"].values()] == [POINTS, POINTS]
    assert history["models"]["one"][0] == (3, 2, 0, 0, 0)
    maker.make(Snapshot(0, SNAPSHOT.models[:1], ()), [], NOW + 1000)
    assert list(maker.history()["models"]) == ["one"]


def test_quantiles_and_rounding() -> None:
    assert quantile((1, 2, 4), [0, 10, 0, 0], 0.5) == 1.5
    assert quantile((1, 2, 4), [10, 0, 0, 10], 0.95) == 4
    assert quantile((1, 2, 4), [1, 0, 0, 0], 1) == 1
    assert [rounded(value) for value in (0.123456, 12.3456, 1234.56, 0)] == [0.123, 12.3, 1235, 0]


def test_who_stops() -> None:
    reports = [report(NOW), Report(4, NOW, {}, {}, {STOPPING: [Counter((), 1)]})]
    assert stopping(reports) == {4}
    assert stopping(reports[:1]) == frozenset()


def test_states() -> None:
    figures = Maker("here").make(SNAPSHOT, [report(NOW)], NOW)
    assert states(figures)["two"] == {"state": "down", "draining": [], "backends": {"127.0.0.1:2": False}}
    assert states({}) == {}


VALUES = st.recursive(
    st.one_of(st.integers(), st.text(max_size=3), st.booleans(), st.lists(st.integers(), max_size=2)),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=8,
)
FIGURES = st.dictionaries(st.sampled_from("abcd"), VALUES, max_size=4)


@given(FIGURES, FIGURES)
def test_a_patch_makes_the_new_of_the_old(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert merged(old, patch(old, new)) == new
    assert patch(new, new) == {}


@pytest.mark.parametrize("old", [{"a": 1}, {"a": True}, {"a": {"b": 1}}])
def test_a_patch_of_another_kind(old: dict[str, Any]) -> None:
    assert merged(old, patch(old, {"a": {"c": 2}})) == {"a": {"c": 2}}

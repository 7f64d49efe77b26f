"""The part of /metrics that comes from the database."""

import threading

import pytest
from citadel_gateway.control import gauges, tallies
from citadel_gateway.control.business import FEEDBACK, SATISFACTION, VALUE
from citadel_gateway.control.conversations import TURNS, settled
from citadel_gateway.control.gauges import FAMILIES, STALE, TTL, Gauges
from citadel_gateway.control.sql import Database, DatabaseAwayError

from gateway.tests.quality import HOST, NOW, POLICIES, RULES, database, enter, request

__all__ = ["database"]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def found(database: Database, clock: Clock) -> Gauges:
    return Gauges(database, HOST, lambda: POLICIES, clock, lambda: NOW)


def lines(gauges: Gauges) -> dict[str, float]:
    text = gauges.page()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if not line.startswith("#")
    }


def later(gauges: Gauges, clock: Clock, seconds: float) -> dict[str, float]:
    """The page after the pause, when the new figures are there."""
    clock.now += seconds
    gauges.page()
    if gauges.running is not None:
        gauges.running.result(10)
    return lines(gauges)


def fill(database: Database) -> None:
    records = [
        request("a", session="s"),
        request("b", user="bob", at=NOW - 3 * 86_400),
        request("c", user="carl", at=NOW - 7 * 86_400),
        request("d", user="dan", outcome="refused"),
        request("e", user="system"),
    ]
    enter(database, records)
    with database.begin() as connection:
        settled(connection, database, HOST, RULES, records)
        counts = [
            (FEEDBACK, ("one", "user", "correct"), 3.0),
            (FEEDBACK, ("one", "golden", "incorrect"), 1.0),
            (SATISFACTION, ("one", "api", "4"), 2.0),
            (SATISFACTION, ("one", "api", "10"), 1.0),
            (TURNS, ("one", "3"), 1.0),
            (TURNS, ("one", "+Inf"), 1.0),
            (f"{TURNS}_sum", ("one",), 83.0),
        ]
        tallies.add(connection, database, HOST, counts)
        tallies.add(connection, database, "another", counts)


def test_the_page(database: Database, found: Gauges, clock: Clock) -> None:
    fill(database)
    page = later(found, clock, 0)
    assert page['llm_feedback_total{model="one",source="user",verdict="correct"}'] == 3
    assert page['llm_feedback_total{model="one",source="golden",verdict="incorrect"}'] == 1
    rating, labels = "llm_feedback_satisfaction", 'model="one",channel="api"'
    buckets = [page[f'{rating}_bucket{{{labels},le="{le}"}}'] for le in ("3.0", "4.0", "9.0", "+Inf")]
    assert buckets == [0, 2, 2, 3]
    assert (page[f"{rating}_sum{{{labels}}}"], page[f"{rating}_count{{{labels}}}"]) == (18, 3)
    turns = "llm_gateway_conversations_turns"
    assert [page[f'{turns}_bucket{{model="one",le="{le}"}}'] for le in ("2.0", "3.0", "55.0", "+Inf")] == [0, 1, 1, 2]
    assert page[f'{turns}_sum{{model="one"}}'] == 83
    assert page[VALUE + '{model="one",use_case="other",kind="estimated"}'] == pytest.approx(0.4)
    assert page['llm_budget_usd{period="month"}'] == 500
    assert page['llm_gateway_active_users{window="day"}'] == 1
    assert page['llm_gateway_active_users{window="week"}'] == 2
    assert page["llm_gateway_conversations_open"] == 1
    found.close()


def test_every_family_is_described_once(found: Gauges) -> None:
    text = found.page()
    for name, (kind, _, _) in FAMILIES.items():
        assert text.count(f"# TYPE {name} {kind}\n") == text.count(f"# HELP {name} ") == 1


def test_it_is_read_every_ten_seconds(
    database: Database, found: Gauges, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []
    monkeypatch.setattr(found, "refresh", lambda: times.append(clock.now))
    for seconds in (0, 1, TTL - 2, 2, 1):
        later(found, clock, seconds)
    assert len(times) == 2


def test_a_database_that_is_away(
    database: Database, found: Gauges, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(database)
    before = later(found, clock, 0)

    def away() -> None:
        raise DatabaseAwayError("away")

    monkeypatch.setattr(database, "read", away)
    assert later(found, clock, TTL + 1) == before
    page = later(found, clock, STALE)
    assert page['llm_feedback_total{model="one",source="user",verdict="correct"}'] == 3
    assert page['llm_budget_usd{period="month"}'] == 500
    assert "llm_gateway_conversations_open" not in page


def test_a_database_that_hangs(
    database: Database, found: Gauges, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page comes all the same, and nobody asks a second time."""
    monkeypatch.setattr(gauges, "WAIT", 0.01)
    release = threading.Event()
    monkeypatch.setattr(found, "refresh", lambda: release.wait(10))
    for _ in range(3):
        assert lines(found) == {'llm_budget_usd{period="month"}': 500}
        clock.now += TTL + 1
    assert found.pool._work_queue.qsize() == 0
    release.set()

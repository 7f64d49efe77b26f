"""Conversations: where one ends and the next begins, and which were abandoned."""

from collections.abc import Sequence

import pytest
from citadel_gateway.control import conversations, tallies
from citadel_gateway.control.conversations import (
    BUCKETS,
    ENDED,
    IDLE,
    TOKENS,
    TURNS,
    Conversation,
    State,
    bucket,
    listed,
    settled,
    sweep,
    within,
)
from citadel_gateway.control.feedback import Given, record
from citadel_gateway.control.sql import Database
from citadel_gateway.records import Settled
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError, OperationalError

from gateway.tests.quality import HOST, NOW, RULES, database, enter, key, request
from gateway.tests.site import Site

__all__ = ["database"]


def take(database: Database, *records: Settled) -> None:
    enter(database, records)
    with database.begin() as connection:
        settled(connection, database, HOST, RULES, records)


def turn(id: str, at: float, **more: object) -> Settled:  # noqa: A002  # the record's own name for it
    return request(id, at=NOW + at, **{"session": "s1", **more})


def seen(database: Database, at: float = 0, state: State | None = None) -> Sequence[Conversation]:
    return listed(database, state=state, now=NOW + at)


def counted(database: Database, name: str) -> dict[tuple[str, ...], float]:
    with database.read() as connection:
        return tallies.read(connection, HOST).get(name, {})


def test_turns_add_up(database: Database) -> None:
    take(database, turn("a", 0), turn("b", 60, model="two", use_case="support"), request("x"))
    take(database, turn("c", 120, outcome="refused", cost_usd=0.0, input_tokens=0, output_tokens=0))
    (found,) = seen(database, 130)
    assert (found.turns, found.input_tokens, found.output_tokens, found.cost_usd) == (2, 20, 40, 1.0)
    assert (found.model, found.use_case, found.last_outcome, found.state) == ("one", "support", "refused", "open")
    assert (found.started_at, found.last_at) == (NOW, NOW + 120)


def test_the_end(database: Database) -> None:
    take(database, turn("a", 0), turn("b", 10), turn("c", 20, session="s2", outcome="client_closed"))
    take(database, turn("d", 30, user="bob", outcome="refused"))
    assert len(seen(database, 40, "open")) == 2
    assert sweep(database, HOST, RULES, NOW + IDLE) == 0
    assert sweep(database, HOST, RULES, NOW + IDLE + 31) == 3
    assert sweep(database, HOST, RULES, NOW + IDLE + 31) == 0
    late = IDLE + 40
    assert {(one.session, one.state) for one in seen(database, late)} == {("s1", "completed"), ("s2", "abandoned")}
    assert [one.session for one in seen(database, late, "abandoned")] == ["s2"]
    assert [one.session for one in seen(database, late, "completed")] == ["s1"]
    assert seen(database, late, "open") == []
    assert counted(database, ENDED) == {("one", "completed"): 1, ("one", "abandoned"): 1}
    assert counted(database, TURNS) == {("one", "1"): 1, ("one", "2"): 1}
    assert counted(database, f"{TURNS}_sum") == {("one",): 3}
    assert counted(database, TOKENS) == {("one", "100"): 2}


def test_feedback_says_that_nobody_went_away(database: Database) -> None:
    take(database, turn("a", 0, outcome="cut"))
    assert record(database, HOST, RULES, key(), Given(request_id="a", rating=2), at=NOW)
    sweep(database, HOST, RULES, NOW + IDLE + 1)
    assert [one.state for one in seen(database, IDLE + 1)] == ["completed"]


def test_a_session_that_comes_back(database: Database) -> None:
    """Swept or not: after the pause it is another conversation, and the first is counted once."""
    take(database, turn("a", 0), turn("b", 10))
    take(database, turn("c", 10 + IDLE + 1))
    assert counted(database, ENDED) == {("one", "completed"): 1}
    (found,) = seen(database, IDLE + 60)
    assert (found.turns, found.started_at, found.state) == (1, NOW + 10 + IDLE + 1, "open")
    sweep(database, HOST, RULES, NOW + 3 * IDLE)
    take(database, turn("d", 3 * IDLE), turn("e", 6 * IDLE))
    assert counted(database, ENDED) == {("one", "completed"): 3}
    assert counted(database, f"{TURNS}_sum") == {("one",): 4}


def test_late_news_of_an_earlier_turn(database: Database) -> None:
    """Another host's journal may be read later."""
    take(database, turn("b", 100))
    take(database, turn("a", 50, outcome="cut"))
    (found,) = seen(database, 101)
    assert (found.turns, found.started_at, found.last_at, found.last_outcome) == (2, NOW + 50, NOW + 100, "ok")


def test_pages(database: Database) -> None:
    take(database, *(turn(f"r{number}", number, session=f"s{number}") for number in range(5)))
    first = listed(database, limit=2, now=NOW)
    second = listed(database, limit=2, before=first[-1].last_at, now=NOW)
    assert [one.session for one in (*first, *second)] == ["s4", "s3", "s2", "s1"]
    assert listed(database, user="bob", now=NOW) == []


class Owner:
    """As much of the process as `within` needs."""

    def __init__(self, database: Database, site: Site) -> None:
        self.database = database
        self.settings = site.settings
        self.snapshot = None


def test_what_fails_does_not_hold_the_ledger_up(
    database: Database, site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    take_in = within(Owner(database, site))  # type: ignore[arg-type]  # see above
    with database.begin() as connection:
        take_in(connection, [turn("a", 0)])
    assert [one.turns for one in seen(database)] == [1]

    away = OperationalError("statement", None, Exception(), connection_invalidated=True)
    errors: list[Exception] = [KeyError("x"), IntegrityError("statement", None, Exception()), away]

    def failing(connection: Connection, *_: object) -> None:
        connection.execute(text("DELETE FROM conversations"))
        raise errors.pop(0)

    monkeypatch.setattr(conversations, "settled", failing)
    for _ in range(2):
        with database.begin() as connection:
            take_in(connection, [turn("b", 1)])
        assert [one.turns for one in seen(database)] == [1], "what was half done is taken back"
    assert caplog.text.count("1 requests are not in them") == 2
    with pytest.raises(OperationalError), database.engine.begin() as connection:
        take_in(connection, [turn("b", 1)])


def test_buckets() -> None:
    assert (bucket(TURNS, 1), bucket(TURNS, 4), bucket(TURNS, 56)) == ("1", "5", "+Inf")
    assert all(list(bounds) == sorted(bounds) for bounds in BUCKETS.values())

"""Feedback: whose it is, how it is corrected, what is counted, and what the figures make of it."""

from concurrent.futures import ThreadPoolExecutor
from datetime import date

import pytest
from citadel_gateway.control import tallies
from citadel_gateway.control.analytics import Analytics, Group, Span, adoption, analyse, span_of
from citadel_gateway.control.business import FEEDBACK, SATISFACTION, VALUE, Rules, estimated
from citadel_gateway.control.feedback import Feedback, Given, Wrong, check, listed, record
from citadel_gateway.control.sql import Database
from citadel_gateway.settings import Key, Policies
from pydantic import ValidationError

from gateway.tests.quality import HOST, MODELS, NOW, RULES, database, enter, key, request

__all__ = ["database"]


def give(database: Database, by: Key, request_id: str = "r1", **more: object) -> Feedback | None:
    given = Given.model_validate({"request_id": request_id, **more})
    check(given, RULES)
    return record(database, HOST, RULES, by, given, at=NOW)


def counted(database: Database, name: str) -> dict[tuple[str, ...], float]:
    with database.read() as connection:
        return tallies.read(connection, HOST).get(name, {})


def test_one_feedback_for_a_request(database: Database) -> None:
    enter(database, [request(use_case="support")])
    first = give(database, key(), rating=4, comment="too long")
    assert first is not None
    assert (first.source, first.model, first.use_case, first.value_usd) == ("user", "one", "support", 0)
    second = give(database, key(), rating=9, correct=True, outcome="solved")
    assert second is not None
    assert second.id == first.id
    assert (second.rating, second.correct, second.comment, second.value_usd) == (9, True, "too long", 20)
    assert [one.id for one in listed(database)] == [first.id]
    assert counted(database, FEEDBACK) == {("one", "user", "correct"): 1}
    assert counted(database, SATISFACTION) == {("one", "api", "4"): 1, ("one", "api", "9"): 1}
    give(database, key(), rating=9, correct=True, outcome="solved")
    assert counted(database, FEEDBACK) == {("one", "user", "correct"): 1}, "the same once more is nothing new"
    assert counted(database, VALUE) == {("one", "support", "realised"): 20}


def test_a_correction_takes_value_back(database: Database) -> None:
    """No counter goes back, and realised less lost is what the rows come to."""
    enter(database, [request(model="old", use_case="unknown")])
    for outcome in ("solved", "escalated", "other", "solved"):
        assert give(database, key(), outcome=outcome)
    assert counted(database, VALUE) == {("other", "other", "realised"): 5 + 3 + 5, ("other", "other", "lost"): 8}
    assert [one.value_usd for one in listed(database)] == [5]


def test_many_at_once(database: Database) -> None:
    """Ratings of one request that meet: one row, and each change is counted once, in some order."""
    enter(database, [request(use_case="support")])
    with database.begin():
        pass  # the tables are made by the first who comes

    def one(number: int) -> None:
        outcome = ("solved", "escalated")[number % 2]
        assert give(database, key(), rating=number + 1, outcome=outcome) is not None

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(one, range(10)))
    (row,) = listed(database)
    assert sum(counted(database, SATISFACTION).values()) == 10
    value = counted(database, VALUE)
    net = value[("one", "support", "realised")] - value.get(("one", "support", "lost"), 0)
    assert net == row.value_usd


def test_whose_requests(database: Database) -> None:
    enter(database, [request("r1"), request("r2", user="bob")])
    assert give(database, key("bob"), correct=True) is None
    assert give(database, key("ann"), "none", correct=True) is None
    judged = give(database, key("root", "admin"), correct=False, outcome="solved")
    assert judged is not None
    assert (judged.source, judged.user) == ("judge", "ann")
    own = give(database, key("ann"), correct=True, outcome="escalated")
    assert own is not None
    assert own.source == "user"
    assert counted(database, FEEDBACK) == {("one", "judge", "incorrect"): 1, ("one", "user", "correct"): 1}
    assert sorted(one.value_usd for one in listed(database)) == [-3, 0], "the last word about the outcome counts alone"
    assert counted(database, VALUE) == {("one", "other", "realised"): 5, ("one", "other", "lost"): 8}
    assert listed(database, user="bob") == []
    assert len(listed(database, user="ann", model="one", request="r1")) == 2
    assert [one.id for one in listed(database, before=own.id, limit=1)] == [judged.id]


def test_ids_that_clients_have_chosen(database: Database) -> None:
    """Two users may choose the same, and a user twice; the gateway's own id goes first."""
    enter(
        database,
        [
            request("r1", request_id="mine", at=NOW - 10),
            request("r2", request_id="mine", at=NOW - 5, model="two"),
            request("r3", request_id="mine", user="bob"),
            request("mine", request_id="x", user="bob"),
        ],
    )
    found = give(database, key("ann"), "mine", rating=5)
    assert found is not None
    assert (found.request_id, found.model) == ("r2", "two")
    found = give(database, key("root", "admin"), "mine", rating=5)
    assert found is not None
    assert found.request_id == "mine"


def test_what_cannot_be_taken() -> None:
    for wrong in ({"rating": 0}, {"rating": 11}, {"rating": 5.5}, {"rating": True}, {"correct": "yes"}, {"more": 1},
                  {"comment": "x" * 2001}, {"comment": "\x00"}, {"comment": "\ud800"}, {"request_id": ""}):  # fmt: skip
        with pytest.raises(ValidationError):
            Given.model_validate({"request_id": "r1", **wrong})
    with pytest.raises(Wrong, match="One of"):
        check(Given(request_id="r1"), RULES)
    for outcome in ("served", "invented"):
        with pytest.raises(Wrong, match="escalated, other, solved"):
            check(Given(request_id="r1", outcome=outcome), RULES)
    check(Given(request_id="r1", outcome="other"), RULES)
    assert Rules.of(None).outcomes == ("other",)


def test_what_answers_are_expected_to_be_worth() -> None:
    records = [request("a"), request("b"), request("c", outcome="cut"), request("d", model="gone", use_case="support")]
    assert estimated(RULES, records) == [
        (VALUE, ("one", "other", "estimated"), 0.2),
        (VALUE, ("other", "support", "estimated"), 0.1),
    ]
    assert estimated(Rules(Policies(), MODELS), records) == []


def fill(database: Database) -> None:
    day = 86_400
    enter(
        database,
        [
            request("r1", at=NOW - 2 * day, use_case="support"),
            request("r2", at=NOW - day, model="two"),
            request("r3", user="bob", at=NOW),
            request("r4", user="bob", outcome="refused", cost_usd=0.0),
            request("r5", user="carl", outcome="upstream_error", at=NOW - 10 * day),
        ],
    )
    give(database, key("ann"), "r1", correct=True, rating=9, outcome="solved")
    give(database, key("ann"), "r2", correct=False, rating=2)
    give(database, key("bob"), "r3", correct=True)


def figures(database: Database, group: Group | None, user: str | None = None) -> dict[str, Analytics]:
    span = span_of(date(2030, 3, 10), date(2030, 3, 17), NOW)
    return {one.group: one for one in analyse(database, RULES, span, group, user)}


def test_figures(database: Database) -> None:
    fill(database)
    total = figures(database, None)[""]
    assert (total.requests, total.refused, total.errors, total.cost_usd) == (4, 1, 0, 1.5)
    assert (total.feedback, total.correct, total.incorrect) == (3, 2, 1)
    assert total.accuracy == pytest.approx(2 / 3)
    assert (total.rated, total.satisfaction, total.satisfied, total.dissatisfied) == (2, 5.5, 1, 1)
    assert (total.value_usd, total.net_usd) == (20, 18.5)
    assert total.estimated_usd == pytest.approx(0.3)
    models = figures(database, "model")
    assert (models["two"].requests, models["two"].accuracy, models["two"].satisfaction) == (1, 0, 2)
    assert models["one"].estimated_usd == pytest.approx(0.2)
    days = figures(database, "day")
    assert {name: one.requests for name, one in days.items()} == {"2030-03-15": 1, "2030-03-16": 1, "2030-03-17": 2}
    assert days["2030-03-17"].feedback == 3, "feedback belongs to the day on which it came"
    users = figures(database, "user")
    assert (users["bob"].requests, users["bob"].refused, users["bob"].satisfaction) == (2, 1, None)
    cases = figures(database, "use_case")
    assert (cases["support"].requests, cases["support"].value_usd) == (1, 20)
    assert (cases[""].requests, cases[""].refused, cases[""].errors) == (3, 1, 0)
    assert {name: one.feedback for name, one in figures(database, "outcome").items()} == {"solved": 1}
    assert figures(database, None, "bob")[""].requests == 2
    assert figures(database, "model", "bob")["one"].feedback == 1
    assert figures(database, "model", "nobody") == {}
    span = span_of(date(2030, 3, 10), date(2030, 3, 17), NOW)
    assert [one.feedback for one in analyse(database, RULES, span, None, None, "user")] == [3]
    assert [one.feedback for one in analyse(database, RULES, span, None, None, "golden")] == [0]


def test_who_comes(database: Database) -> None:
    fill(database)
    days = adoption(database, span_of(date(2030, 3, 8), date(2030, 3, 17), NOW))
    assert [one.users for one in days] == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert [one.week_users for one in days][-3:] == [1, 1, 2]
    assert days[0].week_users == 1, "a week reaches back beyond the first day"
    assert days[-1].requests == 2


def test_spans() -> None:
    assert span_of(None, None, NOW) == Span(first=date(2030, 3, 11), last=date(2030, 3, 17))
    assert span_of(None, None, NOW).end - span_of(None, None, NOW).start == 7 * 86_400
    for first, last in ((date(2030, 3, 18), None), (date(2020, 1, 1), date(2021, 6, 1))):
        with pytest.raises(ValueError, match=r"later than|at most 366 days"):
            span_of(first, last, NOW)

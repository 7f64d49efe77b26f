"""Why a request went as it did."""

from collections.abc import Iterator
from typing import Any

import pytest
from citadel_gateway.control import settler as settling
from citadel_gateway.control.segments import folder_of
from citadel_gateway.records import Candidate, Running, Why

from gateway.tests.client import ADMIN, KEY
from gateway.tests.controls import ThreadedControl, until
from gateway.tests.fake_worker import FakeJournal, opened, progress, settled
from gateway.tests.site import Site

DECISION = Why(
    policy="auto",
    rule="short",
    choose="load",
    candidates=(
        Candidate("one", "127.0.0.1:1", 0.25, "best"),
        Candidate("two", "127.0.0.1:2", 0.5, "down"),
        Candidate("big", "", 0.0, "weight_0"),
    ),
    fallback_from="big",
    prompt_tokens=12,
    remaining={"tokens_per_minute": 100},
    queue_length=3,
)


@pytest.fixture
def control(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedControl]:
    monkeypatch.setattr(settling, "INTERVAL", 0.01)
    site.model("one", 11400)
    found = ThreadedControl(site).start()
    yield found
    found.stop()


@pytest.fixture
def journal(site: Site) -> Iterator[FakeJournal]:
    found = FakeJournal(folder_of(site.settings))
    yield found
    found.die()


def ask(control: ThreadedControl, name: str, key: str = KEY) -> Any:
    answer = control.ask("GET", f"/v1/requests/{name}/why", key=key)
    assert answer.status == 200, answer.body
    return answer.json()


def test_a_settled_request(control: ThreadedControl, journal: FakeJournal) -> None:
    journal.write(
        settled("a-1", user="user", asked="auto", backend="127.0.0.1:1", queue_seconds=0.25, tries=2, why=DECISION)
    )
    until(lambda: control.state.parts["settler"].counts["settled"])
    found = ask(control, "a-1")
    assert found == ask(control, "r-a-1")
    assert (found["state"], found["outcome"], found["status"], found["tries"]) == ("settled", "ok", 200, 2)
    assert found["decision"]["candidates"] == [
        {"model": "one", "backend": "127.0.0.1:1", "score": 0.25, "note": "best", "taken": True},
        {"model": "two", "backend": "127.0.0.1:2", "score": 0.5, "note": "down", "taken": False},
        {"model": "big", "backend": "", "score": 0.0, "note": "weight_0", "taken": False},
    ]
    assert found["limits"]["remaining"] == {"tokens_per_minute": 100}
    assert found["queue"] == {"seconds": 0.25, "length": 3}
    assert found["tokens"] == {"input": 7, "output": 5, "cached": 0, "exact": True}
    assert found["cost"] == {"usd": 0.001, "parts": {"tokens": 0.001}}
    assert found["story"] == [
        "user asked for auto.",
        "The policy auto, rule short chose one by load.",
        "one took over from big.",
        "one at 127.0.0.1:1: taken, score 0.25, the smallest score.",
        "two at 127.0.0.1:2: not taken, score 0.5, was down.",
        "big: score 0, serves only when no other can.",
        "It waited 0.250 s, 3 others before it.",
        "It was answered after 0.000 s, 2 tries.",
        "7 tokens in, 5 out: 0.001000 USD.",
    ]


def test_a_refused_request(control: ThreadedControl, journal: FakeJournal) -> None:
    why = Why(limit="tokens_per_minute", retry_after=4.0, degraded_from="big")
    journal.write(settled("a-1", user="user", outcome="limited", code="rate_limit_exceeded", exact=False, why=why))
    until(lambda: control.state.parts["settler"].counts["settled"])
    assert ask(control, "a-1")["story"] == [
        "user asked for one.",
        "The quota was spent, so one served in the place of big.",
        "The limit tokens_per_minute stood against it.",
        "It was refused by a limit (rate_limit_exceeded) after 0.000 s, 0 tries.",
        "It was told to come back in 4 s.",
        "7 tokens in, 5 out, as far as was seen: 0.001000 USD.",
    ]


def test_a_request_that_runs(control: ThreadedControl, journal: FakeJournal) -> None:
    journal.write(opened("a-1", user="user", reserved=100), progress(Running("a-1", 9, 3, 0.25)))
    until(lambda: any(one.running for one in control.state.parts["settler"].live.values()))
    found = ask(control, "r-a-1")
    assert (found["state"], found["tokens"], found["limits"]) == (
        "open",
        {"input": 9, "output": 3},
        {"reserved_tokens": 100},
    )


def test_it_is_known_before_it_is_in_the_ledger(control: ThreadedControl, journal: FakeJournal) -> None:
    control.state.database.rest_until = float("inf")
    journal.write(settled("a-1", user="user"))
    until(lambda: control.state.parts["settler"].find("a-1"))
    assert ask(control, "a-1")["state"] == "waiting"
    assert control.ask("GET", "/v1/requests/a-2/why", key=KEY).error() == "database_unavailable"
    control.state.database.rest_until = 0


def test_others_requests_are_not_there(control: ThreadedControl, journal: FakeJournal) -> None:
    journal.write(
        settled("a-1", user="bob", request_id="same"),
        settled("a-2", user="user", request_id="same", at=1.0),
        opened("a-3", user="bob"),
    )
    settler = control.state.parts["settler"]
    until(lambda: settler.counts["settled"] == 2 and settler.live)
    for name in ("a-1", "a-3", "nothing", "%2e%2e/x"):
        answer = control.ask("GET", f"/v1/requests/{name}/why", key=KEY)
        assert (answer.status, answer.error()) == (404, "not_found")
    assert ask(control, "same")["id"] == "a-2"
    assert ask(control, "same", ADMIN)["id"] == "a-1"  # the newest
    assert ask(control, "a-3", ADMIN)["state"] == "open"
    assert control.ask("GET", "/v1/requests/a-1/why", key="wrong").status == 401

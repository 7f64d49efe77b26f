"""When a backend is up, and when it is asked again."""

import pytest
from citadel_gateway.core.health import (
    BROKEN,
    FIRST_RETRY,
    LONGEST,
    NEUTRAL,
    PATIENCE,
    SERVED,
    SUSPECT_PATIENCE,
    UNREACHABLE,
    Health,
)
from citadel_gateway.settings import Routing


def test_a_refusal_takes_it_down_at_once_and_a_probe_brings_it_back() -> None:
    health = Health(5.0, now=0.0)
    assert health.up
    assert health.failed(1.0)
    assert not health.up
    assert not health.begin(1.0)
    assert health.begin(1.0 + FIRST_RETRY)
    assert not health.begin(2.0)  # one probe at a time
    assert health.healthy(1.3)
    assert health.up
    assert health.due == 6.3
    assert not health.healthy(6.4)


def test_it_is_asked_less_and_less_often_up_to_the_interval() -> None:
    health = Health(1.0, now=0.0)
    waits = []
    for _ in range(5):
        health.failed(0.0)
        waits.append(health.due)
    assert waits == [0.2, 0.4, 0.8, 1.0, 1.0]


def test_a_busy_engine_is_not_a_dead_one() -> None:
    health = Health(5.0, now=0.0)
    for _ in range(PATIENCE - 1):
        assert health.begin(health.due)
        assert not health.unanswered(health.due)
        assert health.up
    health.begin(health.due)
    assert health.unanswered(health.due)
    assert not health.up
    assert not health.unanswered(health.due)  # it stays down


def test_a_broken_request_only_raises_suspicion() -> None:
    health = Health(5.0, now=0.0)
    health.healthy(0.0)
    health.suspect(1.0)
    assert health.up
    assert health.begin(1.0)


# circuit --------------------------------------------------------------------------------------------------------------
def broken(health: Health, times: int, now: float) -> None:
    for _ in range(times):
        health.ended(BROKEN, now, now)


def test_failures_in_a_row_open_the_circuit() -> None:
    health = Health(5.0, 0.0, Routing(failures=3, open_seconds=5.0))
    broken(health, 2, 1.0)
    health.ended(SERVED, 1.0, 1.0)
    broken(health, 2, 1.0)
    health.ended(NEUTRAL, 1.0, 1.0)
    assert health.usable(1.0)
    broken(health, 1, 1.0)
    assert health.up
    assert not health.usable(5.9)
    assert health.usable(6.0)


def test_a_rate_of_failures_opens_it_when_there_are_enough() -> None:
    health = Health(5.0, 0.0, Routing(failures=100, error_rate=0.5))
    for _ in range(9):
        broken(health, 1, 1.0)
        health.ended(SERVED, 1.0, 1.0)
    assert health.usable(1.0)
    broken(health, 2, 1.0)
    assert not health.usable(1.0)


def test_old_failures_are_forgotten() -> None:
    health = Health(5.0, 0.0, Routing(failures=100, error_rate=0.5))
    broken(health, 19, 1.0)
    health.ended(SERVED, 16.0, 16.0)
    assert health.bad_before == 19
    health.ended(SERVED, 50.0, 50.0)
    broken(health, 1, 50.0)
    assert health.usable(50.0)


def test_one_trial_decides() -> None:
    health = Health(5.0, 0.0, Routing(failures=1, open_seconds=5.0, slow_start=10.0))
    broken(health, 1, 1.0)
    assert health.usable(6.0)
    health.chosen()
    assert not health.usable(6.1)  # one only
    health.ended(SERVED, 6.2, 0.5)  # sent before it opened: says nothing
    assert not health.usable(6.2)
    health.ended(NEUTRAL, 6.3, 6.1)  # its client went away: another one may try
    assert health.usable(6.3)
    health.chosen()
    health.ended(SERVED, 7.0, 6.4)
    assert (health.circuit, health.usable(7.0)) == ("closed", True)
    assert [round(health.ramp(now), 1) for now in (7.0, 12.0, 17.0)] == [0.1, 0.5, 1.0]


def test_a_trial_that_fails_opens_it_for_longer_up_to_a_bound() -> None:
    health = Health(5.0, 0.0, Routing(failures=1, open_seconds=5.0))
    waits, now = [], 1.0
    for _ in range(7):
        broken(health, 1, now)
        waits.append(health.until - now)
        now = health.until
        health.chosen()
    assert waits == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0]
    health.ended(SERVED, now, now)
    broken(health, 1, now + 1.0)  # again soon: not forgotten
    assert health.until == now + 1.0 + LONGEST
    health.chosen()
    health.ended(SERVED, now + 100.0, health.until)
    broken(health, 1, now + 200.0)
    assert health.until == now + 205.0


def test_no_connection_takes_it_down_and_a_broken_one_asks() -> None:
    health = Health(5.0, 0.0)
    health.healthy(0.0)
    broken(health, 1, 1.0)
    assert (health.up, health.due) == (True, 1.0)
    health.ended(UNREACHABLE, 1.0, 1.0)
    assert not health.up


# suspicion ------------------------------------------------------------------------------------------------------------
def test_a_suspect_has_to_generate_and_is_ejected_if_it_does_not() -> None:
    health = Health(5.0, 0.0)
    health.healthy(0.0)
    assert not health.must_generate()
    health.doubt(1.0)
    health.doubt(1.5)
    assert (health.doubted, health.due, health.up) == (1.0, 1.0, True)
    for _ in range(SUSPECT_PATIENCE):
        assert health.up
        assert health.must_generate()
        assert health.begin(health.due)
        health.unanswered(health.due)
    assert (health.up, health.ejected) == (False, True)
    health.heard()
    assert health.must_generate()
    assert not health.begin(health.due - 0.1)
    assert health.begin(health.due)
    assert health.healthy(20.0)
    assert (health.up, health.ejected, health.must_generate()) == (True, False, False)


def test_a_suspect_that_sends_again_is_none() -> None:
    health = Health(5.0, 0.0)
    health.doubt(1.0)
    health.heard()
    assert not health.must_generate()


# flapping -------------------------------------------------------------------------------------------------------------
def test_one_that_goes_up_and_down_is_believed_later_and_later() -> None:
    health = Health(1.0, 0.0, Routing(open_seconds=4.0))
    held, now = [], 10.0
    for _ in range(6):
        health.failed(now)
        held.append(max(health.hold - now, 0.0))
        assert health.healthy(now + 0.5) is (held[-1] == 0)
        now = max(now, health.hold) + 1.0
        health.healthy(now)
        assert health.up
    assert held == [0.0, 0.0, 4.0, 8.0, 16.0, 32.0]
    health.failed(now + 100.0)
    assert health.hold == 0.0


@pytest.mark.parametrize("slow", [0.0, 10.0])
def test_a_replica_that_was_never_away_has_all_its_weight(slow: float) -> None:
    assert Health(5.0, 0.0, Routing(slow_start=slow)).ramp(0.0) == 1.0

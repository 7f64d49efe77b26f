"""When a backend is up, and when it is asked again."""

from citadel_gateway.core.health import FIRST_RETRY, PATIENCE, Health


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

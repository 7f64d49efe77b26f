"""What was counted outlives a restart and a kill; what does not fit is refused, not evicted."""

import re
import time

from testinfra.host import Host

CLI = "redis-cli -s /run/redis/citadel.sock --no-auth-warning"
GATEWAY = f"REDISCLI_AUTH=$(cat /etc/citadel-redis/gateway.password) {CLI} --user gateway"
OPERATOR = f"REDISCLI_AUTH=$(cat /etc/citadel-redis/operator.password) {CLI} --user operator"


def answers(host: Host) -> None:
    for _ in range(50):
        if host.run(f"{GATEWAY} PING").stdout.strip() == "PONG":
            return
        time.sleep(0.2)
    raise AssertionError(host.check_output("journalctl --no-pager --lines=20 --unit=redis-server"))


def test_the_gateway_comes_by_the_socket_and_nobody_else(host: Host) -> None:
    ask = f"runuser --user %s -- sh -c '{GATEWAY} PING'"
    assert host.run(ask.replace("%s", "citadel-gateway")).stdout.strip() == "PONG"
    assert host.run(ask.replace("%s", "nobody")).stdout.strip() != "PONG"


def test_what_was_counted_outlives_a_restart(host: Host) -> None:
    host.check_output(f"{GATEWAY} SET citadel:test:restart 41")
    host.check_output(f"{GATEWAY} INCR citadel:test:restart")
    host.check_output("systemctl restart redis-server")
    answers(host)
    assert host.check_output(f"{GATEWAY} GET citadel:test:restart") == "42"


def test_what_a_script_wrote_outlives_a_restart(host: Host) -> None:
    """Redis replays a script's writes as its default user: if that may do nothing, it comes up empty."""
    script = "redis.call('INCR', KEYS[1]); redis.call('INCR', KEYS[1]); return redis.call('GET', KEYS[1])"
    assert host.check_output(f'{GATEWAY} EVAL "{script}" 1 citadel:test:script') == "2"
    host.check_output("systemctl restart redis-server")
    answers(host)
    assert host.check_output(f"{GATEWAY} GET citadel:test:script") == "2"
    assert "CRITICAL" not in host.check_output("journalctl --no-pager --lines=40 --unit=redis-server")
    host.check_output(f"{GATEWAY} DEL citadel:test:script")


def test_what_was_forced_to_disk_outlives_a_kill(host: Host) -> None:
    host.check_output(f"{GATEWAY} SET citadel:test:kill 42")
    time.sleep(1.5)  # everysec
    host.check_output("systemctl kill --signal=KILL redis-server")
    answers(host)
    assert host.check_output(f"{GATEWAY} GET citadel:test:kill") == "42"
    host.check_output(f"{GATEWAY} DEL citadel:test:kill citadel:test:restart")


def test_full_memory_refuses_and_evicts_nothing(host: Host) -> None:
    host.check_output(f"{GATEWAY} SET citadel:test:kept 1")
    host.check_output(f"{OPERATOR} CONFIG SET maxmemory 1mb")
    try:
        full = host.run(f"{GATEWAY} SETRANGE citadel:test:large 2000000 x; {GATEWAY} SET citadel:test:more 1")
        assert "OOM" in full.stdout + full.stderr
        assert host.check_output(f"{GATEWAY} GET citadel:test:kept") == "1"
    finally:
        host.check_output(f"{OPERATOR} CONFIG SET maxmemory 256mb")
        host.check_output(f"{GATEWAY} DEL citadel:test:large citadel:test:kept citadel:test:more")


def test_exposure_is_small(host: Host) -> None:
    told = host.check_output("systemd-analyze security --no-pager redis-server.service")
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", told)
    assert found, told
    assert float(found[1]) <= 1.5, told

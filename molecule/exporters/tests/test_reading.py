"""With the password there are figures, true ones: of host, store and SQL server, and of all processes of a unit."""

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

PROJECT = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
PASSWORD = "a-password-of-the-test-only"
ADDRESS = "10.77.0.114"
MODEL = "citadel-llm@burner.service"


def play(*options: str, **values: Any) -> subprocess.CompletedProcess[str]:
    command = ["ansible-playbook", "-i", "molecule/inventory", "molecule/exporters/converge.yml", *options]
    extra = ["-e", json.dumps(values)] if values else []
    return subprocess.run([*command, *extra], cwd=PROJECT, capture_output=True, text=True, check=False)


def read(host: Host, port: int, path: str = "/metrics", password: str = PASSWORD) -> tuple[int, str]:
    """(status, text); curl has the password from a file of its settings."""
    told = host.run(
        f"printf 'user = \"citadel:%s\"' '{password}' | curl --silent --config - --write-out '\\n%{{http_code}}' "
        f"'http://{ADDRESS}:{port}{path}'"
    )
    body, _, status = told.stdout.rpartition("\n")
    return int(status), body


def figures(text: str) -> dict[str, float]:
    """``name{labels}`` -> value."""
    return {name: float(value) for name, value in re.findall(r"^([a-z]\w*(?:\{.*\})?) (\S+)$", text, re.MULTILINE)}


def unit_figures(host: Host, name: str = MODEL) -> dict[str, float]:
    """What node exporter says of a unit, by metric."""
    status, body = read(host, 9100)
    assert status == 200
    found = re.findall(r"^citadel_unit_(\w+)\{(.*)\} (\S+)$", body, re.MULTILINE)
    return {metric: float(value) for metric, labels, value in found if f'unit="{name}"' in labels}


def ask_sql(host: Host, question: str) -> str:
    """What the SQL server tells its administrator."""
    psql = "psql --no-psqlrc --tuples-only --no-align --port=5433"
    return str(host.check_output(f"cd / && runuser --user postgres -- {psql} --command %s", question))


@pytest.fixture
def burner(host: Host) -> Iterator[str]:
    """A unit that looks like a model's: its main process rests, the child has 40 MB and works."""
    host.check_output("systemctl daemon-reload")
    host.check_output("systemctl start %s", MODEL)
    yield MODEL
    host.check_output("systemctl stop %s", MODEL)
    host.run("systemctl reset-failed %s", MODEL)


def test_the_machine(host: Host) -> None:
    status, body = read(host, 9100)
    told = figures(body)
    assert status == 200
    assert (
        abs(
            told["node_memory_MemTotal_bytes"]
            - int(host.check_output("sed -n 's/^MemTotal: *//p' /proc/meminfo").split()[0]) * 1024
        )
        < 1
    )
    assert told["node_textfile_scrape_error"] == 0
    assert any(name.startswith("node_filesystem_avail_bytes") and 'mountpoint="/"' in name for name in told)
    # What a machine in a container does not have; all others work.
    failed = {name for name, value in told.items() if name.startswith("node_scrape_collector_success") and value == 0}
    assert failed <= {f'node_scrape_collector_success{{collector="{name}"}}' for name in ("hwmon", "timex")}
    assert len(told) < 700


def test_the_store(host: Host) -> None:
    status, body = read(host, 9121)
    told = figures(body)
    assert (status, told["redis_up"]) == (200, 1)
    assert told["redis_memory_max_bytes"] == 256 * 1024 * 1024
    assert told['redis_exporter_last_scrape_error{err=""}'] == 0
    assert len(told) < 400


def test_the_store_refused_it_nothing(host: Host) -> None:
    """What an exporter asks is what its user may: else the log of refusals would be full of it."""
    secret = "REDISCLI_AUTH=$(cat /etc/citadel-redis/operator.password)"
    operator = f"{secret} redis-cli -s /run/redis/citadel.sock --user operator --no-auth-warning"
    host.check_output(f"{operator} ACL LOG RESET")
    assert read(host, 9121)[0] == 200
    assert host.check_output(f"{operator} ACL LOG") == ""


def test_a_store_that_is_down_is_told_as_down_and_found_again(host: Host) -> None:
    host.check_output("systemctl stop redis-server")
    try:
        status, body = read(host, 9121)
        assert (status, figures(body)["redis_up"]) == (200, 0)
    finally:
        host.check_output("systemctl start redis-server")
    assert figures(read(host, 9121)[1])["redis_up"] == 1


def test_the_sql_server(host: Host) -> None:
    status, body = read(host, 9187)
    told = figures(body)
    assert (status, told["pg_up"]) == (200, 1)
    assert any(name.startswith("pg_settings_max_connections") and value == 100 for name, value in told.items())
    assert ask_sql(host, "SELECT rolsuper, rolcreaterole FROM pg_roles WHERE rolname = 'prometheus'") == "f|f"


@pytest.mark.parametrize("port", [9100, 9121, 9187])
def test_another_password_is_refused(host: Host, port: int) -> None:
    assert read(host, port, password=PASSWORD + "x")[0] == 401
    assert read(host, port, password="")[0] == 401


def test_only_the_figures_of_our_own_store_are_told(host: Host) -> None:
    """The exporter would ask any address that it is told to: that path is not there."""
    assert read(host, 9121, "/scrape?target=redis://127.0.0.1:6379")[0] == 404
    assert read(host, 9121, "/")[0] == 404


def test_the_password_is_nowhere(host: Host) -> None:
    """Neither among the processes, nor in the journal, nor in a unit, nor in a file."""
    printable = "tr --complement --delete '[:print:]'"
    places = [
        f"cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | {printable}",
        f"journalctl --no-pager --output=export | {printable}",
        "systemctl cat 'prometheus-*' 'citadel-*'",
    ]
    monitor = host.check_output("cat /etc/citadel-redis/monitor.password")
    for command in [*places, "cat /etc/citadel-exporters/* /etc/default/prometheus-*"]:
        text = host.run(command).stdout
        assert text
        assert PASSWORD not in text, command
        assert monitor not in text, command


def test_all_processes_of_a_unit_are_counted(host: Host, burner: str) -> None:
    time.sleep(5)
    told = unit_figures(host)
    assert (told["active"], told["tasks"], told["memory_limit_bytes"]) == (1, 2, 200 * 1024 * 1024)
    assert told["memory_bytes"] > 40_000_000  # the child's
    begun = time.monotonic()
    first = told["cpu_seconds_total"]
    time.sleep(6)
    spent = unit_figures(host)["cpu_seconds_total"] - first
    share = spent / (time.monotonic() - begun)
    assert 0.12 < share < 0.45, "CPUQuota is 30 %, all of it the child's; looked at every 2 s"
    main = host.check_output("systemctl show --property=MainPID --value %s", burner)
    alone = sum(map(int, host.check_output("cat /proc/%s/stat", main).rsplit(")", 1)[1].split()[11:13])) / 100
    assert alone < spent / 2, "the main process rests"
    assert (
        f'model="burner",unit="{burner}"' in read(host, 9100)[1]
        or f'unit="{burner}",model="burner"' in read(host, 9100)[1]
    )


def test_a_restart_is_counted_and_a_stop_is_told(host: Host, burner: str) -> None:
    host.check_output("systemctl kill --signal=KILL %s", burner)
    time.sleep(6)
    told = unit_figures(host)
    assert (told["active"], told["restarts_total"]) == (1, 1)
    host.check_output("systemctl stop %s", burner)
    time.sleep(4)
    # Gone for systemd, or known and at rest: in either case nothing is claimed.
    assert unit_figures(host).get("active", 0) == 0
    assert read(host, 9100)[1].count("citadel_unit_collector_success 1") == 1


def test_what_an_engine_s_supervisor_left_is_told_too(host: Host) -> None:
    host.check_output("mkdir --parents /run/citadel-llm/burner")
    text = 'citadel_engine_canary_seconds{model="burner"} 0.25\ncitadel_unit_memory_bytes{model="burner"} 1\nnonsense\n'
    host.check_output("printf %s > /run/citadel-llm/burner/metrics.prom", text)
    try:
        time.sleep(4)
        told = figures(read(host, 9100)[1])
        assert told['citadel_engine_canary_seconds{model="burner"}'] == 0.25
        assert told["citadel_unit_collector_left_out"] == 1
        assert told["node_textfile_scrape_error"] == 0
    finally:
        host.check_output("rm --recursive /run/citadel-llm")


def test_a_new_password_is_the_only_one(host: Host) -> None:
    other = "another-password-of-the-test"
    assert (run := play("--diff", exporters_password=other)).returncode == 0, run.stdout
    assert read(host, 9100, password=other)[0] == 200
    assert read(host, 9121)[0] == 401
    assert other not in run.stdout
    assert "$2y$" not in run.stdout


def test_bad_values_are_refused_all_at_once_with_the_remedies() -> None:
    run = play(
        exporters_password="short",
        exporters_user="a:b",
        exporters_listen="metrics.example.org",
        exporters_node_port=22,
        exporters_redis_url="unix:///run/redis/citadel.sock",
        exporters_redis_password_file="/nonexistent",
        exporters_postgres_server_port=5999,
        exporters_node_collectors=["cpu"],
        exporters_units_others=["ssh.socket"],
        exporters_memory_max="lots",
    )
    assert run.returncode != 0
    for words in (
        "exporters_password has 5 bytes: take 16 to 72",
        "exporters_user is a:b: take letters",
        "exporters_listen is metrics.example.org: give an IPv4 address",
        "A port of exporters_*_port is 22, which something else listens on (sshd): stop it, or take another port",
        "exporters_redis_url is unix:///run/redis/citadel.sock: write redis://HOST:PORT",
        "exporters_redis_password_file /nonexistent is not there or empty: run playbooks/redis.yml",
        "no SQL server answers its administrator at exporters_postgres_socket_dir /run/postgresql",
        "exporters_postgres_server_port 5999",
        "exporters_node_collectors has no textfile",
        "exporters_units_models and exporters_units_others have ssh.socket",
        "exporters_memory_max is lots: write a number and K, M or G",
    ):
        assert words in " ".join(run.stdout.split()), f"{words!r} is not in\n{run.stdout}"
    assert "changed=0" in run.stdout
    assert "exporters_password is empty" in " ".join(play(exporters_password="").stdout.split())


def test_one_of_them_goes_and_an_operator_s_own_is_left_alone(host: Host) -> None:
    drop_in = "/etc/systemd/system/prometheus-postgres-exporter.service.d/citadel.conf"
    assert (run := play(exporters_postgres_enabled=False)).returncode == 0, run.stdout
    assert not host.file(drop_in).exists
    assert host.run("systemctl is-active prometheus-postgres-exporter").stdout.strip() == "inactive"
    assert host.run("systemctl is-active prometheus-node-exporter").stdout.strip() == "active"
    assert ask_sql(host, "SELECT count(*) FROM pg_roles WHERE rolname = 'prometheus'") == "0"
    # Now it runs as Debian packages it, as if the operator had it from before.
    host.check_output("systemctl start prometheus-postgres-exporter")
    run = play()
    assert run.returncode != 0
    assert "already runs here with settings of its own" in " ".join(run.stdout.split())
    assert "changed=0" in run.stdout
    assert (run := play(exporters_take_over=True)).returncode == 0, run.stdout
    assert read(host, 9187)[0] == 200


def test_removed_it_leaves_no_trace(host: Host) -> None:
    assert (run := play(exporters_state="absent")).returncode == 0, run.stdout
    for path in (
        "/etc/citadel-exporters",
        "/opt/citadel/bin/citadel-unit-metrics",
        "/etc/systemd/system/citadel-unit-metrics.service",
        "/etc/systemd/system/citadel-exporter-front.service",
        "/etc/systemd/system/prometheus-node-exporter.service.d/citadel.conf",
        "/etc/systemd/system/prometheus-redis-exporter.service.d/citadel.conf",
        "/var/lib/prometheus/node-exporter/citadel-units.prom",
    ):
        assert not host.file(path).exists, path
    for name in ("node", "redis", "postgres"):
        assert host.run(f"systemctl is-active prometheus-{name}-exporter").stdout.strip() == "inactive"
        assert host.run(f"systemctl is-enabled prometheus-{name}-exporter").stdout.strip() == "disabled"
        assert host.package(f"prometheus-{name}-exporter").is_installed
    assert ask_sql(host, "SELECT count(*) FROM pg_roles WHERE rolname = 'prometheus'") == "0"
    assert "changed=0" in (run := play(exporters_state="absent")).stdout, run.stdout

"""Monitoring of a metrics server: what was written is what its servers have loaded, and its secrets are closed."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

Json = dict[str, Any]
BEGIN = "# BEGIN CITADEL"


def flag(host: Host, unit: str, name: str, default: str) -> str:
    """A flag of a service, as it runs; for one that stands in no file, its default."""
    pid = host.check_output("systemctl show --property=MainPID --value %s", unit)
    arguments = host.run("cat /proc/%s/cmdline", pid).stdout.split("\0")
    given = [word.split("=", 1)[1] for word in arguments if word.startswith(f"{name}=")]
    return given[0] if given else default


@pytest.fixture
def config(host: Host) -> str:
    """Text of the Prometheus configuration that has our block."""
    if not host.run("systemctl cat prometheus.service").succeeded:
        pytest.skip("no Prometheus of the platform's is on this host")
    path = flag(host, "prometheus.service", "--config.file", "/etc/prometheus/prometheus.yml")
    text = str(host.run("cat %s", path).stdout)
    if BEGIN not in text:
        pytest.skip("the Prometheus of this host is not the platform's")
    return text


@pytest.fixture
def folder(config: str) -> str:
    """Ours, as the configuration names it."""
    found = re.search(r"(/\S+)/targets/citadel-\S+\.json", config)
    assert found, "no job of ours has a file of targets"
    return found[1]


@pytest.fixture
def url(host: Host, config: str) -> str:
    assert config
    where = flag(host, "prometheus.service", "--web.listen-address", "0.0.0.0:9090")
    return f"http://127.0.0.1:{where.rsplit(':', 1)[1]}"


@pytest.fixture
def ask(fetch: Callable[..., Any], url: str) -> Callable[[str], Any]:
    """``ask("rules")``: the data of an answer of Prometheus."""

    def get(path: str) -> Any:
        answer = fetch(f"{url}/api/v1/{path}")
        assert answer.status == 200, answer.body
        return answer.json()["data"]

    return get


def test_the_last_load_of_prometheus_succeeded(host: Host, url: str, fetch: Callable[..., Any]) -> None:
    """Prometheus has loaded its configuration, ours in it."""
    assert host.service("prometheus").is_running
    page = fetch(f"{url}/metrics").body
    assert re.search(r"^prometheus_config_last_reload_successful 1$", page, re.MULTILINE)


def test_every_rule_file_is_loaded_and_evaluates(host: Host, folder: str, ask: Callable[[str], Any]) -> None:
    """Every rule group of ours is loaded and evaluates without an error."""
    wanted = {
        name.strip("'\" ") for name in host.run(f"sed -n 's/^ *- name: //p' {folder}/rules/*.yml").stdout.splitlines()
    }
    mine = [group for group in ask("rules")["groups"] if group["file"].startswith(f"{folder}/rules/")]
    assert {group["name"] for group in mine} == wanted
    failing = [
        f"{group['name']}: {rule['lastError']}" for group in mine for rule in group["rules"] if rule.get("lastError")
    ]
    assert failing == []


def test_every_target_is_known_with_its_labels(host: Host, folder: str, ask: Callable[[str], Any]) -> None:
    """Prometheus knows every target of ours, with the labels that were given."""
    known = {
        (target["labels"]["job"], target["labels"]["instance"], target["discoveredLabels"]["__address__"])
        for target in ask("targets?state=active")["activeTargets"]
    }
    for path in host.check_output("ls %s/targets", folder).split():
        for group in json.loads(host.file(f"{folder}/targets/{path}").content_string):
            for address in group["targets"]:
                assert (path.removesuffix(".json"), group["labels"]["instance"], address) in known


def test_our_targets_have_bounds(config: str) -> None:
    """A scrape of ours has a limit of samples, of labels and of their length."""
    jobs = re.findall(r"job_name: citadel-", config)
    for limit in ("sample_limit", "label_limit", "label_value_length_limit"):
        assert len(re.findall(rf"^\s+{limit}: [1-9]", config, re.MULTILINE)) >= len(jobs)


def test_secrets_are_closed_and_in_no_configuration(host: Host, folder: str, config: str) -> None:
    """Keys and passwords are in files of root's that Prometheus' group may read, and in no configuration."""
    paths = host.run(f"ls {folder}/*.key {folder}/*.password {folder}/alertmanager/* 2>/dev/null").stdout.split()
    for path in paths:
        file = host.file(path)
        assert (file.user, file.mode & 0o777) == ("root", 0o640), path
        secret = file.content_string.strip()
        assert secret not in config, path


def test_every_alert_of_ours_leads_to_a_page_that_opens(
    ask: Callable[[str], Any], url: str, folder: str, fetch: Callable[..., Any]
) -> None:
    """Every runbook that an alert of ours links to opens, where Prometheus serves them itself."""
    groups = [group for group in ask("rules")["groups"] if group["file"].startswith(f"{folder}/rules/")]
    links = {
        rule["annotations"].get("runbook_url", "")
        for group in groups
        for rule in group["rules"]
        if rule["type"] == "alerting"
    }
    assert [link for link in links if not link.startswith("http")] == []
    served = {link[link.index("/consoles/") :] for link in links if "/consoles/" in link}
    assert [path for path in sorted(served) if fetch(f"{url}{path}").status != 200] == []


def test_alertmanager_has_our_receivers_before_everybody_elses(
    host: Host, config: str, fetch: Callable[..., Any]
) -> None:
    """Alertmanager has loaded our route, ahead of the operator's; the root receiver is none of ours."""
    assert config
    path = flag(host, "prometheus-alertmanager.service", "--config.file", "/etc/prometheus/alertmanager.yml")
    written = str(host.run("cat %s", path).stdout)
    if BEGIN not in written:
        pytest.skip("the operator's own routes keep our alerts")
    where = flag(host, "prometheus-alertmanager.service", "--web.listen-address", "0.0.0.0:9093")
    loaded = fetch(f"http://127.0.0.1:{where.rsplit(':', 1)[1]}/api/v2/status").json()["config"]["original"]
    wanted = set(re.findall(r"^\s*- name: (citadel-\S+)", written, re.MULTILINE))
    assert wanted <= set(re.findall(r"^- name: (\S+)", loaded, re.MULTILINE))
    receivers = re.findall(r"^(?:  receiver|  - receiver): (\S+)", loaded, re.MULTILINE)
    assert not receivers[0].startswith("citadel-")
    assert receivers[1].startswith("citadel-")

"""Alertmanager's part from the matrix: every cell reaches its people, nobody else's alert reaches ours, and what cannot
work is refused. Whatever is rendered is read by the real amtool.
"""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from filter.citadel_alertmanager import INHIBITS, FilterModule, alerting_problems, alertmanager_config, escalation_rules

from tests.monitoring import servers

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "templates/alertmanager/citadel.tmpl"
GIVEN: dict[str, Any] = {
    "levels": {2: 900, 3: 2700},
    "channels": {
        "ops-chat": {"kind": "slack", "url": "https://hooks.example.org/T0/secret-slack", "channel": "#llm-ops"},
        "pager": {"kind": "pagerduty", "routing_key": "secret-routing"},
        "ops-mail": {"kind": "email", "to": ["ops@example.org", "night@example.org"]},
        "business-mail": {"kind": "email", "to": "business@example.org"},
        "duty-manager": {"kind": "webhook", "url": "https://sms.example.org/send", "token": "secret-token"},
    },
    "smtp": {
        "smarthost": "mail.example.org:587",
        "from": "citadel@example.org",
        "username": "citadel",
        "password": "secret-smtp",
    },
    "matrix": [
        {"team": "*", "severity": "critical", "levels": {1: ["ops-chat"], 2: ["pager"]}},
        {
            "team": "platform",
            "severity": "critical",
            "levels": {1: ["ops-chat"], 2: ["pager", "ops-mail"], 3: ["duty-manager"]},
        },
        {
            "team": "models",
            "severity": "critical",
            "levels": {"1": ["ops-chat"], "2": ["pager"], "3": ["duty-manager"]},
            "after": {"2": 300},
        },
        {"team": "business", "severity": "critical", "levels": {1: ["ops-chat"], 2: ["business-mail"]}},
        {"team": "platform", "severity": "warning", "levels": {1: ["ops-chat"], 2: ["ops-mail"]}},
        {"team": "business", "severity": "warning", "levels": {1: ["ops-chat"]}},
        {"team": "*", "severity": "warning", "levels": {1: ["ops-chat"]}},
        {"team": "platform", "severity": "info", "levels": {1: ["ops-chat"]}},
    ],
    "copies": {"business": ["business-mail"]},
    "heartbeat": {"url": "https://beats.example.org/citadel", "token": "secret-beat"},
}
TEAMS = ("platform", "models", "business", "quality", "unheard-of")
SEVERITIES = ("critical", "warning", "info")
LEVELS = ("", "1", "2", "3")
OPERATORS: dict[str, Any] = {
    "route": {"receiver": "operator", "routes": [{"receiver": "operator-db", "matchers": ['service="db"']}]},
    "receivers": [{"name": "operator"}, {"name": "operator-db"}],
}


def rendered(given: dict[str, Any] = GIVEN, **more: Any) -> dict[str, Any]:
    return alertmanager_config(given, gateways=["http://192.0.2.29:8000"], **more)


def whole(part: dict[str, Any]) -> dict[str, Any]:
    """The operator's configuration with our part in it, as the role merges it."""
    config = deepcopy(OPERATORS)
    config["route"]["routes"].insert(0, part["route"])
    config["receivers"] += part["receivers"]
    config["inhibit_rules"] = part["inhibit_rules"]
    return config | {"templates": [str(TEMPLATE)]}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alertmanager") / "alertmanager.yml"
    path.write_text(yaml.safe_dump(whole(rendered()), sort_keys=False))
    return path


def routed(config: Path, labels: dict[str, str], receivers: list[str]) -> None:
    """amtool, and so Alertmanager's own code, takes these labels to these receivers."""
    words = [f"{name}={value}" for name, value in labels.items()]
    wanted = f"--verify.receivers={','.join(receivers)}"
    done = servers.check(servers.amtool(), "config", "routes", "test", f"--config.file={config}", wanted, *words)
    assert done.returncode == 0, (labels, done.stdout, done.stderr)


def test_amtool_takes_it(config: Path) -> None:
    done = servers.check(servers.amtool(), "check-config", config)
    assert done.returncode == 0, done.stderr
    assert "1 templates" in done.stdout


@pytest.mark.parametrize(
    "given", [{}, {"matrix": [], "channels": {}}, {k: v for k, v in GIVEN.items() if k != "copies"}]
)
def test_amtool_takes_less(given: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "alertmanager.yml"
    path.write_text(yaml.safe_dump(whole(alertmanager_config(given))))
    done = servers.check(servers.amtool(), "check-config", path)
    assert done.returncode == 0, done.stderr


def cell_of(team: str, severity: str) -> dict[str, Any] | None:
    cells = {(cell["team"], cell["severity"]): cell for cell in GIVEN["matrix"]}
    return cells.get((team, severity)) or cells.get(("*", severity))


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("team", TEAMS)
def test_every_cell_reaches_its_people(config: Path, team: str, severity: str) -> None:
    cell = cell_of(team, severity)
    for level in LEVELS:
        labels = {"suite": "citadel", "alertname": "A", "team": team, "severity": severity}
        labels |= {"escalation": level} if level else {}
        number = int(level or 1)
        if cell and number in {int(key) for key in cell["levels"]}:
            whose = "any" if cell["team"] == "*" else team
            routed(config, labels, ["citadel-feed", f"citadel-{whose}-{severity}-{number}"])
        elif number == 1:
            routed(config, labels, ["citadel-feed"])  # nobody is named, and still the live page shows it
        else:
            assert (cell is None) or str(number) not in next(
                rule["levels"] for rule in escalation_rules(GIVEN) if cell == cell_of(rule["team"], rule["severity"])
            )


def test_a_team_without_cells_of_its_own_gets_its_copies(tmp_path: Path) -> None:
    everyone = [
        {"team": "*", "severity": severity, "levels": {1: ["ops-chat"], 2: ["pager"]}} for severity in SEVERITIES
    ]
    path = tmp_path / "alertmanager.yml"
    made = alertmanager_config(GIVEN | {"matrix": everyone})
    path.write_text(yaml.safe_dump(whole(made)))
    labels = {"suite": "citadel", "alertname": "A", "severity": "warning"}
    routed(path, labels | {"team": "business"}, ["citadel-feed", "citadel-business-warning-1"])
    routed(path, labels | {"team": "business", "escalation": "2"}, ["citadel-feed", "citadel-business-warning-2"])
    routed(path, labels | {"team": "models"}, ["citadel-feed", "citadel-any-warning-1"])
    receivers = {receiver["name"]: receiver for receiver in made["receivers"]}
    assert receivers["citadel-business-warning-1"].keys() == {"name", "slack_configs", "email_configs"}
    assert receivers["citadel-business-warning-2"].keys() == {"name", "pagerduty_configs"}
    assert "business" not in str(receivers["citadel-any-warning-1"])


def test_the_watchdog_reaches_the_heartbeat_alone(config: Path) -> None:
    for team in TEAMS:
        labels = {"suite": "citadel", "alertname": "CitadelWatchdog", "severity": "info", "team": team}
        routed(config, labels, ["citadel-heartbeat"])


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        ({"alertname": "DiskFull", "severity": "critical", "team": "platform"}, "operator"),
        ({"alertname": "Watchdog"}, "operator"),
        ({"alertname": "Slow", "service": "db", "escalation": "2"}, "operator-db"),
        ({"alertname": "Slow", "suite": "other", "severity": "critical", "team": "platform"}, "operator"),
    ],
)
def test_what_is_not_ours_never_reaches_ours(config: Path, labels: dict[str, str], receiver: str) -> None:
    routed(config, labels, [receiver])


def test_our_alerts_never_reach_the_operators(config: Path) -> None:
    routed(config, {"suite": "citadel", "service": "db", "alertname": "A"}, ["citadel-feed"])


def test_a_receiver_has_the_channels_of_its_cell() -> None:
    by_name = {receiver["name"]: receiver for receiver in rendered()["receivers"]}
    assert by_name.keys() - {name for name in by_name if name.startswith("citadel-")} == set()
    second = by_name["citadel-platform-critical-2"]
    assert second.keys() == {"name", "pagerduty_configs", "email_configs"}
    assert second["email_configs"][0]["to"] == "ops@example.org, night@example.org"
    first = by_name["citadel-business-warning-1"]
    assert [mail["to"] for mail in first["email_configs"]] == ["business@example.org"]
    assert [mail["to"] for mail in by_name["citadel-business-critical-2"]["email_configs"]] == ["business@example.org"]
    assert by_name["citadel-feed"]["webhook_configs"] == [
        {
            "send_resolved": True,
            "url": "http://192.0.2.29:8000/v1/alerts",
            "http_config": {"authorization": {"credentials_file": "/etc/prometheus/citadel/gateway.key"}},
        }
    ]


def test_no_secret_stands_in_the_configuration() -> None:
    part = rendered(folder="/etc/other", gateway_ca_file="/etc/ca.crt")
    secrets = part.pop("secrets")
    assert "secret-" not in json.dumps(part)
    assert secrets == {
        "/etc/other/alertmanager/ops-chat.url": "https://hooks.example.org/T0/secret-slack",
        "/etc/other/alertmanager/pager.routing_key": "secret-routing",
        "/etc/other/alertmanager/smtp.password": "secret-smtp",
        "/etc/other/alertmanager/duty-manager.token": "secret-token",
        "/etc/other/alertmanager/heartbeat.token": "secret-beat",
    }
    assert part["templates"] == ["/etc/other/templates/citadel.tmpl"]


def test_secrets_may_be_files_already(tmp_path: Path) -> None:
    given = deepcopy(GIVEN)
    given["channels"]["ops-chat"] = {"kind": "slack", "url_file": "/run/slack", "ca_file": "/etc/ca.crt"}
    given["channels"]["pager"] = {
        "kind": "pagerduty",
        "routing_key_file": "/run/pager",
        "url": "http://pager.example.org/v2",
    }
    given["smtp"] = {"smarthost": "127.0.0.1:25", "from": "a@b", "require_tls": False, "hello": "h", "ca_file": "/ca"}
    given["channels"]["duty-manager"] = {"kind": "webhook", "url": "http://127.0.0.1:1/x"}
    given["heartbeat"] = {"url": "http://127.0.0.1:1/beat", "interval": 5}
    part = rendered(given)
    assert part["secrets"] == {}
    path = tmp_path / "alertmanager.yml"
    path.write_text(yaml.safe_dump(whole(part)))
    done = servers.check(servers.amtool(), "check-config", path)
    assert done.returncode == 0, done.stderr
    assert part["route"]["routes"][0]["group_interval"] == "5000ms"


def test_inhibitions_are_ours_alone() -> None:
    for given in (GIVEN, {**GIVEN, "inhibits": [{"source": "A", "targets": ["B", "C.*"], "equal": ["instance"]}]}):
        rules = rendered(given)["inhibit_rules"]
        assert len(rules) > 1
        for rule in rules:
            assert rule["source_matchers"][0] == rule["target_matchers"][0] == 'suite="citadel"'
    assert rules[1]["target_matchers"][1:] == ['alertname!="A"', 'alertname=~"B|C.*"']
    assert len(rendered({**GIVEN, "inhibits": []})["inhibit_rules"]) == 1


def test_the_escalator_goes_by_the_same_matrix() -> None:
    rules = {(rule["team"], rule["severity"]): rule["levels"] for rule in escalation_rules(GIVEN)}
    assert rules["platform", "critical"] == {"2": 900, "3": 2700}
    assert rules["models", "critical"] == {"2": 300, "3": 2700}
    assert rules["*", "critical"] == {"2": 900}
    assert rules["business", "warning"] == rules["platform", "info"] == {}


# --- texts -----------------------------------------------------------------------------------------------------------

ALERT = {
    "status": "firing",
    "labels": {"alertname": "LLMEngineDown", "severity": "critical", "team": "models", "model": "phi-3-mini"},
    "annotations": {"summary": "phi-3-mini is down", "runbook_url": "https://docs.example.org/runbooks/enginedown"},
}


def told(name: str, tmp_path: Path, alert: dict[str, Any] = ALERT, status: str = "firing") -> str:
    data = {
        "receiver": "r",
        "status": status,
        "alerts": [{**alert, "status": status}],
        "groupLabels": {"alertname": "LLMEngineDown"},
        "commonLabels": alert["labels"],
        "commonAnnotations": alert["annotations"],
        "externalURL": "http://am",
    }
    path = tmp_path / "data.json"
    path.write_text(json.dumps(data))
    call = f'{{{{ template "{name}" . }}}}'
    done = servers.check(
        servers.amtool(),
        "template",
        "render",
        f"--template.glob={TEMPLATE}",
        f"--template.text={call}",
        f"--template.data={path}",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_title_says_what_is_wrong_and_who_is_told(tmp_path: Path) -> None:
    assert told("citadel.title", tmp_path) == "[FIRING 1] critical, level 1: LLMEngineDown phi-3-mini"
    second = {**ALERT, "labels": {**ALERT["labels"], "escalation": "2", "instance": "hx"}}  # type: ignore[dict-item]  # labels are a mapping there
    assert told("citadel.title", tmp_path, second) == "[FIRING 1] critical, level 2: LLMEngineDown phi-3-mini on hx"
    assert told("citadel.title", tmp_path, status="resolved").startswith("[RESOLVED] critical")


def test_the_text_says_what_to_do(tmp_path: Path) -> None:
    text = told("citadel.text", tmp_path)
    assert text.splitlines()[:3] == [
        "phi-3-mini is down",
        "Severity critical, level 1, team models",
        "What to do: https://docs.example.org/runbooks/enginedown",
    ]
    assert 'comment begins with "ack"' in text
    assert told("citadel.text", tmp_path, status="resolved").startswith("Over: phi-3-mini is down")
    assert told("citadel.link", tmp_path) == "https://docs.example.org/runbooks/enginedown"
    bare = {"labels": {"alertname": "A"}, "annotations": {}}
    assert told("citadel.link", tmp_path, bare) == ""


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_is_good_has_no_problems() -> None:
    filters = FilterModule().filters()
    assert filters["citadel_alerting_problems"](GIVEN) == []
    assert filters["citadel_alertmanager_config"]({})["secrets"] == {}
    assert filters["citadel_escalation_rules"]({}) == []


def changed(path: str, value: Any) -> dict[str, Any]:
    """GIVEN with one value at a dotted path replaced; ``matrix.0`` is an entry of a list."""
    given: Any = deepcopy(GIVEN)
    here, names = given, path.split(".")
    for name in names[:-1]:
        here = here[int(name)] if isinstance(here, list) else here[name]
    last = names[-1]
    here[int(last) if isinstance(here, list) else last] = value
    return dict(given)


CELL = {"team": "platform", "severity": "critical"}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("recievers", {}, "platform_alerting has recievers, which is not known"),
        ("channels", [], "platform_alerting.channels is not a dict"),
        ("matrix", ["x"], "platform_alerting.matrix has an entry that is not a dictionary"),
        ("levels", {1: 5}, "platform_alerting.levels is {1: 5}: give seconds for the levels 2 and 3"),
        ("levels", {2: 0, 3: 5}, "level 2 comes after 0: give seconds"),
        ("levels", {3: 900}, "has level 2, and platform_alerting.levels no delay for it: add 2: SECONDS"),
        ("levels", {2: 900, 3: 600}, "level 3 comes after 600 s, level 2 after 900 s"),
        ("timing", {"group_wait": "10s"}, "timing: group_wait is '10s': give seconds"),
        ("group_by", ["a-b"], "group_by has a-b, which is no label"),
        ("heartbeat", {"url": "secret-x"}, "heartbeat: url (not shown, it may be a secret) is no address"),
        ("heartbeat", {"interval": 5}, "heartbeat: url (none) is no address"),
        ("heartbeat.intervall", 5, "heartbeat has intervall, which is not known"),
        ("heartbeat.interval", 0, "heartbeat: interval is 0: give seconds"),
        ("inhibits", [{"source": "A"}], "inhibits has {'source': 'A'}: give source (an alert), targets"),
        ("channels.Bad Name", {"kind": "webhook", "url": "http://h/"}, '"Bad Name" is no name'),
        ("channels.ops-chat.kind", "teams", "is of kind teams: take one of slack, pagerduty, email, webhook"),
        ("channels.ops-chat", "slack", "is str, not a dictionary: write kind"),
        ("channels.ops-chat.color", "red", "has color, which slack does not know"),
        ("channels.ops-chat.url_file", "/x", "has url and url_file: keep one of them"),
        ("channels.pager.routing_key", "", "has neither routing_key nor routing_key_file: put one into the vault"),
        ("channels.pager", {"kind": "pagerduty", "routing_key_file": "x"}, "routing_key_file is x: give a whole path"),
        ("channels.duty-manager.url", "", '"duty-manager" has no url'),
        ("channels.duty-manager.url", "http://a:b@h/", "without user and password"),
        ("channels.ops-mail.to", [], '"ops-mail" has no to'),
        ("smtp", {}, "smtp has no smarthost, and a channel sends e-mail"),
        ("smtp.tls", True, "smtp has tls, which is not known"),
        ("smtp.password", "", "smtp has neither password nor password_file"),
        ("matrix.1.team", "any", "the team is any: take lower-case letters"),
        ("matrix.1.severity", "fatal", "the severity is fatal: take one of critical, warning, info"),
        ("matrix.1.delay", 5, "has delay, which is not known: it has team, severity, levels, after"),
        ("matrix.1.levels", {0: ["pager"]}, "levels is {0: ['pager']}: give channels for 1"),
        ("matrix.1.levels", {1: ["pager"], 3: ["pager"]}, "has the levels 1, 3: leave none out"),
        ("matrix.1.levels", {1: []}, "level 1 has no channels"),
        ("matrix.1.levels", {1: ["chat"]}, 'level 1 names "chat", and platform_alerting.channels has ops-chat, pager'),
        ("matrix.1.after", {2: "5m"}, "after: level 2 comes after '5m': give seconds"),
        ("matrix.0", {**CELL, "levels": {1: ["pager"]}}, "matrix has platform critical more than once"),
        ("copies", {"Business Unit": []}, "copies: the team is Business Unit"),
        ("copies", {"business": ["chat"]}, 'copies, business names "chat", which is not in'),
    ],
)
def test_what_cannot_work_is_refused(path: str, value: Any, words: str) -> None:
    given = changed(path, value)
    problems = alerting_problems(given)
    assert any(words in problem for problem in problems), problems
    assert all(re.search(r"[.)]$", problem) for problem in problems)
    assert "secret-" not in " ".join(problems)
    with pytest.raises(AnsibleFilterError, match=r"monitoring_alerting"):
        alertmanager_config(given, variable="monitoring_alerting")
    with pytest.raises(AnsibleFilterError):
        escalation_rules(given)


def test_what_is_no_dictionary_is_refused() -> None:
    problems = FilterModule().filters()["citadel_alerting_problems"]([], "x_alerting")
    assert problems == ["x_alerting is []: write it as a dictionary with channels and matrix."]


def test_a_secret_address_is_not_told() -> None:
    assert "T0" not in " ".join(alerting_problems(changed("channels.ops-chat.url", "hooks.example.org/T0/x")))


# --- our own rules ---------------------------------------------------------------------------------------------------


def our_alerts() -> dict[str, set[str]]:
    """Every alert of files/monitoring/rules, with its severities."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "files/monitoring/rules").glob("*.yml"):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                if "alert" in rule:
                    found.setdefault(rule["alert"], set()).add(rule["labels"]["severity"])
    return found


def test_the_inhibitions_name_alerts_that_there_are() -> None:
    names = our_alerts()
    for entry in INHIBITS:
        assert "critical" in names[entry["source"]]
        for pattern in entry["targets"]:
            fitting = [name for name in names if re.fullmatch(pattern, name)]
            assert fitting, pattern


def test_there_is_a_watchdog() -> None:
    assert [name for name in our_alerts() if name.endswith("Watchdog")] == ["CitadelWatchdog"]

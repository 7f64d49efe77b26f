"""Who is told of which alert, and when: Alertmanager's route, receivers and inhibitions from the site's matrix.

Written for Alertmanager 0.25 and later. Nothing here needs its ``global`` section, which is the operator's. Secrets are
named by file wherever 0.25 can read them from one; the address of a webhook is the exception: a secret belongs into its
``token``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ansible.errors import AnsibleFilterError

Given = dict[str, Any]
OURS = 'suite="citadel"'
SEVERITIES = ("critical", "warning", "info")
NAME = re.compile(r"[a-z][a-z0-9_-]{0,40}")
LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
URL = re.compile(r"https?://[^\s/@]+(/\S*)?")
KEYS = {"levels", "timing", "group_by", "channels", "smtp", "matrix", "copies", "heartbeat", "inhibits"}
TIMING = {"group_wait": 10, "group_interval": 60, "repeat_interval": 14400}
# The setting that holds a channel's secret (or its file, with _file behind it), and what else a channel of a kind has.
CHANNELS: dict[str, tuple[str, set[str]]] = {
    "slack": ("url", {"channel", "ca_file"}),
    "pagerduty": ("routing_key", {"url", "ca_file"}),
    "email": ("", {"to"}),
    "webhook": ("token", {"url", "ca_file"}),
}
ADDRESS = "write http(s)://HOST[:PORT]/PATH"
HEARTBEAT = {"url", "interval", "token", "token_file", "ca_file"}
SMTP = {"smarthost", "from", "username", "password", "password_file", "require_tls", "hello", "ca_file"}
# Who is down is slow and silent too: one message is enough. That users are hurt (error budget) is told all the same.
SLOW = ["LLMLatency.*", "LLMQueue.*", "LLMThroughput.*", "LLMKVCache.*", "LLMEngineCanary.*", "LLMEngineMetricsAbsent"]
INHIBITS: list[Given] = [
    {"source": "LLMEngineDown", "targets": SLOW, "equal": ["model"]},
    {"source": "LLMModelNotServing", "targets": SLOW, "equal": ["model"]},
    {"source": "LLMGatewayDown", "targets": ["LLMGateway.*"], "equal": ["instance"]},
]


def levels_of(cell: Given) -> dict[int, list[str]]:
    """Channels by level; YAML and JSON differ in whether a level is a number."""
    return {int(level): list(names) for level, names in sorted((cell.get("levels") or {}).items(), key=str)}


def delays_of(given: Given, cell: Given) -> dict[int, float]:
    """Seconds without acknowledgement after which a level is told: the cell's own, else those of all."""
    delays = {int(level): seconds for level, seconds in (given.get("levels") or {}).items()}
    delays |= {int(level): seconds for level, seconds in (cell.get("after") or {}).items()}
    return {level: delays[level] for level in levels_of(cell) if level > 1 and level in delays}


# --- refusals --------------------------------------------------------------------------------------------------------


def a_level(value: Any) -> bool:
    return str(value) in {"1", "2", "3"}


def seconds(value: Any, least: float = 0) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > least


def delay_problems(where: str, delays: Any) -> Iterator[str]:
    if not isinstance(delays, dict) or not all(str(level) in {"2", "3"} for level in delays):
        yield f"{where} is {delays}: give seconds for the levels 2 and 3, as in {{2: 900, 3: 2700}}."
        return
    for level, value in delays.items():
        if not seconds(value):
            yield f"{where}: level {level} comes after {value!r}: give seconds, more than 0."


def secret_problems(where: str, setting: str, entry: Given, *, needed: bool) -> Iterator[str]:
    text, file = entry.get(setting), entry.get(f"{setting}_file")
    if text and file:
        yield f"{where} has {setting} and {setting}_file: keep one of them."
    elif needed and not text and not file:
        yield f"{where} has neither {setting} nor {setting}_file: put one into the vault."
    if file and not str(file).startswith("/"):
        yield f"{where}: {setting}_file is {file}: give a whole path on the metrics server."


def channel_problems(variable: str, given: Given) -> Iterator[str]:
    for name, channel in (given.get("channels") or {}).items():
        where = f'{variable}.channels "{name}"'
        if not NAME.fullmatch(str(name)):
            yield f"{where} is no name: take lower-case letters, digits, _ and -, a letter first."
        if not isinstance(channel, dict):
            yield f"{where} is {type(channel).__name__}, not a dictionary: write kind and what that kind needs."
            continue
        kind = channel.get("kind")
        if kind not in CHANNELS:
            yield f"{where} is of kind {kind}: take one of {', '.join(CHANNELS)}; others go through a webhook."
            continue
        secret, more = CHANNELS[kind]
        known = {"kind", *more, *([secret, f"{secret}_file"] if secret else [])}
        for key in sorted(channel.keys() - known):
            yield f"{where} has {key}, which {kind} does not know: it has {', '.join(sorted(known))}."
        if secret:
            yield from secret_problems(where, secret, channel, needed=kind != "webhook")
        if kind == "webhook" and not channel.get("url"):
            yield f"{where} has no url: say where it is to be posted."
        url = channel.get("url")
        if url and not URL.fullmatch(str(url)):
            yield f"{where}: url (not shown, it may be a secret) is no address: {ADDRESS}, without user and password."
        if kind == "email" and not channel.get("to"):
            yield f"{where} has no to: give an address, or a list of them."
    smtp = given.get("smtp") or {}
    if any(c.get("kind") == "email" for c in (given.get("channels") or {}).values() if isinstance(c, dict)):
        for key in ("smarthost", "from"):
            if not smtp.get(key):
                yield f"{variable}.smtp has no {key}, and a channel sends e-mail: set it (smarthost: HOST:PORT)."
    for key in sorted(smtp.keys() - SMTP):
        yield f"{variable}.smtp has {key}, which is not known: it has {', '.join(sorted(SMTP))}."
    yield from secret_problems(f"{variable}.smtp", "password", smtp, needed=bool(smtp.get("username")))


def cell_problems(variable: str, given: Given) -> Iterator[str]:
    channels = given.get("channels") or {}
    matrix = given.get("matrix") or []
    for cell in matrix:
        team, severity = cell.get("team"), cell.get("severity")
        where = f"{variable}.matrix, {team} {severity}"
        if team != "*" and (not NAME.fullmatch(str(team)) or team == "any"):
            yield f"{where}: the team is {team}: take lower-case letters, digits, _ and - (not any), or * for the rest."
        if severity not in SEVERITIES:
            yield f"{where}: the severity is {severity}: take one of {', '.join(SEVERITIES)}."
        for key in sorted(cell.keys() - {"team", "severity", "levels", "after"}):
            yield f"{where} has {key}, which is not known: it has team, severity, levels, after."
        levels = cell.get("levels")
        if not isinstance(levels, dict) or not levels or not all(map(a_level, levels)):
            yield f"{where}: levels is {levels}: give channels for 1, and for 2 and 3 as wanted."
            continue
        found = levels_of(cell)
        if sorted(found) != list(range(1, len(found) + 1)):
            yield f"{where} has the levels {', '.join(map(str, sorted(found)))}: leave none out, 1 first."
        for level, names in found.items():
            if not names:
                yield f"{where}, level {level} has no channels: name one, or leave the level out."
            for name in names:
                if name not in channels:
                    there = ", ".join(channels) or "none"
                    yield f'{where}, level {level} names "{name}", and {variable}.channels has {there}.'
        problems = list(delay_problems(f"{where}: after", cell.get("after") or {}))
        yield from problems
        if problems or list(delay_problems("", given.get("levels") or {})):
            continue
        delays = delays_of(given, cell)
        for level in found:
            if level > 1 and level not in delays:
                yield f"{where} has level {level}, and {variable}.levels no delay for it: add {level}: SECONDS."
        if len(delays) == 2 and delays[3] <= delays[2]:
            yield f"{where}: level 3 comes after {delays[3]} s, level 2 after {delays[2]} s: make the third the later."
    for (team, severity), count in Counter((cell.get("team"), cell.get("severity")) for cell in matrix).items():
        if count > 1:
            yield f"{variable}.matrix has {team} {severity} more than once: keep one."
    for team, names in (given.get("copies") or {}).items():
        if team != "*" and (not NAME.fullmatch(str(team)) or team == "any"):
            yield f"{variable}.copies: the team is {team}: take lower-case letters, digits, _ and - (not any), or *."
        for name in names:
            if name not in channels:
                yield f'{variable}.copies, {team} names "{name}", which is not in {variable}.channels.'


def other_problems(variable: str, given: Given) -> Iterator[str]:
    for key in sorted(given.keys() - KEYS):
        yield f"{variable} has {key}, which is not known: it has {', '.join(sorted(KEYS))}."
    yield from delay_problems(f"{variable}.levels", given.get("levels") or {})
    for key, value in (given.get("timing") or {}).items():
        if key not in TIMING or not seconds(value):
            yield f"{variable}.timing: {key} is {value!r}: give seconds for {', '.join(TIMING)}."
    for label in given.get("group_by") or []:
        if not LABEL.fullmatch(str(label)):
            yield f"{variable}.group_by has {label}, which is no label: take names such as alertname, model."
    heartbeat = given.get("heartbeat") or {}
    for key in sorted(heartbeat.keys() - HEARTBEAT):
        yield f"{variable}.heartbeat has {key}, which is not known: it has {', '.join(sorted(HEARTBEAT))}."
    if heartbeat and not URL.fullmatch(str(heartbeat.get("url"))):
        shown = "not shown, it may be a secret" if heartbeat.get("url") else "none"
        yield f"{variable}.heartbeat: url ({shown}) is no address: {ADDRESS}, or leave heartbeat out."
    if not seconds(heartbeat.get("interval", 60)):
        yield f"{variable}.heartbeat: interval is {heartbeat['interval']!r}: give seconds, more than 0."
    yield from secret_problems(f"{variable}.heartbeat", "token", heartbeat, needed=False)
    for entry in given.get("inhibits") or []:
        if not isinstance(entry, dict) or not entry.get("source") or not entry.get("targets"):
            yield f"{variable}.inhibits has {entry}: give source (an alert), targets (patterns) and equal (labels)."


def alerting_problems(given: Given, variable: str = "platform_alerting") -> list[str]:
    """One sentence each: variable, value, remedy; empty when Alertmanager can use what is given."""
    shape: dict[str, type] = dict.fromkeys(KEYS - {"group_by", "matrix", "inhibits"}, dict)
    shape |= dict.fromkeys(("group_by", "matrix", "inhibits"), list)
    if not isinstance(given, dict):
        return [f"{variable} is {given!r}: write it as a dictionary with channels and matrix."]
    odd = [key for key, kind in shape.items() if given.get(key) is not None and not isinstance(given[key], kind)]
    if odd:
        return [f"{variable}.{key} is not a {shape[key].__name__}: see docs/monitoring.md for its form." for key in odd]
    if not all(isinstance(cell, dict) for cell in given.get("matrix") or []):
        return [f"{variable}.matrix has an entry that is not a dictionary: write team, severity and levels."]
    checks = (other_problems, channel_problems, cell_problems)
    return [line for check in checks for line in check(variable, given)]


# --- rendering -------------------------------------------------------------------------------------------------------


class Secrets:
    """Collects secrets as files of the metrics server; what is a file already stays where it is."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}

    def file(self, name: str, setting: str, entry: Given) -> str:
        if entry.get(f"{setting}_file"):
            return str(entry[f"{setting}_file"])
        path = f"{self.folder}/{name}.{setting}"
        self.files[path] = str(entry[setting])
        return path


def http_config(secrets: Secrets, name: str, entry: Given) -> Given:
    config: Given = {}
    if entry.get("token") or entry.get("token_file"):
        config["authorization"] = {"credentials_file": secrets.file(name, "token", entry)}
    if entry.get("ca_file"):
        config["tls_config"] = {"ca_file": entry["ca_file"]}
    return {"http_config": config} if config else {}


def one_channel(secrets: Secrets, name: str, channel: Given, smtp: Given) -> Given:
    """What one channel adds to one of a receiver's lists."""
    entry: Given = {"send_resolved": True, **http_config(secrets, name, channel)}
    kind = channel["kind"]
    if kind == "slack":
        entry |= {"api_url_file": secrets.file(name, "url", channel), "title": '{{ template "citadel.title" . }}'}
        entry |= {"text": '{{ template "citadel.text" . }}', "fallback": '{{ template "citadel.title" . }}'}
        entry |= {"title_link": '{{ template "citadel.link" . }}'}
        entry |= {"channel": channel["channel"]} if channel.get("channel") else {}
    elif kind == "pagerduty":
        entry |= {"routing_key_file": secrets.file(name, "routing_key", channel)}
        entry |= {"description": '{{ template "citadel.title" . }}', "severity": "{{ .CommonLabels.severity }}"}
        entry |= {"details": {"text": '{{ template "citadel.text" . }}', "runbook": '{{ template "citadel.link" . }}'}}
        entry |= {"client": "Citadel LLM", "client_url": '{{ template "citadel.link" . }}'}
        entry |= {"url": channel["url"]} if channel.get("url") else {}
    elif kind == "webhook":
        entry |= {"url": channel["url"]}
    else:
        to = channel["to"]
        entry |= {"to": to if isinstance(to, str) else ", ".join(to), "from": smtp["from"]}
        entry |= {"smarthost": smtp["smarthost"], "require_tls": smtp.get("require_tls", True)}
        entry |= {"headers": {"Subject": '{{ template "citadel.title" . }}'}, "html": ""}
        entry |= {"text": '{{ template "citadel.text" . }}'}
        if smtp.get("username"):
            password = secrets.file("smtp", "password", smtp)
            entry |= {"auth_username": smtp["username"], "auth_password_file": password}
        entry |= {"hello": smtp["hello"]} if smtp.get("hello") else {}
        entry |= {"tls_config": {"ca_file": smtp["ca_file"]}} if smtp.get("ca_file") else {}
    return {f"{kind}_configs": entry}


def receiver(secrets: Secrets, given: Given, name: str, channels: list[str]) -> Given:
    made: Given = {"name": name}
    for channel in dict.fromkeys(channels):
        one = one_channel(secrets, channel, given["channels"][channel], given.get("smtp") or {})
        for key, entry in one.items():
            made.setdefault(key, []).append(entry)
    return made


def text(value: float) -> str:
    """A duration as Alertmanager writes it."""
    return f"{round(value * 1000)}ms"


def cells(given: Given, secrets: Secrets) -> Iterator[tuple[Given, Given]]:
    """A route and its receiver for each cell and level; those of a named team come before those of all others.

    A team that gets copies has the cells of ``*`` as its own where it has no other.
    """
    matrix = list(given.get("matrix") or [])
    own = {(cell["team"], cell["severity"]) for cell in matrix}
    matrix += [
        cell | {"team": team}
        for team in given.get("copies") or {}
        for cell in matrix
        if cell["team"] == "*" and (team, cell["severity"]) not in own
    ]
    for cell in sorted(matrix, key=lambda cell: cell["team"] == "*"):
        team, severity = cell["team"], cell["severity"]
        extra = (given.get("copies") or {}).get(team, [])
        for level, channels in levels_of(cell).items():
            name = f"citadel-{'any' if team == '*' else team}-{severity}-{level}"
            matchers = [f'severity="{severity}"', 'escalation=~"|1"' if level == 1 else f'escalation="{level}"']
            matchers = matchers if team == "*" else [f'team="{team}"', *matchers]
            names = channels + (extra if level == 1 else [])
            yield {"receiver": name, "matchers": matchers}, receiver(secrets, given, name, names)


def inhibit_rules(given: Given) -> list[Given]:
    rules = [
        {
            "source_matchers": [OURS, 'severity="critical"'],
            "target_matchers": [OURS, 'severity="warning"'],
            "equal": ["alertname", "model", "instance", "slo", "target"],
        }
    ]
    for entry in INHIBITS if given.get("inhibits") is None else given["inhibits"]:
        targets = "|".join(entry["targets"])
        rules.append(
            {
                "source_matchers": [OURS, f'alertname="{entry["source"]}"'],
                "target_matchers": [OURS, f'alertname!="{entry["source"]}"', f'alertname=~"{targets}"'],
                "equal": list(entry.get("equal") or ["model"]),
            }
        )
    return rules


def alertmanager_config(
    given: Given,
    gateways: list[str] | None = None,
    gateway_key_file: str = "/etc/prometheus/citadel/gateway.key",
    folder: str = "/etc/prometheus/citadel",
    gateway_ca_file: str = "",
    variable: str = "platform_alerting",
) -> Given:
    """Our part of ``alertmanager.yml``: ``route`` (one child of the operator's), ``receivers``, ``inhibit_rules``,
    ``templates``; and ``secrets``, the text of each file below ``folder``/alertmanager that the receivers name.

    ``gateways``: base addresses; each one's alert feed is told of every alert at every level, the heartbeat excepted.
    """
    if problems := alerting_problems(given, variable):
        raise AnsibleFilterError("\n".join(problems))
    secrets = Secrets(f"{folder}/alertmanager")
    timing = TIMING | (given.get("timing") or {})
    feed = {"token_file": gateway_key_file, "ca_file": gateway_ca_file}
    told = [
        {"send_resolved": True, "url": f"{url.rstrip('/')}/v1/alerts", **http_config(secrets, "gateway", feed)}
        for url in gateways or []
    ]
    heartbeat = given.get("heartbeat") or {}
    beats = {"send_resolved": False, "url": heartbeat.get("url"), **http_config(secrets, "heartbeat", heartbeat)}
    every = heartbeat.get("interval", 60)
    made = list(cells(given, secrets))
    return {
        "route": {
            "receiver": "citadel-feed",
            "matchers": [OURS],
            "group_by": list(given.get("group_by") or ["alertname", "model", "instance"]),
            **{key: text(value) for key, value in timing.items()},
            "routes": [
                {
                    "receiver": "citadel-heartbeat",
                    "matchers": ['alertname=~".*Watchdog"'],
                    "group_wait": "0s",
                    "group_interval": text(every),
                    "repeat_interval": text(every * 0.9),  # the full time is not quite over at the next flush
                },
                # Everything, and then on to the cell; a page that shows alerts need not wait for a group to be whole.
                {"receiver": "citadel-feed", "continue": True, "group_wait": "1s", "group_interval": "5s"},
                *(route for route, _ in made),
            ],
        },
        "receivers": [
            {"name": "citadel-feed", **({"webhook_configs": told} if told else {})},
            {"name": "citadel-heartbeat", **({"webhook_configs": [beats]} if heartbeat else {})},
            *(receiver for _, receiver in made),
        ],
        "inhibit_rules": inhibit_rules(given),
        "templates": [f"{folder}/templates/citadel.tmpl"],
        "secrets": secrets.files,
    }


def escalation_rules(given: Given, variable: str = "platform_alerting") -> list[Given]:
    """What the escalator goes by: for each cell the seconds after which level 2 and 3 are told.

    A cell without them stands there too, empty: else the cell of all other teams would count for it.
    """
    if problems := alerting_problems(given, variable):
        raise AnsibleFilterError("\n".join(problems))
    return [
        {
            "team": cell["team"],
            "severity": cell["severity"],
            "levels": {str(level): delay for level, delay in delays_of(given, cell).items()},
        }
        for cell in given.get("matrix") or []
    ]


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Any]:
        return {
            "citadel_alerting_problems": alerting_problems,
            "citadel_alertmanager_config": alertmanager_config,
            "citadel_escalation_rules": escalation_rules,
        }

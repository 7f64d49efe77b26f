"""The operator's Prometheus, Alertmanager and Grafana know everything that the servers do, and tell somebody."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx2
import pytest

from .conftest import MODELS, URL, Lab, engine

METRICS = "http://10.77.0.37"
PROMETHEUS, ALERTMANAGER, GRAFANA = f"{METRICS}:9090", f"{METRICS}:9093", f"{METRICS}:3000"
SINKS = f"{METRICS}:3100"
STAND_IN_TOKEN = "glsa_stand_in_of_the_lab"
JOBS = {
    "citadel-gateway": 1,
    "citadel-engine": len(MODELS),
    "citadel-node": 2,
    "citadel-redis": 1,
    "citadel-postgres": 1,
    "citadel-predictor": 1,
    "citadel-escalator": 1,
    "citadel-prometheus": 1,
    "citadel-alertmanager": 1,
}
DASHBOARDS = {"citadel-operations", "citadel-business", "citadel-realtime", "citadel-quality", "citadel-cost"}
STOPPED = "phi-3-mini"
ALERT = "LLMEngineDown"
AUTHOR = "the end-to-end tests"
LEVEL_3 = 45  # seconds: platform_alerting of the lab


@pytest.fixture(scope="module")
def get() -> Callable[..., Any]:
    """JSON of an address of the metrics server."""

    def ask(url: str, method: str = "GET", headers: dict[str, str] | None = None, **options: Any) -> Any:
        reply = httpx2.request(method, url, headers=headers, trust_env=False, timeout=20, **options)
        assert reply.status_code < 300, f"{method} {url}: {reply.status_code} {reply.text[:300]}"
        return reply.json()

    return ask


def query(get: Callable[..., Any], expression: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = get(f"{PROMETHEUS}/api/v1/query", params={"query": expression})["data"]["result"]
    return found


def told(get: Callable[..., Any], sink: str, *words: str) -> list[str]:
    """What a receiver got, as text, so far as it has all of these words."""
    texts = [str(one["body"]) for one in get(f"{SINKS}/received") if one["sink"] == sink]
    return [text for text in texts if all(word in text for word in words)]


def test_every_target_is_up(lab: Lab, get: Callable[..., Any]) -> None:
    def up() -> dict[str, int]:
        found = query(get, 'sum by (job) (up{job=~"citadel-.*"})')
        return {one["metric"]["job"]: int(float(one["value"][1])) for one in found}

    lab.wait_until(f"all of {JOBS} are up", lambda: up() == JOBS, 120)


def test_every_rule_is_loaded_and_healthy(get: Callable[..., Any]) -> None:
    groups = get(f"{PROMETHEUS}/api/v1/rules")["data"]["groups"]
    ours = [rule for group in groups if "/citadel/" in group["file"] for rule in group["rules"]]
    assert len([rule for rule in ours if rule["type"] == "alerting"]) >= 30
    assert [(rule["name"], rule.get("lastError")) for rule in ours if rule["health"] == "err"] == []


def test_traffic_is_seen_by_the_recorded_series(lab: Lab, get: Callable[..., Any]) -> None:
    """Asked again and again: the first request makes a counter, and only further ones a rate."""

    def has_all(name: str) -> bool:
        assert all(lab.generates(model) for model in MODELS)
        return {one["metric"].get("model", "") for one in query(get, f"{name} > 0")} >= set(MODELS)

    for name in ("model:llm_gateway_requests:rate5m", "model:citadel_unit_memory_bytes:sum"):
        lab.wait_until(f"{name} has every model", partial(has_all, name), 180, pause=5)
    lab.wait_until("the engines count", lambda: bool(query(get, "model:llm_engine_generation_tokens:rate5m > 0")), 120)


def test_the_watchdog_barks(lab: Lab, get: Callable[..., Any]) -> None:
    lab.wait_until("the heartbeat arrives", lambda: bool(told(get, "webhook/heartbeat", "Watchdog")), 180)


def test_grafana_has_the_dashboards(get: Callable[..., Any]) -> None:
    headers = {"Authorization": f"Bearer {STAND_IN_TOKEN}"}
    found = get(f"{GRAFANA}/api/search?type=dash-db", headers=headers)
    assert {one["uid"] for one in found if one.get("folderUid") == "citadel"} == DASHBOARDS


def test_the_predictor_has_done_a_round(lab: Lab, get: Callable[..., Any]) -> None:
    lab.wait_until(
        "a round of the predictor", lambda: bool(query(get, 'llm_predictor_cycles_total{outcome="complete"} > 0')), 180
    )


@pytest.fixture(scope="class")
def told_at(lab: Lab, get: Callable[..., Any]) -> Iterator[float]:
    """When level 1 was told, on this process's clock. The model stays stopped for all tests of the class."""
    get(f"{SINKS}/received", "DELETE")
    lab.ssh(f"systemctl stop {engine(STOPPED)}", timeout=180)
    try:
        lab.wait_until("level 1 is told", lambda: bool(told(get, "slack", ALERT, STOPPED)), 300)
        yield time.monotonic()
    finally:
        lab.ssh(f"systemctl start {engine(STOPPED)}", timeout=600)
        for silence in get(f"{ALERTMANAGER}/api/v2/silences"):
            if silence["createdBy"] == AUTHOR:
                httpx2.delete(f"{ALERTMANAGER}/api/v2/silence/{silence['id']}", trust_env=False, timeout=20)


class TestAStoppedModel:
    """Level 1, level 2, a runbook that opens, the gateway's own feed; after an acknowledgement no level 3."""

    def test_it_is_told_and_escalated(self, lab: Lab, get: Callable[..., Any], told_at: float) -> None:
        del told_at
        check_runbook(get)
        check_feed(lab, get)
        for sink in ("pagerduty", "mail"):
            lab.wait_until(f"level 2 is told: {sink}", partial(told, get, sink, ALERT, STOPPED), 120)
        acknowledge(get)

    def test_validate_names_it(self, lab: Lab, told_at: float) -> None:
        del told_at
        output = lab.run("make", "validate", "INVENTORY=inventory/lab", timeout=300, check=False)
        assert f"{engine(STOPPED)} is inactive" in output
        assert "hermes-2" not in output, output[-3000:]

    def test_acknowledged_it_is_told_no_further(self, lab: Lab, get: Callable[..., Any], told_at: float) -> None:
        lab.wait_until("level 3 would be due", lambda: time.monotonic() - told_at > LEVEL_3 + 15, LEVEL_3 + 20)
        assert told(get, "webhook/duty-manager", ALERT, STOPPED) == []
        assert len(told(get, "pagerduty", ALERT, STOPPED, "trigger")) == 1, "told twice"


def test_its_alert_is_over_when_it_runs_again(lab: Lab, get: Callable[..., Any]) -> None:
    lab.wait_until("the alert is over", lambda: not firing(get), 240)


def firing(get: Callable[..., Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = get(f"{ALERTMANAGER}/api/v2/alerts", params={"filter": f"alertname={ALERT}"})
    return [alert for alert in found if alert["labels"].get("model") == STOPPED]


def check_runbook(get: Callable[..., Any]) -> None:
    link = firing(get)[0]["annotations"]["runbook_url"]
    page = httpx2.get(link, trust_env=False, timeout=20)
    assert page.status_code == 200, link
    assert "How to know that it is over" in page.text


def check_feed(lab: Lab, get: Callable[..., Any]) -> None:
    """What /live shows comes from here."""

    def shown() -> bool:
        alerts = get(f"{URL}/v1/alerts?status=firing", headers={"Authorization": f"Bearer {lab.key}"})["alerts"]
        return any(one["labels"].get("alertname") == ALERT and one["labels"].get("model") == STOPPED for one in alerts)

    lab.wait_until("the gateway's feed has it", shown, 60)


def acknowledge(get: Callable[..., Any]) -> None:
    now = time.time()
    stamp = "%Y-%m-%dT%H:%M:%S.000Z"
    labels = {"alertname": ALERT, "model": STOPPED}
    body = {
        "matchers": [
            {"name": name, "value": value, "isRegex": False, "isEqual": True} for name, value in labels.items()
        ],
        "startsAt": time.strftime(stamp, time.gmtime(now - 5)),
        "endsAt": time.strftime(stamp, time.gmtime(now + 1800)),
        "createdBy": AUTHOR,
        "comment": "ack: seen",
    }
    get(f"{ALERTMANAGER}/api/v2/silences", "POST", json=body)

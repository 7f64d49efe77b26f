"""A second gateway with a replica of one model: the same users, limits and books; no stream cut while both restart."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from .conftest import HOST, MODELS, URL, Lab, all_say
from .test_25_people import ask

SECOND = "hx-llm-server-02"
SECOND_URL = "http://10.77.0.31:8000"
BOTH = ("-i", "lab/second.yml")


@pytest.fixture(scope="module", autouse=True)
def second(lab: Lab) -> Iterator[None]:
    """The second host, and the first one knowing of it; afterwards the first one alone again."""
    lab.run("lab/lab", "up", SECOND, timeout=1200)
    lab.play("playbooks/site.yml", *BOTH, "--limit", SECOND)
    lab.play("playbooks/gateway.yml", *BOTH)
    yield
    lab.run("lab/lab", "down", SECOND)
    lab.play("playbooks/gateway.yml")


def test_every_model_is_served_by_both(lab: Lab) -> None:
    for url in (URL, SECOND_URL):
        for model in MODELS:
            reply = ask(lab.key, url=url, model=model)
            assert reply.status_code == 200, f"{url} {model}: {reply.text}"


def test_a_limit_holds_across_both(lab: Lab) -> None:
    with lab.user("e2e-both", "basic") as key:
        lab.wait_until("the key opens there too", lambda: all_say(200, key, SECOND_URL), 2, pause=0.1)
        statuses = [ask(key, url=(URL, SECOND_URL)[number % 2]).status_code for number in range(16)]
        assert statuses == [200] * 10 + [429] * 6


def test_a_revoked_key_is_closed_on_both(lab: Lab) -> None:
    key = lab.gateway("keys create --user somebody --new-user --id e2e-both-revoked")
    lab.wait_until("it opens there", lambda: all_say(200, key, SECOND_URL), 2, pause=0.1)
    lab.gateway("keys revoke e2e-both-revoked", host=SECOND)
    lab.wait_until("it is closed on both", lambda: all_say(401, key, URL, SECOND_URL), 2, pause=0.1)


def test_a_replica_takes_over_and_is_billed_once(lab: Lab) -> None:
    """The first host's own engine rests: the second's answers, and the request is in the books of the first alone."""
    lab.ssh("systemctl stop citadel-llm@phi-3-mini.service", timeout=180)
    try:
        reply = ask(lab.key, tokens=7)
        assert reply.status_code == 200, reply.text
        name = reply.headers["x-request-id"]

        def entries() -> list[dict[str, object]]:
            rows = json.loads(lab.gateway("ledger list --limit 50 --format json"))["data"]
            return [row for row in rows if name in {row.get("request_id"), row.get("id")}]

        lab.wait_until("the request is in the ledger", lambda: len(entries()) > 0, 10)
        time.sleep(2)
        assert [row["host"] for row in entries()] == [HOST]
    finally:
        lab.ssh("systemctl start citadel-llm@phi-3-mini.service", timeout=600)


def test_rolling_restart_of_both_cuts_no_stream(lab: Lab) -> None:
    stop = threading.Event()
    ends: Counter[str] = Counter()

    def client(number: int) -> None:
        body = {"model": "phi-3-mini", "prompt": "x", "max_tokens": 100, "ignore_eos": True, "stream": True}
        url = (URL, SECOND_URL)[number % 2]
        headers = {"Authorization": f"Bearer {lab.key}"}
        while not stop.is_set():
            # A connection each: one that is kept may be closed by a worker that ends just when it is used again.
            try:
                with (
                    httpx2.Client(timeout=120, trust_env=False, headers=headers) as http,
                    http.stream("POST", f"{url}/v1/completions", json=body) as reply,
                ):
                    text = "".join(reply.iter_text())
                    whole = reply.status_code == 200 and text.rstrip().endswith("data: [DONE]")
                    ends["whole" if whole and '"error"' not in text else f"{reply.status_code}: {text[-200:]}"] += 1
            except httpx2.HTTPError as error:
                ends[repr(error)] += 1

    with ThreadPoolExecutor(12) as pool:
        clients = [pool.submit(client, number) for number in range(12)]
        try:
            time.sleep(2)
            lab.play("playbooks/ops/gateway_restart.yml", *BOTH)
            time.sleep(2)
        finally:
            stop.set()
        for one in clients:
            one.result()
    assert set(ends) == {"whole"}, ends
    lab.wait_until(
        "the books of both are right",
        lambda: all(
            lab.gateway("ledger check --journal; echo status $?", host=host, check=False).endswith("status 0")
            for host in (HOST, SECOND)
        ),
        30,
    )

"""What the gateway stands on goes away under load: Redis, a worker, the control process, the SQL server."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx2

from .conftest import URL, Lab

BODY = {"model": "phi-3-mini", "prompt": "x", "max_tokens": 20, "ignore_eos": True, "stream": True}


def under_load(lab: Lab, disturb: Callable[[], object], seconds: float = 8) -> Counter[str]:
    """How the requests of eight clients ended while something was done to the gateway."""
    stop = threading.Event()
    ends: Counter[str] = Counter()

    def client(_: int) -> None:
        headers = {"Authorization": f"Bearer {lab.key}"}
        while not stop.is_set():
            try:
                with (
                    httpx2.Client(timeout=60, trust_env=False, headers=headers) as http,
                    http.stream("POST", f"{URL}/v1/completions", json=BODY) as reply,
                ):
                    text = "".join(reply.iter_text())
                    whole = text.rstrip().endswith("data: [DONE]")
                    ends["whole" if reply.status_code == 200 and whole else str(reply.status_code)] += 1
            except httpx2.HTTPError:
                ends["cut"] += 1

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, number) for number in range(8)]
        try:
            time.sleep(2)
            disturb()
            time.sleep(seconds)
        finally:
            stop.set()
        for one in clients:
            one.result()
    return ends


def settled(lab: Lab) -> bool:
    return "1" not in lab.gateway("ledger check --journal; echo status $?", check=False).rpartition("status ")[2]


def test_redis_restarts_under_load(lab: Lab) -> None:
    """Limits fail open: nobody is refused, and afterwards they are counted again."""
    ends = under_load(lab, lambda: lab.ssh("systemctl restart redis-server"))
    assert set(ends) == {"whole"}, ends
    lab.wait_until("the books are right", lambda: settled(lab), 30)


def test_a_killed_worker_loses_no_request_in_the_books(lab: Lab) -> None:
    """What it was doing is cut; it is settled once, by what its journal knows, and nothing else is touched."""
    ends = under_load(lab, lambda: lab.ssh("systemctl kill --signal=KILL --kill-whom=main citadel-gateway@1.service"))
    assert ends["whole"] > ends["cut"] >= 0, ends
    assert set(ends) <= {"whole", "cut", "200"}, ends
    lab.wait_until("the worker is back", lambda: lab.show("citadel-gateway@1.service", "ActiveState") == "active", 30)
    lab.wait_until("the books are right", lambda: settled(lab), 60)


def test_the_sql_server_and_the_control_process_are_not_on_the_way(lab: Lab) -> None:
    def disturb() -> None:
        lab.ssh("systemctl stop postgresql", host="hx-sql-01")
        lab.ssh("systemctl kill --signal=KILL citadel-gateway-control.service")

    try:
        ends = under_load(lab, disturb)
    finally:
        lab.ssh("systemctl start postgresql", host="hx-sql-01")
    assert set(ends) == {"whole"}, ends
    lab.wait_until("the books are right", lambda: settled(lab), 60)

"""Only the gateway reaches the engines."""

import json
import subprocess
import sys
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from urllib.parse import urlsplit

import httpx2
import pytest

from .conftest import HOST, MODELS, URL, Lab, engine

FETCH = "import sys,urllib.request as u; print(u.build_opener(u.ProxyHandler({})).open(sys.argv[1], timeout=5).status)"


def port_of(lab: Lab, model: str) -> int:
    stored = json.loads(lab.ssh("cat /etc/citadel-gateway/models.json"))
    return next(int(m["backends"][0]["port"]) for m in stored["models"] if m["name"] == model)


@pytest.mark.parametrize("user", ["nobody", "root"])
def test_other_users_of_the_host_are_refused(lab: Lab, user: str) -> None:
    for model in MODELS:
        out = lab.ssh(
            f"runuser -u {user} -- python3 -c '{FETCH}' http://127.0.0.1:{port_of(lab, model)}/health", check=False
        )
        assert "refused" in out, f"{user} reached {model}: {out}"


def test_engines_do_not_listen_outside(lab: Lab) -> None:
    for model in MODELS:
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"http://10.77.0.29:{port_of(lab, model)}/health", trust_env=False)


def test_unit_is_hardened(lab: Lab) -> None:
    for unit in (engine("phi-3-mini"), "citadel-gateway@1.service", "citadel-gateway-control.service"):
        last = lab.ssh(f"systemd-analyze security --no-pager '{unit}' | tail -n 1")
        assert float(last.rpartition(": ")[2].split()[0]) <= 1.5, last


def test_full_queue_is_503_with_retry_after(lab: Lab) -> None:
    """More requests than the engine's queue holds: those too many are told to come back, the others are answered."""
    # 8 at a time, 64 wait at each of the two workers. All are sent before one is read, on connections that are open
    # already: with a thread for each, on a busy machine, the first had been served before the last came.
    body = json.dumps({"model": "openchat-3.5", "prompt": "x", "max_tokens": 400, "ignore_eos": True})
    headers = {"Authorization": f"Bearer {lab.key}", "Content-Type": "application/json"}
    with ExitStack() as stack:
        connections = [
            stack.enter_context(closing(HTTPConnection(urlsplit(URL).netloc, timeout=180))) for _ in range(200)
        ]
        for connection in connections:
            connection.connect()
        for connection in connections:
            connection.request("POST", "/v1/completions", body, headers)
        replies = [connection.getresponse() for connection in connections]
        statuses = {reply.status for reply in replies}
        assert statuses == {200, 503}, statuses
        refused = [reply for reply in replies if reply.status == 503]
        assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
        assert all(json.loads(reply.read())["error"]["message"] for reply in refused)


def test_the_lab_has_no_way_out() -> None:
    """The network of the lab ends at the lab: a route to anywhere else does not exist."""
    done = subprocess.run(["ip", "route", "get", "192.0.2.1"], text=True, capture_output=True, check=False)
    assert done.returncode != 0, f"{HOST} and {sys.executable} see {done.stdout}"

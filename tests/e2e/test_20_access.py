"""Only the gateway reaches the engines."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

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
    # 8 at a time, 64 wait; long enough that none ends before the last has come
    body = {"model": "openchat-3.5", "prompt": "x", "max_tokens": 200, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {lab.key}"}
    limits = httpx2.Limits(max_connections=120)
    with (
        httpx2.Client(timeout=180, trust_env=False, headers=headers, limits=limits) as client,
        ThreadPoolExecutor(120) as pool,
    ):
        replies = list(pool.map(lambda _: client.post(f"{URL}/v1/completions", json=body), range(120)))
    statuses = {reply.status_code for reply in replies}
    assert statuses == {200, 503}, statuses
    refused = [reply for reply in replies if reply.status_code == 503]
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    assert all(reply.json()["error"]["message"] for reply in refused)


def test_the_lab_has_no_way_out() -> None:
    """The network of the lab ends at the lab: a route to anywhere else does not exist."""
    done = subprocess.run(["ip", "route", "get", "192.0.2.1"], text=True, capture_output=True, check=False)
    assert done.returncode != 0, f"{HOST} and {sys.executable} see {done.stdout}"

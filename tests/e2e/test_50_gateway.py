"""An upgrade of the gateway under 50 open streams cuts none and refuses none."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2

from .conftest import REPO, URL, Lab

STREAMS = 50
VERSION_FILE = REPO / "gateway" / "src" / "citadel_gateway" / "__init__.py"


def test_upgrade_under_open_streams(lab: Lab) -> None:
    before = {unit: lab.show(unit, "MainPID") for unit in ("citadel-gateway@1.service", "citadel-gateway@2.service")}
    # as many for each model as it has slots for, so that none waits or is sent away
    models = ("phi-3-mini", "phi-3-mini", "phi-3-mini", "mixtral-8x7b", "hermes-2")
    body = {"prompt": "x", "max_tokens": 700, "stream": True, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {lab.key}"}
    opened = threading.Semaphore(0)
    stop = threading.Event()

    def stream(number: int) -> str:
        asked = {**body, "model": models[number % len(models)]}
        with (
            httpx2.Client(timeout=300, trust_env=False, headers=headers) as client,
            client.stream("POST", f"{URL}/v1/completions", json=asked) as reply,
        ):
            opened.release()
            if reply.status_code != 200:
                return f"status {reply.status_code}"
            return "whole" if "".join(reply.iter_text()).rstrip().endswith("data: [DONE]") else "cut"

    def knock() -> list[str]:
        """New connections all the while."""
        failed = []
        while not stop.is_set():
            try:
                if (status := httpx2.get(f"{URL}/healthz", trust_env=False, timeout=10).status_code) != 200:
                    failed.append(str(status))
            except httpx2.HTTPError as error:
                failed.append(repr(error))
            stop.wait(0.05)
        return failed

    source = VERSION_FILE.read_text()
    with ThreadPoolExecutor(STREAMS + 1) as pool:
        streams = [pool.submit(stream, n) for n in range(STREAMS)]
        for _ in range(STREAMS):
            assert opened.acquire(timeout=120)
        knocking = pool.submit(knock)
        try:
            VERSION_FILE.write_text(source + "# another build\n")
            lab.play("playbooks/gateway.yml")
            ends = [one.result() for one in streams]
        finally:
            stop.set()
            VERSION_FILE.write_text(source)
    assert ends == ["whole"] * STREAMS
    assert knocking.result() == []
    after = {unit: lab.show(unit, "MainPID") for unit in before}
    assert all(before[unit] != after[unit] for unit in before), "the workers were not replaced"


def test_going_back_is_the_same(lab: Lab) -> None:
    """The old build again: its release is still on the host."""
    releases = lab.ssh("ls -d /opt/citadel/envs/gateway-*").split()
    lab.play("playbooks/gateway.yml")
    assert set(lab.ssh("ls -d /opt/citadel/envs/gateway-*").split()) <= set(releases)
    assert httpx2.get(f"{URL}/healthz", trust_env=False).status_code == 200

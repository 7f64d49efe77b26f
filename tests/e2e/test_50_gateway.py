"""An upgrade of the gateway under 50 open streams cuts none and refuses none."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2

from .conftest import REPO, URL, Lab

STREAMS = 50
RELEASE = "readlink /opt/citadel/gateway-env"
VERSION_FILE = REPO / "gateway" / "src" / "citadel_gateway" / "__init__.py"


def test_upgrade_under_open_streams(lab: Lab) -> None:
    before = {unit: lab.show(unit, "MainPID") for unit in ("citadel-gateway@1.service", "citadel-gateway@2.service")}
    # fewer for each model than it has slots for, so that none waits or is sent away
    models = ("phi-3-mini", "phi-3-mini", "mixtral-8x7b", "hermes-2")
    # connections fall on either worker, and one may have heard a moment ago that a model is back from a drain
    lab.wait_until("each worker serves each model", lambda: all(map(lab.generates, models * 4)), 60)
    body = {"prompt": "x", "max_tokens": 300, "stream": True, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {lab.key}"}
    opened = threading.Semaphore(0)
    stop = threading.Event()

    def stream(asked: dict[str, object]) -> str:
        with (
            httpx2.Client(timeout=300, trust_env=False, headers=headers) as client,
            client.stream("POST", f"{URL}/v1/completions", json=asked) as reply,
        ):
            opened.release()
            text = "".join(reply.iter_text())
        if reply.status_code != 200:
            return f"{asked['model']}: {reply.status_code} {text}"
        return "whole" if text.rstrip().endswith("data: [DONE]") else f"{asked['model']}: cut after {text[-200:]}"

    def streams(number: int) -> list[str]:
        """One after the other, as long as workers are being replaced."""
        asked = {**body, "model": models[number % len(models)]}
        ends = [stream(asked)]
        while not stop.is_set() and ends[-1] == "whole":
            ends.append(stream(asked))
        return ends

    def knock() -> list[str]:
        """New connections all the while. Waiting is no failure: in the lab the engines' load and this test's share two
        cores, and an answer has been seen to take eleven seconds."""
        failed = []
        while not stop.is_set():
            try:
                if (status := httpx2.get(f"{URL}/healthz", trust_env=False, timeout=120).status_code) != 200:
                    failed.append(str(status))
            except httpx2.HTTPError as error:
                failed.append(repr(error))
            stop.wait(0.05)
        return failed

    source = VERSION_FILE.read_text()
    release = lab.ssh(RELEASE)
    with ThreadPoolExecutor(STREAMS + 1) as pool:
        try:
            VERSION_FILE.write_text(f"{source}# built {time.time()}\n")
            # compiling takes a minute of this machine; what is installed runs once its workers are replaced
            lab.play("playbooks/gateway.yml", "--tags", "python_env_install,gateway_install")
            assert lab.ssh(RELEASE) != release
            assert before == {unit: lab.show(unit, "MainPID") for unit in before}
            running = [pool.submit(streams, n) for n in range(STREAMS)]
            knocking = pool.submit(knock)
            for _ in range(STREAMS):
                assert opened.acquire(timeout=240), [one.result() for one in running if one.done()]
            lab.play("playbooks/gateway.yml", "--tags", "gateway_run")
        finally:
            stop.set()
            VERSION_FILE.write_text(source)
    ends = [end for one in running for end in one.result()]
    assert [end for end in ends if end != "whole"] == []
    assert knocking.result() == []
    after = {unit: lab.show(unit, "MainPID") for unit in before}
    assert all(before[unit] != after[unit] for unit in before), "the workers were not replaced"


def test_going_back_is_the_same(lab: Lab) -> None:
    """The old build again: its release is still on the host."""
    releases = lab.ssh("ls -d /opt/citadel/envs/gateway-*").split()
    lab.play("playbooks/gateway.yml")
    assert set(lab.ssh("ls -d /opt/citadel/envs/gateway-*").split()) <= set(releases)
    assert httpx2.get(f"{URL}/healthz", trust_env=False).status_code == 200

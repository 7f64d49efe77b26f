"""Processes that die or freeze: the unit comes back, and nothing of the old generation is left."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from .conftest import MODELS, URL, Lab, engine

BACK_SECONDS = 420
VICTIMS = {"mixtral-8x7b": "EngineCore", "hermes-2": "Worker", "openchat-3.5": "api_server"}
FROZEN = "phi-3-mini"


def processes(lab: Lab, model: str) -> dict[int, str]:
    """pid -> command line of everything in the unit's control group."""
    group = lab.show(engine(model), "ControlGroup")
    files = f"/sys/fs/cgroup/systemd{group}/cgroup.procs /sys/fs/cgroup{group}/cgroup.procs"
    lines = lab.ssh(
        f"for p in $(cat {files} 2>/dev/null | sort -u);"
        " do echo $p $(tr '\\0' ' ' < /proc/$p/cmdline) $(cat /proc/$p/comm); done"
    ).splitlines()
    return {int(pid): words for pid, _, words in (line.partition(" ") for line in lines)}


def one(found: dict[int, str], word: str) -> int:
    """The process of that kind: vLLM names its core and workers in their titles, the API server by its module."""
    matching = [pid for pid, words in found.items() if word in words and "citadel-engine" not in words]
    assert matching, f"no {word} among {found}"
    return matching[0]


@pytest.fixture(scope="module")
def killed(lab: Lab) -> dict[str, dict[int, str]]:
    """A part of each of three engines is killed, and a worker of the fourth is frozen; what ran before is returned."""
    before = {model: processes(lab, model) for model in MODELS}
    for model, word in VICTIMS.items():
        lab.ssh(f"kill -9 {one(before[model], word)}")
    lab.ssh(f"kill -STOP {one(before[FROZEN], 'Worker')}")
    return before


@pytest.mark.parametrize("model", [*VICTIMS, FROZEN])
def test_engine_comes_back_whole(lab: Lab, killed: dict[str, dict[int, str]], model: str) -> None:
    lab.wait_until(
        f"{model} was restarted", lambda: not set(killed[model]) & set(processes(lab, model)), BACK_SECONDS, pause=2
    )
    lab.wait_until(
        f"{model} is active", lambda: lab.show(engine(model), "ActiveState") == "active", BACK_SECONDS, pause=2
    )
    lab.wait_until(f"{model} generates", lambda: lab.generates(model), 60)
    left = lab.ssh(f"ps -o pid= -p {','.join(map(str, killed[model]))}", check=False).split()
    assert left == [], f"of the old generation: {left}"


def test_engine_at_full_load_is_not_restarted(lab: Lab) -> None:
    """Busy for longer than two canaries: refusing a canary because the queue is full is not a fault."""
    before = lab.show(engine("phi-3-mini"), "MainPID")
    body = {"model": "phi-3-mini", "prompt": "x", "max_tokens": 1500, "ignore_eos": True}
    end = time.monotonic() + 45

    def hammer(_: int) -> int:
        sent = 0
        with httpx2.Client(timeout=120, trust_env=False, headers={"Authorization": f"Bearer {lab.key}"}) as client:
            while time.monotonic() < end and sent < 500:
                sent += 1
                if client.post(f"{URL}/v1/completions", json=body).status_code == 503:
                    time.sleep(0.2)
        return sent

    with ThreadPoolExecutor(32) as pool:
        assert sum(pool.map(hammer, range(32))) > 0
    assert lab.show(engine("phi-3-mini"), "MainPID") == before
    assert lab.show(engine("phi-3-mini"), "NRestarts") in {"0", "1", "2"}
    lab.wait_until("phi-3-mini answers after the load", lambda: lab.generates("phi-3-mini"), 60)

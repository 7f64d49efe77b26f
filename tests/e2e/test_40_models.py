"""Day 2: one model more, one model less, one setting changed."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx2
from openai import OpenAI

from .conftest import HOST, MODELS, POLICIES, URL, Lab, engine, recap

FIFTH = "[*models, models[-1] | {'name': 'fifth', 'port': 11404}]"


def test_a_fifth_model_is_one_entry_and_goes_without_a_trace(
    lab: Lab, client: OpenAI, changed_models: Callable[[str], list[str]]
) -> None:
    before = lab.pids()
    lab.play("playbooks/vllm.yml", *changed_models(FIFTH))
    assert "fifth" in [model.id for model in client.models.list()]
    assert lab.generates("fifth")
    assert lab.pids() == before

    lab.play(
        "playbooks/vllm.yml",
        *changed_models("[*models, models[-1] | {'name': 'fifth', 'port': 11404, 'state': 'absent'}]"),
    )
    assert sorted(model.id for model in client.models.list()) == sorted(MODELS + POLICIES)
    left = lab.ssh(
        "find /etc /var/log /var/lib /var/cache /run /opt/citadel/bin /opt/models -name '*fifth*' 2>/dev/null",
        check=False,
    )
    assert left == ""
    assert "fifth" not in lab.ssh("systemctl list-units --all --no-legend 'citadel-llm@*'")
    assert lab.pids() == before


def test_changing_one_setting_restarts_that_model_only_after_a_drain(
    lab: Lab, changed_models: Callable[[str], list[str]]
) -> None:
    """Streams are open all the while: each one that was begun ends whole, and later ones are told to come back."""
    before = lab.pids()
    changed = changed_models("[m | ({'max_num_seqs': 31} if m['name'] == 'phi-3-mini' else {}) for m in models]")
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        ends = pool.submit(stream_on_and_on, lab, "phi-3-mini", stop)
        try:
            output = lab.play("playbooks/vllm.yml", *changed)
        finally:
            stop.set()
        assert set(ends.result()) == {"whole", "come back"}, ends.result()
    assert recap(output)[HOST]["changed"] > 0
    after = lab.pids()
    assert {name for name in MODELS if before[name] != after[name]} == {"phi-3-mini"}
    assert lab.generates("phi-3-mini")
    assert "max-num-seqs: 31" in lab.ssh("cat /etc/citadel-llm/models/phi-3-mini.yaml")


def stream_on_and_on(lab: Lab, model: str, stop: threading.Event) -> list[str]:
    """One stream of three seconds after another; how each of them ended."""
    body = {"model": model, "prompt": "x", "max_tokens": 300, "stream": True, "ignore_eos": True}
    ends = []
    with httpx2.Client(timeout=60, trust_env=False, headers={"Authorization": f"Bearer {lab.key}"}) as client:
        while not stop.is_set():
            with client.stream("POST", f"{URL}/v1/completions", json=body) as reply:
                text = "".join(reply.iter_text())
                if reply.status_code == 503 and int(reply.headers["retry-after"]) >= 1:
                    ends.append("come back")
                    stop.wait(1)
                elif reply.status_code == 200 and text.rstrip().endswith("data: [DONE]") and '"error"' not in text:
                    ends.append("whole")
                else:
                    ends.append(f"{reply.status_code}: {text[-300:]}")
    return ends


def test_operators_drain_is_seen_by_clients(lab: Lab) -> None:
    """Drained by hand: told to come back; resumed: served again."""
    headers = {"Authorization": f"Bearer {lab.key}"}
    body = {"model": "hermes-2", "prompt": "x", "max_tokens": 1}
    lab.play("playbooks/ops/drain_model.yml", "-e", "model=hermes-2")
    try:
        time.sleep(1)  # within a second every worker knows
        reply = httpx2.post(f"{URL}/v1/completions", json=body, headers=headers, trust_env=False)
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert json.loads(reply.text)["error"]["message"]
    finally:
        lab.play("playbooks/ops/resume_model.yml", "-e", "model=hermes-2")
    lab.wait_until("hermes-2 serves again", lambda: lab.generates("hermes-2"), 10)
    assert lab.show(engine("hermes-2"), "ActiveState") == "active"

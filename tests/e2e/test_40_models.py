"""Day 2: one model more, one model less, one setting changed."""

import json
from collections.abc import Callable

import httpx2
from openai import OpenAI

from .conftest import HOST, MODELS, URL, Lab, engine, recap

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
    assert sorted(model.id for model in client.models.list()) == sorted(MODELS)
    left = lab.ssh(
        "find /etc /var/log /var/lib /var/cache /run /opt/citadel/bin -name '*fifth*' 2>/dev/null", check=False
    )
    assert left == ""
    assert "fifth" not in lab.ssh("systemctl list-units --all --no-legend 'citadel-llm@*'")
    assert lab.pids() == before


def test_changing_one_setting_restarts_that_model_only_after_a_drain(
    lab: Lab, client: OpenAI, changed_models: Callable[[str], list[str]]
) -> None:
    before = lab.pids()
    changed = changed_models("[m | ({'max_num_seqs': 3} if m['name'] == 'phi-3-mini' else {}) for m in models]")
    # a long stream is open while the play restarts its model: it must end as if nothing had happened
    stream = client.completions.create(
        model="phi-3-mini", prompt="x", max_tokens=1500, stream=True, timeout=300, extra_body={"ignore_eos": True}
    )
    first = next(iter(stream))
    output = lab.play("playbooks/vllm.yml", *changed)
    rest = list(stream)
    assert first.choices
    assert rest[-1].choices[0].finish_reason == "length"
    assert recap(output)[HOST]["changed"] > 0
    after = lab.pids()
    assert {name for name in MODELS if before[name] != after[name]} == {"phi-3-mini"}
    assert lab.generates("phi-3-mini")
    assert "max-num-seqs: 3" in lab.ssh("cat /etc/citadel-llm/models/phi-3-mini.yaml").replace('"', "")


def test_operators_drain_is_seen_by_clients(lab: Lab) -> None:
    """Drained by hand: told to come back; resumed: served again."""
    headers = {"Authorization": f"Bearer {lab.key}"}
    body = {"model": "hermes-2", "prompt": "x", "max_tokens": 1}
    lab.play("playbooks/ops/drain_model.yml", "-e", "model=hermes-2")
    try:
        reply = httpx2.post(f"{URL}/v1/completions", json=body, headers=headers, trust_env=False)
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert json.loads(reply.text)["error"]["message"]
    finally:
        lab.play("playbooks/ops/resume_model.yml", "-e", "model=hermes-2")
    lab.wait_until("hermes-2 serves again", lambda: lab.generates("hermes-2"), 10)
    assert lab.show(engine("hermes-2"), "ActiveState") == "active"

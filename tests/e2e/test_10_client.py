"""The official client works unchanged."""

import httpx2
import pytest
from openai import AuthenticationError, BadRequestError, NotFoundError, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from .conftest import MODELS, POLICIES, URL, Lab

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say something."}]


def test_lists_the_models_by_their_names(client: OpenAI) -> None:
    assert sorted(model.id for model in client.models.list()) == sorted(MODELS + POLICIES)


@pytest.mark.parametrize("model", MODELS)
def test_completes(client: OpenAI, model: str) -> None:
    reply = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8)
    assert reply.choices[0].message.content is not None
    assert reply.usage is not None
    assert 0 < reply.usage.completion_tokens <= 8


@pytest.mark.parametrize("model", MODELS)
def test_streams(client: OpenAI, model: str) -> None:
    chunks = list(client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, stream=True))
    assert chunks[-1].choices[0].finish_reason in {"length", "stop"}
    assert len(chunks) > 1


@pytest.mark.parametrize("model", MODELS)
def test_completes_plain_text(client: OpenAI, model: str) -> None:
    assert client.completions.create(model=model, prompt="Once", max_tokens=4).choices[0].finish_reason in {
        "length",
        "stop",
    }


def test_needs_a_key() -> None:
    with (
        OpenAI(base_url=f"{URL}/v1", api_key="sk-wrong", max_retries=0) as stranger,
        pytest.raises(AuthenticationError),
    ):
        stranger.models.list()
    assert httpx2.get(f"{URL}/v1/models", trust_env=False).status_code == 401


def test_unknown_model_and_bad_requests_are_errors_of_the_api(client: OpenAI) -> None:
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    with pytest.raises(BadRequestError):
        client.chat.completions.create(model="phi-3-mini", messages=MESSAGES, temperature=-3)


def test_log_has_the_request_and_not_the_prompt(lab: Lab, client: OpenAI) -> None:
    word = "xylophone-in-the-prompt"
    client.chat.completions.create(model="phi-3-mini", messages=[{"role": "user", "content": word}], max_tokens=2)
    log = "/var/log/citadel-gateway/access.jsonl"
    lab.wait_until("the request is in the access log", lambda: '"phi-3-mini"' in lab.ssh(f"tail -n 5 {log}"), 10)
    assert lab.ssh(f"grep -c {word} {log}", check=False) == "0"
    assert lab.ssh(f"grep -c {lab.key} {log}", check=False) == "0"
    assert lab.ssh(f"grep -rlF {word} /var/log/citadel-llm", check=False) == ""


def test_keys_are_in_no_process_list(lab: Lab) -> None:
    secret = lab.ssh("cat /etc/citadel-llm/keys/engine")
    listed = lab.ssh("ps -eo args")
    assert secret not in listed
    assert lab.key not in listed

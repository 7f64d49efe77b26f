"""`citadel-gateway serve`, whole, with the official client."""

import asyncio
import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from gateway.tests.client import ADMIN, KEY
from gateway.tests.processes import command, environment, start, stop, wait_for
from gateway.tests.site import Site, free_port

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say a word"}]


@dataclass
class Served:
    site: Site
    config: str
    url: str
    port: int
    process: subprocess.Popen[bytes]

    def client(self, key: str = KEY, **more: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=10, **more)  # type: ignore[arg-type]  # options of any kind

    def page(self, path: str, key: str = ADMIN) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        assert reply.status == 200, text
        return text


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    site = Site(tmp_path_factory.mktemp("site"))
    engine_port = free_port()
    site.model("one", engine_port, aliases=["uno"], context=8192)
    site.model("away", free_port())
    site.keys.append({"id": "few", "sha256": hashlib.sha256(b"sk-few").hexdigest(), "models": ["away"]})
    config = str(site.write())
    port = site.config["listen"]["port"]
    engine = start("-m", "gateway.tests.fake_engine", str(engine_port))
    wait_for(f"http://127.0.0.1:{engine_port}/health", engine)
    process = start("-m", "citadel_gateway", "serve", "--config", config)
    url = f"http://127.0.0.1:{port}"
    wait_for(f"{url}/readyz", process)
    found = Served(site, config, url, port, process)
    while True:  # until control answers too
        try:
            found.page("/metrics")
            break
        except (AssertionError, OSError):
            time.sleep(0.1)
    yield found
    assert stop(process) == 0
    stop(engine)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_models(served: Served) -> None:
    assert [model.id for model in served.client().models.list()] == ["one", "away", "auto"]
    assert served.client().models.retrieve("one").id == "one"


def test_a_completion(served: Served) -> None:
    reply = served.client().chat.completions.create(model="one", messages=MESSAGES)
    assert reply.choices[0].message.content == "It is 42."
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 4
    assert served.client().completions.create(model="uno", prompt="x").choices[0].text == "It is 42."


def test_a_stream(served: Served) -> None:
    stream = served.client().chat.completions.create(model="one", messages=MESSAGES, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == " word0 word1 word2 word3 word4"


def test_async_clients(served: Served) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:
            replies = await asyncio.gather(
                *(client.completions.create(model="one", prompt=str(number)) for number in range(40))
            )
        return [reply.choices[0].text for reply in replies]

    assert asyncio.run(ask()) == ["It is 42."] * 40


def test_errors_are_the_clients_own(served: Served) -> None:
    def create(client: openai.OpenAI, model: str = "one", **more: object) -> None:
        client.completions.create(model=model, prompt="x", **more)  # type: ignore[call-overload]  # options of any kind

    with pytest.raises(openai.AuthenticationError) as error:
        create(served.client("sk-wrong"))
    assert error.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError):
        create(served.client("sk-few"))
    with pytest.raises(openai.NotFoundError) as missing:
        create(served.client(), model="nothing")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError):
        create(served.client(), extra_body={"stream": "yes"})
    with pytest.raises(openai.InternalServerError) as down:
        create(served.client(), model="away")
    assert (down.value.status_code, down.value.code) == (503, "model_unavailable")
    assert down.value.response.headers["retry-after"] == "2"
    assert down.value.request_id


def test_a_stream_that_breaks_raises(served: Served) -> None:
    stream = served.client().completions.create(model="one", prompt="x", stream=True, extra_headers={"x-fake": "die"})
    texts = []
    with pytest.raises(openai.APIError, match="broke off"):
        texts += [part.choices[0].text for part in stream]
    again = served.client().completions.create(model="one", prompt="x", stream=True)
    assert len(list(again)) == 5


def test_the_clients_retries_bridge_a_short_outage(served: Served) -> None:
    assert command("drain", "one", "--config", served.config).returncode == 0
    time.sleep(1.0)
    timer = threading.Timer(1.5, command, ("resume", "one", "--config", served.config))
    timer.start()
    client = served.client().with_options(max_retries=5)
    assert client.completions.create(model="one", prompt="x").choices[0].text == "It is 42."
    timer.join()


def test_an_operator_drains_and_resumes(served: Served) -> None:
    ended = command("drain", "uno", "--config", served.config, key=ADMIN)
    assert (ended.returncode, ended.stdout) == (0, "one: draining\n")
    assert json.loads(served.page("/admin/models"))[0]["draining"] == ["operator"]
    time.sleep(1.0)
    for _ in range(10):  # on whichever worker
        with pytest.raises(openai.InternalServerError) as drained:
            served.client().completions.create(model="one", prompt="x")
        assert drained.value.code == "model_draining"
    key_file = served.site.folder / "admin-key"
    key_file.write_text(ADMIN)
    ended = command("resume", "one", "--config", served.config, "--key-file", str(key_file))
    assert ended.stdout == "one: taking requests\n"
    ended = command("drain", "nothing", "--config", served.config)
    assert (ended.returncode, ended.stderr) == (1, "nothing: The model 'nothing' does not exist\n")
    ended = command("drain", "one", "--config", served.config, key="sk-wrong")
    assert ended.returncode == 1
    time.sleep(1.0)


def test_one_page_of_metrics(served: Served) -> None:
    def total() -> float:
        lines = served.page("/metrics").splitlines()
        wanted = 'llm_gateway_requests_total{model="one",endpoint="completions",code="200"} '
        return sum(float(line.removeprefix(wanted)) for line in lines if line.startswith(wanted))

    before = total()
    for _ in range(20):
        served.client().completions.create(model="one", prompt="x")
    end = time.monotonic() + 5
    while total() < before + 20:
        assert time.monotonic() < end
        time.sleep(0.2)
    assert total() == before + 20
    page = served.page("/metrics")
    assert "llm_gateway_workers 1\n" in page  # without Redis there is one, so that limits are counted in one place
    assert 'llm_gateway_inflight_requests{model="one"} 0' in page
    assert 'llm_gateway_backend_up{model="away"' in page


def test_a_new_key_needs_no_restart(served: Served) -> None:
    served.site.keys.append({"id": "late", "sha256": hashlib.sha256(b"sk-late").hexdigest()})
    served.site.write()
    time.sleep(1.5)
    assert served.client("sk-late").completions.create(model="one", prompt="x").choices


def test_a_worker_reopens_its_log(served: Served) -> None:
    path = Path(served.site.config["access_log"])
    path.rename(path.with_suffix(".1"))
    children = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text().split()
    for pid in children:
        if "worker" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(int(pid), signal.SIGHUP)
    served.client().completions.create(model="one", prompt="x")
    end = time.monotonic() + 5
    while not path.exists() or not path.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_when_one_child_dies_all_end(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.model("one", free_port())
    config = str(site.write())
    process = start("-m", "citadel_gateway", "serve", "--config", config)
    wait_for(f"http://127.0.0.1:{site.config['listen']['port']}/healthz", process)
    while not Path(site.config["control_socket"]).exists():
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait(20) == 1
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with socket.create_server(("127.0.0.1", site.config["listen"]["port"])):
        ended = command("serve", "--config", str(site.write()))
    assert ended.returncode == 1
    assert "Address already in use" in ended.stderr


def test_workers_do_not_load_the_web_framework() -> None:
    code = "import citadel_gateway.worker, sys; print([m for m in ('fastapi', 'pydantic') if m in sys.modules])"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    assert ended.stdout == "[]\n"

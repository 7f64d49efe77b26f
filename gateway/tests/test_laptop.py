"""`citadel-gateway serve --backend …`: from nothing to a gateway."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from citadel_gateway.cli.laptop import CONTEXT, alone, find_models, parsed, state_folder
from citadel_gateway.cli.main import main
from citadel_gateway.settings import WORKERS, ConfigError, Gateway, Models, read, read_gateway

from gateway.tests.controls import until
from gateway.tests.fake_backend import FakeBackend
from gateway.tests.processes import ROOT, command, environment, stop, wait_for
from gateway.tests.site import Site, free_port

Fake = Callable[..., FakeBackend]


@pytest.fixture
def fake() -> Iterator[Fake]:
    made = []

    def make(*models: Any, **more: Any) -> FakeBackend:
        made.append(FakeBackend(*models, **more))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def test_the_models_are_asked_from_the_backends(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    several = fake({"id": "llama3.2:latest"}, {"id": "qwen"}, {"id": "a b"}, "damaged")
    vllm = fake({"id": "qwen", "max_model_len": 8192}, health=True)
    llama_cpp = fake({"id": "gguf", "meta": {"n_ctx": 4096}})
    found = find_models([several.url, vllm.url + "/v1/", f"gguf={llama_cpp.url}"], "any").models
    assert [(model.name, model.context) for model in found] == [
        ("llama3.2:latest", CONTEXT),
        ("qwen", CONTEXT),
        ("gguf", 4096),
    ]
    first, second = found[1].backends
    assert (first.port, first.shared, first.health) == (several.port, True, "/v1/models")
    assert (second.port, second.shared, second.health) == (vllm.port, False, "/health")
    assert "left out: the model 'a b'" in capsys.readouterr().out


def test_a_model_that_is_named_needs_no_list(fake: Fake) -> None:
    silent = fake()
    closed = f"http://127.0.0.1:{free_port()}"
    found = find_models([f"mine={silent.url}", f"later={closed}"], "any").models
    assert [(model.name, model.backends[0].health) for model in found] == [
        ("mine", "/v1/models"),
        ("later", "/v1/models"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("https://api.example", "https is not supported"),
        ("x=https://api.example", "https is not supported"),
        ("ftp://host", "write http://HOST:PORT"),
        ("nonsense", "write http://HOST:PORT"),
        ("http://host:port", "--backend http://host:port"),
        ("http://user:secret@host", "no user or password in a URL"),
        ("http://host/api/v1", "whose paths begin with /v1"),
    ],
)
def test_addresses_that_are_none(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parsed(text)
    assert said in str(refused.value)
    assert "secret" not in str(refused.value)


def test_backends_that_cannot_be_used(fake: Fake) -> None:
    locked = fake({"id": "one"}, key="k")
    for backends, said in (
        ([locked.url], "give --backend-key-file"),
        ([fake().url], "404 and no list of models; or name a model: NAME=http"),
        ([f"http://127.0.0.1:{free_port()}"], "does not answer"),
        ([f"two={fake({'id': 'one'}).url}"], "has no model 'two'; it has one"),
        ([fake({"id": "?"}).url], "serve no model"),
    ):
        with pytest.raises(ConfigError) as refused:
            find_models(backends, "any")
        assert said in str(refused.value)
    assert find_models([locked.url], "k").models[0].name == "one"


def test_one_at_a_time_uses_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with alone(tmp_path):
        assert main(["serve", "--backend", "http://127.0.0.1:1", "--folder", str(tmp_path)]) == 1
    assert "another gateway uses this folder" in capsys.readouterr().err


def test_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert state_folder() == Path("/var/state/citadel-gateway")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert state_folder() == Path.home() / ".local/state/citadel-gateway"


def test_files_and_backends_exclude_each_other(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--config", str(site.write()), "--backend", "http://127.0.0.1:1"]) == 78
    assert "exclude each other" in capsys.readouterr().err


def test_without_redis_one_worker_serves(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where two are set and a tier has limits, which would be refused."""
    site.model("one", 1)
    site.policies = {"tiers": [{"name": "free", "concurrency": 1}]}
    path = str(site.write())
    served = []

    def run_serve(settings: Gateway, config: str) -> int:
        served.append(settings.workers)
        return 0

    monkeypatch.setattr("citadel_gateway.serve.run_serve", run_serve)
    monkeypatch.setenv(WORKERS, "")
    assert main(["serve", "--config", path]) == 0
    assert served == [1]
    monkeypatch.setenv(WORKERS, "3")
    assert read_gateway(path).workers == 3


@pytest.mark.alone
def test_from_nothing_to_an_answer(tmp_path: Path, fake: Fake) -> None:
    """One command; the key it prints opens, and a second start keeps it."""
    backend = fake({"id": "llama3.2:latest"}, {"id": "qwen"})
    port, folder = free_port(), tmp_path / "gateway"
    words = ["serve", "--backend", backend.url, "--port", str(port), "--folder", str(folder)]
    key = ""
    for start in (1, 2):
        with subprocess.Popen(
            [sys.executable, "-m", "citadel_gateway", *words], env=environment(), cwd=ROOT, stdout=subprocess.PIPE
        ) as process:
            try:
                wait_for(f"http://127.0.0.1:{port}/readyz", process)
                assert process.stdout is not None
                lines = [process.stdout.readline().decode().strip() for _ in range(3)]
                assert lines[0] == "models: llama3.2:latest, qwen"
                assert lines[2].startswith(f"citadel-gateway: http://127.0.0.1:{port}/v1 with 1 worker")
                if start == 1:
                    key = lines[1].removeprefix("key (shown this once): ")
                assert (key in lines[1]) == (start == 1)
                for model in ("qwen", "llama3.2:latest"):
                    assert chat(port, key, model) == f"I am {model}"
                until((folder / "run" / "control.sock").exists)  # before that, a signal ends it without a word
                if start == 2:
                    revoke(folder / "gateway.json")
                    until(partial(refused, port, key))
            finally:
                assert stop(process) == 0
    assert len(read(folder / "models.json", Models).models) == 2
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not [path for path in folder.rglob("*.json*") if key in path.read_text(errors="replace")]


def revoke(config: Path) -> None:
    (entry,) = json.loads(command("keys", "list", "--json", "--config", str(config)).stdout)
    assert command("keys", "revoke", entry["id"], "--config", str(config)).returncode == 0


def refused(port: int, key: str) -> bool:
    """Whether a worker has heard of the revocation."""
    try:
        chat(port, key, "qwen")
    except urllib.error.HTTPError as error:
        with error:
            return error.code == 401
    return False


def chat(port: int, key: str, model: str) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "who?"}]}).encode()
    lines = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", body, lines)
    with urllib.request.urlopen(request, timeout=20) as reply:
        return str(json.loads(reply.read())["choices"][0]["message"]["content"])

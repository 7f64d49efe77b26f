"""End-to-end tests: the real services on the lab, from inside its network (`lab/lab exec pytest tests/e2e`)."""

import json
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from openai import OpenAI

REPO = Path(__file__).resolve().parents[2]
HOST = "hx-llm-server-01"
URL = "http://10.77.0.29:8000"
MODELS = ["mixtral-8x7b", "hermes-2", "openchat-3.5", "phi-3-mini"]
POLICIES = ["auto", "cheap", "default"]  # names that become a model, listed beside them
PLAY_SECONDS = 1500


def models_status(key: str, url: str = URL) -> int:
    """What the gateway says to a key that asks for its models."""
    headers = {"Authorization": f"Bearer {key}"}
    return httpx2.get(f"{url}/v1/models", headers=headers, trust_env=False, timeout=10).status_code


def all_say(status: int, key: str, *urls: str) -> bool:
    """Whether every worker answers a key like that: each new connection may be any worker's."""
    return all(models_status(key, url) == status for url in urls or (URL,) for _ in range(6))


@dataclass(frozen=True)
class Lab:
    """The lab as a person would use it: plays, commands on a host, and the gateway's front door."""

    key: str

    def run(self, *command: str, timeout: float = 120, check: bool = True) -> str:
        """A command of the checkout; its output."""
        done = subprocess.run(
            command, cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, check=False
        )
        assert not check or done.returncode == 0, (
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-6000:]}"
        )
        return done.stdout

    def play(self, playbook: str, *options: str, check: bool = True) -> str:
        """A playbook on the lab's inventory; its output."""
        return self.run("lab/lab", "play", playbook, *options, timeout=PLAY_SECONDS, check=check)

    def ssh(self, command: str, *, host: str = HOST, check: bool = True, timeout: float = 120) -> str:
        """A command on a host of the lab, as root; its output without the last line break."""
        return self.run("lab/lab", "ssh", host, command, check=check, timeout=timeout).rstrip("\n")

    def gateway(self, command: str, *, host: str = HOST, check: bool = True, timeout: float = 120) -> str:
        """A command of `citadel-gateway` on a host."""
        return self.ssh(
            f"/opt/citadel/gateway-env/bin/citadel-gateway {command}", host=host, check=check, timeout=timeout
        )

    @contextmanager
    def user(self, name: str, tier: str) -> Iterator[str]:
        """The key of a new user of this tier, for as long as it is needed."""
        self.gateway(f"users create {name} --tier {tier}", check=False)  # there already after a run that was killed
        self.gateway(f"users change {name} --tier {tier}")
        key_id = f"{name}-{uuid.uuid4().hex[:8]}"
        key = self.gateway(f"keys create --user {name} --id {key_id}")
        try:
            self.wait_until(f"{name}'s key opens", lambda: all_say(200, key), 2, pause=0.1)
            yield key
        finally:
            self.gateway(f"keys revoke {key_id}")

    def show(self, unit: str, name: str) -> str:
        """One property of a unit as systemd has it in effect."""
        return self.ssh(f"systemctl show --value --property={name} '{unit}'")

    def pids(self) -> dict[str, str]:
        """Main process of each model's unit."""
        return {model: self.show(engine(model), "MainPID") for model in MODELS}

    def wait_until(self, what: str, condition: Callable[[], object], seconds: float, pause: float = 1.0) -> None:
        """Poll a condition; a test fails with ``what`` when it does not come true in time."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds} s: {what}"
            time.sleep(pause)

    def generates(self, model: str) -> bool:
        """Whether the gateway gets a completion from the model."""
        client = OpenAI(base_url=f"{URL}/v1", api_key=self.key, max_retries=0, timeout=30)
        try:
            with client:
                reply = client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=4
                )
        except Exception:  # any refusal is "no"; the caller's message says what it waited for
            return False
        return reply.usage is not None and reply.usage.completion_tokens > 0


def engine(model: str) -> str:
    """The unit of a model."""
    return f"citadel-llm@{model}.service"


def recap(output: str) -> dict[str, dict[str, int]]:
    """The counts of ansible-playbook's recap by host."""
    found: dict[str, dict[str, int]] = {}
    for line in output.splitlines():
        name, _, counts = line.partition(" : ")
        if "ok=" in counts and "failed=" in counts:
            found[name.strip()] = {k: int(v) for k, v in (word.split("=") for word in counts.split())}
    return found


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The lab, converged: booted and played if need be, as `make lab` does."""
    lab = Lab(
        key=subprocess.run(["lab/lab", "key"], cwd=REPO, text=True, capture_output=True, check=True).stdout.strip()
    )
    lab.run("lab/lab", "up", timeout=1800)
    if "citadel-llm.target" not in lab.ssh(
        "systemctl list-units --no-legend --state=active citadel-llm.target", check=False
    ):
        lab.play("playbooks/site.yml")
    return lab


@pytest.fixture(scope="session")
def client(lab: Lab) -> Iterator[OpenAI]:
    """The official client, set up as its documentation says."""
    with OpenAI(base_url=f"{URL}/v1", api_key=lab.key, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def changed_models(lab: Lab, tmp_path: Path) -> Callable[[str], list[str]]:
    """Options for a play that sees other models: an expression over the inventory's ``llm_models``."""

    def options(expression: str) -> list[str]:
        file = tmp_path / "models.json"
        stored = lab.run(
            ".venv/bin/ansible-inventory", "-i", "inventory/lab", "--host", HOST, "--playbook-dir", "playbooks"
        )
        models = json.loads(stored[stored.index("{") :])["llm_models"]
        file.write_text(json.dumps({"llm_models": eval(expression, {"models": models})}))  # noqa: S307  our own words, in the test
        return ["-e", f"@{file}"]

    return options

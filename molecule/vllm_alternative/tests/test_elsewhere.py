"""What other values lead to, what a removed model leaves behind, and what is refused before anything changes."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

PROJECT = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
MODELS = "/etc/citadel-llm/models"


def settings(host: Host, name: str) -> dict[str, Any]:
    lines = host.file(f"{MODELS}/{name}.yaml").content_string.splitlines()
    return {k: json.loads(v) for k, v in (line.split(": ", 1) for line in lines if not line.startswith("#"))}


def test_every_key_of_an_entry_reaches_vllm(host: Host) -> None:
    assert settings(host, "alpha") == {
        "model": "/srv/llm/alpha/pinned",
        "served-model-name": ["alpha", "first", "a-1"],
        "host": "127.0.0.1",
        "port": 12400,
        "dtype": "float32",
        "max-model-len": 1024,
        "kv-cache-memory-bytes": 32 * 1024 * 1024,
        "max-num-seqs": 2,
        "max-num-batched-tokens": 128,
        "max-num-queued-reqs": 3,
        "enable-prefix-caching": False,
        "enforce-eager": True,
        "shutdown-timeout": 5,
        "disable-uvicorn-access-log": True,
        "disable-fastapi-docs": True,
        "override-generation-config": {"temperature": 0.1},
        "chat-template": f"{MODELS}/alpha.jinja",
        "tool-call-parser": "hermes",
        "enable-auto-tool-choice": True,
        "max-logprobs": 3,
        "seed": 7,
    }
    assert "<assistant>" in host.file(f"{MODELS}/alpha.jinja").content_string
    assert "VLLM_LOGGING_LEVEL=WARNING" in host.file(f"{MODELS}/alpha.env").content_string


def test_only_the_chosen_files_were_fetched(host: Host) -> None:
    assert host.check_output("ls /srv/llm") == "alpha\ndelta"
    fetched = set(host.check_output("ls /srv/llm/alpha/pinned").split())
    assert {"config.json", "manifest.json", "model.safetensors"} <= fetched


def test_times_and_users_of_the_unit(host: Host) -> None:
    names = "User,RestartUSec,StartLimitBurst,After,AllowedCPUs"
    out = host.check_output("systemctl show --property=%s citadel-llm@delta.service", names)
    shown = dict(line.split("=", 1) for line in out.splitlines())
    assert (shown["User"], shown["RestartUSec"], shown["StartLimitBurst"]) == ("engines", "4s", "3")
    assert "citadel-llm@alpha.service" in shown["After"].split(), "one lane: the second starts after the first"
    assert shown["AllowedCPUs"] == "", "shared cores"
    limits = host.file("/etc/systemd/system/citadel-llm@alpha.service.d/limits.conf").content_string.splitlines()
    assert {"WatchdogSec=78", "TimeoutStopSec=35", "TimeoutStartSec=300"} <= set(limits)


def test_nothing_is_started(host: Host) -> None:
    assert host.run("systemctl is-active --quiet citadel-llm@alpha.service").rc != 0
    assert "No such process" in host.run("pgrep --list-name api_server && echo running || echo No such process").stdout


def test_a_table_of_somebody_else_is_still_there(host: Host) -> None:
    tables = host.check_output("nft list tables").splitlines()
    assert {"table inet somebody_elses", "table inet citadel_engines"} <= set(tables)


@pytest.mark.parametrize("name", ["beta", "gamma"])
def test_a_removed_model_leaves_no_trace(host: Host, name: str) -> None:
    places = "/etc /srv/llm /srv/citadel/bin /var/log /var/cache /var/lib /run"
    found = host.check_output(f"find {places} -xdev -name '*{name}*' ! -path '*/journal/*' 2>/dev/null; true")
    assert found == ""
    assert host.run(f"grep -rlE '\\b{name}\\b' /etc/citadel-llm /etc/systemd").stdout == ""
    assert name not in host.check_output("systemctl list-units --all --no-legend 'citadel-llm@*'; true")


# --- bad input: a run of the role each, which must change nothing ---


def play(**variables: Any) -> str:
    inventory = PROJECT / "molecule/inventory"
    command = ["ansible-playbook", f"--inventory={inventory}", "--extra-vars", json.dumps(variables)]
    playbook = PROJECT / "molecule/vllm_alternative/converge.yml"
    run = subprocess.run([*command, playbook], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert run.returncode != 0, run.stdout
    assert "changed=0" in run.stdout, run.stdout
    return " ".join((run.stdout + run.stderr).split())


TINY = {"type": "dense", "layers": 2, "kv_heads": 2, "head_dim": 32, "hidden": 128, "ffn": 256, "vocab": 259}
GOOD = {
    "name": "alpha",
    "port": 12400,
    "context": 1024,
    "source": {"type": "local", "path": "/srv/models/hermes-2"},
    "architecture": TINY,
}


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([{**GOOD, "contxt": 9}], "contxt"),
        ([{**GOOD, "architecture": {**TINY, "layer": 9}}], "layer"),
        ([GOOD, {**GOOD, "port": 12499}], "alpha: the name is used 2 times"),
        ([GOOD, {**GOOD, "name": "other"}], "port 12400: used by alpha and other"),
        ([{**GOOD, "port": 5433}], "port 5433 is sql's"),
        ([{**GOOD, "port": 22}], "port 22 is taken by sshd"),
        ([{**GOOD, "memory": "1G"}], 'set memory: "'),
        ([{**GOOD, "context": 8192, "architecture": {**TINY, "max_position_embeddings": 4096}}], "context 8192"),
        ([{**GOOD, "quantisation": "fp8-block"}], "needs the CPU flags"),
        ([{**GOOD, "extra_args": {"max-modl-len": 9}}], "has no setting max-modl-len (it has max-model-len)"),
        ([{**GOOD, "extra_args": {"api-key": "x"}}], "extra_args has api-key"),
    ],
    ids=["key", "nested-key", "name", "port", "reserved", "taken", "memory", "context", "processor", "flag", "managed"],
)
def test_bad_input_is_refused_before_anything_changes(host: Host, models: list[dict[str, Any]], words: str) -> None:
    before = host.check_output("find /etc/citadel-llm -type f -exec sha256sum {} + | sort")
    assert words in play(vllm_models=models, vllm_prune=False)
    assert host.check_output("find /etc/citadel-llm -type f -exec sha256sum {} + | sort") == before


def test_a_misspelt_variable_is_refused() -> None:
    assert "vllm_modles: this role has no such variable" in play(vllm_modles=[])

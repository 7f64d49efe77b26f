"""playbooks/preflight.yml from files of facts: no host is contacted, what cannot fit ends the run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def preflight(*options: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("ansible-playbook")
    command = [str(program), "playbooks/preflight.yml", "-i", "inventory/production", *options]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["amx", "avx512"])
def test_both_model_files_of_production_fit(kind: str) -> None:
    facts = f"preflight_facts_file=inventory/production/facts/{kind}.json"
    ran = preflight("-e", facts, "-e", f"platform_instruction_set={kind}")
    assert ran.returncode == 0, ran.stdout
    assert "verdict  fits" in ran.stdout
    assert "to fill  phi-3-mini: source.revision of solidrust/Phi-3-mini-4k-instruct-AWQ is empty" in ran.stdout
    assert "WARNING" not in ran.stderr


def test_the_plan_documents_figures_are_refused() -> None:
    facts = "preflight_facts_file=inventory/production/facts/amx.json"
    ran = preflight("-e", facts, "-e", "platform_instruction_set=seed")
    assert ran.returncode == 2
    assert "- mixtral-8x7b: needs 96.24 GiB, memory allows 90.00: 6.24 GiB too little" in ran.stdout
    assert "- cores: 8 + 4 + 4 + 2 = 18 for the models and 2 reserved make 20, this host has 16" in ran.stdout


def test_a_misspelt_key_and_a_port_of_somebody_else_are_refused(tmp_path: Path) -> None:
    shape = {"type": "dense", "layers": 1, "kv_heads": 1, "head_dim": 8, "hidden": 8, "ffn": 8, "vocab": 8}
    model = {"name": "tiny", "port": 8000, "source": {"type": "local", "path": "/x"}, "architecture": shape}
    facts = "preflight_facts_file=inventory/production/facts/amx.json"
    models = tmp_path / "models.json"
    models.write_text(json.dumps({"llm_models": [model]}))
    ran = preflight("-e", facts, "-e", f"@{models}")
    assert ran.returncode == 2
    assert "- tiny: port 8000 is gateway's; choose another port for the model" in ran.stdout
    models.write_text(json.dumps({"llm_models": [{**model, "contxt": 64}]}))
    ran = preflight("-e", facts, "-e", f"@{models}")
    assert ran.returncode == 2
    assert "contxt" in ran.stdout


def test_monitoring_that_could_tell_nobody_is_refused_without_asking_a_host(tmp_path: Path) -> None:
    ran = preflight("--limit", "metrics_servers")
    assert ran.returncode == 2
    for missing in ("vault_exporters_password", "vault_monitoring_gateway_key", "vault_grafana_token"):
        assert f"set {missing}" in ran.stdout
    assert 'platform_alerting.channels "pager" has neither routing_key nor routing_key_file' in ran.stdout
    given = tmp_path / "given.json"
    enough = dict.fromkeys(("platform_exporters_password", "platform_monitoring_gateway_key"), "x" * 32)
    given.write_text(json.dumps({**enough, "platform_grafana": "none", "platform_alerting": {}}))
    ran = preflight("--limit", "metrics_servers", "-e", f"@{given}")
    assert ran.returncode == 2
    assert "platform_alerting has no matrix: nobody would be told" in " ".join(ran.stdout.split())
    ran = preflight("--limit", "metrics_servers", "-e", f"@{given}", "-e", "monitoring_alertmanager_config=")
    assert ran.returncode == 0, ran.stdout

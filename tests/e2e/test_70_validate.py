"""`make validate` asks every product; a stopped model is named."""

from .conftest import Lab, engine


def test_validate_passes_and_names_a_stopped_model(lab: Lab) -> None:
    output = lab.run("make", "validate", "INVENTORY=inventory/lab", timeout=300)
    assert "failed" not in output.splitlines()[-1]
    lab.ssh(f"systemctl stop {engine('openchat-3.5')}")
    try:
        output = lab.run("make", "validate", "INVENTORY=inventory/lab", timeout=300, check=False)
        assert "citadel-llm@openchat-3.5.service is inactive" in output
        assert "hermes-2" not in output, output[-3000:]
    finally:
        lab.ssh(f"systemctl start {engine('openchat-3.5')}", timeout=600)

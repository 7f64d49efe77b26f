"""`make validate` asks every product; a stopped model is named."""

from .conftest import Lab, engine


def test_validate_passes_and_names_a_stopped_model(lab: Lab) -> None:
    output = lab.run("make", "validate", "INVENTORY=inventory/lab", timeout=300)
    assert "failed" not in output.splitlines()[-1]
    lab.ssh(f"systemctl stop {engine('openchat-3.5')}")
    try:
        output = lab.run("make", "validate", "INVENTORY=inventory/lab", timeout=300, check=False)
        failed = [line for line in output.splitlines() if line.startswith("FAIL")]
        assert any("openchat-3.5" in line for line in failed), output[-3000:]
        assert not any("hermes-2" in line for line in failed), output[-3000:]
    finally:
        lab.ssh(f"systemctl start {engine('openchat-3.5')}", timeout=600)

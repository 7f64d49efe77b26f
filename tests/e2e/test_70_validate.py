"""`make validate` asks every product. That it names a stopped one is asked in test_45_monitoring, where one is."""

from .conftest import Lab


def test_validate_passes(lab: Lab) -> None:
    output = lab.run("make", "validate", "INVENTORY=inventory/lab", timeout=300)
    assert "failed" not in output.splitlines()[-1]

"""What the control process describes, asked with everything that schemathesis can think of in a few seconds."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gateway.tests.client import ADMIN
from gateway.tests.controls import ThreadedControl, until
from gateway.tests.servers import PostgresServer
from gateway.tests.site import Site, digest, free_port

SCOPES = ["inference", "read", "admin", "metrics", "alerts"]
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
ENDLESS = r"^/v1/stream"  # they have tests of their own


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresServer) -> Iterator[tuple[str, Any]]:
    """With PostgreSQL, which takes less than SQLite does."""
    site = Site(tmp_path_factory.mktemp("openapi"))
    password = str(postgres_server.password_file)
    site.config["database"] = {"url": postgres_server.url, "password_file": password, "schema": "openapi"}
    site.config["workers"] = 1
    site.model("one", 11400)
    site.policies = {"tiers": [{"name": "basic"}]}
    site.keys = [{"id": "all", "sha256": digest(ADMIN), "scopes": SCOPES}]
    port = free_port()
    control = ThreadedControl(site, port).start()
    until(lambda: control.state.people.version >= 0)
    yield f"http://127.0.0.1:{port}", control.app.openapi()
    control.stop()


BOUNDS = settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_what_is_described(address: tuple[str, Any]) -> None:
    url, description = address
    lines = {"Authorization": f"Bearer {ADMIN}"}
    operations = schemathesis.openapi.from_dict(description).exclude(path_regex=ENDLESS).get_all_operations()
    asked = []
    wrong = []
    for found in operations:
        assert isinstance(found, Ok)
        operation = found.ok()

        @BOUNDS
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            case.call_and_validate(base_url=url, headers=lines, checks=CHECKS, timeout=20)

        asked.append(operation.label)
        try:
            ask()
        except FailureGroup as failures:
            wrong.append(f"{operation.label}: {failures}")
    assert not wrong, "\n".join(wrong)
    assert "PATCH /admin/users/{user}" in asked
    assert len(asked) > 30

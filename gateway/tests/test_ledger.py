"""Usage, entries of the ledger, prices and the check, asked over the control socket."""

import csv
import io
from collections.abc import Iterator

import pytest
from citadel_gateway.control import settler as settling
from citadel_gateway.control import sheets
from citadel_gateway.control.segments import folder_of
from citadel_gateway.control.sql.tables import usage_daily
from citadel_gateway.core.pricing import YEAR_SECONDS
from citadel_gateway.records import Settled, decode

from gateway.tests.client import ADMIN, KEY
from gateway.tests.controls import ThreadedControl, until
from gateway.tests.fake_worker import FakeJournal, settled
from gateway.tests.servers import RedisServer
from gateway.tests.site import Site, digest

DAY = 86_400.0
NOON = 1_900_000_000.25  # 2030-03-17, 17:46


def records() -> list[Settled]:
    return [
        settled("a-1", user="user", key="user"),
        settled("a-2", user="user", key="user", model="two", cached_tokens=2, session="=cmd()"),
        settled("a-3", user="user", key="other", at=NOON + DAY, overage=True),
        settled(
            "a-4", user="bob", key="bob", outcome="limited", status=429, input_tokens=0, output_tokens=0, cost_usd=0.0
        ),
    ]


@pytest.fixture
def control(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedControl]:
    monkeypatch.setattr(settling, "INTERVAL", 0.01)
    site.model("one", 11400, price={"share": 0.5, "output_mtoken": 2})
    site.model("two", 11401)
    site.config["workers"] = 1  # limits are counted in memory
    site.keys += [{"id": "reader", "sha256": digest("sk-read"), "scopes": ["read"]}]
    site.config["policies_file"] = str(site.folder / "policies.json")
    (site.folder / "policies.json").write_text(
        '{"hardware": {"usd": 8760, "lifetime_years": 1, "watts": 1000, "usd_per_kwh": 0.5},'
        ' "tiers": [{"name": "basic", "tokens_per_day": 1000, "concurrency": 2}]}'
    )
    found = ThreadedControl(site).start()
    journal = FakeJournal(folder_of(site.settings))
    journal.write(*records())
    until(lambda: found.state.parts["settler"].counts["settled"] == 4)
    yield found
    found.stop()
    journal.die()


def test_own_usage(control: ThreadedControl) -> None:
    found = control.ask("GET", "/v1/usage?from=2030-03-01&to=2030-03-31", key=KEY).json()
    assert found["user"] == "user"
    assert found["tier"] == "basic"
    assert found["limits"] == {
        "concurrency": {"limit": 2, "used": None},
        "tokens_per_day": {"limit": 1000, "used": None},
    }
    assert [(row["day"], row["requests"]) for row in found["data"]] == [("2030-03-17", 2), ("2030-03-18", 1)]
    total = found["total"]
    assert (total["input_tokens"], total["output_tokens"], total["cached_tokens"]) == (21, 15, 2)
    assert (total["overage_tokens"], total["engine_seconds"], total["cost_usd"]) == (12, 1.5, 0.003)
    assert control.ask("GET", "/v1/usage", key=KEY).json()["data"] == []  # the last thirty days
    whole = control.ask("GET", "/v1/usage?group_by=&from=2030-03-01&to=2030-03-31", key=KEY).json()
    assert [row["requests"] for row in whole["data"]] == [3]


@pytest.mark.parametrize("query", ["from=1.1.2030", "group_by=day,host", "to=2030-02-30"])
def test_what_cannot_be_asked(control: ThreadedControl, query: str) -> None:
    answer = control.ask("GET", f"/v1/usage?{query}", key=KEY)
    assert (answer.status, answer.error()) == (400, "invalid_request")


def test_everybodys_usage(control: ThreadedControl) -> None:
    path = "/admin/usage?from=2030-03-01&to=2030-03-31"
    rows = control.ask("GET", path).json()["data"]
    assert [(row["user"], row["model"], row["requests"], row["refused"]) for row in rows] == [
        ("bob", "one", 1, 1),
        ("user", "one", 2, 0),
        ("user", "two", 1, 0),
    ]
    assert control.ask("GET", path, key="sk-read").status == 200
    assert control.ask("GET", path, key=KEY).error() == "insufficient_scope"
    assert len(control.ask("GET", f"{path}&group_by=key,day&user=user").json()["data"]) == 2
    assert control.ask("GET", f"{path}&model=two").json()["total"]["requests"] == 1
    assert control.ask("GET", f"{path}&key=bob").json()["total"]["requests"] == 1
    answer = control.ask("GET", f"{path}&format=csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert "usage-2030-03-01-2030-03-31.csv" in answer.headers["content-disposition"]
    table = list(csv.DictReader(io.StringIO(answer.body.decode())))
    assert [(row["user"], row["model"], row["cost_usd"]) for row in table] == [
        ("bob", "one", "0.0"),
        ("user", "one", "0.002"),
        ("user", "two", "0.001"),
    ]


def test_entries_page_by_page(control: ThreadedControl) -> None:
    first = control.ask("GET", "/admin/ledger?limit=3").json()
    assert [row["id"] for row in first["data"]] == ["a-3", "a-4", "a-2"]
    second = control.ask("GET", f"/admin/ledger?limit=3&after={first['next']}").json()
    assert [row["id"] for row in second["data"]] == ["a-1"]
    assert second["next"] == ""
    for query, count in (
        ("user=user", 3), ("outcome=limited", 1), ("model=two", 1), ("from=2030-03-18", 1), ("to=2030-03-18", 3),
        ("from=2030-03-17T17:00:00Z&to=2030-03-17T18:00:00", 3), (f"from={NOON + 1}", 1), ("host=far", 0),
    ):  # fmt: skip
        assert len(control.ask("GET", f"/admin/ledger?{query}").json()["data"]) == count, query
    assert control.ask("GET", "/admin/ledger?from=then").error() == "invalid_request"
    assert control.ask("GET", "/admin/ledger", key="sk-read").status == 403


def test_entries_to_take_away(control: ThreadedControl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("citadel_gateway.control.sql.reports.PAGE", 2)
    answer = control.ask("GET", "/admin/ledger?format=jsonl&limit=1000")
    found = {record.id: record for record in map(decode, answer.body.splitlines()) if isinstance(record, Settled)}
    assert found == {record.id: record for record in records()}
    table = list(csv.DictReader(io.StringIO(control.ask("GET", "/admin/ledger?format=csv&limit=3").body.decode())))
    assert [row["id"] for row in table] == ["a-3", "a-4", "a-2"]
    assert table[2]["session"] == "'=cmd()"


def test_long_tables_come_in_pieces() -> None:
    pieces = list(sheets.lines(("a", "b"), (("x" * 100, number) for number in range(2000))))
    assert len(pieces) > 2
    assert len("".join(pieces).splitlines()) == 2001


def test_the_check(control: ThreadedControl) -> None:
    found = control.ask("GET", "/admin/ledger/check").json()
    assert found["good"]
    assert (found["requests"], found["users"], found["open"]) == (4, 2, 0)
    with control.state.database.begin() as connection:
        connection.execute(usage_daily.update().where(usage_daily.c.model == "two").values(output_tokens=6))
        connection.execute(usage_daily.delete().where(usage_daily.c.user_id == "bob"))
    found = control.ask("GET", "/admin/ledger/check").json()
    assert not found["good"]
    assert [(row["user"], row["model"]) for row in found["differences"]] == [("bob", "one"), ("user", "two")]
    assert found["differences"][0]["usage"] is None
    assert found["differences"][1]["usage"]["output_tokens"] == 6


def test_what_models_cost(control: ThreadedControl) -> None:
    one, two = control.ask("GET", "/admin/cost", key="sk-read").json()
    hour = 8760 / (YEAR_SECONDS / 3600) * 0.5
    assert one["hardware_hour_usd"] == pytest.approx(hour)
    assert one["energy_hour_usd"] == pytest.approx(0.25)
    assert one["engine_hour_usd"] == pytest.approx(hour + 0.25)
    assert one["idle_hour_usd"] == pytest.approx(hour)
    assert one["output_mtoken_usd"] == 2
    assert (one["busy"], one["per_mtoken_usd"]) == (0, None)
    assert two["engine_hour_usd"] == 0
    page = control.ask("GET", "/metrics").body.decode()
    assert "llm_gateway_journal_lag_seconds 0" in page
    assert "llm_gateway_journal_settled_total 4" in page
    assert 'llm_gateway_idle_usd_per_hour{model="two"} 0' in page


def test_without_the_database(control: ThreadedControl) -> None:
    database = control.state.database
    database.rest_until = float("inf")
    for path in ("/v1/usage", "/admin/usage", "/admin/ledger", "/admin/ledger?format=jsonl", "/admin/cost"):
        answer = control.ask("GET", path)
        assert (answer.status, answer.error()) == (503, "database_unavailable")
    assert control.ask("GET", "/metrics").status == 200
    database.rest_until = 0


def test_what_counts_against_limits(site: Site, redis_server: RedisServer) -> None:
    password = str(redis_server.password_file)
    site.config["redis"] = {"url": redis_server.url, "password_file": password, "prefix": "citadel"}
    site.config["policies_file"] = str(site.folder / "policies.json")
    (site.folder / "policies.json").write_text('{"tiers": [{"name": "basic", "tokens_per_day": 1000}]}')
    control = ThreadedControl(site).start()
    try:
        control.state.parts["books"].settle_lost("admin", 42, control.state.wall(), "x-1")
        limits = control.ask("GET", "/v1/usage", key=ADMIN).json()["limits"]
        assert limits == {"tokens_per_day": {"limit": 1000, "used": 42}}
        control.state.parts["books"].close()
        control.state.parts["books"].address.port = 1
        assert control.ask("GET", "/v1/usage", key=ADMIN).json()["limits"]["tokens_per_day"]["used"] is None
    finally:
        control.stop()

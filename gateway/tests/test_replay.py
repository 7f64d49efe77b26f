"""Yesterday's requests under another policy."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from citadel_gateway.cli.main import main
from citadel_gateway.core.replay import Outcome, Replay, read
from citadel_gateway.records import Opened, Settled, Why, encode
from citadel_gateway.settings import Address, Key, Model, Policies, Policy, Price, Rule, Tier, When

BIG = Model("big", (Address("h", 1),), price=Price(output_mtoken=10.0))
SMALL = Model("small", (Address("h", 2), Address("h", 3)), price=Price(output_mtoken=1.0))
BY_LENGTH = Policies(
    policies=(Policy("auto", (), (Rule("short", ("small",), When(max_tokens=100)),), ("big",), "first"),)
)


def settled(number: int, at: float, **more: Any) -> Settled:
    fields: dict[str, Any] = {
        "model": "big", "asked": "auto", "backend": "h:1", "input_tokens": 50, "output_tokens": 100,
        "total_seconds": 2.0, "first_byte_seconds": 0.5, "engine_seconds": 1.0, "cost_usd": 0.001,
        "endpoint": "chat", "key": "k", "status": 200, "outcome": "ok", "why": Why(policy="auto", prompt_tokens=40),
    }  # fmt: skip
    return Settled(id=f"r-{number}", request_id="x", at=at, host="h", worker=1, user="u", tier="", **{**fields, **more})


def replayed(records: list[Settled], policies: Policies, policy: str = "", keys: tuple[Key, ...] = ()) -> Outcome:
    return Replay((BIG, SMALL), policies, keys, policy).run(records, Outcome())


def test_what_another_policy_would_have_cost() -> None:
    records = [settled(number, 100.0 + number) for number in range(10)]
    records += [settled(20 + number, 200.0 + number, why=Why(policy="auto", prompt_tokens=500)) for number in range(5)]
    records += [settled(30, 300.0, model="small", backend="h:2", asked="small", why=Why(), total_seconds=1.0)]
    found = replayed(records, BY_LENGTH)
    assert (found.requests, found.unchanged, found.seconds) == (16, 6, 200.0)
    (change,) = found.changes
    assert (change.before, change.after, change.requests) == ("big", "small", 10)
    assert change.cost_before == pytest.approx(10 * 0.001)
    assert change.cost_after == pytest.approx(10 * 0.0001)
    assert found.cost_before == pytest.approx(15 * 0.001 + 0.0001)
    assert found.cost_after == pytest.approx(5 * 0.001 + 11 * 0.0001)
    assert found.cost_recorded == pytest.approx(0.016)
    assert found.rules == {"auto/short": 10, "auto/-": 5}
    big, small = found.models
    assert (big.requests_before, big.requests_after, small.requests_before, small.requests_after) == (15, 5, 1, 11)
    assert (big.peak_before, big.peak_after, small.peak_before, small.peak_after) == (300, 300, 150, 150)
    assert small.mean_after > small.mean_before > 0


def test_load_follows_from_what_was_decided_before() -> None:
    """Each would go where less is under way: as long as one runs on the first model, the second one gets the next."""
    records = [settled(number, 100.0 + number * 0.1) for number in range(3)]
    found = replayed(records, Policies(policies=(Policy("auto", models=("big", "small")),)))
    assert [(one.model, one.requests_after) for one in found.models] == [("big", 1), ("small", 2)]
    apart = [settled(number, 100.0 + number * 5) for number in range(4)]
    found = replayed(apart, Policies(policies=(Policy("auto", models=("big", "small")),)))
    assert found.unchanged == 4


def test_the_same_files_give_the_same_result() -> None:
    records = [settled(number, 100.0 + number * 0.3, session=f"s{number % 3}") for number in range(50)]
    policies = Policies(policies=(Policy("auto", choose="latency"),))
    one = replayed(records, policies)
    assert replayed(list(reversed(records)), policies) == one


def test_another_policy_by_name() -> None:
    policies = Policies(policies=(Policy("auto", models=("big",)), Policy("thrift", models=("small",), choose="cost")))
    records = [settled(1, 1.0), settled(2, 2.0, asked="big", why=Why())]
    assert replayed(records, policies).unchanged == 2
    found = replayed(records, policies, "thrift")
    assert [(one.after, one.requests) for one in found.changes] == [("small", 1)]


def test_refusals_and_keys() -> None:
    keys = (Key("few", "0" * 64, models=("small",)),)
    policies = Policies(tiers=(Tier("t"),), policies=(Policy("auto", models=("big",)),))
    records = [
        settled(1, 1.0, key="few"),
        settled(2, 2.0, asked="gone"),
        settled(3, 3.0, why=Why(policy="auto", budget_usd=0.0005)),
        settled(4, 4.0, endpoint="embeddings"),
        settled(5, 5.0, endpoint="probe"),
    ]
    found = replayed(records, policies, "", keys)
    assert found.refused == {
        "model_not_allowed": 1, "model_not_found": 1, "budget_exceeded": 1, "endpoint_not_supported": 1,
    }  # fmt: skip
    assert [(one.before, one.after, one.requests) for one in found.changes] == [("big", "", 4)]
    assert found.unchanged == 1


def test_nothing_at_all() -> None:
    found = replayed([], BY_LENGTH)
    assert (found.requests, found.models, found.changes) == (0, [], [])


def lines() -> bytes:
    opened = Opened("r-1", "x", 1.0, "h", 1, "u", "k", "", "big", "chat")
    refused = settled(2, 2.0, model="", backend="", outcome="refused", status=404)
    probe = msgspec.structs.replace(settled(3, 3.0), user="system")
    parts = [encode(one) for one in (opened, settled(1, 1.0), refused, probe)]
    exported = msgspec.to_builtins(settled(4, 4.0))
    del exported["kind"]
    parts += [json.dumps(exported).encode(), b"{half a rec", b""]
    return b"\n".join(parts) + b"\n" + b"\0" * 100


def test_what_a_segment_holds() -> None:
    outcome = Outcome()
    found = list(read(lines().splitlines(keepends=True), outcome))
    assert [record.id for record in found] == ["r-1", "r-4"]
    assert (outcome.passed_over, outcome.damaged) == (2, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "h-w1-0.jsonl").write_bytes(lines())
    files = {"models": {"models": (BIG, SMALL)}, "policies": BY_LENGTH, "keys": {"keys": []}}
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_bytes(msgspec.json.encode(value))
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    found = ["replay", str(folder / "journal"), *more]
    for name in ("models", "policies"):
        found += [f"--{name}", str(folder / f"{name}.json")]
    return found


def test_the_command_prints_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder)) == 0
    found = capsys.readouterr().out
    assert "requests   2 in 3.0 s; 2 had reached no model" in found
    assert "damaged    1 lines are no records" in found
    assert "unchanged  0 (0.0 %)" in found
    assert "cost USD   0.002000 -> 0.000200 (-90.0 %); recorded 0.002000" in found
    assert "big   small  2         0.002000 -> 0.000200 (-90.0 %)" in found
    assert "auto/short  2" in found


def test_the_command_prints_a_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "--json", "--keys", str(folder / "keys.json"))) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["requests"], found["changes"][0]["after"]) == (2, "small")


def test_what_it_cannot_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "--policy", "none")) == 78
    assert "there is no policy 'none'" in capsys.readouterr().err
    assert main(["replay", "--config", str(folder / "none.json")]) == 78
    broken = arguments(folder)
    broken[1] = str(folder / "missing.jsonl")
    assert main(broken) == 78
    assert "missing.jsonl: cannot be read" in capsys.readouterr().err


def test_the_journal_of_this_host(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "host": "h", "listen": {}, "control_socket": str(folder / "c"), "run_dir": str(folder),
        "state_dir": str(folder), "models_file": str(folder / "models.json"), "keys_file": str(folder / "keys.json"),
        "policies_file": str(folder / "policies.json"),
    }  # fmt: skip
    (folder / "gateway.json").write_text(json.dumps(config))
    assert main(["replay", "--config", str(folder / "gateway.json"), "--policy", "auto"]) == 0
    assert "requests   2 in 3.0 s" in capsys.readouterr().out

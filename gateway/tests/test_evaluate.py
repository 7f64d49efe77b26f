"""Golden prompts end to end: asked through a worker, checked, kept, counted. And feedback and figures over HTTP."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from citadel_gateway.cli import evaluate as command
from citadel_gateway.cli.client import Failed
from citadel_gateway.cli.main import main
from citadel_gateway.control import tallies
from citadel_gateway.control.business import FEEDBACK
from citadel_gateway.control.evaluate import Run, enter, results, summaries
from citadel_gateway.control.golden import Case, Expect
from citadel_gateway.control.sql import Database
from starlette.concurrency import run_in_threadpool

from gateway.tests.client import KEY
from gateway.tests.fake_engine import FakeEngine
from gateway.tests.quality import HOST, NOW, RULES, Served, database, request, served
from gateway.tests.quality import enter as enter_requests
from gateway.tests.site import Running

__all__ = ["database", "served"]


def run_of(name: str = "first", *more: dict[str, Any]) -> Run:
    one = {"name": "a", "request_id": "r1", "verdict": "correct", "seconds": 1.5, "output_tokens": 4}
    rest = ({"name": "b", "verdict": "partial", "reason": "x"}, {"name": "c", "model": "gone", "verdict": "incorrect"})
    return Run.model_validate({"run": name, "file": "golden.jsonl", "results": [one, *rest, *more]})


def test_a_run_is_kept_once(database: Database) -> None:
    enter_requests(database, [request("r1", model="two")])
    assert enter(database, HOST, RULES, run_of(), NOW)
    assert not enter(database, HOST, RULES, run_of(), NOW)
    assert enter(database, HOST, RULES, run_of("second"), NOW + 1)
    first = summaries(database)[1]
    assert first.model_dump() == {
        "run": "first", "at": NOW, "file": "golden.jsonl", "prompts": 3, "passed": 1, "seconds": 1.5, "cost_usd": 0.5,
    }  # fmt: skip
    assert [one.run for one in summaries(database, 1)] == ["second"]
    kept = results(database, "first")
    assert [(one.name, one.model, one.verdict) for one in kept] == [
        ("a", "two", "correct"), ("b", "", "partial"), ("c", "gone", "incorrect"),
    ]  # fmt: skip
    with database.read() as connection:
        assert tallies.read(connection, HOST)[FEEDBACK] == {
            ("two", "golden", "correct"): 2, ("other", "golden", "partial"): 2, ("other", "golden", "incorrect"): 2,
        }  # fmt: skip


def golden(folder: Path, *cases: dict[str, Any]) -> str:
    path = folder / "golden.jsonl"
    path.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": "?"}], **case}) for case in cases))
    return str(path)


@pytest.fixture
async def site_of_gateway(gateway: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """gateway.json of a site whose worker runs."""
    gateway.site.config["listen"]["port"] = gateway.port
    (tmp_path / "key").write_text(KEY)
    monkeypatch.setenv("CITADEL_GATEWAY_KEY", KEY)
    return str(gateway.site.write())


GOOD, BAD = {"name": "good", "expect": {"contains": "42"}}, {"name": "bad", "expect": {"equals": "43"}}
HALF = {"name": "half", "expect": {"contains": ["42", "43"]}, "model": "one"}


async def evaluate(config: str, *arguments: str) -> int:
    return await run_in_threadpool(main, ["evaluate", "--config", config, "--model", "uno", *arguments])


async def test_the_command(
    site_of_gateway: str, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = golden(tmp_path, GOOD, BAD, HALF)
    assert await evaluate(site_of_gateway, file, "--no-record", "--run", "r") == 1
    captured = capsys.readouterr()
    assert "bad: incorrect: is not '43'" in captured.out
    assert "r: 1 of 3 passed, 12 tokens" in captured.out
    assert "3/3" in captured.err
    asked = [json.loads(one.body) for one in engine.seen]
    assert all(one["max_tokens"] == 256 and one["temperature"] == 0 and not one["stream"] for one in asked)
    assert await evaluate(site_of_gateway, file, "--no-record", "--pass", "0.3", "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert [one["verdict"] for one in whole["results"]] == ["correct", "incorrect", "partial"]
    assert "It is" not in json.dumps(whole), "answers go nowhere"


async def test_failures_count_as_wrong(
    site_of_gateway: str, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.mode = "garbage"
    assert await evaluate(site_of_gateway, golden(tmp_path, GOOD), "--no-record") == 1
    assert "good: incorrect: 50" in capsys.readouterr().out
    assert await evaluate(site_of_gateway, golden(tmp_path, GOOD), "--no-record", "--url", "http://127.0.0.1:9") == 1
    assert "no answer" in capsys.readouterr().out


async def test_what_it_needs(site_of_gateway: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = golden(tmp_path, GOOD)
    assert await evaluate(site_of_gateway, file, "--concurrency", "0") == 78
    assert await evaluate(site_of_gateway, str(tmp_path / "none")) == 78
    assert await evaluate(site_of_gateway, file) == 78, "there is no control process, and no local key"
    monkeypatch.delenv("CITADEL_GATEWAY_KEY")
    assert await evaluate(site_of_gateway, file) == 78


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (200, b"{}", "200: no chat completion"),
        (200, b'{"choices": [{"message": {"content": null}}], "model": "m"}', "does not contain 'x'"),
        (403, b'{"error": {"code": "c", "message": "m"}}', "403 c: m"),
        (500, b"oops", "500: no chat completion"),
    ],
)
def test_answers_that_are_none(status: int, body: bytes, reason: str) -> None:
    case = Case([{"role": "user"}], Expect(contains="x"), "n")
    found = command.outcome_of(case, status, {"x-request-id": "r"}, body, 1.0)
    assert (found.verdict, found.reason, found.request_id) == ("incorrect", reason, "r")


async def test_a_run_over_http(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("citadel_gateway.control.evaluate.SETTLING", (0.0,))
    served.enter(request("r1"))
    body = run_of().model_dump()
    assert (await served.ask("POST", "/admin/evaluations", "ann", body))[0] == 403
    status, summary = await served.ask("POST", "/admin/evaluations", "root", body)
    assert (status, summary["passed"], summary["prompts"]) == (201, 1, 3)
    assert (await served.ask("POST", "/admin/evaluations", "root", body))[0] == 409
    assert (await served.ask("POST", "/admin/evaluations", "root", {**body, "run": "../x"}))[0] == 400
    assert [one["run"] for one in (await served.ask("GET", "/admin/evaluations", "root"))[1]] == ["first"]
    assert len((await served.ask("GET", "/admin/evaluations/first", "root"))[1]) == 3
    assert (await served.ask("GET", "/admin/evaluations/none", "root"))[0] == 404
    found = Outcomes()
    await run_in_threadpool(command.record, served.settings, "second", "/x/golden.jsonl", found.all)
    runs = (await served.ask("GET", "/admin/evaluations", "root"))[1]
    assert (runs[0]["run"], runs[0]["file"]) == ("second", "golden.jsonl")
    with pytest.raises(Failed, match="is there already"):
        await run_in_threadpool(command.record, served.settings, "second", "golden.jsonl", found.all)


class Outcomes:
    """What `ask_all` gives."""

    all = (command.Outcome(Case([{"role": "user"}], Expect(regex="x"), "n"), "correct", "", "one", "r1", 0.5, 3, 4),)


async def test_feedback_over_http(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("citadel_gateway.control.feedback.SETTLING", (0.0,))
    served.enter(request("r1", at=time.time()), request("r2", user="bob", at=time.time()))
    body = {"request_id": "r1", "rating": 9, "correct": True, "outcome": "solved", "comment": "a secret word"}
    assert (await served.ask("POST", "/v1/feedback", "", body))[0] == 401
    assert (await served.ask("POST", "/v1/feedback", "page", body))[0] == 403
    status, found = await served.ask("POST", "/v1/feedback", "ann", body)
    assert (status, found["value_usd"], found["source"]) == (200, 5, "user")
    status, found = await served.ask("POST", "/v1/feedback", "ann", {**body, "request_id": "r2"})
    assert (status, found["error"]["message"]) == (404, "There is no such request of yours")
    status, found = await served.ask("POST", "/v1/feedback", "ann", {"request_id": "r1", "outcome": "invented"})
    assert (status, found["error"]["code"]) == (400, "invalid_request")
    assert (await served.ask("POST", "/v1/feedback", "ann", {"request_id": "r1"}))[0] == 400
    assert (await served.ask("POST", "/v1/feedback", "root", {"request_id": "r2", "correct": False}))[1][
        "source"
    ] == "judge"
    assert len((await served.ask("GET", "/v1/feedback", "ann"))[1]) == 1
    assert len((await served.ask("GET", "/v1/feedback", "root"))[1]) == 2
    assert "secret" not in caplog.text


async def test_figures_over_http(served: Served) -> None:
    now = time.time()
    served.enter(request("r1", at=now), request("r2", user="bob", at=now))
    for by, count in (("ann", 1), ("page", 2), ("root", 2)):
        status, rows = await served.ask("GET", "/v1/analytics?group_by=model", by)
        assert (status, [(one["group"], one["requests"]) for one in rows]) == (200, [("one", count)])
    assert (await served.ask("GET", "/v1/analytics", "scrape"))[0] == 403
    assert (await served.ask("GET", "/v1/analytics?group_by=user", "page"))[0] == 403
    assert len((await served.ask("GET", "/v1/analytics?group_by=user", "root"))[1]) == 2
    assert (await served.ask("GET", "/v1/analytics?from=2031-01-02&to=2031-01-01", "ann"))[0] == 400
    assert (await served.ask("GET", "/v1/analytics/adoption", "ann"))[0] == 403
    assert (await served.ask("GET", "/v1/analytics/adoption", "page"))[1][-1]["users"] == 2
    assert (await served.ask("GET", "/v1/conversations", "ann"))[1] == []


async def test_the_page_of_metrics(served: Served) -> None:
    assert served.session is not None
    async with served.session.get("/metrics", headers={"Authorization": "Bearer sk-scrape"}) as reply:
        page = await reply.text()
    assert 'llm_budget_usd{period="month"} 500' in page
    assert "# TYPE llm_feedback_total counter" in page

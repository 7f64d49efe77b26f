"""The commands of the ledger, and the ledger against the engines' counters."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from citadel_gateway.cli.main import main
from citadel_gateway.control import settler as settling
from citadel_gateway.control.reconcile import Counters, Span, canaries, engines, span
from citadel_gateway.control.segments import folder_of
from citadel_gateway.control.sql import Database
from citadel_gateway.control.sql.tables import requests, usage_daily
from citadel_gateway.records import Candidate, Why

from gateway.tests.controls import ThreadedControl, until
from gateway.tests.fake_worker import FakeJournal, opened, settled
from gateway.tests.servers import PostgresServer
from gateway.tests.site import Site

PAGE = """# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{{engine="0",model_name="one"}} {tokens_in}
# TYPE vllm:prompt_tokens_created gauge
vllm:prompt_tokens_created{{engine="0",model_name="one"}} {started}
vllm:generation_tokens_total{{engine="0",model_name="one"}} {tokens_out}
process_start_time_seconds {started}
strange line
"""


class FakeEngine:
    """Answers /metrics with counters, as vLLM does."""

    def __init__(self) -> None:
        engine = self
        self.tokens_in, self.tokens_out, self.started = 0, 0, time.time() - 1000

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the name that http.server wants
                body = engine.page().encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None: ...  # noqa: A002  # so named there

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def page(self) -> str:
        return PAGE.format(tokens_in=float(self.tokens_in), tokens_out=float(self.tokens_out), started=self.started)

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    found = FakeEngine()
    yield found
    found.stop()


@pytest.fixture
def journal(site: Site) -> Iterator[FakeJournal]:
    found = FakeJournal(folder_of(site.settings))
    yield found
    if found.descriptor >= 0:
        found.die()


@pytest.fixture
def control(site: Site, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedControl]:
    monkeypatch.setattr(settling, "INTERVAL", 0.01)
    monkeypatch.setattr("citadel_gateway.cli.reconciling.QUIET", 0.1)
    site.model("one", engine.server.server_port)
    site.model("far", 1)
    site.models[1]["backends"][0]["gateway"] = True
    found = ThreadedControl(site).start()
    yield found
    found.stop()


def serve(site: Site, engine: FakeEngine, journal: FakeJournal, name: str, *, tell: bool = True) -> None:
    """A request of 7 tokens in and 5 out, in the engine's books and in ours."""
    engine.tokens_in += 7
    engine.tokens_out += 5
    if tell:
        where = f"127.0.0.1:{engine.server.server_port}"
        journal.write(opened(name), settled(name, at=time.time(), backend=where, total_seconds=0.5))


def run(site: Site, *words: str) -> int:
    return main([*words, "--config", str(site.write())])


def entered(control: ThreadedControl, count: int) -> None:
    until(lambda: control.state.parts["settler"].counts["settled"] == count)


def test_both_sides_agree_to_the_token(
    control: ThreadedControl, site: Site, engine: FakeEngine, journal: FakeJournal, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        serve(site, engine, journal, f"a-{number}")
    entered(control, 3)
    assert run(site, "reconcile", "--exact", "--canaries", str(site.folder)) == 0
    heads, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    assert heads == ["MODEL", "TOKENS", "ENGINE", "CANARY", "LEDGER", "DIFFERENCE", "SHARE", "INEXACT", "SINCE"]
    assert [line[:8] for line in lines] == [
        ["one", "input", "21", "0", "21", "0", "0.0000%", "0"],
        ["one", "output", "15", "0", "15", "0", "0.0000%", "0"],
    ]


def test_what_the_ledger_does_not_know_is_found(
    control: ThreadedControl, site: Site, engine: FakeEngine, journal: FakeJournal, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = str(site.folder / "baseline")
    serve(site, engine, journal, "before", tell=False)
    assert run(site, "reconcile", "--save", baseline) == 0
    assert "1 models at 20" in capsys.readouterr().out
    serve(site, engine, journal, "a-1")
    entered(control, 1)
    assert run(site, "reconcile", "one", "--since", baseline, "--exact") == 0
    serve(site, engine, journal, "a-2", tell=False)
    capsys.readouterr()
    assert run(site, "reconcile", "--since", baseline, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert [(line["kind"], line["engine"], line["ledger"], line["difference"]) for line in found] == [
        ("input", 14, 7, -7),
        ("output", 10, 5, -5),
    ]
    assert found[0]["relative"] == 0.5
    assert run(site, "reconcile", "--since", baseline, "--tolerance", "0.5") == 0


def test_canaries_and_other_gateways_are_counted(
    control: ThreadedControl, site: Site, engine: FakeEngine, journal: FakeJournal
) -> None:
    folder = site.folder / "engines" / "one"
    folder.mkdir(parents=True)
    (folder / "metrics.prom").write_text(
        'citadel_engine_canary_prompt_tokens_total{model="one"} 2.000000\nother 1\n'
        'citadel_engine_canary_generation_tokens_total{model="one"} 1.000000\ncitadel_engine_canary_seconds 3\n'
    )
    engine.tokens_in, engine.tokens_out = 2 + 7, 1 + 5
    journal.write(settled("b-1", host="other", at=time.time(), backend="10.0.0.1:8000"))
    entered(control, 1)
    with_both = ("reconcile", "--exact", "--canaries", str(site.folder / "engines"), "--also", "10.0.0.1:8000")
    assert run(site, *with_both) == 0
    assert run(site, *with_both[:-2]) == 1


def test_an_engine_that_was_started_again(
    control: ThreadedControl, site: Site, engine: FakeEngine, journal: FakeJournal, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = str(site.folder / "baseline")
    serve(site, engine, journal, "a-1")
    entered(control, 1)
    assert run(site, "reconcile", "--save", baseline) == 0
    engine.tokens_in = engine.tokens_out = 0
    engine.started = time.time()
    serve(site, engine, journal, "a-2")
    entered(control, 2)
    assert run(site, "reconcile", "--since", baseline, "--exact") == 0
    assert "(restarted)" in capsys.readouterr().out


def test_it_waits_for_what_is_running(
    control: ThreadedControl, site: Site, journal: FakeJournal, capsys: pytest.CaptureFixture[str]
) -> None:
    journal.write(opened("a-1"))
    until(lambda: control.state.parts["settler"].live)
    assert run(site, "reconcile", "--wait", "0.3") == 1
    assert "1 requests are running or not settled" in capsys.readouterr().err
    assert run(site, "ledger", "check") == 1
    assert run(site, "ledger", "check", "--open") == 0


def test_from_files_without_the_control_process(
    site: Site, engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    site.model("one", engine.server.server_port)
    page = site.folder / "page"
    page.write_text(engine.page())
    assert run(site, "reconcile", "--offline", "--metrics", f"one={page}") == 0
    page.write_text("vllm:prompt_tokens_total 3\n")
    assert run(site, "reconcile", "--offline", "--metrics", f"one={page}") == 1
    assert "make a baseline first" in capsys.readouterr().err
    page.write_text("nothing 3\n")
    for words, text in (
        (("--offline", "--metrics", f"one={page}"), "has no token counters"),
        (("--offline", "--metrics", "one=/nowhere"), "No such file"),
        (("--offline", "--metrics", f"two={page}"), "two has no engine"),
        (("two",), "two has no engine"),
        (("--offline",), "needs the engines' counters"),
        (("one",), "does not answer"),
        (("--offline", "--metrics", f"one={page}", "--since", "/nowhere"), "No such file"),
    ):
        control = Path(site.settings.state_dir) / "local-key"
        control.write_text("key")
        assert run(site, "reconcile", *words) in (1, 78)
        assert text in capsys.readouterr().err


def test_counters() -> None:
    page = engines(
        'vllm:prompt_tokens_total{backend="a:1",x="}"} 2\nvllm:prompt_tokens_total{backend="b:1"} 3.0 17\n', "c:1"
    )
    assert page == {"a:1": Counters(2), "b:1": Counters(3)}
    now, before = Counters(10, 10, 100.0), Counters(4, 5, 100.5)
    assert span(now, before, 150.0) == Span(150.0, Counters(6, 5, 100.0), False)
    assert span(now, Counters(4, 11, 100.5), 150.0) == Span(100.0, now, True)
    assert span(Counters(10, 10), Counters(4, 5), 150.0) == Span(150.0, Counters(6, 5), False)
    assert span(Counters(10, 10), None, 0.0) is None
    assert canaries(Path("/nowhere")) == {}


def test_what_commands_print(
    control: ThreadedControl, site: Site, journal: FakeJournal, capsys: pytest.CaptureFixture[str]
) -> None:
    why = Why(policy="auto", choose="load", candidates=(Candidate("one", "127.0.0.1:1", 0.5, "best"),))
    journal.write(settled("a-1", why=why), settled("a-2", user="bob", at=1_900_000_001.0))
    entered(control, 2)
    span_ = ("--from", "2030-03-01", "--to", "2030-03-31")
    assert run(site, "usage", *span_) == 0
    heading, heads, *lines = capsys.readouterr().out.splitlines()
    assert heading == "2030-03-01 to 2030-03-31 (UTC)"
    assert heads.split() == ["USER", "MODEL", "REQUESTS", "REFUSED", "ERRORS", "IN", "OUT", "CACHED", "USD"]
    assert lines[-1].split() == ["total", "2", "0", "0", "14", "10", "0", "0.002000"]
    assert run(site, "usage", *span_, "--by", "user", "--user", "bob", "--csv") == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("bob,1,0,0,0,7,5,0,0,0.5,0.001")
    assert run(site, "usage", *span_, "--json") == 0
    assert json.loads(capsys.readouterr().out)["total"]["requests"] == 2
    assert run(site, "ledger", "list", "--user", "ann") == 0
    assert capsys.readouterr().out.splitlines()[1].split()[2:5] == ["a-1", "ann", "one"]
    for form in ("json", "jsonl", "csv"):
        assert run(site, "ledger", "list", "--format", form) == 0
        assert "a-2" in capsys.readouterr().out
    assert run(site, "why", "r-a-1") == 0
    assert "one at 127.0.0.1:1: not taken, score 0.5, the smallest score." in capsys.readouterr().out
    assert run(site, "why", "a-1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["decision"]["policy"] == "auto"
    assert run(site, "why", "nothing") == 1
    assert run(site, "costs") == 0
    assert run(site, "costs", "--json") == 0
    assert run(site, "usage", "--by", "host") == 1
    assert "group_by: 'host'" in capsys.readouterr().err


def test_the_check_finds_what_is_wrong(
    control: ThreadedControl, site: Site, journal: FakeJournal, capsys: pytest.CaptureFixture[str]
) -> None:
    journal.write(opened("a-1"), settled("a-1"), settled("a-2", outcome="cut"), settled("a-3"))
    entered(control, 3)
    for words in ((), ("--journal",), ("--offline",), ("--offline", "--journal")):
        assert run(site, "ledger", "check", *words) == 0
        assert capsys.readouterr().out == "3 requests of 1 users, each once; 0 open; the days add up\n"
    with control.state.database.begin() as connection:
        connection.execute(requests.delete().where(requests.c.id == "a-2"))
        connection.execute(usage_daily.update().values(output_tokens=usage_daily.c.output_tokens + 1))
    assert run(site, "ledger", "check") == 1
    assert (
        "errors 1 instead of 0, input_tokens 21 instead of 14, output_tokens 16 instead of 10"
        in capsys.readouterr().out
    )
    control.stop()
    journal.write(settled("a-1"), opened("a-4"))
    journal.raw(b"damage\n")
    assert run(site, "ledger", "check", "--offline", "--journal") == 1
    out = capsys.readouterr().out
    assert "1 requests are settled twice in the journal, the first is a-1" in out
    assert "1 requests of the journal are not in the ledger, the first is a-2" in out
    assert "1 requests were opened and never settled, the first is a-4" in out
    assert "1 lines of the journal are damaged" in out


def test_old_requests_can_go(
    control: ThreadedControl, site: Site, journal: FakeJournal, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("citadel_gateway.control.sql.reports.PRUNED", 2)
    day = 86_400
    journal.write(*(settled(f"a-{number}", at=1_900_000_000.0 + number * day) for number in range(6)))
    entered(control, 6)
    assert run(site, "ledger", "prune", "2030-03-20") == 0
    assert capsys.readouterr().out == "3 requests of the days before 2030-03-20 are deleted\n"
    assert run(site, "ledger", "check") == 0
    assert run(site, "usage", "--from", "2030-03-01", "--to", "2030-03-31", "--json") == 0
    assert json.loads(capsys.readouterr().out.partition("add up\n")[2])["total"]["requests"] == 6
    assert run(site, "audit") == 0
    assert "ledger.prune" in capsys.readouterr().out
    assert run(site, "ledger", "prune", "yesterday") == 1


def test_migrate(site: Site, postgres_server: PostgresServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(site, "migrate") == 0
    assert capsys.readouterr().out.startswith("migrated: sqlite:///")
    assert run(site, "migrate") == 0
    assert capsys.readouterr().out.startswith("up to date: sqlite:///")
    assert Database(site.settings).healthy()
    where = {"url": postgres_server.url, "password_file": str(postgres_server.password_file), "schema": "migrated"}
    site.config["database"] = where
    assert run(site, "migrate") == 0
    out = capsys.readouterr().out
    assert out.startswith("migrated: postgresql")
    assert postgres_server.password not in out
    site.config["database"] = {**where, "url": "postgresql+psycopg://citadel@127.0.0.1:1/citadel"}
    assert run(site, "migrate") == 1
    assert "the database does not answer" in capsys.readouterr().err
    assert run(site, "ledger", "check", "--offline") == 1

"""From the journal into the ledger: each request once, whatever dies, breaks or goes away in between."""

import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
from citadel_gateway.control import settler as module
from citadel_gateway.control.segments import folder_of
from citadel_gateway.control.settler import Live, Settler
from citadel_gateway.control.sql import Database
from citadel_gateway.control.sql.tables import journal_offsets, requests, usage_daily
from citadel_gateway.core.pricing import Prices
from citadel_gateway.records import Running, Settled, Why, encode
from citadel_gateway.settings import Address, Gateway, Hardware, Journal, Model, Price
from citadel_gateway.settings import Database as Where
from sqlalchemy import Connection, func, insert, select

from gateway.tests.client import until
from gateway.tests.fake_worker import FakeJournal, opened, progress, settled
from gateway.tests.servers import PostgresServer
from gateway.tests.site import Site

PRICES = Prices(Hardware(), (Model("one", (Address("127.0.0.1", 1),), price=Price(output_mtoken=1000)),))


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, site: Site) -> Gateway:
    if request.param == "sqlite":
        return site.settings
    server: PostgresServer = request.getfixturevalue("postgres_server")
    where = Where(url=server.url, password_file=str(server.password_file), schema=f"s{uuid.uuid4().hex}")
    return msgspec.structs.replace(site.settings, database=where)


@pytest.fixture
def database(settings: Gateway) -> Iterator[Database]:
    found = Database(settings)
    yield found
    found.close()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


Make = Callable[[], Settler]


@pytest.fixture
def make(settings: Gateway, database: Database, clock: Clock) -> Iterator[Make]:
    made: list[Settler] = []

    def one() -> Settler:
        made.append(Settler(settings, database, lambda: PRICES, clock=clock))
        return made[-1]

    yield one
    for settler in made:
        settler.folder.close()


@pytest.fixture
def settler(make: Make) -> Settler:
    return make()


@pytest.fixture
def journal(settings: Gateway) -> Iterator[FakeJournal]:
    found = FakeJournal(folder_of(settings))
    yield found
    if found.descriptor >= 0:
        found.die()


def work(settler: Settler, clock: Clock) -> None:
    """Until there is nothing more; long enough for a dead worker to be believed dead."""
    for _ in range(2):
        clock.now += 2
        while settler.step():
            pass


def ledger(database: Database) -> dict[str, str]:
    """Outcomes by id; and what they add up to must be what the days say."""
    columns = ("input_tokens", "output_tokens", "cached_tokens", "cost_usd", "engine_seconds")
    with database.read() as connection:
        found = connection.execute(select(requests.c.id, requests.c.outcome)).all()
        sums = connection.execute(select(*(func.sum(requests.c[name]) for name in columns))).one()
        days = connection.execute(
            select(*(func.sum(usage_daily.c[name]) for name in columns), func.sum(usage_daily.c.requests))
        ).one()
    assert tuple(sums) == tuple(days[:-1])
    assert (days[-1] or 0) == len(found)
    return {row.id: row.outcome for row in found}


def test_records_become_rows(settler: Settler, journal: FakeJournal, database: Database, clock: Clock) -> None:
    why = {"policy": "auto", "candidates": [["one", "127.0.0.1:1", 0.5, "best"]]}
    full = settled("a-1", traceparent="00-1", overage=True, cached_tokens=3, why=msgspec.convert(why, Why))
    journal.write(opened("a-1"), full, settled("a-2", outcome="limited", status=429, input_tokens=0, output_tokens=0))
    journal.write(settled("a-3", user="bob", at=1_900_000_000 + 86_400))
    work(settler, clock)
    assert ledger(database) == {"a-1": "ok", "a-2": "limited", "a-3": "ok"}
    with database.read() as connection:
        row = connection.execute(select(requests).where(requests.c.id == "a-1")).mappings().one()
        for field in full.__struct_fields__:
            name = {"user": "user_id", "key": "key_id"}.get(field, field)
            if field != "why":
                assert row[name] == getattr(full, field), field
        assert (row["day"], row["why"]) == ("2030-03-17", why)
        days = connection.execute(select(usage_daily).order_by(usage_daily.c.day)).mappings().all()
    assert [(day["day"], day["user_id"], day["requests"], day["refused"]) for day in days] == [
        ("2030-03-17", "ann", 2, 1),
        ("2030-03-18", "bob", 1, 0),
    ]
    assert days[0]["overage_tokens"] == 12
    assert settler.figures()["llm_gateway_journal_settled_total"] == 3


def test_a_record_counts_once_however_often_it_is_read(
    make: Make, journal: FakeJournal, database: Database, clock: Clock
) -> None:
    journal.write(settled("a-1"), settled("a-1"), opened("a-2"), settled("a-3"))
    first = make()
    work(first, clock)
    journal.write(settled("a-4"))
    again = make()  # reads from the request that is open on
    told: list[str] = []
    again.subscribe(lambda batch: told.extend(record.id for record in batch))
    work(again, clock)
    assert set(ledger(database)) == {"a-1", "a-3", "a-4"}
    assert told == ["a-4"]
    assert again.live.keys() == {"a-2"}
    journal.write(settled("a-2"))
    work(first, clock)
    work(again, clock)
    assert len(ledger(database)) == 4
    assert not first.live
    assert not again.live


def test_segments_follow_each_other(settler: Settler, database: Database, settings: Gateway, clock: Clock) -> None:
    journal = FakeJournal(folder_of(settings), size=2000)
    journal.write(opened("long"))
    for number in range(30):
        journal.write(opened(f"a-{number}"), settled(f"a-{number}"))
    assert journal.number > 3
    work(settler, clock)
    assert len(ledger(database)) == 30
    left = [segment.number for segment in settler.folder]
    assert left == [0, journal.number]  # one has a request that is still open
    journal.write(settled("long"))
    work(settler, clock)
    assert [segment.number for segment in settler.folder] == [journal.number]
    journal.die()


def test_what_a_dead_worker_left_is_settled_once(
    make: Make, journal: FakeJournal, database: Database, settings: Gateway, clock: Clock
) -> None:
    class Books:
        told: list[tuple[str, int]] = []  # noqa: RUF012  # of this test alone

        def settle_lost(self, user: str, tokens: int, at: float, id: str) -> None:  # noqa: A002  # as Books names it
            self.told.append((id, tokens))
            if len(self.told) == 1:
                raise OSError("Redis is away")

    journal.write(opened("a-1"), opened("a-2", tier="premium"), progress(Running("a-1", 9, 3, 0.25)))
    journal.rotate()
    journal.write(progress(Running("a-1", 9, 4, 0.5)), settled("a-3"))
    first, second = make(), make()
    first.books = books = Books()
    work(first, clock)
    assert set(ledger(database)) == {"a-3"}
    other = FakeJournal(folder_of(settings), start=2)  # its successor
    other.write(opened("b-1"))
    journal.die()
    work(first, clock)
    work(second, clock)
    assert ledger(database) == {"a-1": "lost", "a-2": "lost", "a-3": "ok"}
    with database.read() as connection:
        row = connection.execute(select(requests).where(requests.c.id == "a-1")).mappings().one()
        assert (row["input_tokens"], row["output_tokens"], row["engine_seconds"]) == (9, 4, 0.5)
        assert (row["cost_usd"], row["cost"], row["exact"]) == (0.004, {"tokens": 0.004}, False)
        assert (row["total_seconds"], row["code"]) == (2.0, "worker_lost")
    assert books.told == [("a-1", 13), ("a-2", 0)]
    clock.now += 61
    work(first, clock)
    assert books.told == [("a-1", 13), ("a-2", 0), ("a-1", 13)]
    assert first.counts["lost"] == 2
    assert second.counts["lost"] == 0
    assert first.live.keys() == {"b-1"}
    other.die()


def test_damaged_lines_are_counted_and_skipped(
    settler: Settler, journal: FakeJournal, database: Database, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    journal.write(settled("a-1"))
    journal.raw(b'{"kind":"settled","id":\n\xff\xfe\n{}\n[]\n' + b'{"kind":"strange"}\n')
    journal.write(settled("a-2", user="zero\0zero", request_id="\\u0000 \\"))
    journal.write(settled("a-3", bytes_in=2**70), settled("a-4"))
    work(settler, clock)
    rejected = settler.counts["rejected"]
    assert {"a-1", "a-2", "a-4"} <= set(ledger(database))
    assert rejected == (0 if database.sqlite else 1)
    assert settler.figures()["llm_gateway_journal_damaged_total"] == 5
    assert caplog.text.count("is damaged and was skipped") == 1
    with database.read() as connection:
        row = connection.execute(select(requests).where(requests.c.id == "a-2")).mappings().one()
        assert (row["user_id"], row["request_id"]) == ("zerozero", "\\u0000 \\")
        assert connection.execute(select(journal_offsets.c.damaged)).scalar() == 5


def test_half_a_line_waits_or_is_broken(
    settler: Settler, journal: FakeJournal, database: Database, clock: Clock
) -> None:
    line = encode(settled("a-2")) + b"\n"
    journal.write(settled("a-1"))
    journal.raw(line[:40])
    work(settler, clock)
    assert set(ledger(database)) == {"a-1"}
    journal.raw(line[40:] + line[:40])
    work(settler, clock)
    assert set(ledger(database)) == {"a-1", "a-2"}
    assert settler.counts["damaged"] == 0
    journal.die()  # in the middle of a line
    work(settler, clock)
    assert settler.counts["damaged"] == 1
    assert list(settler.folder) == []


def test_a_hole_in_a_dead_workers_segment_is_passed_over(
    settler: Settler, journal: FakeJournal, database: Database, clock: Clock
) -> None:
    journal.write(settled("a-1"))
    journal.used += 4096  # a page that never reached the disk
    journal.write(settled("a-2"), settled("a-3"))
    work(settler, clock)
    assert set(ledger(database)) == {"a-1"}
    journal.die()
    work(settler, clock)
    assert set(ledger(database)) == {"a-1", "a-2", "a-3"}
    assert settler.counts["damaged"] == 0


def test_a_worker_that_starts_in_vain_leaves_nothing(
    settler: Settler, settings: Gateway, database: Database, clock: Clock
) -> None:
    for start in range(5):
        FakeJournal(folder_of(settings), start=start).die()
    one = FakeJournal(folder_of(settings), start=9)
    one.write(settled("a-1"), settled("a-2"))
    one.die()
    work(settler, clock)
    assert set(ledger(database)) == {"a-1", "a-2"}
    (left,) = folder_of(settings).iterdir()
    assert left.name == "test-w1-9-0.jsonl"
    assert left.read_bytes() == encode(settled("a-1")) + b"\n" + encode(settled("a-2")) + b"\n"


def test_a_line_longer_than_a_chunk(
    settler: Settler, settings: Gateway, database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = FakeJournal(folder_of(settings), size=4 << 20)
    journal.write(settled("a-1", session="s" * (1 << 21)), settled("a-2"))
    work(settler, clock)
    assert set(ledger(database)) == {"a-1", "a-2"}
    journal.die()


def test_a_segment_that_is_not_locked_yet_is_no_dead_one(
    settler: Settler, settings: Gateway, database: Database, clock: Clock
) -> None:
    folder = folder_of(settings)
    folder.mkdir(parents=True)
    (folder / "test-w1-1-0.jsonl").write_bytes(bytes(100))
    (folder / "something else").touch()
    settler.step()
    assert len(list(settler.folder)) == 1
    (folder / "test-w1-1-0.jsonl").write_bytes(encode(settled("a-1")) + b"\n")
    settler.step()
    assert set(ledger(database)) == {"a-1"}


def test_two_control_processes_on_one_database(
    settings: Gateway, database: Database, journal: FakeJournal, clock: Clock, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    far = msgspec.structs.replace(settings, host="other", journal=Journal(folder=str(tmp_path / "other")))
    theirs = FakeJournal(tmp_path / "other", host="other")
    both = [Settler(one, database, lambda: PRICES, clock=clock) for one in (settings, far)]
    for number in range(50):
        journal.write(settled(f"a-{number}"))
        theirs.write(settled(f"b-{number}"))
        if number % 10 == 0:
            for settler in both:
                settler.step()
    for settler in both:
        work(settler, clock)
        settler.folder.close()
    assert len(ledger(database)) == 100
    theirs.die()


def test_old_segments_are_removed(
    settings: Gateway, make: Make, journal: FakeJournal, database: Database, clock: Clock
) -> None:
    settler = make()
    now = journal.path.stat().st_mtime
    settler.wall = lambda: now
    journal.write(settled("a-1"))
    journal.rotate()
    journal.write(settled("a-2"))
    work(settler, clock)
    assert len(list(folder_of(settings).iterdir())) == 2
    settler.wall = lambda: now + 24 * 3600 + 60
    clock.now += 61
    settler.step()
    assert [path.name for path in folder_of(settings).iterdir()] == [journal.path.name]
    assert set(ledger(database)) == {"a-1", "a-2"}
    assert make().offsets is None
    with database.read() as connection:
        assert connection.execute(select(func.count()).select_from(journal_offsets)).scalar() == 1


def test_others_in_the_same_transaction(
    settler: Settler, journal: FakeJournal, database: Database, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def good(connection: Connection, batch: Sequence[Settled]) -> None:
        connection.execute(insert(journal_offsets).values([{"segment": record.id} for record in batch]))

    def bad(connection: Connection, batch: Sequence[Settled]) -> None:
        connection.execute(insert(journal_offsets).values(segment="never"))
        raise ValueError

    def deaf(batch: Sequence[Settled]) -> None:
        raise ValueError

    settler.within(good)
    settler.within(bad)
    settler.subscribe(deaf)
    journal.write(settled("a-1"))
    work(settler, clock)
    journal.write(settled("a-2"), settled("a-1"))
    work(settler, clock)
    assert set(ledger(database)) == {"a-1", "a-2"}
    with database.read() as connection:
        names = set(connection.execute(select(journal_offsets.c.segment)).scalars())
    assert names == {"a-1", "a-2", journal.path.name}
    assert caplog.text.count("failed for a batch") == 2


def test_what_is_not_settled_yet_can_be_found(
    settler: Settler, journal: FakeJournal, database: Database, clock: Clock
) -> None:
    journal.write(opened("a-1"), progress(Running("a-1", 9, 3, 0.25)))
    work(settler, clock)
    found = settler.find("r-a-1")
    assert isinstance(found, Live)
    assert found.running == Running("a-1", 9, 3, 0.25)
    journal.write(opened("a-2"), settled("a-3"), opened("a-3"))  # nobody has read these
    assert isinstance(settler.find("a-2"), Live)
    assert isinstance(settler.find("r-a-3"), Settled)
    assert settler.find("a") is None
    assert settler.find("a-4") is None


async def test_the_thread_catches_up_when_the_database_is_back(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.01)
    monkeypatch.setattr("citadel_gateway.control.sql.engine.REST_SECONDS", 0.05)
    server = PostgresServer().start()
    where = Where(url=server.url, password_file=str(server.password_file))
    settings = msgspec.structs.replace(site.settings, database=where)
    database = Database(settings)
    journal = FakeJournal(folder_of(settings))
    settler = Settler(settings, database, lambda: PRICES)
    settler.start()
    try:
        journal.write(settled("a-1"))
        await until(lambda: settler.counts["settled"] == 1)
        server.kill()
        journal.write(opened("a-2"), settled("a-2"), opened("a-3"))
        await until(lambda: database.away)
        assert isinstance(settler.find("a-2"), Settled)
        assert settler.figures()["llm_gateway_journal_lag_seconds"] > 0
        server.start()
        await until(lambda: settler.counts["settled"] == 2)
        await until(lambda: not database.away)
        journal.write(settled("a-3"))
        settler.stop()  # reads to the end
        assert set(ledger(database)) == {"a-1", "a-2", "a-3"}
        assert caplog.text.count("the database is away") == 1
    finally:
        settler.stop()
        journal.die()
        database.close()
        server.remove()

"""The database itself: tables, migrations, transactions, and being away. On SQLite and on a real PostgreSQL."""

import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from citadel_gateway.control.sql import Database, DatabaseAwayError, engine, metadata
from citadel_gateway.control.sql.tables import changes, requests, usage_daily, users
from citadel_gateway.settings import ConfigError, Gateway
from citadel_gateway.settings import Database as Where
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

from gateway.tests.servers import PostgresServer
from gateway.tests.site import Site

Make = Callable[[], Database]


def at(settings: Gateway, server: PostgresServer, schema: str) -> Gateway:
    where = Where(url=server.url, password_file=str(server.password_file), schema=schema)
    return msgspec.structs.replace(settings, database=where)


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, site: Site) -> Gateway:
    """Settings of a gateway whose database is new."""
    if request.param == "sqlite":
        return site.settings
    return at(site.settings, request.getfixturevalue("postgres_server"), f"Test {uuid.uuid4().hex}")


@pytest.fixture
def make(settings: Gateway) -> Iterator[Make]:
    made: list[Database] = []

    def one() -> Database:
        made.append(Database(settings))
        return made[-1]

    yield one
    for database in made:
        database.close()


def test_the_migrations_make_the_tables_that_the_program_knows(make: Make) -> None:
    database = make()
    assert database.healthy()
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
        assert connection.execute(select(changes)).all() == [(1, 0)]


def test_two_processes_that_start_together_migrate_once(make: Make) -> None:
    databases = [make() for _ in range(4)]
    threads = [threading.Thread(target=database.migrate) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(database.ready for database in databases)
    with databases[0].read() as connection:
        assert connection.execute(text("SELECT count(*) FROM alembic_version")).scalar() == 1


def test_tables_of_a_newer_release_are_left_alone(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    first = make()
    with first.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    assert make().healthy()
    assert "newer release (9999)" in caplog.text


def test_a_transaction_is_whole(make: Make) -> None:
    database = make()
    add = insert(users).values(id="ann")
    with pytest.raises(ZeroDivisionError), database.begin() as connection:
        connection.execute(add.values(created_at=connection.execute(add).rowcount // 0))
    with database.read() as connection:
        assert connection.execute(select(func.count()).select_from(users)).scalar() == 0


def test_a_wrong_statement_is_no_outage(make: Make) -> None:
    database = make()
    with pytest.raises(IntegrityError), database.begin() as connection:
        connection.execute(insert(users).values([{"id": "ann"}, {"id": "ann"}]))
    with pytest.raises((ProgrammingError, OperationalError)), database.read() as connection:
        connection.execute(text("SELECT * FROM nothing_of_the_kind"))
    assert not database.away
    assert database.healthy()


def test_money_is_whole_nano_dollars(make: Make) -> None:
    database = make()
    key = {"day": "2031-01-01", "user_id": "ann", "key_id": "k", "model": "one"}
    with database.begin() as connection:
        connection.execute(insert(usage_daily).values(**key, cost_usd=0.1))
        for _ in range(9):
            connection.execute(update(usage_daily).values(cost_usd=usage_daily.c.cost_usd + 0.1))
        assert connection.execute(select(usage_daily.c.cost_usd)).scalar() == 1.0
        assert connection.execute(select(func.sum(usage_daily.c.cost_usd))).scalar() == 1.0
        assert connection.execute(text("SELECT cost_nanousd FROM usage_daily")).scalar() == 1_000_000_000
        assert connection.execute(select(func.sum(requests.c.cost_usd))).scalar() is None


def test_writers_wait_for_each_other(make: Make) -> None:
    databases = [make(), make()]

    def add(database: Database) -> None:
        for _ in range(20):
            with database.begin() as connection:
                found = connection.execute(select(changes.c.version).with_for_update()).scalar_one()
                connection.execute(update(changes).values(version=found + 1))

    threads = [threading.Thread(target=add, args=(database,)) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    with databases[0].read() as connection:
        assert connection.execute(select(changes.c.version)).scalar() == 40


def test_reading_waits_for_nobody(make: Make) -> None:
    database = make()
    database.migrate()
    with database.begin() as writing:
        writing.execute(insert(users).values(id="ann"))
        with database.read() as reading:
            assert reading.execute(select(users)).all() == []


def test_what_is_read_is_of_one_moment(make: Make) -> None:
    database = make()
    count = select(func.count()).select_from(users)
    with database.read() as reading:
        assert reading.execute(count).scalar() == 0
        with database.begin() as writing:
            writing.execute(insert(users).values(id="ann"))
        assert reading.execute(count).scalar() == 0
    with database.begin() as again:  # the same connection may come back: it sees what others have done
        assert again.execute(count).scalar() == 1


def test_the_file_is_nobody_elses(site: Site) -> None:
    database = Database(site.settings)
    database.migrate()
    assert (Path(site.settings.state_dir) / engine.FILE).stat().st_mode & 0o007 == 0
    database.close()


def test_other_databases_are_refused(site: Site) -> None:
    settings = msgspec.structs.replace(site.settings, database=Where(url="mysql://root@127.0.0.1/x"))
    with pytest.raises(ConfigError, match="neither postgresql nor sqlite"):
        Database(settings)


def test_away_is_said_at_once_and_over_when_it_is_back(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    server = PostgresServer().start()
    now = [0.0]
    database = Database(at(site.settings, server, "away"), clock=lambda: now[0])
    try:
        assert database.healthy()
        server.kill()
        for _ in range(3):
            with pytest.raises(DatabaseAwayError), database.begin():
                pass
        assert caplog.text.count("the database is away") == 1
        with pytest.raises(DatabaseAwayError, match="a moment ago"), database.begin():
            pass
        server.start()
        assert not database.healthy()  # nobody has asked again yet
        now[0] = 2.0
        assert database.healthy()
        assert "the database answers again" in caplog.text
        Path(server.password_file).unlink()
        database.engine.dispose()
        assert not database.healthy()
    finally:
        database.close()
        server.remove()


def test_nothing_is_shown_of_what_is_stored(make: Make) -> None:
    database = make()
    with pytest.raises(IntegrityError) as caught, database.begin() as connection:
        connection.execute(insert(users), [{"id": "ann", "name": "Ann Private"}] * 2)
    assert "Private" not in str(caught.value)


def test_a_name_in_libpq_options_is_quoted() -> None:
    assert engine.quoted('a "b" c') == '"a\\ ""b""\\ c"'

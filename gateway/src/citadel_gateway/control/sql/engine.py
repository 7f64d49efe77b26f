"""The way to the database: PostgreSQL where the settings name one, else SQLite in the state folder.

Nothing here is on a generation's path. A database that is away costs its users an answer of 503 and nothing else:
connecting has a short bound, and after a failure nobody tries again for a second.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Table, create_engine, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry

from citadel_gateway.control.sql.migrate import upgrade
from citadel_gateway.settings import ConfigError, Gateway

log = logging.getLogger("citadel_gateway")

CONNECT_SECONDS = 3
STATEMENT_SECONDS = 60
BUSY_SECONDS = 15  # that SQLite waits for another writer
REST_SECONDS = 1.0  # after a failed connection
FILE = "gateway.sqlite"

Insert = postgresql.Insert | sqlite.Insert


class DatabaseAwayError(Exception):
    """The database cannot be asked just now. Nothing was changed."""


class Database:
    """One pool of connections; used from any thread. The first use brings the tables up to date."""

    def __init__(self, settings: Gateway, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings.database
        self.url = make_url(self.settings.url or f"sqlite:///{Path(settings.state_dir) / FILE}")
        self.clock = clock
        self.sqlite = self.url.get_backend_name() == "sqlite"
        if not self.sqlite and self.url.get_backend_name() != "postgresql":
            raise ConfigError(f"database.url: {self.url.get_backend_name()!r} is neither postgresql nor sqlite")
        self.engine = self._sqlite() if self.sqlite else self._postgresql()
        self.ready = False  # the tables are up to date
        self.lock = threading.Lock()
        self.rest_until = 0.0
        self.away = False

    def _sqlite(self) -> Engine:
        engine = create_engine(
            self.url, hide_parameters=True, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}
        )

        @event.listens_for(engine, "connect")
        def connected(connection: Any, entry: ConnectionPoolEntry) -> None:
            connection.isolation_level = None  # transactions are begun below, not by the driver's guess
            write_ahead(connection)
            for pragma in ("synchronous=FULL", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}")

        @event.listens_for(engine, "begin")
        def begun(connection: Connection) -> None:
            # A transaction that will write says so at once: one that turns from reading to writing can fail.
            reading = connection.get_execution_options().get("reading", False)
            connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

        return engine

    def _postgresql(self) -> Engine:
        url = self.url.set(drivername="postgresql+psycopg")
        engine = create_engine(
            url,
            hide_parameters=True,  # a comment of a user has no place in a log
            pool_size=4,
            max_overflow=8,
            pool_timeout=CONNECT_SECONDS,
            pool_pre_ping=True,
            pool_recycle=1800,
            connect_args={
                "connect_timeout": CONNECT_SECONDS,
                "application_name": "citadel-gateway",
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 15_000,
                "options": f"-c search_path={quoted(self.settings.schema)} -c timezone=UTC"
                f" -c statement_timeout={STATEMENT_SECONDS}s -c idle_in_transaction_session_timeout=60s",
            },
        )

        @event.listens_for(engine, "do_connect")
        def connecting(dialect: Any, record: Any, arguments: Any, keywords: dict[str, Any]) -> None:
            # Read each time, so that a changed password needs no restart.
            if self.settings.password_file:
                try:
                    keywords["password"] = Path(self.settings.password_file).read_text(encoding="utf-8").strip()
                except OSError as error:
                    raise DatabaseAwayError(f"{self.settings.password_file}: {error.strerror}") from None

        return engine

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A transaction that may write. Committed at the end, rolled back by an exception."""
        with self._transaction({}) as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads: it waits for nobody, and all that it sees is of one moment."""
        moment = {} if self.sqlite else {"isolation_level": "REPEATABLE READ"}  # SQLite has nothing else
        with self._transaction({"reading": True, **moment}) as connection:
            yield connection

    @contextmanager
    def _transaction(self, options: dict[str, Any]) -> Iterator[Connection]:
        self._check_rest()
        try:
            if not self.ready:
                self.migrate()
            with self.engine.connect().execution_options(**options) as connection, connection.begin():
                yield connection
        except (DBAPIError, PoolTimeoutError, DatabaseAwayError) as error:
            if not is_away(error):
                raise
            self._failed(error)
            raise DatabaseAwayError(reason(error)) from error
        if self.away:
            self.away = False
            log.warning("the database answers again")

    def _check_rest(self) -> None:
        if self.clock() < self.rest_until:
            raise DatabaseAwayError("the database was away a moment ago")

    def _failed(self, error: Exception) -> None:
        self.rest_until = self.clock() + REST_SECONDS
        if not self.away:
            self.away = True
            log.error("the database is away: %s", reason(error))

    def migrate(self) -> None:
        """Make the schema and bring its tables up to date; one process at a time."""
        with self.lock:
            if not self.ready:
                self._upgrade()

    def upgrade(self) -> tuple[str, str]:
        """`migrate` for an operator: the revisions before (empty: none) and after. Raises `DatabaseAwayError`."""
        try:
            return self._upgrade()
        except (DBAPIError, PoolTimeoutError) as error:
            if not is_away(error):
                raise
            raise DatabaseAwayError(reason(error)) from error

    def _upgrade(self) -> tuple[str, str]:
        if self.sqlite and self.url.database not in (None, "", ":memory:"):
            Path(str(self.url.database)).touch(mode=0o640)  # the ledger is nobody else's to read
        with self.engine.connect() as connection, connection.begin():
            if not self.sqlite:
                make_schema(connection, self.settings.schema)
            found = upgrade(connection)
        self.ready = True
        return found

    def healthy(self) -> bool:
        """Whether the database answers."""
        try:
            with self.read() as connection:
                connection.execute(text("SELECT 1"))
        except (DatabaseAwayError, SQLAlchemyError):
            return False
        return True

    def insert(self, table: Table) -> Insert:
        """An insert of this database's own kind, which has `on_conflict_do_nothing` and `on_conflict_do_update`."""
        return sqlite.insert(table) if self.sqlite else postgresql.insert(table)

    def close(self) -> None:
        self.engine.dispose()


def write_ahead(connection: sqlite3.Connection) -> None:
    """Let readers and a writer of SQLite not wait for each other. The file remembers it; of several that find a new
    file, those that come second are refused at once and must try again: the wait for locks is not for this.
    """
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")  # nothing to do when it is on already
        except sqlite3.OperationalError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return


def quoted(name: str) -> str:
    """An identifier inside libpq's `options`, where a blank and a backslash are escaped."""
    return '"' + name.replace('"', '""').replace("\\", "\\\\").replace(" ", "\\ ") + '"'


def make_schema(connection: Connection, schema: str) -> None:
    """Only when it is not there: making one needs a right that the gateway's role need not have. The lock is held to
    the end of the transaction, so that two hosts that start together migrate one after the other.
    """
    connection.execute(
        text("SELECT pg_advisory_xact_lock(hashtext('citadel_gateway'), hashtext(:name))"), {"name": schema}
    )
    found = connection.execute(text("SELECT 1 FROM pg_namespace WHERE nspname = :name"), {"name": schema}).first()
    if found is None:
        name = connection.dialect.identifier_preparer.quote_identifier(schema)
        connection.execute(text(f"CREATE SCHEMA {name}"))


BUSY = {"SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY"}
# Connection, resources, shutdown and timeouts, failed systems; a read-only standby, and transactions to be repeated.
AWAY_CLASSES = {"08", "53", "57", "58"}
AWAY_STATES = {"25006", "40001", "40P01", "55P03"}


def is_away(error: Exception) -> bool:
    """Whether asking again later may help, as against a statement that is wrong."""
    if not isinstance(error, DBAPIError) or error.connection_invalidated:
        return True
    if isinstance(error.orig, sqlite3.Error):
        return "_".join(getattr(error.orig, "sqlite_errorname", "").split("_")[:2]) in BUSY
    state = getattr(error.orig, "sqlstate", None)
    if state is None:  # no word from the server at all
        return type(error.orig).__name__ in {"OperationalError", "ConnectionTimeout", "InterfaceError"}
    return state[:2] in AWAY_CLASSES or state in AWAY_STATES


def reason(error: Exception) -> str:
    """One line, without the statement and its values."""
    found = getattr(error, "orig", None) or error
    return str(found).strip().split("\n")[0][:200]

"""All tables. Moments are seconds since the epoch, days are text ("2031-05-17", UTC), money is whole nano-dollars.

Money is counted in whole numbers so that a sum is the same in any order: what `ledger check` compares is equal, not
nearly equal. In Python a column of money is a float of dollars, also after `func.sum`.
"""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.engine import Dialect

NANO = 1_000_000_000

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class Usd(TypeDecorator[float]):
    """Dollars in Python, nano-dollars in the database."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> int | None:
        return None if value is None else round(value * NANO)

    def process_result_value(self, value: Any, dialect: Dialect) -> float | None:
        return None if value is None else int(value) / NANO


# SQLite counts only a column of exactly this type by itself.
Serial = BigInteger().with_variant(Integer, "sqlite")
EMPTY = text("''")
ZERO = text("0")


def word(name: str, **more: Any) -> Column[str]:
    """Text that is never null."""
    return Column(name, Text, nullable=False, server_default=EMPTY, **more)


def count(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False, server_default=ZERO)


def seconds(name: str) -> Column[float]:
    return Column(name, Double, nullable=False, server_default=ZERO)


def money(name: str = "cost_usd") -> Column[float]:
    """The column is called cost_nanousd in the database, and cost_usd here."""
    return Column(name.replace("_usd", "_nanousd"), Usd, key=name, nullable=False, server_default=ZERO)


# People -------------------------------------------------------------------------------------------------------------

users = Table(
    "users",
    metadata,
    Column("id", Text, primary_key=True),
    word("name"),
    word("tier"),
    word("use_case"),
    Column("enabled", Boolean, nullable=False, server_default=text("true")),
    seconds("created_at"),
    word("created_by"),
    seconds("updated_at"),
)

keys = Table(
    "keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("user_id", Text, nullable=False, index=True),
    Column("sha256", Text, nullable=False, unique=True),
    Column("scopes", JSON, nullable=False),  # a list of words
    Column("models", JSON, nullable=False),
    word("use_case"),
    seconds("expires_at"),  # 0: never
    seconds("created_at"),
    word("created_by"),
    seconds("revoked_at"),  # 0: not revoked
    word("revoked_by"),
    word("rotated_from"),  # the id of the key that this one replaces
)

# What operators have changed at run time; `value` and `declared` (what the files said at that moment) are JSON.
overrides = Table(
    "overrides",
    metadata,
    Column("kind", Text, primary_key=True),  # drain, weight, alias, policy, tier, user, key, …
    Column("name", Text, primary_key=True),
    Column("field", Text, primary_key=True, server_default=EMPTY),
    Column("value", JSON, nullable=False),
    Column("declared", JSON),
    seconds("at"),
    word("who"),
    word("host"),  # empty: holds on every host
)

audit = Table(
    "audit",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("at", Double, nullable=False, index=True),
    word("who"),  # the user, or "root" for who may use the control socket's own key
    word("key_id"),
    word("via"),  # admin, cli, graphql
    word("host"),
    word("request_id"),
    word("action"),  # key.create, model.drain, …
    word("target"),
    Column("before", JSON),
    Column("after", JSON),
)

# One row: whoever changes users, keys or overrides adds one to the version, and every control process looks at it.
changes = Table(
    "changes",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    count("version"),
    CheckConstraint("id = 1", name="one_row"),
)

# Ledger -------------------------------------------------------------------------------------------------------------

# One row for each settled request: the fields of `records.Settled`.
requests = Table(
    "requests",
    metadata,
    Column("id", Text, primary_key=True),
    word("request_id"),
    Column("at", Double, nullable=False),
    Column("day", Text, nullable=False),
    word("host"),
    Column("worker", Integer, nullable=False, server_default=ZERO),
    word("user_id"),
    word("key_id"),
    word("tier"),
    word("model"),
    word("endpoint"),
    Column("status", Integer, nullable=False, server_default=ZERO),
    word("outcome"),
    word("code"),
    Column("stream", Boolean, nullable=False, server_default=text("false")),
    word("session"),
    word("use_case"),
    word("asked"),
    word("backend"),
    count("reserved"),
    count("input_tokens"),
    count("output_tokens"),
    count("cached_tokens"),
    Column("exact", Boolean, nullable=False, server_default=text("false")),
    Column("overage", Boolean, nullable=False, server_default=text("false")),
    seconds("queue_seconds"),
    seconds("first_byte_seconds"),
    seconds("total_seconds"),
    seconds("engine_seconds"),
    money(),
    Column("cost", JSON, nullable=False),  # dollars by component
    Column("tries", Integer, nullable=False, server_default=ZERO),
    count("bytes_in"),
    count("bytes_out"),
    word("client"),
    word("traceparent"),
    Column("why", JSON, nullable=False),
    Index("ix_requests_at", "at"),
    Index("ix_requests_user_at", "user_id", "at"),
    Index("ix_requests_request_id", "request_id"),
)

# What `requests` adds up to, kept when old requests are deleted.
usage_daily = Table(
    "usage_daily",
    metadata,
    Column("day", Text, primary_key=True),
    Column("user_id", Text, primary_key=True),
    Column("key_id", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    count("requests"),
    count("refused"),  # of these: refused, limited or not served
    count("errors"),
    count("inexact"),  # of these: the engine did not say how many tokens there were
    count("input_tokens"),
    count("output_tokens"),
    count("cached_tokens"),
    count("overage_tokens"),
    seconds("engine_seconds"),
    money(),
)

# How far the journal's segments are in the ledger. `segment` names host and worker.
journal_offsets = Table(
    "journal_offsets",
    metadata,
    Column("segment", Text, primary_key=True),
    word("host"),
    count("offset"),
    count("settled"),  # records
    count("damaged"),  # lines
    Column("done", Boolean, nullable=False, server_default=text("false")),
    seconds("updated_at"),
)

# Quality ------------------------------------------------------------------------------------------------------------

feedback = Table(
    "feedback",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("request", Text, nullable=False),  # requests.id; feedback may be faster than the settler
    word("source"),  # user, evaluation
    Column("at", Double, nullable=False, index=True),
    word("user_id"),
    word("key_id"),
    word("model"),
    word("session"),
    word("use_case"),
    Column("rating", Integer),
    Column("correct", Boolean),
    word("outcome"),
    word("comment"),
    money("value_usd"),
    UniqueConstraint("request", "source"),
    CheckConstraint("rating BETWEEN 1 AND 10", name="rating"),
)

# One row for each golden prompt of each run.
evaluations = Table(
    "evaluations",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("run", Text, nullable=False, index=True),
    Column("at", Double, nullable=False, index=True),
    word("name"),
    word("file"),
    word("model"),
    word("request"),
    Column("passed", Boolean, nullable=False),
    word("verdict"),  # correct, incorrect, partial
    word("expected"),
    word("reason"),
    seconds("seconds"),
    count("input_tokens"),
    count("output_tokens"),
    money(),
)

conversations = Table(
    "conversations",
    metadata,
    Column("user_id", Text, primary_key=True),
    Column("session", Text, primary_key=True),
    word("model"),
    word("use_case"),
    Column("started_at", Double, nullable=False),
    Column("last_at", Double, nullable=False, index=True),
    count("turns"),
    count("input_tokens"),
    count("output_tokens"),
    money(),
    word("last_request"),
    word("last_outcome"),
    seconds("ended_at"),  # 0: it may go on
    Column("abandoned", Boolean, nullable=False, server_default=text("false")),
    Column("rated", Boolean, nullable=False, server_default=text("false")),
    Index("ix_conversations_ended_at_last_at", "ended_at", "last_at"),
)

# Counters of the control processes, added to in the transaction of what they count: they never go back, also when a
# row is corrected or deleted, and two hosts do not show the same events.
tallies = Table(
    "tallies",
    metadata,
    Column("host", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("labels", Text, primary_key=True),  # a JSON list
    Column("value", Double, nullable=False, server_default=ZERO),
)

"""The servers that other tests stand on."""

import psycopg
import pytest

from gateway.tests import servers
from gateway.tests.servers import PostgresServer, RedisServer


def test_redis_answers_its_user_only(redis_server: RedisServer) -> None:
    assert redis_server.command("ACL", "WHOAMI") == b"admin"
    assert f"gateway@127.0.0.1:{redis_server.port}" in redis_server.url


def test_postgres_answers_its_role_only(postgres_server: PostgresServer) -> None:
    with psycopg.connect(postgres_server.dsn) as connection:
        row = connection.execute("SELECT current_user, current_database()").fetchone()
    assert row == ("citadel", "citadel")
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(postgres_server.dsn.replace(postgres_server.password, "wrong"))


def test_what_is_missing_is_named_with_the_command_that_fetches_it() -> None:
    with pytest.raises(RuntimeError, match="tools/servers"):
        servers.find("no-such-server")

"""Bringing the tables up to date, with alembic run from inside the program."""

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection

log = logging.getLogger("citadel_gateway")
logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells every step otherwise
FOLDER = Path(__file__).parent / "migrations"


def configuration(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def upgrade(connection: Connection) -> tuple[str, str]:
    """Inside the caller's transaction, so that a migration that fails leaves nothing. The revisions of the tables
    before (empty: there were none) and after.

    Tables of a newer release are left as they are: during a rolling upgrade the older control process goes on with
    them, because a release only adds to what the one before it uses.
    """
    config = configuration(connection)
    script = ScriptDirectory.from_config(config)
    current = MigrationContext.configure(connection).get_current_revision()
    head = str(script.get_current_head())
    if current == head:
        return head, head
    if current is not None:
        try:
            script.get_revision(current)
        except CommandError:
            log.warning("the database has the tables of a newer release (%s)", current)
            return current, current
    command.upgrade(config, "head")
    log.info("the database's tables are at revision %s", head)
    return current or "", head

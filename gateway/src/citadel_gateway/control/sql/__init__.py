"""The database of the control process: users, keys, what was changed at run time, and the ledger."""

from citadel_gateway.control.sql.engine import Database, DatabaseAwayError
from citadel_gateway.control.sql.tables import metadata

__all__ = ["Database", "DatabaseAwayError", "metadata"]

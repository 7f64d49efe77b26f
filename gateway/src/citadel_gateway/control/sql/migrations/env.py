"""How alembic runs the migrations: always on the connection it is handed, in the transaction that is open."""

from alembic import context
from citadel_gateway.control.sql.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()

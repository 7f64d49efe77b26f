"""What feedback and conversations need of the process: their part of the metrics, and an end of what is over."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from citadel_gateway.control.business import Rules
from citadel_gateway.control.conversations import sweep
from citadel_gateway.control.gauges import Gauges
from citadel_gateway.control.sql import DatabaseAwayError
from citadel_gateway.control.state import State
from citadel_gateway.settings import Policies

SWEEP_SECONDS = 60.0


@asynccontextmanager
async def lifespan(state: State) -> AsyncIterator[None]:
    """Adds to the page of metrics, and ends conversations now and then."""
    host = state.settings.host

    def policies() -> Policies:
        return state.snapshot.policies if state.snapshot is not None else Policies()

    def end_conversations() -> None:
        try:
            sweep(state.database, host, Rules.of(state.snapshot))
        except DatabaseAwayError:
            return  # said by the database, once; they end later

    gauges = Gauges(state.database, host, policies)
    state.pages.append(gauges.page)
    state.every(SWEEP_SECONDS, end_conversations)
    yield
    gauges.close()

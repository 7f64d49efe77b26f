"""What most tests of the gateway need: an engine, a site, a running worker."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from citadel_gateway.worker import process

from gateway.tests.fake_engine import FakeEngine
from gateway.tests.live_site import LiveSite
from gateway.tests.servers import postgres_server, redis_server
from gateway.tests.site import Running, Site

__all__ = ["postgres_server", "redis_server"]  # fixtures, where pytest looks for them


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    found = await FakeEngine().start()
    yield found
    await found.stop()


@pytest.fixture
async def second() -> AsyncIterator[FakeEngine]:
    found = await FakeEngine().start()
    yield found
    await found.stop()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
async def gateway(site: Site, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    """One worker in front of `engine`, which serves the model `one` with the alias `uno`."""
    monkeypatch.setattr(process, "GRACE", 0.1)
    if not site.models:
        site.model("one", engine.port, aliases=["uno"], context=8192)
    running = await Running(site).start()
    yield running
    await running.stop()
    running.quiet()


@pytest.fixture
async def live(site: Site, gateway: Running) -> AsyncIterator[LiveSite]:
    """The control process behind that worker."""
    found = await LiveSite(site, gateway).start()
    yield found
    await asyncio.gather(found.stop(), gateway.stop())

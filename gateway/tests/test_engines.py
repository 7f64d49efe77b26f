"""The engines' own figures, passed through."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from citadel_gateway.control.engines import labelled, merged

from gateway.tests import fake_engine
from gateway.tests.client import ADMIN, KEY, get
from gateway.tests.live_site import LiveSite
from gateway.tests.site import Site

PAGE = b"""# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="one"} 1.0
# HELP python_info Version.
# TYPE python_info gauge
python_info 1.0
"""


class FakeExporter:
    """A server that has nothing but /metrics."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.status = b"200 OK"
        self.port = 0

    async def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/metrics" in head:
            self.heads.append(head)
        writer.write(b"HTTP/1.1 %b\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (
            self.status, len(PAGE), PAGE))  # fmt: skip
        await writer.drain()
        writer.close()


@pytest.fixture
async def exporter() -> AsyncIterator[FakeExporter]:
    found = FakeExporter()
    server = await asyncio.start_server(found.client, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    yield found
    server.close()


@pytest.fixture
def site(site: Site, exporter: FakeExporter) -> Site:
    site.model("one", exporter.port, aliases=["uno"])
    site.model("two", exporter.port + 1, exporter.port)
    site.models[1]["backends"][1]["host"] = "localhost"
    site.models.append({"name": "far", "backends": [{"host": "127.0.0.1", "port": exporter.port + 2, "gateway": True}]})
    return site


async def test_one_engine_byte_for_byte(live: LiveSite, exporter: FakeExporter) -> None:
    for name in ("one", "uno"):
        reply = await get(live.port, f"/metrics/engines/{name}", ADMIN)
        assert (reply.status, reply.body) == (200, PAGE)
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert f"Authorization: Bearer {fake_engine.KEY}".encode() in exporter.heads[-1]
    assert ADMIN.encode() not in exporter.heads[-1]


async def test_what_answers_of_several(live: LiveSite, exporter: FakeExporter) -> None:
    reply = await get(live.port, "/metrics/engines/two", ADMIN)
    assert f'python_info{{backend="localhost:{exporter.port}"}} 1.0' in reply.body.decode()
    exporter.status = b"500 Oops"
    assert (await get(live.port, "/metrics/engines/two", ADMIN)).status == 502


async def test_who_may(live: LiveSite) -> None:
    assert (await get(live.port, "/metrics/engines/one", "")).status == 401
    assert (await get(live.port, "/metrics/engines/one", KEY)).status == 403
    assert (await get(live.port, "/metrics/engines/nothing", ADMIN)).status == 404
    assert (await get(live.port, "/metrics/engines/far", ADMIN)).status == 404


def test_each_family_once() -> None:
    page = merged({"a:1": PAGE, "b:2": PAGE}).decode()
    assert page.splitlines() == [
        "# HELP vllm:num_requests_running Number of requests.",
        "# TYPE vllm:num_requests_running gauge",
        'vllm:num_requests_running{backend="a:1",engine="0",model_name="one"} 1.0',
        'vllm:num_requests_running{backend="b:2",engine="0",model_name="one"} 1.0',
        "# HELP python_info Version.",
        "# TYPE python_info gauge",
        'python_info{backend="a:1"} 1.0',
        'python_info{backend="b:2"} 1.0',
    ]
    assert labelled("a{} 1", "x:1") == 'a{backend="x:1"} 1'
    assert labelled('a{b="} {"} 1', "x:1") == 'a{backend="x:1",b="} {"} 1'

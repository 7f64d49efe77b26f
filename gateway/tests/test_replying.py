"""Answers of the gateway's own, as they stand on the wire."""

from gateway.tests.client import connect, head_of
from gateway.tests.site import Running


async def test_an_answer_has_one_framing_and_the_usual_lines(gateway: Running) -> None:
    wire = await connect(gateway.port)
    wire.send(head_of("GET", "/v1/models"))
    status, headers = await wire.head()
    body = await wire.reader.readexactly(int(headers["content-length"]))
    assert status == 401
    assert body.startswith(b'{"error":{')
    assert set(headers) == {"content-type", "www-authenticate", "content-length", "date", "x-request-id"}
    assert headers["date"].endswith(" GMT")
    await wire.close()


async def test_a_head_request_gets_no_body(gateway: Running) -> None:
    wire = await connect(gateway.port)
    for _ in range(2):
        wire.send(head_of("HEAD", "/healthz"))
        status, headers = await wire.head()
        assert (status, headers["cache-control"]) == (200, "no-store")
        assert int(headers["content-length"]) > 0
    wire.send(head_of("HEAD", "/v1/models"))
    assert (await wire.head())[0] == 405
    await wire.close()


async def test_closing_waits_for_what_the_client_has_not_read(gateway: Running) -> None:
    wire = await connect(gateway.port)
    wire.send(head_of("GET", "/healthz", {"Connection": "close"}) * 3)  # only the first counts
    assert (await wire.reply()).headers["connection"] == "close"
    assert await wire.at_end()
    await wire.close()

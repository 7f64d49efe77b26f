"""Writes that leave together."""

import asyncio

from citadel_gateway.worker.outbox import FEW, Outbox


class FakeTransport(asyncio.Transport):
    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closing


async def test_a_quiet_worker_writes_at_once() -> None:
    outbox, transport = Outbox(asyncio.get_running_loop()), FakeTransport()
    outbox.put(transport, b"1", FEW - 1)
    assert transport.written == [b"1"]


async def test_a_busy_worker_writes_at_the_end_of_the_turn_and_in_order() -> None:
    outbox, one, two = Outbox(asyncio.get_running_loop()), FakeTransport(), FakeTransport()
    outbox.put(one, b"1", FEW)
    outbox.put(two, b"2", FEW)
    outbox.put(one, b"3", 0)  # not before what waits already
    assert one.written == two.written == []
    two.closing = True
    await asyncio.sleep(0)
    assert one.written == [b"1", b"3"]
    assert two.written == []
    outbox.put(one, b"4", FEW)
    outbox.flush()
    assert one.written == [b"1", b"3", b"4"]

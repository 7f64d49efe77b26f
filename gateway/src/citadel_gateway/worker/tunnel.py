"""An upgraded connection: bytes both ways between a client and the control process, with backpressure."""

import asyncio
from collections.abc import Callable
from typing import cast


class Tunnel(asyncio.Protocol):
    """The control side of the pair. `closed` is called once, when either side has ended."""

    def __init__(self, client: asyncio.Transport, first: bytes, closed: Callable[[], None]) -> None:
        self.client = client
        self.first = first
        self.closed = closed
        self.transport: asyncio.Transport | None = None
        self.moved = 0  # bytes since the last look, both ways

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is one without being of the class
        self.transport.write(self.first)
        self.first = b""
        if not self.client.is_closing():
            self.client.resume_reading()

    def data_received(self, data: bytes) -> None:
        self.moved += len(data)
        self.client.write(data)

    def from_client(self, data: bytes) -> None:
        self.moved += len(data)
        if self.transport is not None:
            self.transport.write(data)
        else:
            self.first += data

    def client_writable(self, writable: bool) -> None:
        if self.transport is not None and not self.transport.is_closing():
            if writable:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    def pause_writing(self) -> None:
        self.client.pause_reading()

    def resume_writing(self) -> None:
        if not self.client.is_closing():
            self.client.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.closed()

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

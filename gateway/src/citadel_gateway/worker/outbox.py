"""Writes that leave together."""

import asyncio
from collections.abc import Callable
from typing import Final

FEW: Final = 4  # with fewer requests under way than this, every write goes out at once


def nothing() -> None:
    """Nothing has to be written down."""


class Outbox:
    """While there is load, the writes of one turn of the loop leave at its end.

    The peers are then woken once for many requests and answer many at once, which saves the kernel much of its work.
    What must be written down before anything leaves is: `before` is called first. Writes keep their order; whoever
    closes a transport, or writes to it past the outbox, calls `flush` first.
    """

    __slots__ = ("before", "loop", "pending")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.before: Callable[[], None] = nothing
        self.pending: list[tuple[asyncio.Transport, bytes]] = []

    def put(self, transport: asyncio.Transport, data: bytes, load: int) -> None:
        if load < FEW and not self.pending:
            self.before()
            transport.write(data)
            return
        if not self.pending:
            self.loop.call_soon(self.flush)
        self.pending.append((transport, data))

    def flush(self) -> None:
        self.before()
        pending, self.pending = self.pending, []
        for transport, data in pending:
            if not transport.is_closing():
                transport.write(data)

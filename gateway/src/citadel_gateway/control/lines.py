"""Long-lived connections of the control process: WebSockets and event streams, counted, bounded, and ended in order.

Each is a `Line`. It learns through `ending` that its worker or the control process is about to stop; it then finishes
what it is doing and goes, so that no restart waits for a page that somebody left open, and none cuts an answer.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from starlette.requests import HTTPConnection

from citadel_gateway.control.figures import gauge
from citadel_gateway.control.state import State
from citadel_gateway.errors import Refusal

TOTAL = 1024  # of the control process
EACH = 64  # of one key
ADDRESS = "@"  # no key's id begins so
NOBODY = 16  # of one address, that have not said their key yet


class Changes:
    """A number that grows with each change, and those who wait for the next."""

    def __init__(self) -> None:
        self.version = 0
        self.waiting: set[asyncio.Future[None]] = set()

    def tell(self) -> None:
        self.version += 1
        waiting, self.waiting = self.waiting, set()
        for one in waiting:
            if not one.done():
                one.set_result(None)

    async def after(self, seen: int, seconds: float | None = None) -> int:
        """The version, as soon as it is not `seen` any more; `seen` again when that takes too long."""
        if self.version == seen:
            one = asyncio.get_running_loop().create_future()
            self.waiting.add(one)
            try:
                await asyncio.wait_for(one, seconds)
            except TimeoutError:
                return seen
            finally:
                self.waiting.discard(one)
        return self.version


class Line:
    """One of them. `worker`: through which it came, 0 for the control socket itself."""

    def __init__(self, owner: str, worker: int) -> None:
        self.owner = owner
        self.worker = worker
        self.ending = asyncio.Event()


class Lines:
    """All that are open."""

    def __init__(self, total: int = TOTAL, each: int = EACH, nobody: int = NOBODY) -> None:
        """`nobody`: for owners that are an address, and no key."""
        self.total = total
        self.each = each
        self.nobody = nobody
        self.open: set[Line] = set()
        self.left = Changes()  # one of them has ended
        self.owners: Counter[str] = Counter()
        self.stopping: frozenset[int] = frozenset()
        self.closed = False

    @contextmanager
    def line(self, owner: str, connection: HTTPConnection) -> Iterator[Line]:
        """Count a connection as long as the block lasts. Raises Refusal when there are too many."""
        if self.closed:
            raise Refusal(503, "restarting", "The gateway's control process is being restarted", retry_after=2)
        if len(self.open) >= self.total:
            raise Refusal(503, "too_many_connections", "Too many long-lived connections", retry_after=10)
        self.claim(owner)
        line = Line(owner, worker_of(connection))
        if line.worker in self.stopping:
            line.ending.set()
        self.open.add(line)
        try:
            yield line
        finally:
            self.open.discard(line)
            self.leave(line.owner)
            self.left.tell()

    def claim(self, owner: str) -> None:
        if self.owners[owner] >= (self.nobody if owner.startswith(ADDRESS) else self.each):
            raise Refusal(
                429, "too_many_connections", "Too many long-lived connections of one key or address", retry_after=10
            )
        self.owners[owner] += 1

    def leave(self, owner: str) -> None:
        self.owners[owner] -= 1
        if self.owners[owner] <= 0:
            del self.owners[owner]

    def belongs(self, line: Line, owner: str) -> None:
        """The line has said whose it is. Raises Refusal when that one has too many already."""
        self.claim(owner)
        self.leave(line.owner)
        line.owner = owner

    def look(self, stopping: frozenset[int]) -> None:
        """These workers are about to stop."""
        self.stopping = stopping
        for line in self.open:
            if line.worker in stopping:
                line.ending.set()

    async def drain(self, seconds: float) -> None:
        """End all of them; wait until they have gone, at most that long."""
        self.closed = True
        for line in self.open:
            line.ending.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.open:
                    await self.left.after(self.left.version)


def address_of(connection: HTTPConnection) -> str:
    """The owner of a connection whose key is not known yet: where it comes from, as the worker says."""
    return ADDRESS + connection.headers.get("x-forwarded-for", "")


def worker_of(connection: HTTPConnection) -> int:
    number = connection.headers.get("x-citadel-worker", "")
    return int(number) if number.isdecimal() else 0


@asynccontextmanager
async def lifespan(state: State) -> AsyncIterator[None]:
    """Keeps `parts["lines"]`. They have been drained when this ends, by the server that stops."""
    lines = state.parts["lines"] = Lines()
    text = "WebSockets and event streams of the control process."
    state.pages.append(lambda: gauge("llm_gateway_long_connections", text, {(): float(len(lines.open))}))
    yield

"""The limits' store in Redis: one connection a worker, calls written together and answered in their order.

Nothing waits: a call is some bytes to write, its answer a call back. A store that does not answer within the timeout is
away, its connection is thrown away and another one made; what it may or may not have heard is told again by the
limiter, which numbers all it tells.
"""

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import hiredis

from citadel_gateway.core.limitstore import Answer, Call, MemoryStore, Store
from citadel_gateway.redis_address import RedisAddress, limits_script, pack
from citadel_gateway.settings import Gateway, Redis

log = logging.getLogger("citadel_gateway")

RETRIES = (0.1, 0.2, 0.4, 0.8)  # seconds between attempts to connect; then the last one again and again
PROBE = 0.5  # seconds until a Redis that refuses to work (no memory, loading) is asked again
CONNECT = 2.0
SECOND_LOOK = 0.01

Handler = Callable[[Any], None]


class Link(asyncio.Protocol):
    """One connection. Replies go to the store in the order in which they come."""

    def __init__(self, store: "RedisStore") -> None:
        self.store = store
        self.reader = hiredis.Reader()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's own are not derived from it

    def data_received(self, data: bytes) -> None:
        self.reader.feed(data)
        try:
            while (reply := self.reader.gets()) is not False and self.store.link is self:
                self.store.replied(reply)
        except hiredis.ProtocolError as error:
            self.store.fail(f"it speaks no Redis: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        if self.store.link is self:
            self.store.fail(str(exc or "it has closed the connection"))


class RedisStore:
    """See `limitstore.Store`. `observe` gets the seconds that each answer took; `time_ms` is for tests that have a time
    of their own: without it Redis' own clock counts.
    """

    def __init__(
        self,
        settings: Redis,
        clock: Callable[[], float],
        observe: Callable[[float], None] = lambda seconds: None,
        *,
        time_ms: Callable[[], int] | None = None,
    ) -> None:
        self.settings = settings
        self.address = RedisAddress(settings)
        self.clock = clock
        self.observe = observe
        self.time_ms = time_ms
        self.script = limits_script()
        self.sha = hashlib.sha1(self.script.encode(), usedforsecurity=False).hexdigest()
        self.up = False
        self.since = clock()
        self.on_up: Callable[[], None] = lambda: None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.link: Link | None = None
        self.connecting: asyncio.Task[None] | None = None
        self.closed = False
        self.failures = 0
        self.next_try = 0.0
        self.reported = ""
        self.expected: deque[tuple[float, Handler]] = deque()
        self.out: list[bytes] = []

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Connect for the first time; later `tick` does it whenever it must be."""
        self.loop = loop
        self.since = self.clock()
        self.connecting = loop.create_task(self.connect())

    # the connection -------------------------------------------------------------------------------------------------
    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        address = self.address
        link = Link(self)
        try:
            async with asyncio.timeout(CONNECT):
                if address.path:
                    await loop.create_unix_connection(lambda: link, address.path)
                else:
                    await loop.create_connection(lambda: link, address.host, address.port, ssl=address.context())
            greeting = address.greeting()
        except (OSError, ValueError) as error:  # TimeoutError and ssl.SSLError are OSErrors
            self.connecting = None
            if link.transport is not None:
                link.transport.abort()
            self.fail(str(error) or type(error).__name__)
            return
        self.connecting = None
        if self.closed:
            assert link.transport is not None
            link.transport.close()
            return
        self.link = link
        for command in greeting:
            self.send(command, self.greeted)
        self.send(pack("SCRIPT", "LOAD", self.script), self.loaded)

    def greeted(self, reply: Any) -> None:
        if isinstance(reply, hiredis.ReplyError):
            self.fail(str(reply))

    def loaded(self, reply: Any) -> None:
        """It knows the script; whether it also does it is seen by trying."""
        if isinstance(reply, hiredis.ReplyError):
            self.fail(str(reply))
        elif reply is not None:
            self.probe()

    def probe(self) -> None:
        """Say something that writes: a Redis without memory, or one that only copies another, refuses that."""
        self.evaluate("", ["probe", "", self.time()], self.probed)

    def probed(self, reply: Any) -> None:
        if isinstance(reply, int) and not self.up:
            self.up = True
            self.failures = 0
            if self.reported:
                log.warning("limits: Redis is back")
                self.reported = ""
            self.on_up()
        elif isinstance(reply, hiredis.ReplyError):
            self.refuse(reply)

    def fail(self, why: str) -> None:
        """The connection is of no use any more. Nobody knows what became of the calls that are under way."""
        now = self.clock()
        expected, self.expected = self.expected, deque()
        self.away(why, expected[0][0] if expected else now)
        link, self.link = self.link, None
        self.out.clear()
        if link is not None and link.transport is not None:
            link.transport.abort()
        self.next_try = now + RETRIES[min(self.failures, len(RETRIES) - 1)]
        self.failures += 1
        for _, handler in expected:
            handler(None)

    def refuse(self, error: hiredis.ReplyError) -> None:
        """It is there but does not do its work: no memory, a script that hangs, a copy that may not write."""
        now = self.clock()
        self.away(str(error), now)
        self.next_try = now + PROBE

    def away(self, why: str, since: float) -> None:
        if self.up:
            self.up = False
            self.since = since
        if why != self.reported and not self.closed:
            self.reported = why
            done = "admitted and counted later" if self.settings.on_failure == "open" else "refused"
            log.warning("limits: Redis is away: %s; requests of limited users are %s", why, done)

    def send(self, command: bytes, handler: Handler) -> None:
        """All that is sent in one turn of the loop is written at once."""
        assert self.loop is not None
        if not self.out:
            self.loop.call_soon(self.write)
        self.out.append(command)
        self.expected.append((self.clock(), handler))

    def write(self) -> None:
        out, self.out = self.out, []
        if self.link is not None and self.link.transport is not None and out:
            self.link.transport.write(b"".join(out))

    def replied(self, reply: Any) -> None:
        if not self.expected:
            self.fail("it answers what was not asked")
            return
        sent, handler = self.expected.popleft()
        self.observe(self.clock() - sent)
        handler(reply)

    def evaluate(self, user: str, arguments: list[Any], handler: Handler) -> None:
        """The script by its hash, and as a whole when Redis has forgotten it."""
        keys = self.address.keys(user)

        def known(reply: Any) -> None:
            if isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT"):
                self.send(pack("EVAL", self.script, len(keys), *keys, *arguments), handler)
            else:
                handler(reply)

        self.send(pack("EVALSHA", self.sha, len(keys), *keys, *arguments), known)

    def time(self) -> int | str:
        return self.time_ms() if self.time_ms is not None else ""

    # the limiter's side ---------------------------------------------------------------------------------------------
    def sync(self, call: Call) -> None:
        if not self.up:
            call.done(call, None)
            return

        def answered(reply: Any) -> None:
            if isinstance(reply, hiredis.ReplyError):
                self.refuse(reply)
            call.done(call, answer(reply) if isinstance(reply, list) else None)

        self.evaluate(call.user, sync_arguments(call, self.clock(), self.time()), answered)

    def beat(self, worker: str, now: float, done: Callable[[float, bool], None]) -> None:
        if not self.up:
            done(now, False)
            return

        def answered(reply: Any) -> None:
            if isinstance(reply, hiredis.ReplyError):
                self.refuse(reply)
            done(now, isinstance(reply, int))

        self.evaluate("", ["beat", worker, self.time()], answered)

    def tick(self, now: float) -> None:
        """Ten times a second: is somebody late, is it time to try again?"""
        if self.expected and now - self.expected[0][0] > self.settings.timeout and self.loop is not None:
            self.loop.call_later(SECOND_LOOK, self.look_again, self.expected[0])
        if self.up or self.closed or self.loop is None or now < self.next_try:
            return
        if self.link is not None:
            if not self.expected:
                self.next_try = now + PROBE
                self.probe()
        elif self.connecting is None:
            self.connecting = self.loop.create_task(self.connect())

    def look_again(self, late: tuple[float, Handler]) -> None:
        """The answer may have been there all the time, when it was this process that stood still."""
        if self.expected and self.expected[0] is late:
            self.fail(f"no answer within {self.settings.timeout} s")

    def close(self) -> None:
        """What was said before is still written."""
        self.closed = True
        self.up = False
        if self.connecting is not None:
            self.connecting.cancel()
        self.write()
        link, self.link = self.link, None
        if link is not None and link.transport is not None:
            link.transport.close()


def sync_arguments(call: Call, now: float, time_ms: int | str) -> list[Any]:
    """ARGV of limits.lua. The worker's clock does not leave the worker: ages do."""
    tier = call.tier
    arguments = [
        "sync", call.worker, time_ms, call.number, call.delta_number,
        tier.requests_per_minute, tier.tokens_per_minute, tier.concurrency, tier.tokens_per_day, tier.tokens_per_month,
        int(tier.overage == "block"), *call.opened, *call.keep, *call.want, len(call.asks), *call.asks,
    ]  # fmt: skip
    for at, requests, tokens in call.deltas:
        arguments += (max(0, int((now - at) * 1000)), requests, tokens)
    return arguments


def answer(reply: list[int]) -> Answer:
    verdicts = [
        (code, wait / 1000 if wait >= 0 else -1.0) for code, wait in zip(reply[10::2], reply[11::2], strict=True)
    ]
    return Answer(reply[0], (reply[2], reply[3], reply[4]), tuple(reply[5:10]), bool(reply[1]), verdicts)


def limit_store(
    settings: Gateway, clock: Callable[[], float], wall: Callable[[], float], observe: Callable[[float], None]
) -> Store:
    """That of the settings; on the running loop."""
    if not settings.redis.url:
        return MemoryStore(wall)
    store = RedisStore(settings.redis, clock, observe)
    store.start(asyncio.get_running_loop())
    return store

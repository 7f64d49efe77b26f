"""Resumable streams: a client that lost its connection goes on where it was.

A completion that asks for it (X-Citadel-Resumable: 1) is relayed here by the worker. We ask a worker for it as any
client does, with the caller's key, keep the last events in a bounded buffer, and number them by `id:` lines. While the
client is away the generation goes on, for a minute; GET /v1/streams/{id} with Last-Event-ID brings what it has missed
and then what is still to come. A deliberate end is DELETE.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import Response, StreamingResponse
from msgspec import Struct
from starlette.types import Receive, Scope, Send

from citadel_gateway.control.auth import Scoped, state_of
from citadel_gateway.control.client import Client, Reply, Unreachable
from citadel_gateway.control.figures import gauge
from citadel_gateway.control.lines import Changes
from citadel_gateway.control.state import State
from citadel_gateway.errors import Refusal, stream_error
from citadel_gateway.settings import Key

log = logging.getLogger("citadel_gateway")
router = APIRouter()

AWAY_SECONDS = 60.0
STREAM_BYTES = 4 * 1024 * 1024  # of one stream
TOTAL_BYTES = 128 * 1024 * 1024  # of all of them
STREAMS = 256
EACH = 16  # of one user
GONE = 4096  # ids of streams that are over, for an honest answer
DROPPED = frozenset(
    (
        *("accept-encoding", "authorization", "connection", "content-length", "content-type", "host"),
        *("transfer-encoding", "x-citadel-resumable", "x-citadel-worker", "x-forwarded-for"),
    )
)
Clock = Callable[[], float]
Generating = Annotated[Key, Depends(Scoped("inference"))]


class Wanted(Struct):
    stream: bool | None = None


decode = msgspec.json.Decoder(Wanted).decode


class Recording:
    """One stream: the events that are kept, and who reads them. Event N has the id N; the first is 1."""

    def __init__(self, owner: str, name: str, clock: Clock, limit: Callable[[], int]) -> None:
        self.owner = owner
        self.name = name
        self.clock = clock
        self.limit = limit
        self.events: deque[bytes] = deque()
        self.first = 1  # id of the oldest that is kept
        self.size = 0
        self.complete = False
        self.changes = Changes()
        self.reader = 0  # serial of the one that reads; a later one takes its place
        self.position = 0  # id of the last event it has taken
        self.reading = False
        self.since = clock()  # when the last reader went, or the stream began
        self.task: asyncio.Task[None] | None = None

    @property
    def last(self) -> int:
        return self.first + len(self.events) - 1

    # writing --------------------------------------------------------------------------------------------------------
    async def record(self, reply: Reply) -> None:
        """Take the events of a reply. A reader that is there but slow is waited for, one that is away is not."""
        try:
            async for event in reply.events():
                await self.add(event)
        except Unreachable:
            await self.add(stream_error(502, "upstream_error", "The stream broke off"))
        self.complete = True
        self.since = self.clock()
        self.changes.tell()

    async def add(self, event: bytes) -> None:
        self.events.append(event)
        self.size += len(event)
        self.changes.tell()
        while self.size > self.limit() and len(self.events) > 1:
            if self.reading and self.position < self.first:
                await self.changes.after(self.changes.version)
                continue
            self.size -= len(self.events.popleft())
            self.first += 1

    # reading --------------------------------------------------------------------------------------------------------
    def has(self, after: int) -> bool:
        """Whether a reader that knows the events up to `after` can go on."""
        return self.first - 1 <= after <= self.last

    def attach(self, after: int) -> int:
        """A new reader; it takes the place of one that may be half dead."""
        self.reader += 1
        self.position = after
        self.reading = True
        self.changes.tell()
        return self.reader

    async def read(self, reader: int) -> AsyncIterator[bytes]:
        while reader == self.reader:
            seen = self.changes.version
            if self.position < self.last:
                number = self.position + 1
                event = self.events[number - self.first]
                self.position = number
                self.changes.tell()
                yield b"id: %d\n%b" % (number, event)
            elif self.complete:
                return
            else:
                await self.changes.after(seen)

    def detach(self, reader: int) -> None:
        if reader == self.reader:
            self.reading = False
            self.since = self.clock()
            self.changes.tell()

    def expired(self) -> bool:
        return not self.reading and self.clock() - self.since > AWAY_SECONDS


class Recordings:
    """All that are kept. Each belongs to a user; to others it does not exist."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.kept: dict[tuple[str, str], Recording] = {}
        self.gone: OrderedDict[tuple[str, str], None] = OrderedDict()

    def begin(self, owner: str, name: str) -> Recording:
        """Raises Refusal when there is no room, or the user has one of this name."""
        self.look()
        if (owner, name) in self.kept:
            raise Refusal(409, "stream_exists", f"A stream with the request id {name[:128]!r} is kept already")
        if Counter(one for one, _ in self.kept)[owner] >= EACH:
            raise Refusal(429, "too_many_streams", f"A user may have {EACH} resumable streams", retry_after=5)
        if len(self.kept) >= STREAMS:
            raise Refusal(503, "too_many_streams", "Too many resumable streams", retry_after=5)
        self.gone.pop((owner, name), None)
        found = self.kept[owner, name] = Recording(owner, name, self.clock, self.share)
        return found

    def share(self) -> int:
        """The bytes that one stream may keep."""
        return min(STREAM_BYTES, TOTAL_BYTES // max(1, len(self.kept)))

    def find(self, owner: str, name: str) -> Recording:
        self.look()
        found = self.kept.get((owner, name))
        if found is None and (owner, name) in self.gone:
            raise Refusal(410, "stream_gone", "This stream is over and not kept any more")
        if found is None:
            raise Refusal(404, "stream_not_found", f"There is no stream {name[:128]!r}")
        return found

    def forget(self, recording: Recording) -> None:
        """Its end: whatever still generates is told."""
        key = (recording.owner, recording.name)
        if self.kept.get(key) is recording:
            del self.kept[key]
            self.gone[key] = None
            while len(self.gone) > GONE:
                self.gone.popitem(last=False)
        if recording.task is not None:
            recording.task.cancel()
        recording.attach(recording.last)  # whoever reads it reads no more

    def drop(self, recording: Recording) -> None:
        """It never became a stream."""
        if self.kept.get((recording.owner, recording.name)) is recording:
            del self.kept[recording.owner, recording.name]

    def look(self) -> None:
        for recording in [one for one in self.kept.values() if one.expired()]:
            self.forget(recording)

    async def tidy(self) -> None:
        self.look()

    async def close(self) -> None:
        tasks = [one.task for one in self.kept.values() if one.task is not None]
        for recording in list(self.kept.values()):
            self.forget(recording)
        await asyncio.gather(*tasks, return_exceptions=True)


class Resumable(StreamingResponse):
    """A reader of a recording."""

    def __init__(self, recording: Recording, after: int, headers: Mapping[str, str]) -> None:
        self.recording = recording
        self.reader = recording.attach(after)
        super().__init__(recording.read(self.reader), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.recording.detach(self.reader)


@asynccontextmanager
async def lifespan(state: State) -> AsyncIterator[None]:
    """Keeps `parts["recordings"]`."""
    recordings = state.parts["recordings"] = Recordings(time.monotonic)
    state.every(1.0, recordings.tidy)
    text = "Streams that are kept for clients that may come back."
    state.pages.append(lambda: gauge("llm_gateway_resumable_streams", text, {(): float(len(recordings.kept))}))
    yield
    await recordings.close()


def recordings_of(request: Request) -> Recordings:
    found: Recordings = state_of(request).parts["recordings"]
    return found


Kept = Annotated[Recordings, Depends(recordings_of)]


def owner_of(key: Key) -> str:
    return key.user or key.id


async def completion(request: Request, key: Generating, kept: Kept) -> Response:
    """A completion that asked to be resumable; workers relay no other here."""
    if request.headers.get("x-citadel-resumable") != "1":
        raise Refusal(404, "not_found", "Not Found")
    body = await request.body()
    try:
        stream = bool(decode(body).stream)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, "invalid_request", f"The request is not valid: {error}") from None
    if not stream:
        raise Refusal(400, "not_a_stream", "Only a stream can be resumed: ask with stream true", param="stream")
    name = request.headers.get("x-request-id", "")
    if not name:
        raise Refusal(400, "request_id_missing", "A resumable stream needs an X-Request-ID")
    recording = kept.begin(owner_of(key), name)
    started: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
    recording.task = asyncio.create_task(generate(request, body, recording, kept, started))
    try:
        return await started
    except BaseException:  # the client has gone before the first byte, as if there had been no buffer
        kept.forget(recording)
        raise


async def generate(
    request: Request, body: bytes, recording: Recording, kept: Recordings, started: "asyncio.Future[Response]"
) -> None:
    """Ask the worker; answer the client with its refusal or with the recording, and go on recording without it."""
    client: Client = state_of(request).parts["client"]
    token = request.headers["authorization"].partition(" ")[2].strip()
    headers = {name: value for name, value in request.headers.items() if name not in DROPPED}
    try:
        async with client.ask("POST", request.url.path, token, body, headers) as reply:
            passed = {name: value for name, value in reply.headers.items() if name.lower().startswith("x-")}
            if not reply.is_stream or reply.status != 200:
                found = await reply.body()
                if retry := reply.headers.get("retry-after"):
                    passed["retry-after"] = retry
                answer(started, Response(found, reply.status, passed, reply.headers.get("content-type")))
                kept.drop(recording)
                return
            passed |= {"x-citadel-resumable": "1", "cache-control": "no-store"}
            answer(started, Resumable(recording, 0, passed))
            await recording.record(reply)
    except Unreachable as error:
        answer(started, Response(error.body(), 503, {"retry-after": "2"}, "application/json"))
        kept.drop(recording)
    except Exception as error:
        if started.done():
            log.exception("a resumable stream failed")
        else:
            started.set_exception(error)  # the client's answer is made of it
        kept.forget(recording)


def answer(started: "asyncio.Future[Response]", response: Response) -> None:
    if not started.done():
        started.set_result(response)


for path in ("/v1/chat/completions", "/v1/completions"):
    router.post(path, include_in_schema=False)(completion)


@router.get("/v1/streams/{name}", tags=["streams"])
async def resume(
    name: str, key: Generating, kept: Kept, last_event_id: Annotated[str, Header(max_length=32)] = "0"
) -> Response:
    """The events after Last-Event-ID; without one from the beginning."""
    recording = kept.find(owner_of(key), name)
    if not last_event_id.isdecimal() or int(last_event_id) > recording.last:
        raise Refusal(400, "invalid_last_event_id", f"There is no event {last_event_id!r}", param="Last-Event-ID")
    if not recording.has(int(last_event_id)):
        raise Refusal(410, "events_gone", f"The events after {last_event_id} are not kept any more")
    headers = {"x-citadel-resumable": "1", "cache-control": "no-store"}
    return Resumable(recording, int(last_event_id), headers)


@router.delete("/v1/streams/{name}", status_code=204, tags=["streams"])
async def end(name: str, key: Generating, kept: Kept) -> None:
    """The generation is ended, and what was kept is forgotten."""
    kept.forget(kept.find(owner_of(key), name))

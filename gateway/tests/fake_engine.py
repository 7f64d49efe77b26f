"""A fake engine: an asyncio server that speaks enough of vLLM's HTTP to try the gateway, and fails on cue.

The test tells it what to do by `mode` (for all requests) or by the header `x-fake` of one request:

    ok          answer, or stream `events` events, `delay` seconds apart
    slow        answer after `delay` seconds
    hang        accept the request and never answer
    503, 500, 401   this status with a body of OpenAI's shape
    close       close the connection without a byte
    die         send half of what was promised, then reset the connection
    die_early   break off before the first event of a stream is complete
    die_event   break off in the middle of an event
    stall       send the first events of a stream and then nothing
    garbage     bytes that are no HTTP
    big         a reply of 3 MB with Content-Length
    bigchunks   a reply of 3 MB in chunks that is no stream
    until_close a reply without a length
    extra       two replies to one request
    continue    100 Continue first
    headonly    the head of a stream at once, and then nothing, as vLLM does while its worker hangs
"""

import asyncio
import contextlib
import json
import struct
import sys
from dataclasses import dataclass, field
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

KEY = "engine-secret"


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    raw_head: bytes


@dataclass
class FakeEngine:
    mode: str = "ok"
    health: int = 200
    events: int = 5
    delay: float = 0.0
    keep_alive: bool = True
    usage: bool = True  # knows `stream_options`
    fingerprint: str = ""
    prompt_tokens: int = 3
    port: int = 0
    seen: list[Seen] = field(default_factory=list)
    cancelled: int = 0
    connections: int = 0
    open: set[asyncio.StreamWriter] = field(default_factory=set)
    server: asyncio.Server | None = None

    async def start(self) -> "FakeEngine":
        self.server = await asyncio.start_server(self.client, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """Refuse from now on and drop what is open, as a killed process does."""
        if self.server is not None:
            for listener in self.server.sockets:
                asyncio.get_running_loop().remove_reader(listener.fileno())
            for _ in range(3):  # what is being accepted at this moment would be left open by a server that closes
                await asyncio.sleep(0)
            self.server.close()
            self.server = None
        for writer in tuple(self.open):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open.add(writer)
        try:
            while await self.one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open.discard(writer)
            writer.close()

    async def one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")[:-2]
        method, path, _ = line.split(" ")
        headers = {name.lower(): value for name, _, value in (one.partition(": ") for one in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if path == "/health":
            writer.write(b"HTTP/1.1 %d X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % self.health)
            await writer.drain()
            return False
        if method == "GET":  # probes ask for counters, which it has none of
            writer.write(b"HTTP/1.1 404 X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            await writer.drain()
            return False
        self.seen.append(Seen(method, path, headers, body, head))
        watcher = asyncio.ensure_future(self.watch(reader, writer))
        try:
            return await self.answer(headers.get("x-fake", self.mode), json.loads(body), writer)
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await watcher

    async def watch(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Notice a client that goes away while we are busy: vLLM stops generating then."""
        with contextlib.suppress(ConnectionError):
            if await reader.read(1):  # nothing but the end can come before our answer
                raise AssertionError("a second request before the first was answered")
        self.cancelled += 1
        writer.transport.abort()

    async def answer(self, mode: str, request: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        if mode in ("hang", "headonly", "close", "garbage") or mode.isdigit():
            return await self.refuse(mode, writer)
        if mode == "slow":
            await self.pause(writer, self.delay)
        if mode == "continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await asyncio.sleep(0.02)
        if mode in ("big", "bigchunks", "until_close"):
            return await self.long(mode, writer)
        if request.get("stream"):
            return await self.stream(mode, request, writer)
        return await self.reply(mode, request, writer)

    async def refuse(self, mode: str, writer: asyncio.StreamWriter) -> bool:
        if mode == "headonly":
            stream = b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
            writer.write(b"HTTP/1.1 200 OK\r\n" + stream)
            await writer.drain()
        if mode in ("hang", "headonly"):
            await self.pause(writer, 600)
        elif mode == "garbage":
            writer.write(b"this is no HTTP\r\n\r\n")
            await writer.drain()
        elif mode.isdigit():
            body = json.dumps({"error": {"message": "on cue", "type": "server_error", "param": None, "code": mode}})
            head = f"HTTP/1.1 {mode} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write((head + body).encode())
            return True
        return False

    async def pause(self, writer: asyncio.StreamWriter, seconds: float) -> None:
        """Sleep, and notice within 10 ms that the other side has gone."""
        end = asyncio.get_running_loop().time() + seconds
        while (left := end - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(min(left, 0.01))
            if writer.transport.is_closing():
                raise ConnectionResetError

    async def reply(self, mode: str, request: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        message = {"role": "assistant", "content": "It is 42."}
        choice = {"index": 0, "message": message, "text": "It is 42.", "finish_reason": "stop"}
        usage = usage_of(self.prompt_tokens, 4)
        body = json.dumps(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 1,
                "model": request["model"],
                "choices": [choice],
                "usage": usage,
            }
        ).encode()
        head = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: application/json\r\n"
        if not self.keep_alive:
            head += b"connection: close\r\n"
        whole = head + b"content-length: %d\r\n\r\n%b" % (len(body), body)
        if mode == "die":
            writer.write(whole[:-20])
            await writer.drain()
            await asyncio.sleep(0.02)
            reset(writer)
            return False
        writer.write(whole * 2 if mode == "extra" else whole)
        await writer.drain()
        return self.keep_alive

    async def stream(self, mode: str, request: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        if mode == "die_early":
            writer.write(b"20\r\ndata: ")
        options = (request.get("stream_options") or {}) if self.usage else {}
        model, wanted = request["model"], bool(options.get("include_usage"))
        for number in range(self.events):
            used = usage_of(self.prompt_tokens, number + 1) if options.get("continuous_usage_stats") else None
            event = event_bytes(number, model, used, self.ending(number, wanted))
            if mode == "die_early":
                await asyncio.sleep(0.02)
                reset(writer)
                return False
            if mode == "die" and number == 2:
                await asyncio.sleep(0.02)
                reset(writer)
                return False
            if mode == "die_event" and number == 2:
                writer.write(b"%x\r\n%b" % (len(event), event[:20]))
                await asyncio.sleep(0.02)
                reset(writer)
                return False
            if mode == "stall" and number == 2:
                await self.pause(writer, 600)
            if mode == "split":
                writer.write(chunk(event[:30]))
                await asyncio.sleep(0.005)
                event = event[30:]
            writer.write(chunk(event))
            await writer.drain()
            if self.delay:
                await self.pause(writer, self.delay)
        if wanted:
            writer.write(chunk(last_bytes(model, usage_of(self.prompt_tokens, self.events), self.fingerprint)))
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        await writer.drain()
        return self.keep_alive

    def ending(self, number: int, usage_follows: bool) -> dict[str, str]:
        """What the last event of the text has besides: vLLM puts its fingerprint into the very last one."""
        if not self.fingerprint or number < self.events - 1:
            return {}
        return {"finish": "stop"} if usage_follows else {"finish": "stop", "system_fingerprint": self.fingerprint}

    async def long(self, mode: str, writer: asyncio.StreamWriter) -> bool:
        data = b"x" * 3_000_000
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n"
        if mode == "big":
            writer.write(head + b"content-length: %d\r\n\r\n" % len(data) + data)
        elif mode == "bigchunks":
            writer.write(head + b"transfer-encoding: chunked\r\n\r\n" + chunk(data) + b"0\r\n\r\n")
        else:
            writer.write(head + b"\r\nuntil the end")
        await writer.drain()
        return mode != "until_close"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event_bytes(
    number: int, model: str, usage: dict[str, int] | None = None, more: dict[str, str] | None = None
) -> bytes:
    more = dict(more or {})
    finish = more.pop("finish", None)
    choice = {"index": 0, "delta": {"content": f" word{number}"}, "text": f" word{number}", "finish_reason": finish}
    event: dict[str, Any] = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": model}
    event["choices"] = [choice]
    if usage is not None:
        event["usage"] = usage
    return b"data: " + json.dumps(event | more).encode() + b"\n\n"


def last_bytes(model: str, usage: dict[str, int], fingerprint: str = "") -> bytes:
    """The event after the text, for who asked for usage."""
    event: dict[str, Any] = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": model}
    event |= {"choices": [], "usage": usage}
    if fingerprint:
        event["system_fingerprint"] = fingerprint
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def usage_of(prompt: int, output: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def stream_bytes(count: int, model: str) -> bytes:
    """What a client must get of a whole stream."""
    return b"".join(event_bytes(number, model) for number in range(count)) + b"data: [DONE]\n\n"


def reset(writer: asyncio.StreamWriter) -> None:
    """End the connection as the kernel does for a killed process that had unread bytes."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def main(port: int) -> None:
    """A process of its own, for tests that need one."""
    engine = await FakeEngine(port=port, events=5).start()
    assert engine.server is not None
    await engine.server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))

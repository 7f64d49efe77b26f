#!/usr/bin/python3
"""A fake engine: answers like vLLM as far as the gateway's tests need it, and generates nothing.

Usage: fake_engine.py PORT KEY_FILE MODEL. A completion has ``max_tokens`` words, one every ``FAKE_ENGINE_GAP`` seconds.
"""

import asyncio
import hmac
import json
import os
import sys
from pathlib import Path

PORT, KEY, MODEL = int(sys.argv[1]), Path(sys.argv[2]).read_text().strip(), sys.argv[3]
GAP = float(os.environ.get("FAKE_ENGINE_GAP", "0.05"))
OPEN = {"/health", "/metrics", "/version"}


def answer(status: str, body: object, kind: str = "application/json") -> bytes:
    data = (body if isinstance(body, str) else json.dumps(body)).encode()
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def chunk(data: str) -> bytes:
    return f"{len(data):x}\r\n{data}\r\n".encode()


async def generate(path: str, request: dict[str, object], writer: asyncio.StreamWriter) -> None:
    words = int(str(request.get("max_tokens") or 8))
    chat = path == "/v1/chat/completions"
    head = {"id": "fake-1", "object": "chat.completion" if chat else "text_completion", "created": 0, "model": MODEL}
    usage = {"prompt_tokens": 3, "completion_tokens": words, "total_tokens": 3 + words}
    if not request.get("stream"):
        await asyncio.sleep(GAP * words)
        text = " ".join(["word"] * words)
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choices = [{"index": 0, "finish_reason": "length", **said}]
        writer.write(answer("200 OK", {**head, "choices": choices, "usage": usage}))
        return
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n")
    writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
    for number in range(words):
        said = {"delta": {"content": "word "}} if chat else {"text": "word "}
        choices = [{"index": 0, "finish_reason": "length" if number == words - 1 else None, **said}]
        writer.write(chunk(f"data: {json.dumps({**head, 'choices': choices})}\n\n"))
        await writer.drain()
        await asyncio.sleep(GAP)
    options = request.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage"):
        writer.write(chunk(f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"))
    writer.write(chunk("data: [DONE]\n\n") + b"0\r\n\r\n")


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            line, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (part.partition(":") for part in rest)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            path = line.split()[1].partition("?")[0]
            if path not in OPEN and not hmac.compare_digest(headers.get("authorization", ""), f"Bearer {KEY}"):
                writer.write(answer("401 Unauthorized", {"error": "Unauthorized"}))
            elif path in {"/health", "/version"}:
                writer.write(answer("200 OK", {}))
            elif path == "/metrics":
                writer.write(answer("200 OK", "vllm:num_requests_running 0\n", "text/plain; version=0.0.4"))
            elif path == "/v1/models":
                writer.write(answer("200 OK", {"object": "list", "data": [{"id": MODEL, "object": "model"}]}))
            elif path in {"/v1/chat/completions", "/v1/completions"}:
                await generate(path, json.loads(body), writer)
            else:
                writer.write(answer("404 Not Found", {"error": {"message": "the fake engine has no " + path}}))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", PORT, backlog=1024)
    async with server:
        await server.serve_forever()


asyncio.run(main())

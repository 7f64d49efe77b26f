#!/usr/bin/python3
"""Streams through the gateway, told apart: what ended with [DONE], what was cut, what was refused.

Usage: streams.py URL KEY_FILE MODEL OPEN WORDS SECONDS. Holds OPEN streams of WORDS words each, and besides asks for
short completions on new connections for SECONDS; prints one JSON object. Needs nothing but Python.
"""

import asyncio
import json
import sys
import time
import urllib.parse
from pathlib import Path

url = urllib.parse.urlsplit(sys.argv[1])
KEY, MODEL = Path(sys.argv[2]).read_text().strip(), sys.argv[3]
OPEN, WORDS, SECONDS = int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6])


async def ask(words: int, *, stream: bool) -> bytes:
    """The whole answer to one request on a connection of its own."""
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        body = json.dumps(
            {"model": MODEL, "max_tokens": words, "stream": stream, "messages": [{"role": "user", "content": "hello"}]}
        ).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {url.netloc}\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        return await reader.read(-1)
    finally:
        writer.close()


async def main() -> None:
    result = {"whole": 0, "cut": 0, "answered": 0, "refused": 0}
    why: list[str] = []

    async def hold() -> None:
        try:
            got = await ask(WORDS, stream=True)
        except OSError as error:
            got = str(error).encode()
        whole = got.startswith(b"HTTP/1.1 200") and got.count(b'"content"') == WORDS and b"data: [DONE]" in got
        result["whole" if whole else "cut"] += 1
        if not whole:
            why.append(got[:120].decode("utf-8", "replace") + " ... " + got[-120:].decode("utf-8", "replace"))

    async def knock() -> None:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            try:
                got = await ask(1, stream=False)
            except OSError as error:
                got = str(error).encode()
            good = got.startswith(b"HTTP/1.1 200")
            result["answered" if good else "refused"] += 1
            if not good:
                why.append(got[:240].decode("utf-8", "replace"))
            await asyncio.sleep(0.01)

    await asyncio.gather(*(hold() for _ in range(OPEN)), *(knock() for _ in range(4)))
    print(json.dumps({**result, "why": why[:5]}))


asyncio.run(main())

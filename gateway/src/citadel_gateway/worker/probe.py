"""Asking one backend whether it is well: `GET /health` with the key, on a connection of its own."""

import asyncio
from typing import Literal

Verdict = Literal["up", "down", "silent"]


async def probe(host: str, port: int, key: str, patience: float) -> Verdict:
    """`up` for a 200, `down` for a refusal or another status, `silent` when no answer came in time."""
    writer = None
    try:
        async with asyncio.timeout(patience):
            reader, writer = await asyncio.open_connection(host, port)
            name = f"[{host}]" if ":" in host else host
            writer.write(
                f"GET /health HTTP/1.1\r\nhost: {name}:{port}\r\nauthorization: Bearer {key}\r\n"
                "user-agent: citadel-gateway\r\nconnection: close\r\n\r\n".encode()
            )
            line = await reader.readline()
        return "up" if line.split(b" ", 2)[1:2] == [b"200"] else "down"
    except TimeoutError:
        return "silent"
    except (OSError, ValueError):
        return "down"
    finally:
        if writer is not None:
            writer.close()

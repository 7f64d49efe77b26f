"""`citadel-gateway serve`: control process and workers on one machine without systemd, started and ended together."""

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import Process
from contextlib import suppress
from pathlib import Path

from citadel_gateway.settings import Gateway


def listening_socket(address: str, port: int) -> socket.socket:
    """One socket that all workers accept from, as a systemd socket unit would make it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(4096)
    listener.setblocking(False)
    return listener


class Family:
    """The child processes. When one ends without being told to, the others are ended too."""

    def __init__(self, settings: Gateway, config: str, listener: socket.socket) -> None:
        self.settings = settings
        self.config = config
        self.listener = listener
        self.asked = asyncio.Event()

    async def child(self, *words: str, fds: tuple[int, ...] = ()) -> Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "citadel_gateway", *words, "--config", self.config, pass_fds=fds
        )

    async def run(self) -> int:
        """Start, wait for the end; 0 when it was asked for and every child ended in order."""
        fd = self.listener.fileno()
        control = await self.child("control")
        workers = [
            await self.child("worker", str(number + 1), "--listen-fd", str(fd), fds=(fd,))
            for number in range(self.settings.workers)
        ]
        ends = [asyncio.create_task(child.wait()) for child in (control, *workers)]
        asked = asyncio.create_task(self.asked.wait())
        await asyncio.wait([asked, *ends], return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        for generation in (workers, [control]):  # the workers first: they may still relay to the control process
            for child in generation:
                with suppress(ProcessLookupError):
                    child.terminate()
            await asyncio.gather(*(child.wait() for child in generation))
        statuses = await asyncio.gather(*ends)
        in_order = (0, -signal.SIGTERM)  # who is told to end before it could listen for that ends by the signal
        return 0 if self.asked.is_set() and all(status in in_order for status in statuses) else 1


async def supervise(settings: Gateway, config: str, listener: socket.socket) -> int:
    family = Family(settings, config, listener)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, family.asked.set)
    return await family.run()


def run_serve(settings: Gateway, config: str) -> int:
    for folder in (settings.run_dir, settings.state_dir):
        Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        listener = listening_socket(settings.listen.address, settings.listen.port)
    except OSError as error:
        print(f"{settings.listen.address}:{settings.listen.port}: {error.strerror}", file=sys.stderr)
        return 1
    os.set_inheritable(listener.fileno(), True)
    address, port = listener.getsockname()[:2]
    print(
        f"citadel-gateway: http://{address}:{port}/v1 with {settings.workers} worker{'s' * (settings.workers > 1)}",
        flush=True,
    )
    with listener:
        return asyncio.run(supervise(settings, config, listener))

"""What users have used, for the control process: its threads may wait for Redis, requests may not."""

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

import hiredis

from citadel_gateway.redis_address import RedisAddress, limits_script, pack
from citadel_gateway.settings import Gateway

WAIT = 5.0


class Books:
    """A view of the limits' store. Without Redis the one worker counts in its own memory: nothing is known here, and
    what a dead worker counted has died with it.

    Raises `OSError` or `hiredis.ReplyError` when Redis is away. For any thread.
    """

    def __init__(self, settings: Gateway) -> None:
        self.address = RedisAddress(settings.redis) if settings.redis.url else None
        self.lock = threading.Lock()
        self.socket: socket.socket | None = None
        self.reader = hiredis.Reader()
        self.time_ms: Callable[[], int | str] = lambda: ""  # Redis' own clock; tests have another

    def settle_lost(self, user: str, tokens: int, at: float, id: str) -> bool:  # noqa: A002  # the ledger's word
        """Count what a request had used when its worker died, at the time of its last sign of life. False when this
        `id` was counted before.
        """
        if self.address is None:
            return False
        lost = f"{self.address.settings.prefix}:lost:{id}"
        return bool(self.run([*self.address.keys(user), lost], "lost", "", self.time_ms(), int(at * 1000), tokens))

    def usage(self, user: str) -> dict[str, int]:
        """What counts against each limit now."""
        if self.address is None:
            return {}
        requests, tokens, slots, day, month = self.run(list(self.address.keys(user)), "usage", "", self.time_ms())
        return {
            "requests_per_minute": requests,
            "tokens_per_minute": tokens,
            "concurrency": slots,
            "tokens_per_day": day,
            "tokens_per_month": month,
        }

    def run(self, keys: list[str], *arguments: Any) -> Any:
        """The script. A connection that has broken since it was last used is made anew once."""
        with self.lock:
            fresh = self.socket is None
            try:
                return self.evaluate(keys, arguments)
            except OSError:
                self.drop()
                if fresh:
                    raise
            try:
                return self.evaluate(keys, arguments)
            except OSError:
                self.drop()
                raise

    def evaluate(self, keys: list[str], arguments: tuple[Any, ...]) -> Any:
        return self.ask(pack("EVAL", limits_script(), len(keys), *keys, *arguments))

    def ask(self, command: bytes) -> Any:
        if self.socket is None:
            self.connect()
        assert self.socket is not None
        self.socket.sendall(command)
        while (reply := self.reader.gets()) is False:
            data = self.socket.recv(65536)
            if not data:
                raise ConnectionError("Redis has closed the connection")
            self.reader.feed(data)
        if isinstance(reply, hiredis.ReplyError):
            raise reply
        return reply

    def connect(self) -> None:
        address = self.address
        assert address is not None
        self.reader = hiredis.Reader()
        if address.path:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(WAIT)
            self.socket.connect(address.path)
        else:
            self.socket = socket.create_connection((address.host, address.port), WAIT)
            context = address.context()
            if context is not None:
                self.socket = context.wrap_socket(self.socket, server_hostname=address.host)
        try:
            for command in address.greeting():
                self.ask(command)
        except hiredis.ReplyError:
            self.drop()
            raise

    def drop(self) -> None:
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.close()
            self.socket = None

    def close(self) -> None:
        with self.lock:
            self.drop()

"""Where Redis is and what is said first, for the workers' connection and for the control process's."""

import ssl
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis

from citadel_gateway.settings import ConfigError, Redis


@cache
def limits_script() -> str:
    return resources.files("citadel_gateway.core").joinpath("limits.lua").read_text(encoding="ascii")


def pack(*words: Any) -> bytes:
    """One command as Redis reads it."""
    packed: bytes = hiredis.pack_command(words)
    return packed


class RedisAddress:
    """settings.redis.url, taken apart; `ConfigError` when it is none. The password is read anew for each connection."""

    def __init__(self, settings: Redis) -> None:
        self.settings = settings
        parts = urlsplit(settings.url)
        number = parts.path.strip("/")
        if parts.scheme == "unix":
            number = parse_qs(parts.query).get("db", [""])[0]
        try:
            self.port = parts.port or 6379
            self.database = int(number or 0)
        except ValueError:
            raise ConfigError(f"redis.url: {settings.url!r} has a wrong port or database") from None
        self.path = unquote(parts.path) if parts.scheme == "unix" else ""
        self.host = parts.hostname or ""
        self.user = unquote(parts.username or "")
        self.tls = parts.scheme == "rediss"
        if parts.scheme not in ("redis", "rediss", "unix") or not (self.path or self.host):
            raise ConfigError(f"redis.url: {settings.url!r} is none of redis://, rediss:// and unix://")
        if parts.password:
            raise ConfigError("redis.url: the password belongs into a file (redis.password_file)")

    def context(self) -> ssl.SSLContext | None:
        return ssl.create_default_context(cafile=self.settings.ca_file or None) if self.tls else None

    def greeting(self) -> list[bytes]:
        """What is sent first; each is answered by OK."""
        commands = []
        if self.settings.password_file:
            password = Path(self.settings.password_file).read_text(encoding="utf-8").strip()
            commands.append(pack("AUTH", *((self.user,) if self.user else ()), password))
        if self.database:
            commands.append(pack("SELECT", self.database))
        return commands

    def keys(self, user: str) -> tuple[str, ...]:
        """KEYS of limits.lua."""
        prefix = self.settings.prefix
        return (*(f"{prefix}:{kind}:{user}" for kind in ("holds", "slots", "counts", "quotas")), f"{prefix}:workers")

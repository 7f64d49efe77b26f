"""Keys: how they are made, what is kept of them, and how one that stands in a URL is noticed."""

import hashlib
import re
import secrets

PREFIX = "ck-"
IN_URL = re.compile(
    rb"[?&](?:[a-z_-]+key|authorization|bearer|(?:[a-z]+[_-]?)?token)=|ck-[a-z0-9_-]{43}|(?<![a-z0-9])sk-[a-z0-9_-]{20}",
    re.IGNORECASE,
)
BARE = re.compile(rb"[?&]key=", re.IGNORECASE)
ADMIN = b"/admin/"  # where `key` is the name of one


def new_key() -> str:
    """256 random bits. Shown once; nothing but its digest is kept."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(key: str) -> str:
    """A key is random, so that one round of SHA-256 cannot be turned around by trying."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def key_in_url(target: bytes) -> bool:
    """URLs end up in logs, histories and referrers, so a key there is refused even when it is a good one."""
    if BARE.search(target) is not None and not target.startswith(ADMIN):
        return True
    return IN_URL.search(target) is not None

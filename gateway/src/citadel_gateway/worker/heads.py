"""Heads that have been seen before: on a kept connection each request has the same head but for its length.

Taking a head apart costs more than deciding about the request. Where the bytes are the very same that the strict
parser has accepted a moment ago, and the whole message is there, nothing is taken apart again. Everything else goes
through the parser: another head, a body in pieces, requests sent ahead.
"""

from typing import Final

LENGTH: Final = b"\r\ncontent-length:"
LONGEST: Final = 9  # digits


class KnownHead:
    """The bytes of an accepted head around the digits of its Content-Length."""

    __slots__ = ("after", "before")

    def __init__(self, before: bytes, after: bytes) -> None:
        self.before = before
        self.after = after

    def body_of(self, data: bytes) -> bytes | None:
        """The body, if `data` is exactly this head with some length and a body of that length."""
        if not data.startswith(self.before):
            return None
        start = len(self.before)
        end = data.find(b"\r", start, start + LONGEST + 1)
        if end <= start or not data.startswith(self.after, end):
            return None
        length = 0
        for place in range(start, end):
            digit = data[place] - 48
            if digit < 0 or digit > 9:
                return None
            length = 10 * length + digit
        body = end + len(self.after)
        return data[body:] if len(data) == body + length else None


def known_head(data: bytes, size: int) -> KnownHead | None:
    """What is to be remembered of a message that came in one piece, with a body of `size` bytes; None if it has no
    Content-Length that says so.
    """
    end = data.find(b"\r\n\r\n") + 4
    if end < 4 or end + size != len(data):
        return None
    start = data[:end].lower().find(LENGTH) + len(LENGTH)
    if start < len(LENGTH):
        return None
    while data[start : start + 1] == b" ":
        start += 1
    digits = b"%d" % size
    stop = start + len(digits)
    if data[start:stop] != digits or data[stop : stop + 2] != b"\r\n":
        return None
    return KnownHead(data[:start], data[stop:end])

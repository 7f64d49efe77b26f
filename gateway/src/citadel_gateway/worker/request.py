"""A client's request as it comes in: what the parser found, and what is read from its headers."""

from typing import Any, Final

from citadel_gateway.errors import Refusal
from citadel_gateway.worker.headers import Headers

FIELDS: Final = {
    b"authorization": "authorization",
    b"content-length": "length",
    b"content-type": "content_type",
    b"expect": "expect",
    b"host": "host",
    b"origin": "origin",
    b"transfer-encoding": "coding",
    b"upgrade": "upgrade",
    b"x-request-id": "request_id",
}


class Request:
    """Filled by the parser's callbacks, piece by piece; `checked` once its head was looked at before its body came."""

    __slots__ = (
        "authorization", "checked", "coding", "complete", "content_type", "digest", "expect", "head_done", "head_fed",
        "headers", "hints", "host", "hosts", "http10", "keep_alive", "length", "method", "origin", "parts", "passed",
        "path", "query", "refusal", "request_id", "size", "target", "upgrade",
    )  # fmt: skip

    def __init__(self) -> None:
        self.target = b""
        self.headers: Headers = []
        self.head_fed = 0  # bytes of reads that did not bring the end of the head
        self.parts: list[bytes] = []
        self.size = 0
        self.hosts = 0
        self.method = self.path = self.query = self.host = self.upgrade = self.coding = self.length = b""
        self.authorization = self.content_type = self.expect = self.origin = self.request_id = b""
        self.http10 = self.keep_alive = False
        self.head_done = self.checked = self.complete = False
        self.refusal: Refusal | None = None
        # made from the head when first needed, and kept for the next request with the same head
        self.digest = b""
        self.passed = b""
        self.hints: Any = None

    def again(self, body: bytes) -> None:
        """The same head once more, with another body; what was read from the head stays."""
        self.parts = [body]
        self.size = len(body)

    def plain(self) -> bool:
        """A message whose head can be remembered: complete, with a length, and nothing unusual about it."""
        return (
            self.complete
            and self.keep_alive
            and not self.http10
            and self.hosts == 1
            and self.refusal is None
            and not (self.coding or self.expect or self.upgrade or self.checked)
        )

    def end_of_head(self, method: bytes, version: str, keep_alive: bool) -> None:
        self.method = method
        self.http10 = version == "1.0"
        self.keep_alive = keep_alive
        self.path, _, self.query = self.target.partition(b"?")
        for name, value in self.headers:
            field = FIELDS.get(name)
            if field is not None:
                setattr(self, field, value)
                if field == "host":
                    self.hosts += 1
        self.head_done = True

    def head_size(self) -> int:
        return len(self.target) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def declared(self) -> int:
        """Content-Length; -1 when the length is not known beforehand."""
        return -1 if self.coding else int(self.length or 0)

    def body(self) -> bytes:
        parts = self.parts
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def without_upgrade(self) -> bytes:
        """The head once more, as if no other protocol had been offered."""
        lines = [b"%b %b HTTP/%b" % (self.method, self.target, b"1.0" if self.http10 else b"1.1")]
        for name, value in self.headers:
            if name == b"connection":
                tokens = (token.strip() for token in value.split(b","))
                lines.append(b"connection: " + b", ".join(token for token in tokens if token.lower() != b"upgrade"))
            elif name != b"upgrade":
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def wants_websocket(self) -> bool:
        return self.method == b"GET" and self.upgrade.lower() == b"websocket"

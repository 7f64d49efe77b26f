"""Errors as OpenAI's clients expect them."""

from typing import Final

import msgspec

encode = msgspec.json.Encoder().encode

# the `type` that goes with a status; everything else of the 4xx is an invalid request
KINDS: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(status: int, code: str, message: str, param: str | None = None) -> bytes:
    """`{"error": {…}}` with the four fields of OpenAI's errors."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


class Refusal(Exception):  # noqa: N818  # an answer that was decided, not an error of the program
    """A request that gets an answer of the gateway instead of one of a model.

    `close`: the connection cannot be used again (its bytes are not understood, or the rest of a body will not be read).
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: int = 0,
        allow: str = "",
        outcome: str = "refused",
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.allow = allow
        self.outcome = outcome
        self.close = close

    def body(self) -> bytes:
        return error_body(self.status, self.code, self.message, self.param)

    def headers(self) -> bytes:
        """The header lines that belong to this refusal."""
        lines = b""
        if self.retry_after:
            lines += b"retry-after: %d\r\n" % self.retry_after
        if self.allow:
            lines += b"allow: %b\r\n" % self.allow.encode()
        if self.status == 401:
            lines += b'www-authenticate: Bearer realm="citadel"\r\n'
        return lines


def method_not_allowed(method: str, allow: str) -> Refusal:
    return Refusal(405, "method_not_allowed", f"{method} is not allowed here; use {allow}", allow=allow)


def stream_error(status: int, code: str, message: str) -> bytes:
    """The last event of a stream that cannot be finished: never a silent end."""
    return b"data: %b\n\n" % error_body(status, code, message)

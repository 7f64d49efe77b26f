"""Questions to a Prometheus, within a budget: range queries alone, one at a time, of a bounded size."""

import base64
import http.client
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from . import settings

LEAST_STEP = settings.DETECTION_STEP
MOST_POINTS = 11_000  # of one series in one answer: Prometheus' own bound
MOST_BYTES = 32 * 1024 * 1024  # of one answer
PIECE = 1 << 16

EVERYWHERE = {"unreachable", "timeout", "busy", "unauthorised"}  # the next question would fare no better


class QueryError(Exception):
    """No usable answer; ``reason`` is one word of a closed set, as it stands in metrics."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason

    @property
    def everywhere(self) -> bool:
        return self.reason in EVERYWHERE


class Found(Struct, frozen=True):
    """One series of an answer: its labels, and (time, value) with the value as text."""

    metric: dict[str, str]
    values: list[tuple[float, str]]

    def points(self) -> list[tuple[float, float]]:
        return [(at, float(value)) for at, value in self.values]


class Matrix(Struct, frozen=True):
    result: list[Found]
    result_type: Annotated[str, Meta(pattern="^matrix$")] = msgspec.field(name="resultType")


class Answer(Struct, frozen=True):
    data: Matrix


class Refusal(Struct, frozen=True):
    error: str = ""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Credentials go to the address that was set, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Client:
    """Asks one server. ``observe`` gets the seconds of each question; nothing is kept between two of them."""

    def __init__(
        self,
        where: settings.Prometheus,
        observe: Callable[[float], None] = lambda _: None,
        *,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.where, self.observe, self.most_bytes = where, observe, most_bytes
        handlers: list[Any] = [urllib.request.ProxyHandler({}), NoRedirect()]
        if where.url.startswith("https:"):
            handlers.append(
                urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=where.ca_file or None))
            )
        self.opener = urllib.request.build_opener(*handlers)

    def range(self, query: str, start: int, end: int, step: int) -> list[Found]:
        """Values of each series at ``start``, ``start + step``, … ``end`` (seconds since the epoch).

        Raises QueryError without an answer, ValueError for a question beyond the budget.
        """
        points = (end - start) // step + 1
        if step < LEAST_STEP or not 1 <= points <= MOST_POINTS:
            raise ValueError(f"{points} points of {step} s: ask for 1 to {MOST_POINTS} of at least {LEAST_STEP} s")
        form = {"query": query, "start": start, "end": end, "step": step, "timeout": f"{self.where.timeout_seconds:g}s"}
        began = time.monotonic()
        try:
            body = self._post("/api/v1/query_range", urllib.parse.urlencode(form).encode())
        finally:
            self.observe(time.monotonic() - began)
        try:
            return msgspec.json.decode(body, type=Answer).data.result
        except msgspec.DecodeError as error:
            raise QueryError("malformed", f"what {self.where.url} answered is no range of values: {error}") from None

    def _post(self, path: str, form: bytes) -> bytes:
        address = self.where.url.rstrip("/") + path  # http or https: the settings were checked
        request = urllib.request.Request(address, form, self._headers())  # noqa: S310  settings allow http and https alone
        deadline = time.monotonic() + self.where.timeout_seconds
        try:
            with self.opener.open(request, timeout=self.where.timeout_seconds) as reply:
                return self._body(reply, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error.code, error.read(4096)) from None
        except TimeoutError:
            raise self._late() from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.URLError) and isinstance(error.reason, TimeoutError):
                raise self._late() from None
            raise QueryError("unreachable", f"{self.where.url} cannot be asked: {error}") from None

    def _body(self, reply: Any, deadline: float) -> bytes:
        """All of an answer, unless it is too long, or comes so slowly that no single wait for it is."""
        pieces, size = [], 0
        while piece := reply.read1(PIECE):
            size += len(piece)
            if size > self.most_bytes:
                raise QueryError("too_large", f"the answer has more than {self.most_bytes} bytes: select fewer series")
            if time.monotonic() > deadline:
                raise self._late()
            pieces.append(piece)
        return b"".join(pieces)

    def _late(self) -> QueryError:
        return QueryError("timeout", f"{self.where.url} did not answer within {self.where.timeout_seconds:g} s")

    def _refused(self, status: int, body: bytes) -> QueryError:
        try:
            said = msgspec.json.decode(body, type=Refusal).error
        except msgspec.DecodeError:
            said = ""
        reason = {401: "unauthorised", 403: "unauthorised", 429: "busy", 502: "busy", 503: "busy", 504: "busy"}
        return QueryError(reason.get(status, "refused"), f"{self.where.url} answered {status} {said}".rstrip())

    def _headers(self) -> dict[str, str]:
        try:
            if self.where.bearer_file:
                return {"Authorization": f"Bearer {Path(self.where.bearer_file).read_text().strip()}"}
            if self.where.username:
                pair = f"{self.where.username}:{Path(self.where.password_file).read_text().strip()}"
                return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}
        except OSError as error:
            raise QueryError("unauthorised", f"{error.filename}: cannot be read: {error.strerror}") from None
        return {}

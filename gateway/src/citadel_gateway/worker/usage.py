"""Token usage in the bytes that pass by.

A stream is asked to say with every event what it has used (vLLM's `continuous_usage_stats`), so that a request can be
settled however it ends. What the client did not ask for is cut out again, and then its stream is, byte for byte, the
one that the engine sends to those who do not ask. Events are looked at as bytes: of a whole stream only the last usage
is decoded.
"""

import re
from typing import Final, Literal

import msgspec
from msgspec import Raw

from citadel_gateway.core.ticket import Used
from citadel_gateway.worker.shapes import Figures, Options

Ask = Literal["nothing", "total", "all"]  # what the client itself wants to see: nothing, the last event, every event

NAME: Final = b'"usage"'
DONE: Final = b"data: [DONE]\n\n"
# one level of details inside; engines put only numbers into both
VALUE: Final = re.compile(rb'"usage"\s*:\s*(null|\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
INDEX: Final = re.compile(rb'"index"\s*:\s*(\d{1,6})')
FINGERPRINT: Final = re.compile(rb'"system_fingerprint"\s*:\s*"[^"\\]*"')
NO_CHOICES: Final = re.compile(rb'"choices"\s*:\s*\[\s*\]')
FINISHED: Final = re.compile(rb'"finish_reason"\s*:\s*"')
BLANK: Final = b" \t\r\n"
OPTIONS: Final = b'{"include_usage":true,"continuous_usage_stats":true}'
BYTES_PER_TOKEN: Final = 4  # of a text whose engine does not say how many tokens it is


decode = msgspec.json.Decoder(Figures).decode
decode_options = msgspec.json.Decoder(Options | None).decode
decode_members = msgspec.json.Decoder(dict[str, Raw]).decode
encode = msgspec.json.Encoder().encode


def asked(options: bytes) -> Ask | None:
    """What `stream_options` mean for the client; None when they are not understood, and the engine shall say so."""
    if not options:
        return "nothing"
    try:
        found = decode_options(options)
    except msgspec.DecodeError:  # ValidationError is one of these
        return None
    if found is None or not found.include_usage:
        return "nothing"
    return "all" if found.continuous_usage_stats else "total"


def with_options(body: bytes, options: bytes) -> bytes:
    """The body of a stream, asking for usage with each event; `options` are those that the client gave."""
    if not options:
        return with_member(body, b'"stream_options":%b' % OPTIONS)
    members = decode_members(options) if options != b"null" else {}
    members["include_usage"] = members["continuous_usage_stats"] = Raw(b"true")
    return replaced(body, "stream_options", encode(members))


def with_member(body: bytes, member: bytes) -> bytes:
    """One more member of an object that has some. It is the last one, so it counts, whatever stands before it."""
    end = body.rindex(b"}")
    return b"%b,%b%b" % (body[:end], member, body[end:])


def replaced(body: bytes, name: str, value: bytes) -> bytes:
    """Another value for a name, which then stands once. All other values keep their bytes."""
    members = decode_members(body)
    members[name] = Raw(value)
    return encode(members)


def find(data: bytes) -> re.Match[bytes] | None:
    """The last usage in one event or reply. In a text its quotes would be escaped, so a text is never taken for one."""
    at = data.rfind(NAME)
    while at >= 0:
        found = VALUE.match(data, at)
        if found is not None:
            return found
        at = data.rfind(NAME, 0, at)
    return None


def around(data: bytes, found: re.Match[bytes]) -> tuple[bytes, bytes, bytes]:
    """What stands before the usage, the comma that belongs to it, and what stands after."""
    before, after = data[: found.start()].rstrip(BLANK), data[found.end() :]
    if before.endswith(b","):
        before = before[:-1]
        return before, data[len(before) : found.start()], after
    rest = after.lstrip(BLANK)
    return before, b",", rest[1:].lstrip(BLANK) if rest.startswith(b",") else after


def used_of(value: bytes) -> Used | None:
    """A usage object in any of its shapes; None when it is none."""
    try:
        found = decode(value)
    except msgspec.DecodeError:
        return None
    details = found.prompt_tokens_details or found.input_tokens_details
    cached = (details.cached_tokens if details is not None else found.cache_read_input_tokens) or 0
    if found.prompt_tokens is not None:
        return Used(found.prompt_tokens, found.completion_tokens or 0, cached)
    if found.input_tokens is None and found.output_tokens is None:
        return None
    # of messages (not of responses) what came from the cache is no part of the input
    beside = (found.cache_read_input_tokens or 0) + (found.cache_creation_input_tokens or 0)
    return Used((found.input_tokens or 0) + beside, found.output_tokens or 0, cached)


class Meter:
    """Reads the usage of one reply, and takes it out of a stream where it was only asked for by us.

    `many`: how many texts there are for one prompt, when the stream has several (n, or several prompts), each with a
    count of its own; else 0.
    """

    __slots__ = ("ask", "done", "events", "held", "last", "many", "texts")

    def __init__(self, ask: Ask | None = None, many: int = 0) -> None:
        self.ask = ask  # None: a stream of other events, where usage is only read
        self.many = many
        self.events = 0
        self.last = b""
        self.texts: dict[int, bytes] = {}
        self.done = False  # `last` is about the whole request
        self.held: tuple[bytes, bytes, bytes] | None = None

    # streams --------------------------------------------------------------------------------------------------------
    def stream(self, data: bytes) -> bytes:
        """Whole events as they came; what the client gets of them."""
        if self.ask is None:
            self.read(data)
            return data
        if NAME not in data and self.held is None:
            self.events += data.count(b"\n\n") - data.endswith(DONE)
            return data
        separator = b"\n\n" if b"\n\n" in data else b"\r\n\r\n"
        end = data.find(separator) + len(separator)
        if end == len(data):
            return self.event(data)
        out, start = [], 0
        while start < len(data):
            end = data.find(separator, start)
            end = len(data) if end < 0 else end + len(separator)
            out.append(self.event(data[start:end]))
            start = end
        return b"".join(out)

    def event(self, data: bytes) -> bytes:
        """One event."""
        found = find(data)
        if found is None:
            self.events += data != DONE
            return self.rest() + data
        value = found[1]
        if NO_CHOICES.search(data) is not None:
            if value != b"null":
                self.last, self.done = value, True
            waiting = self.rest(FINGERPRINT.search(data))
            return waiting if self.ask == "nothing" else waiting + data
        self.events += 1
        waiting = self.rest()
        if value != b"null":
            self.note(data, value)
        if self.ask == "all":
            return waiting + data
        before, comma, after = around(data, found)
        if self.ask == "nothing" and not self.many and value != b"null" and FINISHED.search(before) is not None:
            # the last event of the text: an engine that is asked for usage puts its fingerprint into the event after it
            self.held = before, comma, after
            return waiting
        return b"%b%b%b" % (waiting, before, after)

    def note(self, data: bytes, value: bytes) -> None:
        self.last = value
        if self.many:
            index = INDEX.search(data)
            self.texts[int(index[1]) if index is not None else 0] = value

    def rest(self, fingerprint: re.Match[bytes] | None = None) -> bytes:
        """The event that was held back, with the fingerprint that it has in a stream without usage."""
        if self.held is None:
            return b""
        (before, comma, after), self.held = self.held, None
        return b"".join((before, comma, fingerprint[0], after) if fingerprint is not None else (before, after))

    def read(self, data: bytes) -> None:
        """Events of responses and messages: they tell their usage unasked, at the end."""
        self.events += data.count(b"delta\n")
        start = data.rfind(NAME)
        while start >= 0:
            found = VALUE.match(data, start)
            if found is not None and found[1] != b"null":
                self.last = found[1]
                line = data.rfind(b"data:", 0, start)
                self.done = b"message_start" not in data[max(line, 0) : start]
                return
            start = data.rfind(NAME, 0, start)

    # replies --------------------------------------------------------------------------------------------------------
    def reply(self, body: bytes) -> None:
        """A complete reply that is no stream."""
        found = find(body)
        if found is not None and found[1] != b"null":
            self.last, self.done = found[1], True
        else:
            self.events = len(body) // BYTES_PER_TOKEN

    # the sum --------------------------------------------------------------------------------------------------------
    def used(self, estimate: int) -> Used:
        """What is known so far; `estimate`: of the prompt, for an engine that says nothing."""
        if self.many and not self.done and self.texts:
            texts = {index: used_of(value) or Used() for index, value in self.texts.items()}
            prompts = {index // self.many: one.input for index, one in texts.items()}
            return Used(sum(prompts.values()), sum(one.output for one in texts.values()))
        found = used_of(self.last) if self.last else None
        if found is None:
            return Used(estimate, self.events)
        if self.done:
            return Used(found.input, found.output, found.cached, True)
        return Used(found.input, max(found.output, self.events) if self.ask is None else found.output, found.cached)

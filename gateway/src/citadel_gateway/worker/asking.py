"""What a client asks for: as much of the body and of the headers as decisions need, and the body that an engine gets.

Nothing is decoded that nobody decides about; all other members go through with their bytes. Where a name stands twice
the last one counts, for us as for the engines.
"""

import re
from math import ceil
from typing import Final

import msgspec
from msgspec import Raw

from citadel_gateway.core.catalogue import Model
from citadel_gateway.core.routing import Query, stable_hash
from citadel_gateway.core.ticket import Ticket
from citadel_gateway.errors import Refusal
from citadel_gateway.settings import Limits
from citadel_gateway.worker.request import Request
from citadel_gateway.worker.shapes import ABSENT, Wanted
from citadel_gateway.worker.usage import BYTES_PER_TOKEN, Ask, Meter, asked, replaced, with_member, with_options

MOST_TEXT: Final = 128  # characters of a header that is kept (session, tag, use case, language)
USUAL_OUTPUT: Final = 256  # tokens that are expected of a request that names no number
SECONDS: Final = re.compile(rb"\d{1,6}(\.\d{1,6})?")
AMOUNT: Final = re.compile(rb"\d{1,9}(\.\d{1,12})?")
TRACE: Final = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
BLANK: Final = b" \t\r\n"
NO_TOOLS: Final = frozenset((b"", b"[]", b"null"))

HINTS: Final = frozenset(
    b"x-session-id x-use-case x-tag x-language accept-language traceparent x-budget-usd x-request-timeout"
    b" x-citadel-resumable".split()
)

# path -> the capability it needs, which is also its name in metrics
CAPABILITIES: Final = {
    b"/v1/chat/completions": "chat",
    b"/v1/completions": "completions",
    b"/v1/embeddings": "embeddings",
    b"/v1/responses": "responses",
    b"/v1/messages": "messages",
}
WITH_OPTIONS: Final = frozenset(("chat", "completions"))  # whose streams can be asked for usage


decode = msgspec.json.Decoder(Wanted).decode
decode_list = msgspec.json.Decoder(list[Raw]).decode
encode = msgspec.json.Encoder().encode


def read(body: bytes) -> Wanted:
    """Raises 400 for what is no JSON object or has a wrong type where we look."""
    try:
        wanted = decode(body)
        if not body.isascii():
            body.decode()  # a text that is passed over is not looked at by the decoder
    except msgspec.ValidationError as error:
        raise Refusal(400, "invalid_request", f"The request is not valid: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, "invalid_json", f"The body is not valid JSON: {error}") from None
    return wanted


def prompts(prompt: memoryview) -> int:
    """How many prompts a `prompt` is: a list of texts, or of lists of tokens, is several."""
    if bytes(prompt[:1]) != b"[":
        return 1
    members = decode_list(prompt)
    several = bool(members) and bytes(members[0])[:1] in (b'"', b"[")
    return len(members) if several else 1


def given(tools: Raw) -> bool:
    """Whether there are any."""
    return tools is not ABSENT and bytes(memoryview(tools)[:5]).strip(BLANK) not in NO_TOOLS


def text(value: bytes) -> str:
    """A header's value as it may stand in records: short, and without control characters."""
    found = value.decode("latin-1")[:MOST_TEXT]
    return found if found.isprintable() else "".join(filter(str.isprintable, found))


def number(value: bytes, form: re.Pattern[bytes], name: str) -> float:
    if form.fullmatch(value) is None:
        raise Refusal(400, "invalid_request", f"{name} must be a number", param=name)
    return float(value)


class Hints:
    """What the headers say about a request for a model, beside its key."""

    __slots__ = ("budget_usd", "language", "resumable", "session", "tag", "timeout", "traceparent", "use_case")

    def __init__(
        self,
        session: str = "",
        use_case: str = "",
        tag: str = "",
        language: str = "",
        traceparent: str = "",
        budget_usd: float = 0.0,
        timeout: float = 0.0,
        resumable: bool = False,
    ) -> None:
        self.session = session
        self.use_case = use_case
        self.tag = tag
        self.language = language
        self.traceparent = traceparent
        self.budget_usd = budget_usd
        self.timeout = timeout
        self.resumable = resumable


NO_HINTS: Final = Hints()


def hints_of(request: Request) -> Hints:
    """Read once for each head. Raises 400 for a number that is none."""
    found: Hints | None = request.hints
    if found is not None:
        return found
    values = {name: value for name, value in request.headers if name in HINTS}
    found = NO_HINTS
    if values:
        language = values.get(b"x-language") or values.get(b"accept-language", b"").partition(b",")[0]
        trace = values.get(b"traceparent", b"")
        found = Hints(
            session=text(values.get(b"x-session-id", b"")),
            use_case=text(values.get(b"x-use-case", b"")),
            tag=text(values.get(b"x-tag", b"")),
            language=text(language.partition(b";")[0].strip()),
            traceparent=trace.decode() if TRACE.fullmatch(trace) else "",
            budget_usd=number(values.get(b"x-budget-usd", b"0"), AMOUNT, "X-Budget-USD"),
            timeout=number(values.get(b"x-request-timeout", b"0"), SECONDS, "X-Request-Timeout"),
            resumable=values.get(b"x-citadel-resumable") == b"1",
        )
    request.hints = found
    return found


class Asking:
    """One request for a model, as it was asked and as it is passed on."""

    __slots__ = ("ask", "body", "capability", "limit_output", "many", "sent", "sent_for", "stream", "wanted")

    def __init__(self, body: bytes, capability: str) -> None:
        self.body = body
        self.capability = capability
        self.wanted = wanted = read(body)
        self.stream = bool(wanted.stream)
        self.ask: Ask | None = None
        if self.stream and capability in WITH_OPTIONS:
            self.ask = asked(bytes(wanted.stream_options))
        self.many = 0
        self.limit_output = 0  # tokens that the engine is told to stop at, where the client has named no number
        self.sent = b""
        self.sent_for = ""

    def describe(self, ticket: Ticket, hints: Hints, limits: Limits, prefix_bytes: int) -> None:
        """Tell the ticket what is asked for. Raises 400 for what is out of bounds."""
        key, wanted = ticket.key, self.wanted
        assert key is not None
        person = key.person
        n = max(wanted.n or 1, wanted.best_of or 1, 1)
        if n > limits.n:
            raise Refusal(400, "invalid_request", f"n may not be more than {limits.n}", param="n")
        most = self.most_output(limits)
        prompt = memoryview(wanted.messages) or memoryview(wanted.prompt) or memoryview(wanted.input)
        texts = n * prompts(prompt) if self.capability == "completions" else n
        self.many = n if texts > 1 else 0
        if self.capability == "embeddings":
            most = 0
        elif most < 0:
            if person.tokens_limited and ticket.metered:
                most = self.limit_output = person.most
            else:
                most = USUAL_OUTPUT
        ticket.stream = self.stream
        ticket.texts = texts
        ticket.output = most * texts
        ticket.load = len(prompt) // BYTES_PER_TOKEN + ticket.output
        ticket.session = hints.session or (wanted.user or "")[:MOST_TEXT]
        ticket.use_case = hints.use_case or key.use_case
        ticket.traceparent = hints.traceparent
        if hints.timeout:
            ticket.deadline = ticket.started + hints.timeout
        ticket.query = Query(
            wanted.model,
            key,
            ticket.started,
            person.tier.name,
            prompt_tokens=len(prompt) // BYTES_PER_TOKEN,
            output_tokens=ticket.output,
            prompt_hash=stable_hash(bytes(prompt[:prefix_bytes])) if prefix_bytes else 0,
            session=ticket.session,
            tools=given(wanted.tools),
            stream=self.stream,
            language=hints.language,
            tag=hints.tag,
            priority=person.priority,
            budget_usd=hints.budget_usd,
            deadline=ticket.deadline,
            capability=self.capability,
        )

    def most_output(self, limits: Limits) -> int:
        """Tokens that may be generated for each text; -1 when the client names no number."""
        wanted = self.wanted
        most = -1
        for name, value in (
            ("max_tokens", wanted.max_tokens),
            ("max_completion_tokens", wanted.max_completion_tokens),
            ("max_output_tokens", wanted.max_output_tokens),
        ):
            if value is not None:
                if value > limits.max_tokens:
                    raise Refusal(
                        400, "invalid_request", f"{name} may not be more than {limits.max_tokens}", param=name
                    )
                most = max(most, value, 0)
        return most

    def reservation(self, ticket: Ticket, model: Model) -> int:
        """Tokens that the request cannot use more of: its prompt, as long as its bytes allow, and its output. Each text
        with its prompt fits into the context.
        """
        prompt = ceil(len(self.body) * model.tokens_per_byte)
        return min(prompt + ticket.output, model.context * ticket.texts)

    # what the engine gets -------------------------------------------------------------------------------------------
    def body_for(self, model: Model) -> bytes:
        """The body that asks for `model` by the name that its engines know, and for usage."""
        if self.sent_for != model.name:
            self.sent = self.adapted(model)
            self.sent_for = model.name
        return self.sent

    def adapted(self, model: Model) -> bytes:
        body, wanted = self.body, self.wanted
        if wanted.model != model.name:
            body = with_model(body, wanted.model, model.name)
        if self.ask == "nothing" or self.ask == "total":
            body = with_options(body, bytes(wanted.stream_options))
        if self.limit_output:
            most = min(self.limit_output, model.context)
            name = b"max_output_tokens" if self.capability == "responses" else b"max_tokens"
            body = with_member(body, b'"%b":%d' % (name, most))  # a `null` of the client's comes before it
        return body

    def meter(self) -> Meter:
        return Meter(self.ask, self.many)


def with_model(body: bytes, asked_for: str, name: str) -> bytes:
    """The same body asking for `name`: an alias is ours, the engine knows only its own name. All other values keep
    their bytes.
    """
    if body.count(b'"model"') == 1:
        at = body.index(b'"model"') + 7
        rest = body[at:].lstrip(BLANK)
        value = encode(asked_for)
        if rest[:1] == b":" and rest[1:].lstrip(BLANK).startswith(value):
            start = body.index(value, at)
            return b"%b%b%b" % (body[:start], encode(name), body[start + len(value) :])
    return replaced(body, "model", encode(name))

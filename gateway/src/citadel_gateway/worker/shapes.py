"""What is decoded of bodies, and what is kept of headers."""

from msgspec import Raw, Struct


class Wanted(Struct, gc=False):
    """What is decoded of a body, of whichever endpoint."""

    model: str
    stream: bool | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    user: str | None = None
    stream_options: Raw = Raw()
    tools: Raw = Raw()
    messages: Raw = Raw()
    prompt: Raw = Raw()
    input: Raw = Raw()


class Hints(Struct, frozen=True, gc=False):
    """What the headers say about a request for a model, beside its key."""

    session: str = ""
    use_case: str = ""
    tag: str = ""
    language: str = ""
    traceparent: str = ""
    budget_usd: float = 0.0
    timeout: float = 0.0
    resumable: bool = False


class Options(Struct):
    """A client's `stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Details(Struct):
    cached_tokens: int | None = None


class Figures(Struct):
    """The usage of chat and text completions, of embeddings, of responses and of messages."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: Details | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: Details | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None

"""What is decoded of bodies."""

from msgspec import Raw, Struct

ABSENT = Raw()


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
    stream_options: Raw = ABSENT
    tools: Raw = ABSENT
    messages: Raw = ABSENT
    prompt: Raw = ABSENT
    input: Raw = ABSENT


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

"""What mutations and subscriptions are given."""

from enum import Enum
from typing import Annotated

import strawberry

from citadel_gateway.control.graphql.measures import Loose


@strawberry.enum(description="Whether a model takes new requests.")
class ModelState(Enum):
    SERVING = "serving"
    DRAINED = "drained"


@strawberry.input(description="One message of a chat.")
class MessageInput:
    role: str
    content: str


@strawberry.input(description="A chat request. `parameters`: everything else that /v1/chat/completions takes.")
class ChatInput:
    messages: list[MessageInput]
    model: str = "auto"
    max_tokens: int | None = None
    temperature: float | None = None
    session: str | None = None
    use_case: str | None = None
    parameters: Annotated[Loose | None, strawberry.argument(description="Fields of the request, as they are.")] = None


@strawberry.input(description="At least one of rating (1-10), correct, outcome and comment.")
class FeedbackInput:
    request_id: str
    rating: int | None = None
    correct: bool | None = None
    outcome: str | None = None
    comment: str | None = None


@strawberry.input(description="A new key. `expiresIn`: seconds; 0: never.")
class KeyInput:
    user: str
    id: str | None = None
    scopes: list[str] = strawberry.field(default_factory=lambda: ["inference"])
    models: list[str] = strawberry.field(default_factory=lambda: ["*"])
    expires_in: float = 0.0
    use_case: str = ""
    new_user: bool = False

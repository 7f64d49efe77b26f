"""Who may ask the control process."""

import hmac
import re
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from starlette.requests import HTTPConnection

from citadel_gateway.control.state import LOCAL, State
from citadel_gateway.control.stored import Actor
from citadel_gateway.settings import Key, Scope

OPERATOR = re.compile(r"[A-Za-z0-9._@-]{1,64}")


def state_of(connection: HTTPConnection) -> State:
    """The state that `make_app` has put on the application. For requests and for WebSockets."""
    state: State = connection.app.state.control
    return state


Control = Annotated[State, Depends(state_of)]


def is_local(request: HTTPConnection) -> bool:
    """On the control socket itself, not through a worker: only processes of this host can."""
    return "x-citadel-worker" not in request.headers


def key_of(request: HTTPConnection) -> Key | None:
    """The valid key that the request came with."""
    return state_of(request).key(request.headers.get("authorization", ""), local=is_local(request))


class Scoped:
    """A dependency: the key of the request, which must have one of the scopes.

    401 without a key, 403 without a scope.
    """

    def __init__(self, *scopes: Scope) -> None:
        self.scopes = scopes

    def __call__(self, request: Request) -> Key:
        key = key_of(request)
        if key is None:
            raise HTTPException(401, "A key is needed: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})
        if not set(self.scopes) & set(key.scopes):
            raise HTTPException(403, f"This key lacks the scope {' or '.join(map(repr, self.scopes))}")
        return key


def actor_for(request: HTTPConnection, key: Key, via: str = "admin") -> Actor:
    who = key.user
    if key.id == LOCAL:
        said = request.headers.get("x-citadel-actor", "")
        who = said if OPERATOR.fullmatch(said) else LOCAL
        via = "cli" if via == "admin" else via
    return Actor(who, key.id, via, request.headers.get("x-request-id", "")[:128])


def admin(request: Request) -> Actor:
    """A dependency: whoever came with a key of scope admin."""
    return actor_for(request, Scoped("admin")(request))


Admin = Annotated[Actor, Depends(admin)]


def is_engine(request: Request) -> None:
    """For /internal: the key of this host's engines, and never through a worker."""
    if not is_local(request):
        raise HTTPException(404, "Not Found")
    sent = request.headers.get("authorization", "")
    if not hmac.compare_digest(sent.encode(), f"Bearer {request.app.state.internal_key}".encode()):
        raise HTTPException(401, "The key of this host's engines is needed")


def known_model(name: str, control: Control) -> str:
    """A dependency: the model's own name for the name or alias in the path."""
    model = control.find(name)
    if model is None:
        raise HTTPException(404, f"The model {name[:128]!r} does not exist")
    return model

"""Who may ask the control process."""

import hmac
from typing import Annotated

from fastapi import Depends, HTTPException, Request

from citadel_gateway.control.state import State
from citadel_gateway.settings import Key, Scope


def state_of(request: Request) -> State:
    """The state that `make_app` has put on the application."""
    state: State = request.app.state.control
    return state


Control = Annotated[State, Depends(state_of)]


class Scoped:
    """A dependency: the key of the request, which must have one of the scopes.

    401 without a key, 403 without a scope.
    """

    def __init__(self, *scopes: Scope) -> None:
        self.scopes = scopes

    def __call__(self, request: Request) -> Key:
        key = state_of(request).key(request.headers.get("authorization", ""))
        if key is None:
            raise HTTPException(401, "A key is needed: Authorization: Bearer KEY")
        if not set(self.scopes) & set(key.scopes):
            raise HTTPException(403, f"This key lacks the scope {' or '.join(map(repr, self.scopes))}")
        return key


def is_engine(request: Request) -> None:
    """For /internal: the key of this host's engines, and never through a worker."""
    if "x-citadel-worker" in request.headers:
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

"""Errors as clients get them: what was decided is said with its code, everything else is said to the log alone."""

import logging

from graphql import GraphQLError
from pydantic import ValidationError
from sqlalchemy.exc import DataError
from strawberry.extensions import MaskErrors

from citadel_gateway.control.client import Unreachable
from citadel_gateway.control.feedback import Wrong
from citadel_gateway.control.sql import DatabaseAwayError
from citadel_gateway.errors import Refusal

log = logging.getLogger("citadel_gateway")

INTERNAL = "The gateway's control process failed; its log has the reason"


def known(error: BaseException | None) -> tuple[str, str, int] | None:
    """Code, message and status of what was decided or foreseen."""
    match error:
        case Refusal():
            return error.code, error.message, error.status
        case Wrong():
            return "invalid_request", str(error), 400
        case ValidationError():
            found = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            return "invalid_request", found, 400
        case DatabaseAwayError():
            return "database_unavailable", "The database is away; try again in a moment", 503
        case Unreachable():
            return "gateway_unavailable", "No worker of the gateway can be reached at the moment", 503
        case DataError() | UnicodeEncodeError():
            return "invalid_request", "A text or a number in the query cannot be asked for", 400
        case RecursionError():
            return "query_too_large", "The query is nested too deeply", 400
    return None


class Faults(MaskErrors):
    """Replaces errors on their way out."""

    def __init__(self) -> None:
        super().__init__()

    def _process_errors(self, errors: list[GraphQLError]) -> list[GraphQLError]:
        return [shown(error) for error in errors]


def is_foreseen(error: GraphQLError) -> bool:
    """One of GraphQL's own, about the query, or one that was decided."""
    cause = error.original_error
    return cause is None or isinstance(cause, GraphQLError) or known(cause) is not None


def shown(error: GraphQLError) -> GraphQLError:
    cause = error.original_error
    found = known(cause)
    if found is None:
        if is_foreseen(error):
            return error
        found = ("internal_error", INTERNAL, 500)
    code, message, status = found
    return GraphQLError(message, nodes=error.nodes, path=error.path, extensions={"code": code, "status": status})

"""The schema, and what each operation passes before it is executed."""

import logging
from collections.abc import Iterator
from typing import Any

import strawberry
from graphql import DocumentNode, GraphQLError, OperationDefinitionNode
from strawberry.extensions import SchemaExtension
from strawberry.schema.config import StrawberryConfig
from strawberry.types import ExecutionContext

from citadel_gateway.control.graphql.context import Context
from citadel_gateway.control.graphql.faults import Faults, is_foreseen
from citadel_gateway.control.graphql.limits import BOUNDS, nested, refuse
from citadel_gateway.control.graphql.mutations import Mutation
from citadel_gateway.control.graphql.queries import Query
from citadel_gateway.control.graphql.subscriptions import Subscription
from citadel_gateway.errors import Refusal

log = logging.getLogger("citadel_gateway")

VARIABLES_DEPTH = 20


class Limits(SchemaExtension):
    """Bounds of the document, before validation. The schema is shown to administrators."""

    def on_operation(self) -> Iterator[None]:
        self.execution_context.parse_options["max_tokens"] = BOUNDS.tokens
        yield

    def on_validate(self) -> Iterator[None]:
        execution = self.execution_context
        assert execution.graphql_document is not None
        variables: dict[str, Any] = execution.variables or {}
        try:
            named = execution._provided_operation_name  # the public name falls back to the first operation
            if named is None and len(operations(execution.graphql_document)) > 1:
                raise GraphQLError("operationName must say which operation", extensions={"code": "bad_request"})
            if nested(variables, VARIABLES_DEPTH):
                raise GraphQLError("The variables are nested too deeply", extensions={"code": "query_too_large"})
            size = refuse(execution.graphql_document, graphql_schema, variables, BOUNDS)
            context: Context = execution.context
            if size.introspects and not context.has("admin"):
                raise GraphQLError(
                    "The schema is shown to keys of scope 'admin' only", extensions={"code": "insufficient_scope"}
                )
        except GraphQLError as error:
            execution.pre_execution_errors = [error]  # validation is skipped then
        except Refusal as error:
            execution.pre_execution_errors = [GraphQLError(error.message, original_error=error)]
        yield


def operations(document: DocumentNode) -> list[OperationDefinitionNode]:
    return [one for one in document.definitions if isinstance(one, OperationDefinitionNode)]


class Schema(strawberry.Schema):
    """One that logs only what nobody foresaw, and no values."""

    def process_errors(self, errors: list[GraphQLError], execution_context: ExecutionContext | None = None) -> None:
        for error in errors:
            if not is_foreseen(error):
                cause = error.original_error
                log.error("graphql: %s failed", ".".join(map(str, error.path or ("?",))), exc_info=cause)


schema = Schema(
    Query,
    Mutation,
    Subscription,
    extensions=[Faults, Limits],
    config=StrawberryConfig(auto_camel_case=True, disable_field_suggestions=True),
)
graphql_schema = schema._schema  # strawberry has no public name for it

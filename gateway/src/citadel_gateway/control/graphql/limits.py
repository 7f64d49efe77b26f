"""What a GraphQL document may ask for.

Measured after parsing and before validation, because validation itself can be made slow by a document that is built
for it. Fragments count wherever they are spread, and each is measured once, so that a chain of fragments which doubles
with every link costs no more to measure than to write down.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLError,
    GraphQLField,
    GraphQLList,
    GraphQLNonNull,
    GraphQLObjectType,
    GraphQLSchema,
    InlineFragmentNode,
    IntValueNode,
    OperationDefinitionNode,
    SelectionSetNode,
    VariableNode,
    get_named_type,
)

MOST_ROWS = 200  # that one list may be asked for
NODES = "nodes"  # of a page, whose own `first` has counted them
WEIGHTS = {"chatCompletion": 500, "createKey": 500}  # fields that cost more than a look


@dataclass(frozen=True, slots=True)
class Bounds:
    """`cost`: one for each field or its weight, times the rows of the lists around it. `depth`: fields in fields."""

    tokens: int = 2000
    depth: int = 10
    aliases: int = 30
    fields: int = 400
    cost: int = 5000
    directives: int = 25
    fragments: int = 30
    operations: int = 10
    rows: int = 5  # of a list that takes no `first`


BOUNDS = Bounds()


class TooMuch(GraphQLError):  # noqa: N818  # an answer that was decided, not an error of the program
    """The document asks for more than the bounds allow."""

    def __init__(self, what: str, found: object, allowed: int) -> None:
        super().__init__(
            f"The query is too large: {what} {found}, at most {allowed}", extensions={"code": "query_too_large"}
        )


@dataclass(slots=True)
class Size:
    """What a selection comes to. `introspects`: it asks for the schema."""

    depth: int = 0
    fields: int = 0
    aliases: int = 0
    directives: int = 0
    cost: int = 0
    introspects: bool = False


def refuse(document: DocumentNode, schema: GraphQLSchema, variables: Mapping[str, Any], bounds: Bounds) -> Size:
    """The size of the largest operation of the document; raises `TooMuch` for one that is out of bounds."""
    measure = Measure(document, schema, variables, bounds)
    largest = Size()
    for operation in measure.operations:
        found = measure.operation(operation)
        for what in ("depth", "fields", "aliases", "directives", "cost"):
            value, allowed = getattr(found, what), getattr(bounds, what)
            if value > allowed:
                raise TooMuch(what, value if value < 1_000_000_000 else "over 1000000000", allowed)
            setattr(largest, what, max(getattr(largest, what), value))
        largest.introspects = largest.introspects or found.introspects
    return largest


class Measure:
    """Sizes of one document's operations."""

    def __init__(
        self, document: DocumentNode, schema: GraphQLSchema, variables: Mapping[str, Any], bounds: Bounds
    ) -> None:
        self.schema = schema
        self.variables = variables
        self.bounds = bounds
        self.operations = [one for one in document.definitions if isinstance(one, OperationDefinitionNode)]
        found = [one for one in document.definitions if isinstance(one, FragmentDefinitionNode)]
        for what, count, allowed in (
            ("operations", len(self.operations), bounds.operations),
            ("fragments", len(found), bounds.fragments),
        ):
            if count > allowed:
                raise TooMuch(what, count, allowed)
        self.fragments = {one.name.value: one for one in found}
        self.known: dict[str, Size] = {}  # fragments that were measured
        self.open: set[str] = set()  # fragments that are being measured: one that meets itself is a cycle
        self.defaults: dict[str, Any] = {}

    def operation(self, node: OperationDefinitionNode) -> Size:
        self.defaults = {
            one.variable.name.value: one.default_value for one in node.variable_definitions or () if one.default_value
        }
        self.known = {}  # a list's length may hang on this operation's variables
        size = self.selections(node.selection_set, self.schema.get_root_type(node.operation))
        size.directives += len(node.directives or ())
        return size

    def selections(self, node: SelectionSetNode | None, parent: object) -> Size:
        total = Size()
        if node is None:
            return total
        for one in node.selections:
            if isinstance(one, FieldNode):
                part = self.field(one, parent)
            elif isinstance(one, InlineFragmentNode):
                part = self.selections(one.selection_set, self.condition(one, parent))
            elif isinstance(one, FragmentSpreadNode):
                part = self.spread(one)
            else:
                continue
            total.depth = max(total.depth, part.depth)
            total.fields += part.fields
            total.aliases += part.aliases
            total.directives += part.directives + len(one.directives or ())
            total.cost += part.cost
            total.introspects = total.introspects or part.introspects
        return total

    def condition(self, node: InlineFragmentNode | FragmentDefinitionNode, parent: object) -> object:
        if node.type_condition is None:
            return parent
        return self.schema.get_type(node.type_condition.name.value)

    def field(self, node: FieldNode, parent: object) -> Size:
        name = node.name.value
        if name in ("__schema", "__type"):
            # Whoever may ask this may ask for all of it: the standard question is deep, and validation bounds it.
            return Size(depth=1, fields=1, aliases=node.alias is not None, cost=1, introspects=True)
        definition = parent.fields.get(name) if isinstance(parent, GraphQLObjectType) else None
        size = self.selections(node.selection_set, get_named_type(definition.type) if definition else None)
        size.depth += 1
        size.fields += 1
        size.aliases += node.alias is not None
        size.cost = WEIGHTS.get(name, 1) + size.cost * self.rows(node, definition)
        return size

    def rows(self, node: FieldNode, definition: GraphQLField | None) -> int:
        """How many rows the field may give: what `first` says, else what a list gives without being asked."""
        if definition is None or node.name.value == NODES:
            return 1
        argument = definition.args.get("first")
        if argument is not None:
            given = next((one.value for one in node.arguments or () if one.name.value == "first"), None)
            value = self.number(given)
            default = argument.default_value if isinstance(argument.default_value, int) else self.bounds.rows
            return max(1, default if value is None else value)
        return self.bounds.rows if is_list(definition.type) else 1

    def number(self, value: object) -> int | None:
        if isinstance(value, VariableNode):
            name = value.name.value
            given = self.variables[name] if name in self.variables else self.number(self.defaults.get(name))
            return given if isinstance(given, int) else None
        return int(value.value) if isinstance(value, IntValueNode) else None

    def spread(self, node: FragmentSpreadNode) -> Size:
        name = node.name.value
        fragment = self.fragments.get(name)
        if fragment is None:
            return Size()  # validation will say so
        if name in self.open:
            raise GraphQLError(
                f"The fragment {name!r} spreads itself", nodes=node, extensions={"code": "query_too_large"}
            )
        if name not in self.known:
            self.open.add(name)
            self.known[name] = self.selections(fragment.selection_set, self.condition(fragment, None))
            self.open.discard(name)
        return self.known[name]


def is_list(kind: object) -> bool:
    while isinstance(kind, GraphQLNonNull):
        kind = kind.of_type
    return isinstance(kind, GraphQLList)


def nested(value: object, most: int) -> bool:
    """Whether a value of JSON is deeper than `most`, without recursion."""
    level: list[object] = [value]
    for _ in range(most):
        if not level:
            return False
        level = list(children(level))
    return bool(level)


def children(values: list[object]) -> Iterator[object]:
    for value in values:
        if isinstance(value, dict):
            yield from (one for one in value.values() if isinstance(one, dict | list))
        elif isinstance(value, list):
            yield from (one for one in value if isinstance(one, dict | list))

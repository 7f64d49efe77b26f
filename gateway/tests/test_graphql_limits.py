"""Documents that are built to cost more than they look."""

import hashlib
import time
from typing import Any

import pytest
from citadel_gateway.control.graphql.limits import Bounds, Size, TooMuch, nested, refuse
from citadel_gateway.control.graphql.persisted import NotFound, Persisted
from graphql import GraphQLError, build_schema, parse

SCHEMA = build_schema(
    """
    type Query { me: Person!  people(first: Int): [Person!]!  one(id: ID): Person }
    type Person { name: String!  friends(first: Int): [Person!]!  tags: [String!]!  pets: [Pet!]! }
    type Pet { name: String }
    """
)


def size(query: str, bounds: Bounds | None = None, **variables: Any) -> Size:
    return refuse(parse(query), SCHEMA, variables, bounds or Bounds())


def refusal(query: str, **variables: Any) -> str:
    with pytest.raises(GraphQLError) as caught:
        size(query, **variables)
    assert caught.value.extensions == {"code": "query_too_large"}
    return caught.value.message


@pytest.mark.parametrize(
    ("query", "cost"),
    [
        ("{ me { name } }", 2),
        ("{ people { name } }", 1 + 5),
        ("{ people(first: 100) { name tags } }", 1 + 100 * 2),
        ("{ me { friends { name } } }", 1 + 1 + 5),
        ("{ me { pets { name } } }", 1 + 1 + 5),
        ("query ($n: Int) { people(first: $n) { name } }", 1 + 7),
        ("query ($k: Int = 9) { people(first: $k) { name } }", 1 + 9),
        ("{ people(first: -3) { name } }", 2),
        ("{ me { ...f } } fragment f on Person { name tags }", 3),
        ("{ me { ... on Person { name } ... @include(if: true) { tags } } }", 3),
        ("{ nothing { at { all } } }", 3),
    ],
)
def test_cost(query: str, cost: int) -> None:
    assert size(query, n=7).cost == cost


def test_rows_multiply() -> None:
    assert "cost" in refusal("{ people(first: 100) { friends(first: 100) { name } } }")
    assert "cost" in refusal("query ($n: Int) { people(first: $n) { name tags } }", n=10**12)


def test_depth() -> None:
    deep = "friends(first: 1) { " * 20 + "name" + " }" * 20
    assert "depth 22" in refusal(f"{{ me {{ {deep} }} }}")
    chain = "".join(f"fragment f{n} on Person {{ friends(first: 1) {{ ...f{n + 1} }} }} " for n in range(20))
    assert "depth" in refusal(f"{{ me {{ ...f0 }} }} {chain} fragment f20 on Person {{ name }}")


def test_aliases_and_fields() -> None:
    assert "aliases 31" in refusal("{" + " ".join(f"a{n}: me {{ name }}" for n in range(31)) + "}")
    assert "fields 500" in refusal("{ me {" + " name" * 499 + "} }")


def test_directives() -> None:
    assert "directives" in refusal("{ me { name " + "@include(if: true) " * 26 + "} }")


def test_cycles() -> None:
    assert "spreads itself" in refusal("{ me { ...a } } fragment a on Person { friends { ...a } }")
    assert "spreads itself" in refusal("{ me { ...a } } fragment a on Person { ...b } fragment b on Person { ...a }")


def test_fragments_that_double() -> None:
    """Thirty links, each spread twice by the one before: a billion fields, measured in no time."""
    chain = "".join(f"fragment f{n} on Person {{ ...f{n + 1} ...f{n + 1} }} " for n in range(28))
    started = time.perf_counter()
    assert "fields 268435457" in refusal(f"{{ me {{ ...f0 }} }} {chain} fragment f28 on Person {{ name }}")
    assert time.perf_counter() - started < 1
    assert "fragments" in refusal(
        "{ me { name } }" + "".join(f"fragment f{n} on Person {{ name }} " for n in range(31))
    )


def test_each_operation_is_measured() -> None:
    """The one that is not executed too: which it will be is decided later."""
    assert "cost" in refusal("query a { me { name } } query b { people(first: 9999) { name } }")
    assert "operations" in refusal(" ".join(f"query q{n} {{ me {{ name }} }}" for n in range(11)))


def test_what_is_asked_about_the_schema() -> None:
    assert size("{ __schema { types { name } } }").introspects
    assert size('{ ...f } fragment f on Query { __type(name: "Pet") { name } }').introspects
    assert not size("{ me { __typename } }").introspects
    assert not size("{ me { ...unknown } }").introspects


def test_a_tighter_bound() -> None:
    with pytest.raises(TooMuch):
        size("{ me { name } }", Bounds(depth=1))


def test_deep_variables() -> None:
    value: Any = 1
    for _ in range(5000):
        value = [value]
    assert nested(value, 10)
    assert nested({"a": {"b": {"c": []}}}, 3)
    assert not nested({"a": {"b": {"c": 1}}}, 3)
    assert not nested([1, "x", None], 1)


def asking(query: str) -> dict[str, Any]:
    return {"persistedQuery": {"version": 1, "sha256Hash": hashlib.sha256(query.encode()).hexdigest()}}


def test_persisted_queries() -> None:
    store = Persisted(kept=2)
    assert store.resolve("{ a }", {}) == "{ a }"
    with pytest.raises(NotFound):
        store.resolve(None, asking("{ a }"))
    for query in ("{ a }", "{ b }"):
        assert store.resolve(query, asking(query)) == query
        store.keep(query, asking(query))
        store.keep(query, asking(query))
    assert store.resolve(None, asking("{ a }")) == "{ a }"
    store.keep("{ c }", asking("{ c }"))
    assert set(store.queries.values()) == {"{ a }", "{ c }"}, "the one not used for longest is dropped"
    store.keep("{ d }", {})
    assert store.bytes == 10


def test_persisted_queries_are_bounded_in_bytes() -> None:
    store = Persisted(kept_bytes=10)
    for query in ("{ aaaa }", "{ bbbb }"):
        store.keep(query, asking(query))
    assert list(store.queries.values()) == ["{ bbbb }"]


@pytest.mark.parametrize(
    "asked",
    [
        {"persistedQuery": {"version": 1, "sha256Hash": "0" * 64}},
        {"persistedQuery": {"version": 2, "sha256Hash": "0" * 64}},
        {"persistedQuery": {"version": 1, "sha256Hash": 5}},
        {"persistedQuery": []},
    ],
)
def test_hashes_that_lie(asked: dict[str, Any]) -> None:
    with pytest.raises(GraphQLError) as caught:
        Persisted().resolve("{ a }", asked)
    assert caught.value.extensions == {"code": "bad_request"}

"""The checks of golden prompts, and files that must not pass for good ones."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from citadel_gateway.control.golden import Expect, judge, load, schema_problems
from citadel_gateway.settings import ConfigError

SHAPE = {
    "type": "object",
    "required": ["name", "age"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 5, "pattern": "^[A-Z]"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "minItems": 1, "maxItems": 2, "items": {"enum": ["a", "b", 1]}},
        "more": {
            "anyOf": [{"type": "null"}, {"const": 7}, {"type": "object", "additionalProperties": {"type": "number"}}]
        },
    },
}


def verdict(answer: str, **expect: Any) -> str:
    return judge(msgspec.convert(expect, Expect), answer)[0]


@pytest.mark.parametrize(
    ("answer", "expect", "found"),
    [
        ("It is Paris.", {"contains": "Paris"}, "correct"),
        ("It is Paris.", {"contains": "paris"}, "incorrect"),
        ("It is Paris.", {"contains": "paris", "ignore_case": True}, "correct"),
        ("It is Paris.", {"contains": ["Paris", "France"]}, "partial"),
        ("It is Paris.", {"contains": ["Lyon", "France"]}, "incorrect"),
        ("It is Paris.", {"not_contains": "Paris"}, "incorrect"),
        ("It is Paris.", {"contains": "Paris", "not_contains": ["Lyon", "is"]}, "partial"),
        ("  42\n", {"equals": "42"}, "correct"),
        ("42.", {"equals": "42"}, "incorrect"),
        ("YES", {"equals": "yes", "ignore_case": True}, "correct"),
        ("", {"equals": ""}, "correct"),
        ("id 17b", {"regex": r"\d+b$"}, "correct"),
        ("ID 17", {"regex": ["^id", "17"], "ignore_case": True}, "correct"),
        ("ID 17", {"regex": "^id"}, "incorrect"),
        ('{"name": "Ann", "age": 3}', {"json_schema": SHAPE}, "correct"),
        ('```json\n{"name": "Ann", "age": 3.0}\n```', {"json_schema": SHAPE}, "correct"),
        ("I am not JSON", {"json_schema": SHAPE}, "incorrect"),
        ("[" * 100_000, {"json_schema": SHAPE}, "incorrect"),
        ("true", {"json_schema": {"type": ["boolean", "null"]}}, "correct"),
        ("1", {"json_schema": {"enum": [True]}}, "incorrect"),
        ("true", {"json_schema": {"type": "integer"}}, "incorrect"),
    ],
)
def test_checks(answer: str, expect: dict[str, Any], found: str) -> None:
    assert verdict(answer, **expect) == found


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"age": 3}, "$ lacks 'name'"),
        ({"name": "Ann", "age": "3"}, "$.age is no integer"),
        ({"name": "Ann", "age": 300}, "$.age is out of range"),
        ({"name": "A", "age": 3}, "$.name has 1 characters"),
        ({"name": "ann", "age": 3}, "$.name does not match the pattern"),
        ({"name": "Ann", "age": 3, "x": 1}, "$ has one name too many"),
        ({"name": "Ann", "age": 3, "tags": []}, "$.tags has 0 items"),
        ({"name": "Ann", "age": 3, "tags": ["c"]}, "$.tags[0] is none of the values of enum"),
        ({"name": "Ann", "age": 3, "tags": [True]}, "$.tags[0] is none of the values of enum"),
        ({"name": "Ann", "age": 3, "more": 8}, "$.more fits nothing of anyOf"),
        ({"name": "Ann", "age": 3, "more": {"x": "y"}}, "$.more fits nothing of anyOf"),
        ([1], "$ is no object"),
    ],
)
def test_shapes(value: object, reason: str) -> None:
    assert judge(Expect(json_schema=SHAPE), json.dumps(value)) == ("incorrect", reason)


def test_a_shape_that_fits() -> None:
    for more in (None, 7, {"x": 1.5}):
        value = {"name": "Ann", "age": 3, "tags": ["a", 1], "more": more}
        assert judge(Expect(json_schema=SHAPE), json.dumps(value)) == ("correct", "")


def test_the_reason_says_what_was_wanted_and_not_what_was_answered() -> None:
    found, reason = judge(Expect(contains=["Paris"], equals="x"), "a secret")
    assert (found, reason) == ("incorrect", "does not contain 'Paris'; is not 'x'")


def test_schemas_that_cannot_be_checked() -> None:
    assert list(schema_problems(SHAPE)) == []
    wrong: dict[str, Any] = {
        "oneOf": [],
        "minItems": "3",
        "type": ["thing"],
        "pattern": "(",
        "properties": {"a": 5},
        "items": {"format": "date"},
        "additionalProperties": {"not": {}},
        "anyOf": [{"x": 1}],
    }
    assert "\n".join(schema_problems(wrong)).count("\n") == 7


def write(folder: Path, *lines: object) -> Path:
    path = folder / "golden.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def case(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "?"}], "expect": {"contains": "x"}, **more}


def test_a_file(tmp_path: Path) -> None:
    found = load(write(tmp_path, case(name="first"), "", case(model="one", parameters={"max_tokens": 5})))
    assert [(one.name, one.model) for one in found] == [("first", ""), ("line 3", "one")]


def test_files_that_are_wrong(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "{",
        case(expects={}),
        case(expect={}),
        case(expect={"contians": "x"}),
        case(expect={"regex": "("}),
        case(expect={"json_schema": {"oneOf": []}}),
        case(messages=[]),
        case(name="twice"),
        case(name="twice"),
    )
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert [line.split(": ")[0].rpartition(":")[2] for line in caught.value.lines[:-1]] == list("1234567")
    assert "'twice' stands twice" in caught.value.lines[-1]
    for wrong in (tmp_path / "none.jsonl", write(tmp_path, "")):
        with pytest.raises(ConfigError):
            load(wrong)

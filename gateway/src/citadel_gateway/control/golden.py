"""Golden prompts: questions whose answers can be checked, one JSON object a line.

    {"name": "capital", "messages": [{"role": "user", "content": "Capital of France? One word."}],
     "expect": {"contains": "Paris", "not_contains": ["Lyon"], "ignore_case": true}}

Every check of `expect` must hold. A file is checked as a whole before anything is asked: a misspelt check that is
silently left out would be a test that always passes.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from citadel_gateway.settings import ConfigError

ANSWER = 100_000  # characters of an answer that are looked at
Verdict = Literal["correct", "incorrect", "partial"]
Texts = str | list[str]


class Expect(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an answer must be like. `equals` ignores blanks around it, `json_schema` a fence of Markdown."""

    contains: Texts = []
    not_contains: Texts = []
    equals: str | None = None
    regex: Texts = []
    json_schema: dict[str, Any] | None = None
    ignore_case: bool = False


class Case(Struct, frozen=True, forbid_unknown_fields=True):
    """One line. `parameters` go into the request as they are."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    expect: Expect
    name: Annotated[str, Meta(max_length=128)] = ""
    model: str = ""
    parameters: dict[str, Any] = {}
    use_case: Annotated[str, Meta(max_length=64)] = ""


decode = msgspec.json.Decoder(Case).decode


def load(path: str | Path) -> list[Case]:
    """The file's cases, each with a name. `ConfigError` has a line for each line that is wrong."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    cases: list[Case] = []
    wrong: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            case = decode(line)
        except msgspec.DecodeError as error:
            wrong.append(f"{path}:{number}: {error}")
            continue
        wrong += [f"{path}:{number}: {problem}" for problem in problems(case.expect)]
        cases.append(case if case.name else msgspec.structs.replace(case, name=f"line {number}"))
    names = [case.name for case in cases]
    wrong += [f"{path}: the name {name!r} stands twice" for name in sorted({n for n in names if names.count(n) > 1})]
    if not cases and not wrong:
        wrong.append(f"{path}: there is no golden prompt in it")
    if wrong:
        raise ConfigError(*wrong)
    return cases


def texts(given: Texts) -> list[str]:
    return [given] if isinstance(given, str) else given


def problems(expect: Expect) -> list[str]:
    """What the types cannot say: nothing is checked, a pattern is none, a keyword of JSON Schema is not known here."""
    found = []
    if not any((expect.contains, expect.not_contains, expect.regex)) and expect.equals is None:
        found += [] if expect.json_schema is not None else ["expect: there is no check in it"]
    for pattern in texts(expect.regex):
        try:
            re.compile(pattern)
        except re.error as error:
            found.append(f"expect.regex: {pattern!r}: {error}")
    if expect.json_schema is not None:
        found += [f"expect.json_schema: {problem}" for problem in schema_problems(expect.json_schema)]
    return found


def failures(expect: Expect, answer: str) -> tuple[int, list[str]]:
    """How many checks there are, and what is wrong for each that does not hold."""
    answer = answer[:ANSWER]
    found = list(checks(expect, answer))
    return len(found), [wrong for wrong in found if wrong]


def judge(expect: Expect, answer: str) -> tuple[Verdict, str]:
    """`partial`: some checks hold. The reason names what is missing and never repeats the answer."""
    count, wrong = failures(expect, answer)
    if not wrong:
        return "correct", ""
    return ("partial" if len(wrong) < count else "incorrect"), "; ".join(wrong)


def checks(expect: Expect, answer: str) -> Iterator[str]:
    """For each check what is wrong, empty when it holds."""
    fold: Callable[[str], str] = str.casefold if expect.ignore_case else str
    text = fold(answer)
    for part in texts(expect.contains):
        yield "" if fold(part) in text else f"does not contain {part!r}"
    for part in texts(expect.not_contains):
        yield f"contains {part!r}" if fold(part) in text else ""
    if expect.equals is not None:
        yield "" if text.strip() == fold(expect.equals).strip() else f"is not {expect.equals!r}"
    for pattern in texts(expect.regex):
        flags = re.IGNORECASE if expect.ignore_case else 0
        yield "" if re.search(pattern, answer, flags) else f"does not match {pattern!r}"
    if expect.json_schema is not None:
        yield json_failure(expect.json_schema, answer)


FENCE = re.compile(r"^\s*```(?:json)?\s*\n(.*?)\n\s*```\s*$", re.DOTALL)


def json_failure(schema: dict[str, Any], answer: str) -> str:
    fenced = FENCE.match(answer)
    try:
        value = msgspec.json.decode((fenced.group(1) if fenced else answer).encode())
    except (msgspec.DecodeError, RecursionError):
        return "is no JSON"
    return next(shape_failures(schema, value), "")


# The part of JSON Schema that says what shape an answer has; another keyword is refused when the file is read.
KINDS: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "number": (int, float),
    "integer": int,
}
KEYWORDS: dict[str, type | tuple[type, ...]] = {
    "type": (str, list),
    "enum": list,
    "const": object,
    "properties": dict,
    "required": list,
    "additionalProperties": (bool, dict),
    "items": dict,
    "minItems": int,
    "maxItems": int,
    "minLength": int,
    "maxLength": int,
    "pattern": str,
    "minimum": (int, float),
    "maximum": (int, float),
    "anyOf": list,
    "title": str,
    "description": str,
    "$schema": str,
}


def schema_problems(schema: object, where: str = "$") -> Iterator[str]:
    """Keywords that are not known or have a wrong kind of value, all through the schema."""
    if not isinstance(schema, dict):
        yield f"{where}: a schema is an object"
        return
    for keyword, value in schema.items():
        if keyword not in KEYWORDS:
            yield f"{where}: the keyword {keyword!r} is not supported"
        elif not isinstance(value, KEYWORDS[keyword]):
            yield f"{where}: {keyword}: a wrong kind of value"
    kinds = schema.get("type", [])
    for kind in [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []:
        if kind not in KINDS:
            yield f"{where}: there is no type {kind!r}"
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"{where}: pattern: {error}"
    for path, inner in parts(schema, where):
        yield from schema_problems(inner, path)


def parts(schema: dict[str, Any], where: str) -> Iterator[tuple[str, object]]:
    """The schemas inside a schema."""
    properties = schema.get("properties")
    if isinstance(properties, dict):
        for name, inner in properties.items():
            yield f"{where}.{name}", inner
    if "items" in schema:
        yield f"{where}[]", schema["items"]
    if isinstance(schema.get("additionalProperties"), dict):
        yield f"{where}.*", schema["additionalProperties"]
    if isinstance(schema.get("anyOf"), list):
        for number, inner in enumerate(schema["anyOf"]):
            yield f"{where}|{number}", inner


def shape_failures(schema: dict[str, Any], value: object, where: str = "$") -> Iterator[str]:
    """What does not fit, in words that name the place and the rule."""
    kinds = schema.get("type", [])
    allowed = [kinds] if isinstance(kinds, str) else kinds
    if allowed and not any(is_kind(value, kind) for kind in allowed):
        yield f"{where} is no {' or '.join(allowed)}"
        return
    if "enum" in schema and not any(same(value, one) for one in schema["enum"]):
        yield f"{where} is none of the values of enum"
    if "const" in schema and not same(value, schema["const"]):
        yield f"{where} is not the value of const"
    if "anyOf" in schema and all(next(shape_failures(one, value, where), "") for one in schema["anyOf"]):
        yield f"{where} fits nothing of anyOf"
    if isinstance(value, dict):
        yield from object_failures(schema, value, where)
    elif isinstance(value, list):
        yield from array_failures(schema, value, where)
    elif isinstance(value, str):
        yield from text_failures(schema, value, where)
    elif is_kind(value, "number"):
        yield from number_failures(schema, value, where)


def object_failures(schema: dict[str, Any], value: dict[str, Any], where: str) -> Iterator[str]:
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{where} lacks {name!r}"
    known = schema.get("properties", {})
    others = schema.get("additionalProperties", True)
    for name, one in value.items():
        if name in known:
            yield from shape_failures(known[name], one, f"{where}.{name}")
        elif others is False:
            yield f"{where} has one name too many"
        elif isinstance(others, dict):
            yield from shape_failures(others, one, f"{where}.*")


def array_failures(schema: dict[str, Any], value: list[Any], where: str) -> Iterator[str]:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        yield f"{where} has {len(value)} items"
    if "items" in schema:
        for number, one in enumerate(value):
            yield from shape_failures(schema["items"], one, f"{where}[{number}]")


def text_failures(schema: dict[str, Any], value: str, where: str) -> Iterator[str]:
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        yield f"{where} has {len(value)} characters"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{where} does not match the pattern"


def number_failures(schema: dict[str, Any], value: Any, where: str) -> Iterator[str]:
    if not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        yield f"{where} is out of range"


def is_kind(value: object, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, KINDS[kind])


def same(one: object, other: object) -> bool:
    """Equal as JSON: true is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other

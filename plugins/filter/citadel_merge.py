"""Our items in the lists of somebody else's YAML file, everything else in it byte for byte as it was.

A block between two marker lines is put directly below the key of its list, where nothing of the operator's has to be
understood but that one line; a list that is missing is made inside such a block. Blocks are taken out by their markers
alone. PyYAML says where the keys stand, and reads the result: what does not come out as the old content plus our items
is refused, as is all that the lines cannot be sure of.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

BEGIN, END = "# BEGIN CITADEL", "# END CITADEL"
BLOCK = re.compile(rf"^[ ]*{BEGIN} (?P<path>\S+)[^\n]*\n(?:.*\n)*?[ ]*{END} (?P=path)\r?(?:\n|\Z)", re.MULTILINE)
MARKER = re.compile(rf"^[ ]*(?:{BEGIN}|{END})\b.*$", re.MULTILINE)
# Line ends for YAML 1.1 and not for those who edit the file: positions would be a matter of opinion.
ODD_LINE_ENDS = {"\x85": "U+0085", "\u2028": "U+2028", "\u2029": "U+2029"}


class RefusalError(ValueError):
    """A file that cannot be extended safely; the message says what to change in it."""


def citadel_merge(text: str, sections: Sequence[Mapping[str, Any]] = (), name: str = "the file") -> str:
    """The text with exactly these items of ours in it; without sections, the text as it was before us.

    A section is ``path`` (key of a list, ``scrape_configs``, or below another key, ``route.routes``), ``items``, and
    where items have a name that must be theirs alone, ``identity``, its key (``job_name``). Ours come first in a list.
    Raises RefusalError, which names the file as ``name``.
    """
    original = remove(text, name)
    before = read(original, name)
    merged = original
    wanted = [section for section in sections if section["items"]]
    for section in wanted:
        path, items = str(section["path"]).split("."), list(section["items"])
        refuse_taken(before, path, items, section.get("identity"), name)
        merged = insert(merged, path, items, name)
    if wanted:
        expected = copy.deepcopy(before) or {}
        for section in wanted:
            extend(expected, str(section["path"]).split("."), list(section["items"]))
        if read(merged, name) != expected or remove(merged, name) != original:
            raise RefusalError(
                f"{name}: with our items it would no longer say what it said. Most often its last line is text of a "
                "block (| or >) without a line end: end the file with one"
            )
    return merged


def remove(text: str, name: str = "the file") -> str:
    """The text without our blocks; one at the very end, without a line end, takes the line end before it along."""
    rest = text
    while found := BLOCK.search(rest):
        head, tail = rest[: found.start()], rest[found.end() :]
        if not tail and not found[0].endswith("\n"):
            head = head.removesuffix("\n").removesuffix("\r")
        rest = head + tail
    if stray := MARKER.search(rest):
        raise RefusalError(
            f"{name} has the line {stray[0].strip()!r} without its counterpart: delete what is left of that block, and "
            "the line"
        )
    return rest


def read(text: str, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise RefusalError(f"{name} is no YAML that can be extended: {fault(error)}") from None


def fault(error: Exception) -> str:
    """What is wrong and where, without the line itself, which may hold somebody else's password."""
    mark = getattr(error, "problem_mark", None)
    if not isinstance(error, yaml.error.MarkedYAMLError) or mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def compose(text: str, name: str) -> yaml.Node | None:
    for character, word in ODD_LINE_ENDS.items():
        if character in text:
            raise RefusalError(f"{name} has the character {word}, a line end to some readers: delete it")
    if re.search(r"\r(?!\n)", text):
        raise RefusalError(f"{name} has a carriage return that ends no line: delete it")
    try:
        documents = list(yaml.compose_all(text, yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise RefusalError(f"{name} is no YAML that can be extended: {fault(error)}") from None
    if len(documents) > 1:
        raise RefusalError(f"{name} has {len(documents)} documents: keep one")
    return documents[0] if documents else None


def insert(text: str, path: Sequence[str], items: list[Any], name: str) -> str:
    """The text with one more block."""
    where = ".".join(path)
    root = compose(text, name)
    if root is None or null(root):
        if len(path) > 1:
            raise RefusalError(f"{name} has no {path[0]}: {where} has nowhere to go")
        return append(text, [f"{where}:", *lines_of(items, 2)], where, 0, name)
    mapping = block_mapping(root, name, "the file")
    opener: yaml.Node | None = None  # the key whose value `mapping` is
    for depth, word in enumerate(path):
        here = ".".join(path[: depth + 1])
        found = [(key, value) for key, value in mapping.value if key.value == word]
        if len(found) > 1:
            raise RefusalError(f"{name} has {here} {len(found)} times: keep one")
        column = mapping.start_mark.column
        if not found:
            if depth < len(path) - 1:
                raise RefusalError(f"{name} has no {here}: {where} has nowhere to go")
            made = [" " * column + f"{word}:", *lines_of(items, column + 2)]
            return (
                append(text, made, where, column, name)
                if opener is None
                else below(text, opener, made, where, column, name)
            )
        opener, value = found[0]
        if depth < len(path) - 1:
            mapping = block_mapping(value, name, here)
            continue
        if null(value):
            indent = column + 2
        elif not isinstance(value, yaml.SequenceNode):
            raise RefusalError(f"{name}: {here} is no list")
        elif value.flow_style:
            raise RefusalError(
                f"{name}: {here} is a list in brackets; write one item a line, or nothing if it is empty"
            )
        else:
            indent = value.start_mark.column
        return below(text, opener, lines_of(items, indent), where, indent, name)
    raise AssertionError("a path has at least one key")


def null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null" and node.value == ""


def block_mapping(node: yaml.Node, name: str, here: str) -> yaml.MappingNode:
    if not isinstance(node, yaml.MappingNode):
        raise RefusalError(f"{name}: {here} is no mapping of keys")
    if node.flow_style:
        raise RefusalError(f"{name}: {here} is written in braces; write one key a line")
    return node


def below(text: str, key: yaml.Node, made: list[str], where: str, column: int, name: str) -> str:
    """The block below the line of a key, which may hold nothing else than the key and a comment."""
    end = text.find("\n", key.end_mark.index)
    end = len(text) if end < 0 else end
    rest = text[key.end_mark.index : end]
    if not re.fullmatch(r"[ \t]*:[ \t]*(?:[ \t]#.*)?\r?", rest):
        raise RefusalError(
            f"{name}: the line of {key.value} goes on with {rest.strip()!r}; put what belongs to it on lines below it, "
            "and do without anchors and tags there"
        )
    return put(text, min(end + 1, len(text)), made, where, column)


def append(text: str, made: list[str], where: str, column: int, name: str) -> str:
    if re.search(r"^\.\.\.(?:[ \t\r].*)?$", text, re.MULTILINE):
        raise RefusalError(f"{name} ends its document with '...': delete that line")
    return put(text, len(text), made, where, column)


def put(text: str, at: int, made: list[str], where: str, column: int) -> str:
    """The block at this position. Where no line end is before it, the block brings that one and has none itself."""
    end = "\r\n" if "\r\n" in text else "\n"
    margin = " " * column
    lines = [f"{margin}{BEGIN} {where} (made by Ansible, changed there)", *made, f"{margin}{END} {where}"]
    block = end.join(lines)
    if text[:at].endswith("\n") or at == 0:
        return text[:at] + block + end + text[at:]
    return text[:at] + end + block + text[at:]


class Dumper(yaml.SafeDumper):
    """Without anchors, and lists a step further in than their key."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def lines_of(items: list[Any], column: int) -> list[str]:
    text = yaml.dump(
        plain(items), Dumper=Dumper, sort_keys=False, default_flow_style=False, width=1000, allow_unicode=False
    )
    return [" " * column + line if line else line for line in text.splitlines()]


def plain(value: Any) -> Any:
    """Without the types that Ansible gives to what it has read, which no dumper knows."""
    match value:
        case Mapping():
            return {plain(key): plain(item) for key, item in value.items()}
        case str():
            return str.__str__(value)
        case bool() | None:
            return value
        case int():
            return int(value)
        case float():
            return float(value)
        case Sequence():
            return [plain(item) for item in value]
    return value


def refuse_taken(document: Any, path: Sequence[str], items: list[Any], identity: str | None, name: str) -> None:
    """Somebody else's items must not be ours, nor carry the name of one of ours."""
    there = document
    for word in path:
        there = there.get(word) if isinstance(there, dict) else None
    taken = there if isinstance(there, list) else []
    for item in items:
        if item in taken:
            raise RefusalError(f"{name} has {item!r} in {'.'.join(path)} already, not put there by us: delete it there")
        if identity and any(isinstance(other, dict) and other.get(identity) == item[identity] for other in taken):
            raise RefusalError(
                f"{name} has an item of {'.'.join(path)} with {identity} {item[identity]}, which is not ours: "
                "rename or delete it"
            )


def extend(document: dict[str, Any], path: Sequence[str], items: list[Any]) -> None:
    here = document
    for word in path[:-1]:
        here = here[word]
    here[path[-1]] = items + (here.get(path[-1]) or [])


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"citadel_merge": citadel_merge}

"""What the contract tests ask of the repository: files, YAML, Jinja names, roles, inventories. Each question once."""

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, meta, nodes

ROOT = Path(__file__).resolve().parent.parent.parent
PHASES = ("preflight", "install", "configure", "run", "verify")
INVENTORIES = tuple(sorted((ROOT / "inventory").glob("*/")))  # an operator's copies too
PRODUCTION = ROOT / "inventory/production"
WIRING = ROOT / "playbooks/group_vars/all/wiring.yml"

# Task keys whose value is a Jinja expression without braces.
BARE = {"when", "that", "failed_when", "changed_when", "until", "var", "break_when"}


class Loader(yaml.SafeLoader):
    """YAML as Ansible reads it: ``!vault`` and ``!unsafe`` are plain values here."""


Loader.add_multi_constructor("!", lambda loader, _, node: loader.construct_scalar(node))


@cache
def load(path: Path) -> Any:
    """A YAML file's one document; an empty or an encrypted one is an empty mapping."""
    text = path.read_text()
    if text.startswith("$ANSIBLE_VAULT"):
        return {}
    return yaml.load(text, Loader) or {}  # noqa: S506  a SafeLoader with two more tags


@cache
def files() -> tuple[Path, ...]:
    """Every file of the repository as it is to be committed, links left out."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    paths = (ROOT / name for name in names if name)
    return tuple(sorted({path for path in paths if path.is_file() and not path.is_symlink()}))


def texts(*, but: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """(name, text) of every text file whose name does not start with one of ``but``."""
    for path in files():
        name = str(path.relative_to(ROOT))
        if name.startswith(but):
            continue
        try:
            yield name, path.read_text()
        except UnicodeDecodeError:
            continue


def found(pattern: str | re.Pattern[str], *, but: tuple[str, ...] = ()) -> list[str]:
    """``file:line: text`` of every line that matches."""
    expression = re.compile(pattern)
    return [
        f"{name}:{number}: {line.strip()[:140]}"
        for name, text in texts(but=but)
        for number, line in enumerate(text.splitlines(), 1)
        if expression.search(line)
    ]


def roles() -> list[Path]:
    return sorted(path for path in (ROOT / "roles").glob("*") if path.is_dir())


def role_names() -> list[str]:
    return [role.name for role in roles()]


def defaults(role: Path) -> dict[str, Any]:
    path = role / "defaults/main.yml"
    values: dict[str, Any] = load(path) if path.exists() else {}
    return values


def spec(role: Path) -> dict[str, Any]:
    """The options of the role's only entry point."""
    options: dict[str, Any] = load(role / "meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    return options


def tags_of(role: str) -> list[str]:
    return [role, *(f"{role}_{phase}" for phase in PHASES[1:])]


def words(template: str) -> tuple[set[str], set[str]]:
    """(variables, attributes and string constants) of a Jinja template; comments and plain text do not count."""
    # Ansible takes a backslash in a YAML string as it stands; Jinja alone would read an escape.
    tree = Environment(autoescape=True).parse(template.replace("\\", "\\\\"))
    names = {node.name for node in tree.find_all(nodes.Name)}
    others = {node.attr for node in tree.find_all(nodes.Getattr)}
    others |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return names, others


class _Anything(dict[str, Any]):
    """Filters and tests: Ansible has many that Jinja alone does not know."""

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(key) or (lambda value: value)


def undeclared(template: str) -> set[str]:
    """The variables that a template takes from outside; its own loop variables do not count."""
    environment = Environment(autoescape=True)
    environment.filters, environment.tests = _Anything(environment.filters), _Anything(environment.tests)
    return meta.find_undeclared_variables(environment.parse(template.replace("\\", "\\\\")))


def templates_in(value: Any, *, bare: bool = False) -> Iterator[str]:
    """Every Jinja template inside a YAML value; an expression of ``when`` and the like comes in braces."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from templates_in(key)
            yield from templates_in(item, bare=key in BARE)
    elif isinstance(value, list):
        for item in value:
            yield from templates_in(item, bare=bare)
    elif isinstance(value, str):
        if "{{" in value or "{%" in value:
            yield value
        elif bare:
            yield "{{ " + value + " }}"


def tasks_of(role: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(file, task) of every task and handler, those inside blocks too."""

    def flat(tasks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for task in tasks:
            yield task
            for section in ("block", "rescue", "always"):
                yield from flat(task.get(section, []))

    for path in sorted([*role.glob("tasks/**/*.yml"), *role.glob("handlers/*.yml")]):
        for task in flat(load(path) or []):
            yield path, task


def given_in(scenario: Path) -> dict[str, list[Any]]:
    """Variable -> values that a molecule scenario gives it, in ``vars`` of its plays and in its files of variables."""
    given: dict[str, list[Any]] = {}

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                if key == "vars" and isinstance(item, dict):
                    add(item)
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    def add(variables: dict[str, Any]) -> None:
        for name, item in variables.items():
            given.setdefault(name, []).append(item)

    for path in sorted(scenario.rglob("*.yml")):
        if "vars" in path.relative_to(scenario).parts:
            add(load(path))
        else:
            walk(load(path))
    return given


def site_variables(inventory: Path) -> dict[str, Path]:
    """Variable -> file of an inventory's group_vars/all."""
    return {name: path for path in sorted(inventory.glob("group_vars/all/*.yml")) for name in load(path)}


def vars_of_groups(group: dict[str, Any]) -> Iterator[str]:
    """Variables that a hosts.yml gives to groups. (Those of single hosts and of group_vars/<group> beat the wiring.)"""
    for name, value in (group or {}).items():
        if name == "vars":
            yield from value
        elif name != "hosts" and isinstance(value, dict):
            yield from vars_of_groups(value)

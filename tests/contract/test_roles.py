"""A role is whole, says what it takes, and reads nothing that is not its own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.contract.repo import (
    PHASES,
    ROOT,
    defaults,
    load,
    role_names,
    roles,
    spec,
    tags_of,
    tasks_of,
    templates_in,
    words,
)

ROLES = pytest.mark.parametrize("role", roles(), ids=role_names())
SPINE = ("base_system", "python_env", "storage", "network_checks", "vllm", "gateway")
TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "path": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "list": list,
    "dict": dict,
}


def test_the_roles_of_the_spine_are_there() -> None:
    assert set(SPINE) <= set(role_names())


@ROLES
def test_a_role_has_every_part(role: Path) -> None:
    parts = ["README.md", "defaults/main.yml", "meta/main.yml", "meta/argument_specs.yml", "tasks/main.yml"]
    parts += [f"tasks/{phase}.yml" for phase in PHASES]
    assert [part for part in parts if not (role / part).is_file()] == []


@ROLES
def test_a_role_depends_on_no_other(role: Path) -> None:
    assert load(role / "meta/main.yml").get("dependencies", []) == []


@ROLES
def test_the_main_file_is_the_five_phases_with_their_tags(role: Path) -> None:
    wanted = []
    for phase in PHASES:
        tags = tags_of(role.name) if phase == "preflight" else [role.name, f"{role.name}_{phase}"]
        wanted.append((phase.capitalize(), f"{phase}.yml", tags))
    found = []
    for task in load(role / "tasks/main.yml"):
        imported = task.get("ansible.builtin.import_tasks") or task["ansible.builtin.include_tasks"]
        found.append((task["name"], imported if isinstance(imported, str) else imported["file"], task["tags"]))
    # What takes away instead of installing is the only other step that a role may have.
    assert [step for step in found if step[:2] != ("Remove", "remove.yml")] == wanted


@ROLES
def test_specs_equal_defaults(role: Path) -> None:
    options = spec(role)
    optional = {name: option.get("default") for name, option in options.items() if not option.get("required")}
    assert set(optional) == set(defaults(role)), (
        "meta/argument_specs.yml and defaults/main.yml name different variables"
    )
    differing = {name: (optional[name], value) for name, value in defaults(role).items() if optional[name] != value}
    assert differing == {}, "(spec, defaults) differ"


@ROLES
def test_every_option_is_described_and_typed(role: Path) -> None:
    def faults(options: dict[str, Any], prefix: str) -> list[str]:
        result = []
        for name, option in options.items():
            here = f"{prefix}{name}"
            if not option.get("description"):
                result.append(f"{here} has no description")
            if option.get("type") not in {*TYPES, "raw"}:
                result.append(f"{here} has no type, or an odd one: {option.get('type')}")
            if option.get("type") == "list" and "elements" not in option:
                result.append(f"{here} does not say what it is a list of")
            value = option.get("default")
            templated = isinstance(value, str) and "{{" in value
            if value is not None and not templated and option.get("type") in TYPES:
                wanted = TYPES[option["type"]]
                if not isinstance(value, wanted) or (isinstance(value, bool) and option["type"] != "bool"):
                    result.append(f"{here} is a {option['type']} with the default {value!r}")
            result += faults(option.get("options", {}), f"{here}.")
        return result

    assert faults(spec(role), "") == []


@ROLES
def test_defaults_are_commented(role: Path) -> None:
    paragraphs = (role / "defaults/main.yml").read_text().removeprefix("---\n").split("\n\n")
    assert [paragraph for paragraph in paragraphs if paragraph.strip() and "#" not in paragraph] == []


@ROLES
def test_variables_carry_the_name_of_the_role(role: Path) -> None:
    public = [name for name in defaults(role) if not name.startswith(f"{role.name}_")]
    internal = [
        name for path in role.glob("vars/*.yml") for name in load(path) if not name.startswith(f"__{role.name}_")
    ]
    made = []
    for path, task in tasks_of(role):
        names = [task.get("register"), (task.get("loop_control") or {}).get("loop_var"), *(task.get("vars") or {})]
        names += [name for name in task.get("ansible.builtin.set_fact") or {} if name != "cacheable"]
        odd = [name for name in names if name and not name.startswith((f"__{role.name}_", "ansible_"))]
        made += [f"{path.relative_to(ROOT)}: {name}" for name in odd]
    assert (public, internal, made) == ([], [], [])


def owner_of(name: str) -> str | None:
    """The role whose prefix a variable carries (the longest, should one role's name begin another's), or the site."""
    bare = name.removeprefix("__")
    prefixes = sorted([*role_names(), "platform", "llm"], key=len, reverse=True)
    return next((prefix for prefix in prefixes if bare.startswith(f"{prefix}_")), None)


@ROLES
def test_a_role_reads_only_its_own_variables(role: Path) -> None:
    others = {name for other in roles() if other != role for name in defaults(other)}
    sources: list[tuple[Path, str]] = []
    for path in sorted(role.glob("**/*.yml")):
        if "meta" not in path.parts:
            sources += [(path, template) for template in templates_in(load(path))]
    sources += [(path, path.read_text()) for path in sorted(role.glob("templates/**/*")) if path.is_file()]
    faults = []
    for path, template in sources:
        variables, constants = words(template)
        foreign = {name for name in variables if owner_of(name) not in {None, role.name}}
        foreign |= constants & others  # hostvars[x].other_role_y, lookup('vars', 'other_role_y')
        faults += [f"{path.relative_to(ROOT)} reads {name}" for name in sorted(foreign)]
    assert faults == []


def test_readmes_are_what_the_specs_say() -> None:
    command = [sys.executable, str(ROOT / "tools/role_readme.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr

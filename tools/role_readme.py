#!/usr/bin/env python3
"""Write the generated part of every roles/<role>/README.md from the role's meta/argument_specs.yml.

Only what stands between the two markers is replaced; a role's hand-written words stay around it. ``--check`` writes
nothing and fails if a file is not up to date.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- generated from meta/argument_specs.yml by make docs: begin -->"
END = "<!-- generated: end -->"


def text(value: Any) -> str:
    """A description (a string or a list of paragraphs) as one line."""
    paragraphs = value if isinstance(value, list) else [value or ""]
    return " ".join(" ".join(str(paragraph).split()) for paragraph in paragraphs)


def cell(value: str) -> str:
    return value.replace("|", "\\|")


def code(value: Any) -> str:
    return f"`{value}`" if value != "" else '`""`'


def default_of(option: dict[str, Any]) -> str:
    if "default" not in option:
        return "required" if option.get("required") else ""
    value = option["default"]
    shown = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    if len(shown) > 80:
        return "see defaults/main.yml"
    return f"`{shown}`" if shown else '`""`'


def rows(options: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, option in options.items():
        kind = option["type"]
        if "elements" in option:
            kind = f"{kind} of {option['elements']}"
        words = text(option.get("description"))
        if "choices" in option:
            words += " One of " + ", ".join(code(choice) for choice in option["choices"]) + "."
        yield f"| `{prefix}{name}` | {kind} | {cell(default_of(option))} | {cell(words)} |"
        if "options" in option:
            yield from rows(option["options"], f"{prefix}{name}{'[]' if option['type'] == 'list' else ''}.")


def generated(role: Path) -> str:
    """The part between the markers: what the role does, its variables, its tags."""
    spec = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]
    paragraphs = spec.get("description", [])
    paragraphs = paragraphs if isinstance(paragraphs, list) else [paragraphs]
    lines = [text(spec["short_description"]), ""]
    for paragraph in paragraphs:
        lines += [text(paragraph), ""]
    lines += ["## Variables", "", "| variable | type | default | what |", "|---|---|---|---|"]
    lines += rows(spec["options"])
    tags = ", ".join(f"`{role.name}_{phase}`" for phase in ("install", "configure", "run", "verify"))
    lines += ["", "## Tags", "", f"`{role.name}` for all of it, {tags}; the preflight runs with each of them."]
    return "\n".join([BEGIN, "", *lines, "", END])


def readme(role: Path) -> str:
    """The whole file: the present one with its generated part renewed, or a new one."""
    path = role / "README.md"
    present = path.read_text() if path.exists() else f"# {role.name}\n\n{BEGIN}\n{END}\n"
    if BEGIN not in present:
        present = f"{present.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, rest = present.split(BEGIN, 1)
    return before + generated(role) + rest.split(END, 1)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a file would change")
    check = parser.parse_args().check
    stale = 0
    for spec in sorted(ROOT.glob("roles/*/meta/argument_specs.yml")):
        role = spec.parent.parent
        path = role / "README.md"
        wanted = readme(role)
        if path.exists() and path.read_text() == wanted:
            continue
        stale += 1
        if check:
            print(f"{path.relative_to(ROOT)} is not what meta/argument_specs.yml says: run `make docs`")
        else:
            path.write_text(wanted)
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

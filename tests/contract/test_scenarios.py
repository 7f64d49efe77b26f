"""Role, playbook, molecule scenario and tag share one word, and each scenario has tests that exist."""

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.contract.repo import PHASES, ROOT, defaults, given_in, load, role_names, roles, tags_of

SCENARIOS = sorted(path.parent for path in (ROOT / "molecule").glob("*/molecule.yml"))
ALTERNATIVES = {
    f"{role}_alternative" for role in ("storage", "network_checks", "redis", "vllm", "gateway", "monitoring")
}


def checks_of(scenario: Path) -> list[Path]:
    """The test files that molecule gives to pytest: those of the scenario, or of the folder that it names instead."""
    verifier = load(scenario / "molecule.yml").get("verifier", {})
    folder = verifier.get("directory", "tests").replace("${MOLECULE_PROJECT_DIRECTORY}", str(ROOT))
    return sorted((scenario / folder).glob("test_*.py"))


def test_every_role_has_a_scenario() -> None:
    names = {path.name for path in SCENARIOS}
    assert {*role_names(), *ALTERNATIVES, "full"} - names == set()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda path: path.name)
def test_a_scenario_plays_and_verifies(scenario: Path) -> None:
    assert (scenario / "converge.yml").is_file()
    tests = checks_of(scenario)
    assert tests, "molecule reports success for a scenario without tests"
    assert [test.name for test in tests if not test.resolve().is_file()] == [], "a link to nothing"
    assert [test.name for test in tests if not re.search(r"^def test_", test.read_text(), re.MULTILINE)] == []
    absolute = [test.name for test in tests if test.is_symlink() and test.readlink().is_absolute()]
    assert absolute == [], "an absolute link works on this machine only"


@pytest.mark.parametrize("role", role_names())
def test_the_checks_of_a_role_are_those_of_its_scenario_and_of_validate(role: str) -> None:
    shared = ROOT / f"tests/infra/test_{role}.py"
    assert shared.is_file()
    assert shared in {test.resolve() for test in checks_of(ROOT / "molecule" / role)}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda path: path.name)
def test_a_scenario_gives_only_variables_that_there_are(scenario: Path) -> None:
    """Ansible takes a misspelt name without a word, and the scenario would try the default."""
    taken = {name for role in roles() for name in defaults(role)}
    mine = tuple(f"{role}_" for role in role_names())
    assert [name for name in given_in(scenario) if name.startswith(mine) and name not in taken] == []
    if scenario.name != "full":
        site = [name for name in given_in(scenario) if name.startswith(("platform_", "llm_"))]
        assert site == [], "a role's own scenario knows no site"


# What an alternative scenario cannot change, and why.
UNCHANGED = {
    "vllm_device": "the lab has no GPU",
    "vllm_hf_token": "the scenario that downloads is another one",
}


@pytest.mark.parametrize("scenario", sorted(ALTERNATIVES))
def test_an_alternative_scenario_changes_every_variable(scenario: str) -> None:
    given = given_in(ROOT / "molecule" / scenario)
    inputs = defaults(ROOT / "roles" / scenario.removesuffix("_alternative"))
    same = {name for name, value in inputs.items() if name not in given or value in given[name]}
    # What takes away is tried by tests of its own.
    assert {name for name in same - set(UNCHANGED) if not re.search(r"_(state|prune|remove_\w+)$", name)} == set()


@pytest.mark.parametrize("role", role_names())
def test_a_role_has_a_playbook_of_its_name(role: str) -> None:
    plays = load(ROOT / f"playbooks/{role}.yml")
    applied = {name if isinstance(name, str) else name["role"] for play in plays for name in play.get("roles", [])}
    assert role in applied


def test_site_plays_every_role() -> None:
    imported = [play["ansible.builtin.import_playbook"] for play in load(ROOT / "playbooks/site.yml")]
    assert [role for role in role_names() if f"{role}.yml" not in imported] == []
    assert [play["ansible.builtin.import_playbook"] for play in load(ROOT / "site.yml")] == ["playbooks/site.yml"]


@cache
def listed_tags() -> set[str]:
    command = ["ansible-playbook", "--list-tags", "playbooks/site.yml"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {tag for found in re.findall(r"TAGS: \[(.*?)\]", run.stdout) for tag in found.split(", ")}


@pytest.mark.parametrize("role", role_names())
def test_every_tag_is_reached_and_documented(role: str) -> None:
    assert set(tags_of(role)) - listed_tags() == set()
    documented = (ROOT / "docs/tags.md").read_text()
    assert [tag for tag in tags_of(role) if f"`{tag}`" not in documented] == []


def test_no_tag_goes_undocumented() -> None:
    documented = (ROOT / "docs/tags.md").read_text()
    assert [tag for tag in sorted(listed_tags() - {"", "always", "never"}) if f"`{tag}`" not in documented] == []


def test_the_phases_of_a_tag_are_the_files_of_a_role() -> None:
    tagged = {tag.removeprefix(f"{role}_") for role in role_names() for tag in tags_of(role)[1:]}
    assert tagged == set(PHASES[1:])


def test_molecule_gives_each_scenario_a_host() -> None:
    def hosts(group: Any) -> set[str]:
        return set((group or {}).get("hosts") or {}).union(*(hosts(sub) for sub in children(group).values()))

    def children(group: Any) -> dict[str, Any]:
        return (group or {}).get("children") or {}

    everything = load(ROOT / "molecule/inventory/hosts.yml")
    groups = {name: group for top in everything.values() for name, group in children(top).items()} | everything
    without = [path.name for path in SCENARIOS if path.name != "full" and not hosts(groups.get(path.name))]
    assert without == []

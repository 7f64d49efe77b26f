"""Site variables: once in each inventory, and a role's only by way of the wiring."""

from pathlib import Path

import pytest

from tests.contract.repo import (
    INVENTORIES,
    PRODUCTION,
    ROOT,
    WIRING,
    defaults,
    found,
    load,
    roles,
    site_variables,
    templates_in,
    undeclared,
    vars_of_groups,
    words,
)

MAGIC = {
    "ansible_facts",
    "ansible_host",
    "ansible_play_hosts_all",
    "group_names",
    "groups",
    "hostvars",
    "inventory_dir",
    "inventory_hostname",
    "lookup",
    "omit",
    "playbook_dir",
    "q",
    "query",
}

EVERY = pytest.mark.parametrize("inventory", INVENTORIES, ids=lambda path: path.name)

# Where a port or an address of ours may stand as a number: the inventories, and what plays with them. Pages may too.
PLAYING = ("inventory/", "tests/", "molecule/", "lab/", "bench/", "gateway/tests/", "files/", "requirements.txt")


@EVERY
def test_an_inventory_has_the_variables_of_production_in_the_same_files(inventory: Path) -> None:
    wanted, there = site_variables(PRODUCTION), site_variables(inventory)
    assert (set(wanted) - set(there), set(there) - set(wanted)) == (set(), set()), "(missing, unknown)"
    assert {name for name in wanted if wanted[name].name != there[name].name} == set(), "in differently named files"


@EVERY
@pytest.mark.parametrize("name", ["platform_ports", "platform_services"])
def test_an_inventory_names_the_ports_and_services_of_production(inventory: Path, name: str) -> None:
    wanted, there = (set(load(site_variables(tree)[name])[name]) for tree in (PRODUCTION, inventory))
    assert wanted == there


@EVERY
def test_site_variables_say_so_in_their_names(inventory: Path) -> None:
    odd = [name for name in site_variables(inventory) if not name.startswith(("platform_", "llm_", "ansible_"))]
    assert odd == []


@EVERY
def test_no_wired_name_is_set_where_the_wiring_beats_it(inventory: Path) -> None:
    given = {*site_variables(inventory), *vars_of_groups(load(inventory / "hosts.yml"))}
    assert given & set(load(WIRING)) == set(), "playbooks/group_vars/all/wiring.yml would beat it silently"


def test_the_wiring_sets_only_what_a_role_takes() -> None:
    taken = {name for role in roles() for name in defaults(role)}
    assert [name for name in load(WIRING) if not name.startswith("__") and name not in taken] == []


def test_the_wiring_reads_only_site_variables_of_both_inventories() -> None:
    known = MAGIC | {"_"} | set(load(WIRING))  # {% set _ = … %} throws a result away
    known |= set.intersection(*(set(site_variables(inventory)) for inventory in INVENTORIES))
    faults = []
    for name, value in load(WIRING).items():
        for template in templates_in(value):
            faults += [f"{name} reads {other}" for other in sorted(undeclared(template) - known)]
    assert faults == []


def test_every_site_variable_is_read_somewhere() -> None:
    paths = [*(ROOT / "playbooks").rglob("*.yml"), *(path for tree in INVENTORIES for path in tree.rglob("*.yml"))]
    read = {name for path in paths for template in templates_in(load(path)) for name in words(template)[0]}
    assert set(site_variables(PRODUCTION)) - read == set()


def test_ports_and_addresses_stand_in_the_inventories_only() -> None:
    lines = found(r"\b1140[0-9]\b|\b192\.168\.10\.\d|\b10\.77\.0\.\d", but=PLAYING)
    assert [line for line in lines if not line.split(":", 1)[0].endswith(".md")] == []


def test_the_ops_playbooks_see_the_same_wiring() -> None:
    link = ROOT / "playbooks/ops/group_vars"
    if link.parent.exists():
        assert link.is_symlink()
        assert link.resolve() == (ROOT / "playbooks/group_vars")

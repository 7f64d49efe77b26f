"""Address, names and firewall as they were written, and every neighbour answering in its own protocol."""

import ipaddress
import json
import re
from pathlib import Path

import pytest
from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[2]
CHECKS = "/etc/citadel-network/checks.json"
RULES = "/etc/citadel-network/firewall.nft"


def test_every_neighbour_answers_and_our_ports_are_ours(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    if not host.file(CHECKS).exists:
        pytest.skip("no network checks on this host")
    monkeypatch.setenv("ANSIBLE_CONFIG", str(ROOT / "ansible.cfg"))
    checks = json.loads(host.file(CHECKS).content_string)
    result = host.ansible("citadel_network_probe", json.dumps(checks))
    bad = [f"{row['name']} ({row['target']}): {row['detail']}" for row in result["rows"] if not row["passed"]]
    assert bad == [], "; ".join(bad)


def test_hosts_entries_resolve(host: Host) -> None:
    block = re.search(
        r"^# BEGIN citadel-llm\n(.*?)^# END", host.file("/etc/hosts").content_string, re.MULTILINE | re.DOTALL
    )
    if not block:
        pytest.skip("no hosts entries of ours")
    for line in block.group(1).splitlines():
        address, *names = line.split()
        for name in names:
            # Debian gives the host's own name a second address on loopback.
            assert address in host.check_output("getent ahosts %s", name).split(), f"{name} is not {address}"


def test_the_static_address_is_on_its_interface(host: Host) -> None:
    files = host.check_output(
        "ls /etc/systemd/network/20-citadel-*.network /etc/netplan/60-citadel.yaml 2>/dev/null; true"
    )
    if not files:
        pytest.skip("no static address of ours")
    for path in files.split():
        text = host.file(path).content_string
        interfaces = re.findall(r"^Name=(\S+)$|^    (\S+):$", text, re.MULTILINE)
        interface = "".join(interfaces[0])
        found = json.loads(host.check_output("ip -json address show dev %s", interface))[0]["addr_info"]
        has = {f"{one['local']}/{one['prefixlen']}" for one in found}
        wanted = set(re.findall(r"[0-9a-fA-F.:]+/\d+", text))
        assert wanted <= has, f"{interface} has {sorted(has)}"


@pytest.fixture
def rules(host: Host) -> str:
    if not host.file(RULES).exists:
        pytest.skip("the firewall is off on this host")
    return str(host.check_output("nft --numeric list table inet citadel_host"))


def test_the_firewall_refuses_by_default(host: Host, rules: str) -> None:
    assert re.search(r"hook input priority (filter|0); policy drop;", rules)
    assert host.check_output("systemctl is-enabled citadel-firewall.service") == "enabled"
    assert host.check_output("systemctl is-active citadel-firewall.service") == "active"


def test_the_loaded_rules_are_those_of_the_file(host: Host, rules: str) -> None:
    def allowed(text: str) -> set[tuple[str, ...]]:
        found = re.findall(r"(?:(ip6?) saddr (\S+) )?(tcp|udp) dport (\d+) accept comment", text)
        # nft drops the prefix of a single address and the host part of a network's.
        return {
            (family, str(ipaddress.ip_network(net, strict=False)) if net else "", *rest) for family, net, *rest in found
        }

    assert allowed(rules) == allowed(host.file(RULES).content_string)
    assert any(name == "ssh" for name in re.findall(r'comment "([^"]+)"', rules)), "nobody could log in"


def test_the_roll_back_is_not_armed(host: Host, rules: str) -> None:
    assert not host.run("systemctl is-active --quiet citadel-firewall-rollback.timer").succeeded

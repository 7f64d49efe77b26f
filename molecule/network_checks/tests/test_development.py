"""The development profile: names as given, and no firewall."""

from testinfra.host import Host


def test_the_name_servers_are_written(host: Host) -> None:
    lines = host.file("/etc/resolv.conf").content_string.splitlines()
    assert lines[-2:] == ["nameserver 192.0.2.53", "search example.org"]


def test_no_firewall_is_there(host: Host) -> None:
    assert not host.file("/etc/citadel-network/firewall.nft").exists
    assert not host.file("/etc/systemd/system/citadel-firewall.service").exists

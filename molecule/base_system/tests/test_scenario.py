"""What this scenario asked for beside the shared checks."""

from testinfra.host import Host


def test_name_and_time_zone(host: Host) -> None:
    assert host.check_output("hostnamectl hostname") == "mol-base-system"
    assert host.check_output("timedatectl show --property=Timezone --value") == "Europe/Berlin"


def test_users_come_and_go(host: Host) -> None:
    assert host.user("auditor").shell == "/bin/sh"
    assert "citadel-audit" in host.user("auditor").groups
    assert host.user("agent0").home == "/opt/citadel"
    assert not host.user("games").exists


def test_packages_of_the_site(host: Host) -> None:
    assert host.package("tree").is_installed
    assert not host.package("telnet").is_installed


def test_production_refuses_passwords(host: Host) -> None:
    """sshd offers no way in but a key."""
    options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o PreferredAuthentications=none"
    answer = host.run(f"ssh -T {options} root@127.0.0.1 true || true").stderr
    assert "Permission denied (publickey)" in answer


def test_excluded_packages_are_not_updated(host: Host) -> None:
    assert 'Unattended-Upgrade::Package-Blacklist:: "postgresql.*";' in host.check_output("apt-config dump")


def test_a_blocked_module_cannot_be_loaded(host: Host) -> None:
    assert "install /bin/false" in host.run("/sbin/modprobe --show-depends dccp").stdout or not host.exists("modprobe")


def test_system_is_not_degraded_after_its_boot_units_ran_again(host: Host) -> None:
    """Settings that a container cannot have do not fail the units that apply them."""
    host.check_output("systemd-tmpfiles --create /etc/tmpfiles.d/90-citadel-tunables.conf")
    assert host.check_output("systemctl is-system-running") == "running"

"""A lab host is a server as its owner would hand it over: booted, with nothing of ours, no way out but packages."""

from testinfra.host import Host


def test_systemd_is_up(host: Host) -> None:
    assert host.run("systemctl is-system-running").stdout.strip() == "running"


def test_nothing_of_ours_is_installed(host: Host) -> None:
    assert not host.file("/opt/citadel").exists
    assert not host.user("agent0").exists


def test_wheelhouse_is_read_only(host: Host) -> None:
    assert host.run("touch /srv/wheelhouse/x").rc != 0


def test_proxy_refuses_what_is_no_registry(host: Host) -> None:
    code = "import urllib.request as u; o=u.build_opener(u.ProxyHandler({'http': 'http://10.77.0.1:3142'})); o.open('http://example.invalid/')"
    done = host.run("python3 -c %s", code)
    assert "403" in done.stderr
